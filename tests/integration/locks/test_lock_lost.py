"""Locks that are lost: that is found, it is said once, and nobody goes on believing in one."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from phonon import Lock, Process
from phonon.errors import (
    DeclaredDeadError,
    ForeignKeyError,
    LockLostError,
    ServerError,
    ServerStateLostError,
)
from support.others import QUICK, Others, other  # noqa: F401 - the fixture is found by its name
from support.proxy import Proxy
from support.world import Make, Redis, key_of, stop_heart, wait_until


@pytest.fixture
def admin(server: Redis) -> Iterator["redis.Redis"]:
    with server.client() as client:
        yield client


class Told:
    """Collects the errors that a process and its lock report."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.locks: list[Lock] = []

    def kinds(self) -> list[type[Exception]]:
        return [type(error) for error in self.errors]


Lose = Callable[[], None]


@pytest.fixture
def lose(admin: "redis.Redis", namespace: str) -> Lose:
    """Makes the server lose the lock on "x"."""

    def delete() -> None:
        assert admin.delete(*(key_of(namespace, kind, "x") for kind in ("lock", "shared")))

    return delete


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def process(make: Make, told: Told) -> Process:
    return make(on_error=told.errors.append)


def renew(process: Process) -> None:
    """Renew the locks that have a lease of their own, as the heartbeat has it done."""
    process.engine.run(process.engine.leases.renew_all())


def ends_lost(lock: Lock, body: Callable[[], object]) -> None:
    """Leave a block of a lock that the body loses."""
    with pytest.raises(LockLostError, match=r"'x' \(token \d+\) was lost before it was released"):  # noqa: SIM117
        with lock:
            body()
            assert lock.token is not None


@pytest.mark.parametrize("shared", [False, True])
def test_its_renewal_finds_it(shared: bool, process: Process, told: Told, lose: Lose) -> None:
    lock = process.lock("x", shared=shared, lease=20, on_lost=told.locks.append)

    def body() -> None:
        assert lock.owned()
        lose()
        renew(process)
        assert not lock.owned()
        wait_until(lambda: told.locks)
        assert "lost, token" in repr(lock)
        renew(process)
        with pytest.raises(LockLostError):
            lock.check()

    ends_lost(lock, body)
    assert told.locks == [lock]
    assert told.kinds() == [LockLostError]
    assert lock.token is None
    with lock:
        lock.check()
    assert told.locks == [lock]


@pytest.mark.parametrize("shared", [False, True])
def test_a_check_finds_it(shared: bool, process: Process, told: Told, lose: Lose) -> None:
    lock = process.lock("x", shared=shared, on_lost=told.locks.append)

    def body() -> None:
        lock.check()
        lose()
        for act in (lock.check, lock.extend, lock.reacquire):
            with pytest.raises(LockLostError):
                act()
            assert not lock.owned()

    ends_lost(lock, body)
    assert told.locks == [lock]
    assert told.kinds() == [LockLostError]


@pytest.mark.parametrize("shared", [False, True])
def test_a_heartbeat_finds_it(shared: bool, make: Make, told: Told, lose: Lose) -> None:
    process = make(on_error=told.errors.append, heartbeat_interval=0.25)
    lock = process.lock("x", shared=shared, on_lost=told.locks.append)
    held = process.lock("y", shared=shared, on_lost=told.locks.append)

    def body() -> None:
        assert held.acquire()
        lose()
        wait_until(lambda: told.locks)
        assert not lock.owned()

    ends_lost(lock, body)
    assert told.locks == [lock]
    assert held.owned()
    held.release()


@pytest.mark.parametrize("shared", [False, True])
def test_leaving_the_block_finds_it(shared: bool, process: Process, told: Told, lose: Lose) -> None:
    lock = process.lock("x", shared=shared, lease=20, on_lost=told.locks.append)
    ends_lost(lock, lose)
    renew(process)
    assert told.locks == [lock]
    assert told.kinds() == [LockLostError]


def test_it_is_said_once_whoever_finds_it(process: Process, told: Told, lose: Lose) -> None:
    for _ in range(20):
        told.locks.clear()
        lock = process.lock("x", lease=20, on_lost=told.locks.append)
        assert lock.acquire()
        lose()
        threads = [threading.Thread(target=renew, args=[process]) for _ in range(2)]
        for thread in threads:
            thread.start()
        with pytest.raises(LockLostError):
            lock.check()
        for thread in threads:
            thread.join()
        with pytest.raises(LockLostError):
            lock.release()
        wait_until(lambda: told.locks)
        assert told.locks == [lock]


def test_the_users_error_is_the_one_to_see(process: Process, lose: Lose) -> None:
    def work() -> None:
        with process.lock("x"):
            lose()
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        work()
    (note,) = raised.value.__notes__
    assert note.startswith("phonon: the lock on 'x'")
    assert "was lost" in note


