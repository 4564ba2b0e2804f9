"""A process's life: connecting, beating, stopping, forking, ending."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import redis

from conftest import Make, Redis, wait_until
from phonon import ConflictFreeUpdate, LruCache, PhononError, Process
from phonon.errors import ConfigurationError, ForkedError, LockLostError, ProcessStoppedError
from phonon.process import _alive


class Count(ConflictFreeUpdate):
    executed: ClassVar[list[Any]] = []

    def execute(self) -> None:
        self.executed.append(dict(self.doc))


def test_stop_ends_everything_and_leaves_nothing(make: Make, server: Redis, namespace: str) -> None:
    process = make()
    cache: LruCache[Count] = LruCache()
    cache.set(1, Count(process, 1, doc={"n": 1}, init_cache=False))
    loose = Count(process, 2, doc={"n": 2}, init_cache=False)
    Count(process, 3, doc={"n": 3})
    process.create_reference("x")
    process.lock("y").acquire()
    process.stop()
    process.stop()
    assert sorted(doc["n"] for doc in Count.executed) == [1, 2, 3]
    Count.executed.clear()
    with server.client() as client:
        left = [key.decode() for key in client.scan_iter(match=f"{namespace}:*", count=1000)]
        assert all(key.endswith(":memory") for key in left), left
        assert all(0 < client.pttl(key) <= 70_000 for key in left)
    for use in (lambda: process.create_reference("x"), loose.cache, process.get_registry):
        with pytest.raises(ProcessStoppedError):
            use()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_heart_beats_and_is_started_again(
    make: Make, server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    process = make(heartbeat_interval=0.05)
    client = server.client()

    def deadline() -> float:
        return float(client.zscore(process.heartbeat_hash_name, process.id) or 0)

    first = deadline()
    wait_until(lambda: deadline() > first)

    def die() -> None:
        raise SystemExit

    process.engine.beat = die  # type: ignore[method-assign]
    wait_until(lambda: "has died" in caplog.text)
    del process.engine.beat
    process.create_reference("x")
    second = deadline()
    wait_until(lambda: deadline() > second)
    client.close()


def test_a_beat_that_fails_is_logged_and_the_next_one_comes(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    process = make(heartbeat_interval=0.02)
    beat = process.engine.beat
    failures = [ZeroDivisionError("a bug"), None]

    def fail_once() -> None:
        if failure := failures.pop(0) if len(failures) > 1 else None:
            raise failure
        beat()
        failures.clear()

    process.engine.beat = fail_once  # type: ignore[method-assign]
    wait_until(lambda: not failures)
    assert "a bug" in caplog.text
    process.engine.beat = beat  # type: ignore[method-assign]


def test_a_membership_lasts_while_its_process_beats(make: Make) -> None:
    living, silent = (make(session_length=0.4, heartbeat_interval=0.05) for _ in range(2))
    silent.engine.beat = lambda: None  # type: ignore[method-assign]
    here, there = living.create_reference("x"), silent.create_reference("x")
    assert here.count() == 2
    wait_until(lambda: here.count() == 1)
    assert here.dereference(), "the other one's lease has run out"
    assert not there.dereference()


def test_the_server_is_found_by_url_argument_and_environment(
    server: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHONON_URL", server.url)
    with Process(namespace=namespace) as found, Process(namespace=namespace) as again:
        assert found.client is again.client
    with redis.Redis(unix_socket_path=server.socket, db=2) as client:
        with Process(client=client, namespace=namespace) as process:
            assert process.client is client
            process.create_reference("x").dereference()
        assert client.ping(), "it is the caller's"


@pytest.mark.parametrize(
    "options",
    [
        {"session_length": 0},
        {"heartbeat_interval": -1},
        {"heartbeat_interval": 60},
        {"retry_timeout": 31},
        {"url": "redis://localhost", "hosts": ["a:1"]},
        {"url": "localhost:6379"},
        {"url": "http://localhost"},
        {"hosts": "localhost"},
        {"client": "localhost"},
    ],
)
def test_arguments_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Process(**options)


def test_registries_can_be_read_and_written(make: Make) -> None:
    one, other = make(), make()
    name = "{}%ключ\n"
    one.create_reference(name)
    assert one.get_registry() == [name] == other.get_registry(one.registry_key)
    assert other.add_to_registry("x", one.registry_key) == 1
    assert other.remove_from_registry("x", one.registry_key) == 1
    assert one.remove_from_registry("x") == 0


def in_fork(task: Callable[[], None]) -> int:
    """Run a task in a forked child; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            task()
        except BaseException:  # noqa: BLE001 - the child must not go on with the parent's tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_somebody_else(make: Make) -> None:
    process = make()
    parent = process.id
    reference = process.create_reference("x")
    cache: LruCache[Count] = LruCache()
    update = Count(process, 1, doc={"n": 1}, init_cache=False)
    cache.set(1, update)
    lock = process.lock("y")
    lock.acquire()

    def child() -> None:
        assert process.id != parent
        assert process.get_registry() == []
        assert cache.size() == 0
        for use in (update.cache, update.end_session):
            with pytest.raises(ForkedError):
                use()
        with pytest.raises(LockLostError):
            lock.release()
        with pytest.raises(Process.AlreadyLocked):
            process.lock("y", block=False).__enter__()
        assert reference.count() == 1
        assert not reference.dereference(), "it never was a member"
        assert process.create_reference("x").count() == 2
        process.stop()

    assert in_fork(child) == 0
    assert process.id == parent
    assert reference.count() == 1
    lock.release()
    cache.expire_all()
    assert Count.executed == [{"n": 1}]
    Count.executed.clear()


