"""Semaphores: never more inside than there are places, in order of arrival."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from phonon import Process
from phonon.errors import AlreadyLockedError, ConfigurationError, LockLostError
from support.others import QUICK, Others, other  # noqa: F401 - the fixture is found by its name
from support.world import Make, Redis, wait_until

Keys = Callable[[], set[str]]


@pytest.fixture
def in_line(process: Process) -> Callable[[int], bool]:
    """Return whether so many wait for the semaphore "s"."""
    looks = process.semaphore("s", 1)
    return lambda number: len(looks.waiters()) == number


InLine = Callable[[int], bool]


@pytest.mark.parametrize("places", [1, 2, 3])
def test_never_more_inside_than_places(places: int, make: Make, keys: Keys) -> None:
    processes = [make() for _ in range(3)]
    free = threading.BoundedSemaphore(places)
    most = itertools.count()
    full = threading.Event()
    inside: set[int] = set()

    def work(process: Process) -> None:
        for _ in range(25):
            with process.semaphore("s", places) as semaphore:
                assert free.acquire(blocking=False), "one too many"
                inside.add(threading.get_ident())
                if len(inside) == places:
                    full.set()
                else:
                    full.wait(0.05)
                assert semaphore.owned()
                next(most)
                inside.discard(threading.get_ident())
                free.release()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, process) for process in processes * 2]:
            future.result(60)
    assert next(most) == 150
    assert full.is_set(), "all places were in use"
    assert keys() == set()


def test_places_are_given_in_order_of_arrival(make: Make, in_line: InLine) -> None:
    processes = [make() for _ in range(3)]
    order: list[int] = []
    held = [processes[0].semaphore("s", 2) for _ in range(2)]
    assert all(semaphore.acquire() for semaphore in held)

    def wait(number: int) -> None:
        with processes[number % 3].semaphore("s", 2):
            with adding:
                order.append(number)
            stay[number].wait(10)

    adding = threading.Lock()
    stay = [threading.Event() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        waiting = []
        for number in range(8):
            waiting.append(pool.submit(wait, number))
            wait_until(partial(in_line, number + 1))
        assert not processes[1].semaphore("s", 2).acquire(block=False)
        held[0].release()
        wait_until(lambda: order == [0])
        held[1].release()
        wait_until(lambda: order == [0, 1])
        for number in range(6):
            stay[number].set()
            wait_until(partial(lambda expected: len(order) == expected, number + 3))
        stay[6].set()
        stay[7].set()
        for future in waiting:
            future.result(10)
    assert order == list(range(8))


def test_places_that_are_free_together_are_taken_together(make: Make, in_line: InLine) -> None:
    """A waiter that asked before its turn is woken again when its turn comes."""
    holder, waiter = make(), make()
    together = threading.Barrier(3)

    def enter() -> None:
        with waiter.semaphore("s", 3):
            together.wait(20)

    for _ in range(20):
        held = [holder.semaphore("s", 3) for _ in range(3)]
        assert all(semaphore.acquire() for semaphore in held)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(enter) for _ in range(3)]
            wait_until(lambda: in_line(3))
            for semaphore in held:
                semaphore.release()
            for future in waiting:
                future.result(1.5)  # of 2 s until they would look by themselves


def test_a_place_of_a_killed_process_returns(make: Make, other: Others) -> None:  # noqa: F811
    process = make(heartbeat_interval=QUICK)
    dead = other("s", places=2)
    assert dead.ask("acquire")
    with process.semaphore("s", 2) as mine:
        assert {holder.id for holder in mine.holders()} == {dead.id, process.id}
        assert not process.semaphore("s", 2).acquire(block=False)
        dead.kill()
        assert process.semaphore("s", 2).acquire(timeout=30)
        assert {holder.id for holder in mine.holders()} == {process.id}


@pytest.mark.slow
def test_a_killed_waiter_takes_no_place(
    make: Make,
    in_line: InLine,
    other: Others,  # noqa: F811
) -> None:
    process = make(recover_failed_processes=False)
    held = process.semaphore("s", 1)
    assert held.acquire()
    dead = other("s", places=1)
    dead.send("acquire")
    wait_until(lambda: in_line(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(process.semaphore("s", 1).acquire)
        wait_until(lambda: in_line(2))
        dead.kill()
        held.release()
        assert waiting.result(30)


def test_it_has_nothing_to_do_with_a_lock_of_its_name(make: Make) -> None:
    one, two = make(), make()
    with one.lock("s"), two.semaphore("s", 1), one.lock("s:semaphore"):
        assert not two.lock("s").acquire(block=False)
        assert not one.semaphore("s", 1).acquire(block=False)
        two.create_reference("r")
        assert two.get_registry() == ["r"]  # it lists resources


def test_a_thread_may_take_several_places(make: Make) -> None:
    process = make()
    semaphore = process.semaphore("s", 2)
    with semaphore as first, semaphore as second:
        assert first is second
        assert not semaphore.acquire(block=False)
        assert len(semaphore.holders()) == 2
    assert not semaphore.locked()
    with pytest.raises(LockLostError):
        semaphore.release()


def test_who_has_the_places_is_said(make: Make) -> None:
    one, two = make(), make()
    with one.semaphore("s", 1):
        with pytest.raises(AlreadyLockedError, match="'s' is locked") as raised:
            two.semaphore("s", 1, block=False).__enter__()
        assert raised.value.holder.id == one.id
    assert repr(one.semaphore("s", 1)).startswith("<phonon.Semaphore shared 's'")


def test_stop_returns_the_places(make: Make) -> None:
    one, two = make(), make()
    assert one.semaphore("s", 2).acquire()
    assert one.semaphore("s", 2).acquire()
    one.stop()
    assert two.semaphore("s", 2).acquire(block=False)


@pytest.mark.parametrize("places", [0, -1])
def test_there_is_a_place(places: int, make: Make) -> None:
    with pytest.raises(ConfigurationError, match="places is at least 1"):
        make().semaphore("s", places)


def test_a_lost_place_is_found(make: Make, server: Redis, namespace: str) -> None:
    process = make()
    semaphore = process.semaphore("s", 2)
    with pytest.raises(LockLostError), semaphore:
        with server.client() as client:
            for key in client.scan_iter(f"{{{namespace}/*}}:lock:*"):
                client.delete(key)
        semaphore.check()
    assert not semaphore.owned()
