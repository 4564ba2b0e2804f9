"""Code that was written for the locks of the standard library, or of redis-py, runs unchanged."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from phonon import Process
from phonon.errors import AlreadyLockedError, LockLostError
from support.world import Make, Redis, key_of

#: Those of which threads may share an object.
FOR_THREADS = (type(threading.Lock()), Process.Lock)


class Kit:
    """Locks of one kind.

    Attributes:
        make: Makes a lock; those of one name exclude each other, where the kind has names.
        lose: Makes the server lose the lock of a name.
    """

    def __init__(self, make: Callable[..., Any], lose: Callable[[str], object]) -> None:
        self.make = make
        self.lose = lose


def _kit(kind: str, server: Redis, namespace: str, make: Make) -> Kit:
    if kind == "threading":
        return Kit(lambda _: threading.Lock(), lambda _: None)
    client = server.client()
    if kind == "redis-py":
        return Kit(
            lambda name: client.lock(f"{namespace}:{name}", timeout=30, thread_local=False),
            lambda name: client.delete(f"{namespace}:{name}"),
        )
    process = make()
    return Kit(
        process.lock,
        lambda name: client.delete(key_of(namespace, "lock", name)),
    )


@pytest.fixture(params=["threading", "redis-py", "phonon"])
def kit(request: pytest.FixtureRequest, server: Redis, namespace: str, make: Make) -> Kit:
    return _kit(request.param, server, namespace, make)


@pytest.fixture(params=["threading", "phonon"])
def std(request: pytest.FixtureRequest, server: Redis, namespace: str, make: Make) -> Kit:
    return _kit(request.param, server, namespace, make)


@pytest.fixture(params=["redis-py", "phonon"])
def py(request: pytest.FixtureRequest, server: Redis, namespace: str, make: Make) -> Kit:
    return _kit(request.param, server, namespace, make)


# All three


def test_it_excludes(kit: Kit) -> None:
    lock = kit.make("x")
    counted = 0

    def work() -> None:
        nonlocal counted
        for _ in range(20):
            with lock:
                before = counted
                time.sleep(0)
                counted = before + 1

    # One object for all threads, as it is with threading.Lock; redis-py's keeps one token.
    with ThreadPoolExecutor(4 if isinstance(lock, FOR_THREADS) else 1) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result(60)
    assert counted == 80
    assert not lock.locked()


def test_the_simple_things(kit: Kit) -> None:
    lock = kit.make("x")
    assert lock.locked() is False
    assert lock.acquire() is True
    assert lock.locked() is True
    assert lock.acquire(blocking=False) is False
    assert lock.locked() is True
    lock.release()
    assert lock.locked() is False
    assert lock.acquire(blocking=False) is True
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.release).result()
    assert lock.locked() is False
    with pytest.raises((RuntimeError, redis.exceptions.LockError)):
        lock.release()
    with lock:
        assert lock.locked() is True
    with pytest.raises(ZeroDivisionError), lock:
        _ = 1 / 0
    assert lock.locked() is False


# threading.Lock


def test_ways_to_acquire_of_the_standard_library(std: Kit) -> None:
    lock = std.make("x")
    for positional in [(), (True,), (True, 5), (True, -1), (False,), (1,), (0,)]:
        assert lock.acquire(*positional) is True
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lock.acquire, False).result() is False
            assert pool.submit(lock.acquire, blocking=False).result() is False
            began = time.monotonic()
            assert pool.submit(lock.acquire, True, 0.05).result() is False
            assert pool.submit(lock.acquire, timeout=0.05).result() is False
            assert time.monotonic() - began >= 0.1
        lock.release()
    for named in [{"timeout": -1}, {"timeout": 5}, {"blocking": True, "timeout": 5}]:
        assert lock.acquire(**named) is True
        lock.release()


def test_release_of_an_unlocked_lock(std: Kit) -> None:
    lock = std.make("x")
    with pytest.raises(RuntimeError):
        lock.release()
    with lock:
        pass
    with pytest.raises(RuntimeError):
        lock.release()


def test_one_thread_takes_it_and_another_gives_it_back(std: Kit) -> None:
    lock = std.make("x")
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            assert lock.acquire()
            waiting = pool.submit(lock.acquire, timeout=20)
            lock.release()
            assert waiting.result() is True
            lock.release()
    assert not lock.locked()


def test_two_that_release_at_once(std: Kit) -> None:
    """One of them has released it; the other one is told."""
    lock = std.make("x")
    for _ in range(20):
        assert lock.acquire()
        start = threading.Barrier(2)

        def release(start: threading.Barrier = start) -> bool:
            start.wait(10)
            try:
                lock.release()
            except RuntimeError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(release) for _ in range(2)]
            assert sorted(future.result() for future in results) == [False, True]
        assert not lock.locked()


def test_a_condition_over_it(std: Kit) -> None:
    """`threading.Condition` takes any lock, and finds out by trying whether it is held."""
    condition = threading.Condition(std.make("x"))
    items: list[int] = []

    def consume() -> int:
        with condition:
            condition.wait_for(lambda: items, timeout=20)
            return items.pop()

    with pytest.raises(RuntimeError, match="un-acquired"):
        condition.notify()
    with ThreadPoolExecutor(2) as pool:
        consumers = [pool.submit(consume) for _ in range(2)]
        for item in range(2):
            with condition:
                items.append(item)
                condition.notify_all()
        assert sorted(future.result() for future in consumers) == [0, 1]


# redis-py


def test_ways_to_acquire_of_redis_py(py: Kit) -> None:
    lock, other = py.make("x"), py.make("x")
    assert lock.acquire(blocking=True, blocking_timeout=5) is True
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other.acquire, blocking=False).result() is False
        began = time.monotonic()
        assert pool.submit(other.acquire, blocking=True, blocking_timeout=0.2).result() is False
        assert pool.submit(other.acquire, blocking_timeout=0.2).result() is False
        assert time.monotonic() - began >= 0.2
    assert other.owned() is False
    assert other.locked() is True
    lock.release()
    assert other.acquire(blocking_timeout=5) is True
    assert lock.owned() is False
    other.release()


def test_a_life_with_redis_py(py: Kit) -> None:
    lock = py.make("x")
    with lock:
        assert lock.owned() is True
        assert lock.locked() is True
        assert lock.extend(10) is True
        assert lock.extend(10, replace_ttl=True) is True
        assert lock.extend(additional_time=2.5, replace_ttl=False) is True
        assert lock.reacquire() is True
        assert lock.owned() is True
    assert lock.owned() is False
    assert lock.locked() is False
    assert lock.name


def test_errors_of_redis_py_for_what_is_not_held(py: Kit) -> None:
    lock = py.make("x")
    for act in (lock.release, lock.reacquire, lambda: lock.extend(10)):
        with pytest.raises(redis.exceptions.LockError):
            act()


def test_errors_of_redis_py_for_what_was_lost(py: Kit) -> None:
    for name in ("release", "reacquire", "extend"):
        lock = py.make("x")
        assert lock.acquire()
        py.lose("x")
        arguments = [10] if name == "extend" else []
        with pytest.raises(redis.exceptions.LockNotOwnedError):
            getattr(lock, name)(*arguments)
    lock = py.make("x")
    with pytest.raises(redis.exceptions.LockError), lock:
        py.lose("x")


def test_errors_of_redis_py_for_a_block_that_is_not_entered(
    server: Redis, namespace: str, make: Make
) -> None:
    with server.client() as client:
        theirs = client.lock(f"{namespace}:x", timeout=30, blocking=False)
        ours = make().lock("x", block=False)
        for lock, holder in [
            (theirs, client.lock(f"{namespace}:x", timeout=30)),
            (ours, make().lock("x")),
        ]:
            entered: Any = lock
            with holder:
                with pytest.raises(redis.exceptions.LockError):  # noqa: SIM117
                    with entered:
                        pass
                assert entered.locked()


def test_the_errors_are_of_both_worlds() -> None:
    assert issubclass(LockLostError, RuntimeError)
    assert issubclass(LockLostError, redis.exceptions.LockNotOwnedError)
    assert issubclass(AlreadyLockedError, redis.exceptions.LockError)
    assert str(AlreadyLockedError("text")) == "text"