def _in_worker(process_id: str, found: Any) -> None:
    process = next(p for p in list(_alive) if p.id != process_id)
    with process.lock("x"):
        found.put(process.id)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_multiprocessing_with_fork(make: Make) -> None:
    process = make()
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    worker = context.Process(target=_in_worker, args=(process.id, found))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0
    assert found.get(timeout=10) != process.id


PROGRAM = """
import sys, threading, time
from phonon import ConflictFreeUpdate, Process

class Count(ConflictFreeUpdate):
    def execute(self):
        print("executed", self.doc, flush=True)

process = Process()
update = Count(process, 1, doc={"n": 1})
def work():
    process.create_reference("thread").dereference()
    sys.stdin.read()
    print("thread", process.create_reference("thread").dereference(), flush=True)
thread = threading.Thread(target=work)
thread.start()
print("ready", flush=True)
"""


def start_program(server: Redis) -> "subprocess.Popen[str]":
    program = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=os.environ | {"PHONON_URL": server.url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout
    assert program.stdout.readline() == "ready\n"
    return program


def test_the_end_of_the_interpreter_ends_sessions(own_server: Redis) -> None:
    program = start_program(own_server)
    output, _ = program.communicate("", timeout=30)
    assert output.splitlines() == ["thread True", "executed {'n': 1}"]
    assert program.returncode == 0
    with own_server.client() as client:
        assert all(key.endswith(b":memory") for key in client.keys("*"))


def test_what_a_killed_process_had_stored_is_still_there(own_server: Redis) -> None:
    program = start_program(own_server)
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=30)
    with own_server.client() as client:
        assert client.llen("phonon:{=test.test.1}:partials") == 1
        assert client.zcard("phonon:{=test.test.1}:members") == 1
        [registry] = client.keys("*:holds")
        assert b"phonon:{=test.test.1}" in client.hkeys(registry)


def test_several_threads_share_a_process(make: Make) -> None:
    process, other = make(), make()
    other.create_reference("x")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                reference = process.create_reference("x")
                reference.increment_times_modified()
                reference.dereference()
        except PhononError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert other.create_reference("x").get_times_modified() == 400
