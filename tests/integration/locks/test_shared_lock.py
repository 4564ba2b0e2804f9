"""Shared locks: readers together, writers alone, nobody starved, nothing left of the dead."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from phonon import Process
from phonon.lock import Lock
from support.others import QUICK, Other, Others, other  # noqa: F401 - the fixture is found by its name
from support.world import Make, Redis, key_of, wait_until

Keys = Callable[[], set[str]]
InLine = Callable[[int], bool]


@pytest.fixture
def in_line(server: Redis, namespace: str) -> InLine:
    """Return whether so many wait for the lock on "x"."""

    def count(number: int) -> bool:
        with server.client() as client:
            return bool(client.zcard(key_of(namespace, "queue", "x")) == number)

    return count


def reader(process: Process) -> Lock:
    return process.lock("x", shared=True)


def test_readers_share_and_writers_do_not(make: Make, keys: Keys) -> None:
    one, two, three = make(), make(), make()
    with reader(one) as first, reader(two) as second, ThreadPoolExecutor(1) as pool:
        assert pool.submit(reader(one).acquire, block=False).result()
        assert not three.lock("x").acquire(block=False)
        assert not pool.submit(one.lock("x").acquire, block=False).result()
        assert first.owned()
        assert second.owned()
        assert len(first.holders()) == 3
        assert all(holder.shared for holder in first.holders())
        (third,) = {holder.token for holder in first.holders()} - {first.token, second.token}
        assert third > max(first.token or 0, second.token or 0)
    one.stop()
    with three.lock("x"):
        assert not reader(two).acquire(block=False)
    assert keys() == set()


def test_the_last_reader_frees_it(make: Make, in_line: InLine) -> None:
    one, two, three = make(), make(), make()
    readers = [reader(one), reader(two)]
    assert all(lock.acquire() for lock in readers)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(three.lock("x").acquire)
        wait_until(lambda: in_line(1))
        readers[0].release()
        assert in_line(1)
        assert not waiting.done()
        readers[1].release()
        assert waiting.result(4.5), "it asks by itself after 5 s"


def test_who_comes_after_a_waiting_writer_goes_in_after_it(make: Make, in_line: InLine) -> None:
    one, two, three = make(), make(), make()
    order: list[str] = []

    def enter(lock: Lock, name: str) -> None:
        with lock:
            order.append(name)
            if name == "reader":
                together.wait(10)  # they are inside at the same time, or this breaks

    together = threading.Barrier(3)
    with ThreadPoolExecutor(8) as pool:
        with reader(one):
            waiting = [pool.submit(enter, two.lock("x"), "writer")]
            wait_until(lambda: in_line(1))
            assert not reader(three).acquire(block=False), "a writer waits already"
            for i in range(3):
                waiting.append(pool.submit(enter, reader(three), "reader"))
                wait_until(partial(in_line, i + 2))
            waiting.append(pool.submit(enter, two.lock("x"), "last"))
            wait_until(lambda: in_line(5))
            assert order == []
        for future in waiting:
            future.result(20)
    assert order == ["writer", *["reader"] * 3, "last"]


def test_a_writer_gets_in_among_readers_that_keep_coming(make: Make) -> None:
    """Always some of them are inside, so one that does not go before late readers waits on."""
    processes = [make() for _ in range(3)]
    done = threading.Event()
    entries = itertools.count()
    overlaps = threading.Semaphore(0)

    def read(process: Process) -> None:
        while not done.is_set():
            with reader(process):
                next(entries)
                overlaps.release()
                # Stay until another one has come in, if one can.
                overlaps.acquire(timeout=0.02)

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read, process) for process in processes * 2]
        wait_until(lambda: len(processes[0].lock("x").holders()) > 1)
        writer = make().lock("x")
        try:
            for _ in range(10):
                assert writer.acquire(timeout=20)
                assert [holder.shared for holder in writer.holders()] == [False]
                writer.release()
        finally:
            done.set()
        for future in reading:
            future.result()
    assert next(entries) > 10


def test_a_writer_that_gives_up_lets_the_readers_behind_it_in(make: Make, in_line: InLine) -> None:
    one, two, three = make(), make(), make()
    with reader(one), ThreadPoolExecutor(3) as pool:
        writer = pool.submit(two.lock("x").acquire, timeout=1)
        wait_until(lambda: in_line(1))
        behind = [pool.submit(reader(three).acquire) for _ in range(2)]
        wait_until(lambda: in_line(3))
        assert not writer.result()
        began = time.monotonic()
        assert all(future.result() for future in behind)
        assert time.monotonic() - began < 3.5, "they were woken, and did not look by chance"


def test_tokens_of_both_kinds_grow_together(make: Make) -> None:
    processes = [make(), make()]
    tokens: list[int] = []
    for i in range(30):
        with processes[i % 2].lock("x", shared=i % 3 > 0) as lock:
            assert lock.token is not None
            tokens.append(lock.token)
    with reader(processes[0]) as first, reader(processes[1]) as second:
        tokens += [first.token or 0, second.token or 0]
    assert tokens == sorted(set(tokens))


def test_tokens_grow_over_deaths_and_ended_leases(make: Make, other: Others) -> None:  # noqa: F811
    process = make(heartbeat_interval=QUICK)
    tokens: list[int] = []
    for shared in (False, True):
        dead = other(shared=shared)
        assert dead.ask("acquire")
        tokens.append(dead.ask("token"))
        dead.kill()
        with process.lock("x") as lock:
            tokens.append(lock.token or 0)
        paused = other(shared=shared, lease=0.2, process={"heartbeat_interval": 20})
        assert paused.ask("acquire")
        tokens.append(paused.ask("token"))
        paused.pause()
        with process.lock("x") as lock:
            tokens.append(lock.token or 0)
        paused.kill()
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 8


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_killed_process_held_is_free_after_four_heartbeats(
    shared: bool,
    make: Make,
    other: Others,  # noqa: F811
) -> None:
    process = make(heartbeat_interval=QUICK)
    dead = other(shared=shared)
    assert dead.ask("acquire")
    (holder,) = process.lock("x").holders()
    assert (holder.id, holder.pid, holder.shared) == (dead.id, dead.popen.pid, shared)
    # Its lease is a minute long: it is its death that frees the lock.
    dead.kill()
    assert process.lock("x").acquire(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_killed_waiter_swallows_no_wake_up(
    shared: bool,
    make: Make,
    in_line: InLine,
    other: Others,  # noqa: F811
) -> None:
    """Although it was first in line, and nobody takes over from dead processes."""
    one, two = make(recover_failed_processes=False), make(recover_failed_processes=False)
    lock = one.lock("x")
    assert lock.acquire()
    dead = other(shared=shared)
    dead.send("acquire")
    wait_until(lambda: in_line(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(two.lock("x").acquire)
        wait_until(lambda: in_line(2))
        dead.kill()
        lock.release()
        assert waiting.result(30)


def test_others_that_give_up_do_not_keep_a_dead_waiter_waiting(
    make: Make,
    in_line: InLine,
    other: Others,  # noqa: F811
) -> None:
    """A waiter that gives up wakes the first waiter. That must not keep a dead waiter's place."""
    one, two = make(recover_failed_processes=False), make(recover_failed_processes=False)
    lock = one.lock("x")
    assert lock.acquire()
    dead = other()
    dead.send("acquire")
    wait_until(lambda: in_line(1))
    dead.kill()
    lock.release()
    wait_until(lambda: two.lock("x").acquire(timeout=0.3), 30)


def test_a_deleted_set_of_readers_is_lost_and_leaves_nothing(
    make: Make, server: Redis, namespace: str, keys: Keys
) -> None:
    process = make()
    lock = process.lock("x", shared=True, lease=20)
    assert lock.acquire()
    with server.client() as client:
        client.delete(key_of(namespace, "lock", "x"))
    process.engine.run(process.engine.leases.renew_all())
    wait_until(lambda: not lock.owned())
    assert keys() == set()
    again = reader(make())
    with again:
        assert [holder.token for holder in again.holders()] == [again.token]
    assert keys() == set()
