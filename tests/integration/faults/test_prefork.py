"""Servers that fork: each message counts once, and nothing is left to take over."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery

from support.world import Redis, keys_in, wait_until

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RECORDS = ("stored", "cached", "another")
MESSAGES = 60


class Program:
    """The files and variables of a program, and what it has written."""

    def __init__(self, folder: Path, server: Redis, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self.sink = folder / "sink"
        self.done = folder / "done"
        self.sink.touch()
        self.done.touch()
        self.environment = {
            "PREFORK_URL": server.url,
            "PREFORK_NAMESPACE": namespace,
            "PREFORK_SINK": str(self.sink),
            "PREFORK_DONE": str(self.done),
            "PREFORK_BROKER": f"redis+socket://{server.socket}?virtual_host=2",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        }

    def totals(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for line in self.sink.read_text().splitlines():
            record, n, _ = json.loads(line)
            totals[record] += n
        return dict(totals)

    @contextmanager
    def run(self, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a server, which is told to end in good order."""
        log = self.sink.with_name("log")
        with log.open("wb") as output:
            started = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                cwd=HERE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield started
                started.terminate()
                started.wait(30)
                # A master may end before its workers, which still end their sessions.
                wait_until(lambda: not is_running(started.pid), timeout=30)
            except BaseException:
                print(log.read_text()[-4000:])  # noqa: T201 - pytest shows it
                raise
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.pid, signal.SIGKILL)
                started.wait()

    def check(self, expected: dict[str, int]) -> None:
        """All is written, once, as soon as the program has ended: nobody has to die for it."""
        assert self.totals() == expected
        assert keys_in(self.server, self.namespace) == set()
        with self.server.client() as client:
            assert client.zcard(f"{{{self.namespace}}}:processes") == 0


@pytest.fixture
def program(
    tmp_path: Path, server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Program:
    made = Program(tmp_path, server, namespace)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def is_running(group: int) -> bool:
    """Return whether any process of a group is alive."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat="],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=True,
    )
    processes = (line.split() for line in listed.stdout.splitlines())
    return any(pgid == str(group) and not stat.startswith("Z") for pgid, stat in processes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def request(port: int, record: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", f"/{record}")
        return int(connection.getresponse().read())
    finally:
        connection.close()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def serve(
    program: Program, port: int, *command: str, is_idle: Callable[[], bool] = lambda: True
) -> None:
    """Have a web server handle messages in several workers, and stop it when it is idle."""
    handled: Counter[str] = Counter()
    workers: set[int] = set()

    def handle(record: str) -> None:
        workers.add(request(port, record))
        handled[record] += 1

    with program.run(*command):
        wait_until(lambda: answers(port))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(handle, RECORDS * (MESSAGES // len(RECORDS))))
        wait_until(is_idle)
    assert len(workers) > 1
    program.check(dict(handled))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--lazy-apps",), ("--py-call-osafterfork",)], ids=str)
def test_uwsgi(program: Program, options: tuple[str, ...]) -> None:
    port = free_port()
    stats = program.sink.with_name("stats")
    command = [str(BIN / "uwsgi"), "--master", "--need-app", "--die-on-term", "--enable-threads"]
    command += ["--http-socket", f"127.0.0.1:{port}", "--processes", "2", "--listen", "20"]
    command += ["--module", "prefork_app", "--virtualenv", sys.prefix, "--stats", str(stats)]
    # uWSGI runs no exit hooks in a busy worker, and it may be busy after it has answered.
    serve(program, port, *command, *options, is_idle=lambda: is_idle(stats))


def is_idle(stats: Path) -> bool:
    """Return whether no worker of uWSGI handles a request, as its statistics say."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(stats))
        with connection.makefile("rb") as answer:
            workers = json.load(answer)["workers"]
    return all(worker["status"] != "busy" for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--preload",)], ids=str)
def test_gunicorn(program: Program, options: tuple[str, ...]) -> None:
    port = free_port()
    command = [str(BIN / "gunicorn"), "--workers", "2", "--bind", f"127.0.0.1:{port}", *options]
    serve(program, port, *command, "prefork_app")


@pytest.mark.slow
def test_celery(program: Program) -> None:
    """A worker that is told to stop finishes its tasks, and ends by `os._exit`."""
    records = [RECORDS[i % len(RECORDS)] for i in range(MESSAGES)]
    with Celery(broker=program.environment["PREFORK_BROKER"]) as app:
        for record in records:
            app.send_task("count", [record])
    command = [sys.executable, "-m", "celery", "-A", "prefork_tasks", "worker", "-P", "prefork"]
    with program.run(*command, "-c", "2", "--without-gossip", "--without-mingle"):
        wait_until(lambda: len(program.done.read_text().splitlines()) == MESSAGES, 40)
        workers = set(program.done.read_text().splitlines())
    assert len(workers) == 2
    program.check(dict(Counter(records)))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("used", [False, True], ids=["", "used before"])
def test_multiprocessing(
    program: Program, method: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children, and those of an executor, end their sessions although no `atexit` is run."""
    if used:
        monkeypatch.setenv("PREFORK_USE", "1")
    code = f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import prefork_app

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    children = [
        context.Process(target=prefork_app.count_many, args=({RECORDS!r},)) for _ in range(2)
    ]
    for child in children:
        child.start()
    prefork_app.count("cached")
    for child in children:
        child.join()
        assert child.exitcode == 0
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        list(pool.map(prefork_app.count, {RECORDS!r} * 2))
"""
    script = program.sink.with_name("script.py")
    script.write_text(code)
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    totals = program.totals()
    before = totals.pop("before", 0)
    # Where the module is imported anew, each process makes its own.
    assert (before > 0) is used
    assert totals == {"stored": 4, "cached": 5, "another": 4}
    assert keys_in(program.server, program.namespace) == set()
