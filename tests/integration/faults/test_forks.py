"""A fork gives another process, whoever has forked, and whether or not Python was told."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from phonon import LruCache, Process
from phonon._transport.threads import ThreadSignal
from phonon.errors import ForkedError, LockLostError
from support.samples import Tally, put
from support.world import Make, Redis, wait_until

Fork = Callable[[Process], int]


def _fork(process: Process) -> int:
    return _begun(os.fork())


def _fork_in_c(process: Process) -> int:
    """Fork as uWSGI does: nothing that Python registers is run."""
    # The interpreter itself does not survive it while another thread is waiting to run.
    wait_until(lambda: process.engine.heartbeat.beats and others_wait())
    return _begun(int(ctypes.PyDLL(None).fork()))


def _begun(child: int) -> int:
    if not child:
        signal.alarm(20)  # a child that hangs must not hold up the test for ever
    return child


def others_wait() -> bool:
    """Return whether all of Phonon's threads wait for a signal."""
    ours = {thread.ident for thread in threading.enumerate() if thread.name.startswith("phonon")}
    frames = sys._current_frames()
    return all(frames[i].f_code is ThreadSignal.wait.__code__ for i in ours & frames.keys() if i)


forked = pytest.mark.parametrize("fork", [_fork, _fork_in_c], ids=["os.fork", "in C"])


def in_child(fork: Fork, process: Process, work: Callable[[], Any]) -> Any:
    """Return what a function returns in a forked child, which then dies without ado."""
    read, write = os.pipe()
    child = fork(process)
    if not child:
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return json.loads(told)


@pytest.fixture
def kind(tmp_path: Any) -> Any:
    """Updates that write to a file, which parent and child have in common."""
    path = tmp_path / "written"

    class Written(Tally, name=f"written to {path}"):
        def execute(self) -> None:
            with path.open("a") as file:
                file.write(json.dumps([self._id, self.doc["n"]]) + "\n")

        @classmethod
        def docs(cls) -> dict[Any, Any]:
            totals: dict[Any, Any] = {}
            for line in path.read_text().splitlines():
                record, n = json.loads(line)
                totals[record] = totals.get(record, 0) + n
            return totals

    return Written


@forked
def test_each_message_counts_once(fork: Fork, process: Process, kind: Any) -> None:
    """38 acknowledged, 20 written: the two had one identity and one sequence of calls."""
    put(kind, process, "record")

    def work() -> None:
        for _ in range(18):
            put(kind, process, "record").end_session()
        process.stop()

    child = fork(process)
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    for _ in range(19):
        put(kind, process, "record").end_session()
    os.waitpid(child, 0)
    process.stop()
    assert kind.docs() == {"record": 38}


@forked
def test_what_the_parent_holds_is_the_parents(fork: Fork, make: Make) -> None:
    process = make()
    reference = process.create_reference("resource")
    lock = process.lock("resource")
    assert lock.acquire()

    def look() -> list[Any]:
        owned, token = lock.owned(), lock.token
        try:
            lock.release()
        except LockLostError:
            released = False
        else:
            released = True
        found = [owned, token, released, process.id, reference.count()]
        process.create_reference("resource")
        pids = sorted(holder.pid for holder in reference.holders())
        process.stop()
        return [*found, pids == sorted([os.getpid(), os.getppid()])]

    owned, token, released, its, count, pids = in_child(fork, process, look)
    assert (owned, token, released, count, pids) == (False, None, False, 1, True)
    assert its != process.id
    assert lock.owned()
    assert reference.count() == 1


@forked
def test_a_childs_messages_do_not_go_into_its_copy_of_the_parents_data(
    fork: Fork, process: Process, kind: Any
) -> None:
    """Although nothing of them is sent: the parent's membership is not the child's."""
    cache: LruCache[Tally] = LruCache()
    cache.set("record", put(kind, process, "record", init_cache=False))

    def work() -> int:
        cache.set("record", put(kind, process, "record", 10, init_cache=False))
        process.stop()
        return cache.size()

    assert in_child(fork, process, work) == 0
    assert cache.size() == 1
    process.stop()
    assert kind.docs() == {"record": 11}


@forked
def test_an_update_of_the_parents_is_refused_in_the_child(
    fork: Fork, process: Process, kind: Any
) -> None:
    update = put(kind, process, "record")

    def use() -> list[str]:
        told = []
        for call in (update.cache, update.end_session, lambda: update.refresh(update)):
            try:
                call()
            except ForkedError as error:
                told.append(str(error))
        return told

    told = in_child(fork, process, use)
    assert len(told) == 3
    assert all("make updates in the process that handles the message" in text for text in told)
    update.end_session()
    assert kind.docs() == {"record": 1}


@forked
def test_a_block_that_was_forked_inside_of_is_the_parents(
    fork: Fork, process: Process, kind: Any
) -> None:
    """The child's data in the block is stored at once."""

    def work() -> None:
        put(kind, process, "record", 10)
        put(kind, process, "its", 5).end_session()

    with process.batch():
        put(kind, process, "record")
        assert in_child(fork, process, work) is None
        assert kind.docs() == {"its": 5}
    process.stop()
    assert kind.docs()["its"] == 5


@forked
def test_grandchildren(fork: Fork, process: Process, namespace: str) -> None:
    process.create_reference("resource")

    def be_a_parent() -> list[Any]:
        process.create_reference("another")
        ids = [process.id, in_child(fork, process, lambda: process.id)]
        return [*ids, in_child(fork, process, lambda: process.create_reference("resource").count())]

    child, grandchild, count = in_child(fork, process, be_a_parent)
    assert len({process.id, child, grandchild}) == 3
    assert count == 2


@forked
def test_a_child_that_does_nothing_disturbs_nothing(fork: Fork, server: Redis, make: Make) -> None:
    """Its end leaves the parent's connections as they are, and its sessions."""
    process = make()
    reference = process.create_reference("resource")
    assert in_child(fork, process, process.stop) is None  # as at the end of the interpreter
    troubles = process.engine.driver.server.troubles
    for _ in range(5):
        assert reference.count() == 1
    assert process.engine.driver.server.troubles == troubles
    with server.client() as client:
        assert client.zcard(process.heartbeat_hash_name) == 1