def test_on_lost_may_raise_or_take_its_time(
    make: Make, told: Told, lose: Lose, caplog: pytest.LogCaptureFixture
) -> None:
    """The heart beats on meanwhile."""
    process = make(heartbeat_interval=QUICK, on_error=told.errors.append)
    go_on = threading.Event()
    in_it = threading.Event()

    def on_lost(lock: Lock) -> None:
        in_it.set()
        go_on.wait(20)
        told.locks.append(lock)
        assert lock.acquire()
        told.locks.append(lock)
        raise RuntimeError("on purpose")

    lock = process.lock("x", lease=20, on_lost=on_lost)
    assert lock.acquire()
    lose()
    wait_until(in_it.is_set)
    name = process.id
    identity = process.engine.identity
    alive_until = identity.clock() + 8 * QUICK
    wait_until(lambda: identity.clock() > alive_until)
    assert identity.surely_lives
    go_on.set()
    wait_until(lambda: "on_lost of" in caplog.text)
    assert process.id == name
    assert told.locks == [lock, lock]
    assert told.kinds() == [LockLostError]


@pytest.mark.parametrize("shared", [False, True])
def test_a_process_that_was_paused_beyond_its_death(
    shared: bool,
    make: Make,
    other: Others,  # noqa: F811
) -> None:
    process = make(heartbeat_interval=QUICK)
    paused = other(shared=shared)
    assert paused.ask("acquire")
    token = paused.ask("token")
    paused.pause()
    with process.lock("x") as lock:
        assert lock.token is not None
        assert lock.token > token
        paused.go_on()
        assert paused.ask("owned") is False, "before it has heard of it"
        assert paused.ask("check") == "LockLostError"
        assert paused.ask("release") == "LockLostError"
        # In whichever order they are found. A busy machine may pause it once more.
        wait_until(lambda: set(paused.ask("told")) == {"DeclaredDeadError", "LockLostError"})
        assert paused.ask("acquire", block=False) is False
        lock.check()
    assert paused.ask("acquire") is True
    assert paused.ask("lost") == ["x"]


def test_a_process_that_was_paused_beyond_its_lease(make: Make, other: Others) -> None:  # noqa: F811
    paused = other(lease=0.3, process={"heartbeat_interval": 20})
    assert paused.ask("acquire")
    paused.pause()
    with make().lock("x"):
        paused.go_on()
        assert paused.ask("owned") is False
        assert paused.ask("check") == "LockLostError"
        wait_until(lambda: paused.ask("lost") == ["x"])
        assert paused.ask("told") == ["LockLostError"]
        assert paused.ask("release") == "LockLostError"


def test_who_is_told_may_stop_the_process(make: Make, server: Redis, namespace: str) -> None:
    """In the middle of whatever has found out."""
    process: Process
    stopped = threading.Event()

    def stop(error: Exception) -> None:
        process.stop()
        stopped.set()

    process = make(on_error=stop)
    with pytest.raises(LockLostError), process.lock("x", on_lost=lambda lock: lock.locked()):
        with server.client() as client:
            # As another one's heartbeat does if it has been silent for long.
            client.zadd(process.heartbeat_hash_name, {process.id: 0})
        process.engine.heartbeat.wake()
        wait_until(stopped.is_set)


@pytest.fixture
def far_away(server: Redis) -> Iterator[Proxy]:
    """Where what is sent to the server arrives later."""
    proxy = Proxy(server.socket)
    proxy.plan(lambda *_: time.sleep(0.2))
    yield proxy
    proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_owned_ends_before_the_server_gives_the_lock_away(
    shared: bool, make: Make, far_away: Proxy
) -> None:
    rival = make().lock("x")
    process = make(url=far_away.url)
    process.engine.leases.start_worker = lambda: None

    def ends_early() -> bool:
        lock = process.lock("x", shared=shared, lease=0.5)
        assert lock.acquire()
        was = early = False
        while not rival.acquire(block=False):
            was = was or lock.owned()
            early = early or not lock.owned()
        assert not lock.owned()
        rival.release()
        with pytest.raises(LockLostError):
            lock.release()
        return was and early

    # Unless the machine was too busy to look in time.
    wait_until(ends_early)
    process.stop()


def test_owned_ends_before_the_process_is_declared_dead(make: Make) -> None:
    process, rival = make(heartbeat_interval=QUICK), make(recover_failed_processes=False)
    stop_heart(process)
    lock = process.lock("x")
    assert lock.acquire()
    assert lock.owned()
    wait_until(lambda: not lock.owned())
    assert not rival.lock("x").acquire(block=False), "nobody has taken over yet"
    process.engine.run(process.engine.heartbeat.beat())
    assert process.engine.identity.surely_lives
    assert lock.owned()
    rival.stop()


def until(admin: "redis.Redis", namespace: str) -> float:
    """When the lease of the lock on "x" ends, seconds; 0 if there is none."""
    found: Any = admin.zrange(key_of(namespace, "leases", "x"), 0, -1, withscores=True)
    return found[0][1] / 1000 if found else 0


def test_a_lease_much_shorter_than_the_heartbeat_is_renewed(
    make: Make, admin: "redis.Redis", namespace: str
) -> None:
    process, rival = make(heartbeat_interval=30), make(heartbeat_interval=30)
    # Not so short that a busy machine misses all four renewals.
    with process.lock("x", lease=1.5) as lock, process.lock("y", shared=True, lease=1.6) as second:
        first = until(admin, namespace)

        def renewed() -> bool:
            assert lock.owned()
            assert second.owned()
            assert not rival.lock("x").acquire(block=False)
            assert not rival.lock("y").acquire(block=False)
            return until(admin, namespace) > first + 2

        wait_until(renewed)
        lock.check()
        second.check()


def test_a_failed_renewal_is_made_good_within_the_lease(
    make: Make, admin: "redis.Redis", namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make(heartbeat_interval=30)
    leases = process.engine.leases
    renew_all = leases.renew_all
    failures = iter(range(2))

    def failing() -> Any:
        if next(failures, None) is not None:
            raise ServerError("on purpose")
        return renew_all()

    monkeypatch.setattr(leases, "renew_all", failing)
    with process.lock("x", lease=2) as lock:
        first = until(admin, namespace)
        wait_until(lambda: until(admin, namespace) > first)
        assert lock.owned()
        assert next(failures, None) is None


def test_a_holder_that_extends_its_lease_is_not_cut_short(
    process: Process, admin: "redis.Redis", namespace: str
) -> None:
    """By a renewal that was prepared before, and is sent after it."""
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            renew(process)

    with process.lock("x", lease=5) as lock:
        threads = [threading.Thread(target=go_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for seconds in range(10, 110):
                lock.extend(seconds, replace_ttl=True)
                (grant,) = process.engine.leases.everywhere()
                now, left = time.time(), grant.until - process.engine.identity.clock()
                assert until(admin, namespace) - now >= left - 0.05
        finally:
            done.set()
            for thread in threads:
                thread.join()


def test_a_server_that_comes_back_without_its_data(
    own_server: Redis, namespace: str, told: Told
) -> None:
    with Process(
        url=own_server.url,
        namespace=namespace,
        heartbeat_interval=QUICK,
        on_error=told.errors.append,
    ) as process:
        locks = [process.lock("x", on_lost=told.locks.append) for _ in range(1)]
        locks.append(process.lock("y", shared=True, on_lost=told.locks.append))
        tokens = []
        for lock in locks:
            assert lock.acquire()
            tokens.append(lock.token or 0)
        own_server.kill()
        own_server.start()
        wait_until(lambda: len(told.locks) == 2)
        assert {lock.name for lock in told.locks} == {"x", "y"}
        kinds = told.kinds()
        assert ServerStateLostError in kinds
        assert DeclaredDeadError not in kinds
        assert kinds.count(LockLostError) == 2
        for lock, token in zip(locks, tokens, strict=True):
            assert not lock.owned()
            with pytest.raises(LockLostError):
                lock.release()
            with lock:
                assert (lock.token or 0) > token


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_release_that_the_server_refuses_can_be_repeated(
    reentrant: bool, process: Process, admin: "redis.Redis", namespace: str
) -> None:
    lock = process.lock("x", reentrant=reentrant)
    assert lock.acquire()
    if reentrant:
        assert lock.acquire()
        lock.release()
    foreign = key_of(namespace, "queue", "x")
    admin.set(foreign, "not ours")
    for _ in range(2):
        with pytest.raises(ForeignKeyError):
            lock.release()
        assert lock.owned()
    admin.delete(foreign)
    lock.check()
    lock.release()
    assert not lock.owned()
    assert not lock.locked()


def test_stop_releases_all_and_says_so(make: Make, told: Told) -> None:
    one, two = make(), make()
    locks: list[Lock] = [one.lock(f"x{i}", shared=i % 2 > 0) for i in range(10)]
    locks.append(one.semaphore("s", 1))
    for lock in locks:
        assert lock.acquire()
    one.stop()
    for lock in locks:
        assert not lock.owned()
        with pytest.raises(LockLostError, match="its process was stopped"):
            lock.check()
        with pytest.raises(LockLostError, match="its process was stopped"):
            lock.release()
        with pytest.raises(LockLostError, match="is not held"):
            lock.release()
    assert two.semaphore("s", 1).acquire(block=False)
    assert all(two.lock(f"x{i}").acquire(block=False) for i in range(10))
