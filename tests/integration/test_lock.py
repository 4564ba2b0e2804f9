"""Locks: one holder at a time, in order of arrival, and nothing left of those who give up."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import redis

from conftest import Make, Redis, wait_until
from phonon import Lock, Process
from phonon.errors import AlreadyLockedError, LockLostError, PhononError, ProcessStoppedError
from samples import fresh, put

Keys = Callable[[], set[str]]
InLine = Callable[[int], bool]


class Impatient(Process):
    """It waits for a lock only for a moment."""

    BLOCKING_TIMEOUT = 0.05


class Forgetful(Process):
    """Its locks are gone soon, for its heart hardly beats."""

    TTL = 0.3


@pytest.fixture
def admin(server: Redis) -> Iterator["redis.Redis"]:
    with server.client() as client:
        yield client


@pytest.fixture
def impatient(server: Redis, namespace: str) -> Iterator[Process]:
    with Impatient(url=server.url, namespace=namespace) as process:
        yield process


@pytest.fixture
def in_line(admin: "redis.Redis", namespace: str) -> InLine:
    """Whether so many wait for the lock on "x"."""
    return lambda number: bool(admin.zcard(f"{namespace}:{{=x}}:queue") == number)


def test_a_lock_is_exclusive(make: Make) -> None:
    """Between processes, between threads of one, and between two locks of one thread."""
    one, two = make(), make()
    with one.lock("x"):
        assert two.lock("x").acquire(block=False) is False
        assert one.lock("x").acquire(block=False) is False
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(one.lock("x").acquire, block=False).result() is False
        with two.lock("y"), one.lock("z", block=False):
            pass
    assert two.lock("x").acquire(block=False) is True


def test_never_two_inside(make: Make, keys: Keys) -> None:
    processes = [make() for _ in range(3)]
    inside = threading.Lock()
    counted = 0
    tokens: list[int] = []

    def work(process: Process) -> None:
        nonlocal counted
        for _ in range(40):
            with process.lock("x") as lock:
                assert inside.acquire(blocking=False)
                before = counted
                assert lock.token is not None
                tokens.append(lock.token)
                counted = before + 1
                inside.release()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, process) for process in processes * 2]:
            future.result()
    assert counted == 240
    assert tokens == sorted(set(tokens))
    assert keys() == {"{=x}:memory"}


def test_waiters_are_served_in_order_of_arrival(make: Make, in_line: InLine) -> None:
    processes = [make() for _ in range(3)]
    order: list[int] = []

    def wait(number: int) -> None:
        with processes[number % 3].lock("x"):
            order.append(number)

    with ThreadPoolExecutor(9) as pool:
        with processes[0].lock("x"):
            waiting = []
            for number in range(9):
                waiting.append(pool.submit(wait, number))
                wait_until(partial(in_line, number + 1))
            assert order == []
        for future in waiting:
            future.result()
    assert order == list(range(9))


def test_who_comes_late_does_not_push_in(make: Make, in_line: InLine) -> None:
    one, two = make(), make()
    lock = one.lock("x")
    assert lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(two.lock("x").acquire)
        wait_until(lambda: in_line(1))
        lock.release()
        # It is free, but promised to the one that was woken for it.
        assert lock.acquire(block=False) is False
        assert waiting.result() is True


def test_waiting_is_woken_not_polled(make: Make, in_line: InLine) -> None:
    """Between two looks of a poller, a lock goes through many hands."""
    one, two = make(), make()
    turns = 200

    def play(process: Process) -> None:
        for _ in range(turns):
            with process.lock("x"):
                wait_until(lambda: in_line(1) or done.is_set())
        done.set()

    done = threading.Event()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(play, process) for process in (one, two)]:
            future.result()
    assert time.monotonic() - began < turns * 0.05


def test_blocking_ends(impatient: Process, make: Make, keys: Keys) -> None:
    other = make()
    with other.lock("x"):
        began = time.monotonic()
        with pytest.raises(Process.AlreadyLocked, match=r"after 0\.05 s of waiting") as raised:
            impatient.lock("x").__enter__()
        assert time.monotonic() - began >= 0.05
        assert other.id in str(raised.value)
        assert "'x'" in str(raised.value)
        assert Process.AlreadyLocked is AlreadyLockedError
        assert issubclass(AlreadyLockedError, PhononError)
        # Whoever gives up leaves neither a place in line nor a wake-up behind.
        assert keys() == {"{=x}:lock", "{=x}:memory"}
        assert impatient.get_registry() == []


@pytest.mark.parametrize(
    ("made", "asked", "waits"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_block(made: bool, asked: bool | None, waits: bool, impatient: Process, make: Make) -> None:
    with make().lock("x"):
        began = time.monotonic()
        assert impatient.lock("x", made).acquire(asked) is False
        assert (time.monotonic() - began >= 0.05) is waits


def test_timeout(make: Make, keys: Keys) -> None:
    one, two = make(), make()
    lock = two.lock("x")
    with one.lock("x"):
        began = time.monotonic()
        assert lock.acquire(timeout=0.02) is False
        assert time.monotonic() - began >= 0.02
        assert lock.acquire(timeout=0) is False
        assert lock.token is None
        assert keys() == {"{=x}:lock", "{=x}:memory"}
    assert lock.acquire(timeout=0) is True
    lock.release()


def test_who_gives_up_swallows_no_wake_up(impatient: Process, make: Make, in_line: InLine) -> None:
    one, two = make(), make()
    lock = one.lock("x")
    assert lock.acquire()
    with ThreadPoolExecutor(2) as pool:
        gives_up = pool.submit(impatient.lock("x").acquire)
        wait_until(lambda: in_line(1))
        waits = pool.submit(two.lock("x").acquire)
        assert gives_up.result() is False
        wait_until(lambda: in_line(1))
        lock.release()
        assert waits.result() is True


def test_a_waiter_that_is_woken_as_it_gives_up_wakes_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch, in_line: InLine
) -> None:
    one, two, three = make(), make(), make()
    lock = one.lock("x")
    assert lock.acquire()

    def interrupted(*_: object) -> bool:
        waits.append(pool.submit(three.lock("x").acquire))
        wait_until(lambda: in_line(2))
        lock.release()
        raise KeyboardInterrupt

    monkeypatch.setattr(two.engine.driver, "server", _Waits(two, interrupted))
    with ThreadPoolExecutor(1) as pool:
        waits: list[Future[bool]] = []
        with pytest.raises(KeyboardInterrupt):
            two.lock("x").acquire()
        (waiting,) = waits
        assert waiting.result() is True
    assert in_line(0)


class _Waits:
    """A process's server, with another way of waiting."""

    def __init__(self, process: Process, wait: Callable[..., bool]) -> None:
        self._server = process.engine.driver.server
        self.wait = wait

    def __getattr__(self, name: str) -> object:
        return getattr(self._server, name)


def test_tokens_grow(make: Make) -> None:
    processes = [make() for _ in range(2)]
    tokens: list[int] = []
    for process in itertools.islice(itertools.cycle(processes), 20):
        with process.lock("x") as lock:
            assert type(lock.token) is int
            tokens.append(lock.token)
            assert f"token {lock.token}" in repr(lock)
        assert lock.token is None
    assert tokens == sorted(set(tokens))


def test_tokens_grow_although_the_keys_are_gone(
    process: Process, admin: "redis.Redis", namespace: str
) -> None:
    last = 0
    for _ in range(10):
        with process.lock("x") as lock:
            assert lock.token is not None
            assert lock.token > last
            last = lock.token
        admin.delete(f"{namespace}:{{=x}}:memory")


def test_a_lock_and_the_batches_of_a_resource_share_its_tokens(process: Process) -> None:
    sheet = fresh()
    tokens: list[int] = []
    for n in range(5):
        with process.lock("test.test.a") as lock:
            assert lock.token is not None
            tokens.append(lock.token)
            put(sheet, process, "a", n).end_session()
        tokens.append(sheet.written[-1].token)
    assert tokens == sorted(set(tokens))


def test_a_lock_can_be_used_again_and_again(process: Process) -> None:
    lock = process.lock("x")
    for _ in range(3):
        with lock as entered:
            assert entered is lock
            assert isinstance(lock, Process.Lock)
            assert isinstance(lock, Lock)
            assert lock.owned()
        assert not lock.owned()
        assert "not held" in repr(lock)


def test_a_lock_object_is_held_once(process: Process) -> None:
    lock = process.lock("x")
    with lock, pytest.raises(AlreadyLockedError, match="this Lock object already holds 'x'"):
        lock.acquire()
    assert lock.acquire(block=False)


def test_what_is_not_held_cannot_be_released(process: Process) -> None:
    lock = process.lock("x")
    with pytest.raises(LockLostError, match="is not held: acquire it first"):
        lock.release()
    with lock:
        pass
    with pytest.raises(LockLostError):
        lock.release()


def test_another_thread_may_release_it(make: Make) -> None:
    one, two = make(), make()
    lock = one.lock("x")
    assert lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.release).result()
    assert two.lock("x").acquire(block=False)


def test_the_users_error_comes_out_and_the_lock_is_free(make: Make) -> None:
    one, two = make(), make()
    with pytest.raises(ZeroDivisionError), one.lock("x"):
        _ = 1 / 0
    assert two.lock("x").acquire(block=False)


def test_a_lease_runs_out(server: Redis, namespace: str, make: Make) -> None:
    """Of a process that lives and does not renew: what was locked is free, and it is told."""
    other = make()
    with Forgetful(url=server.url, namespace=namespace, heartbeat_interval=0.29) as process:
        process.engine.upkeep.stop()
        lock = process.lock("x")
        assert lock.acquire()
        token = lock.token
        assert token is not None
        with other.lock("x") as next_lock:
            assert next_lock.token is not None
            assert next_lock.token > token
            with pytest.raises(LockLostError, match=r"its lease of 0\.3 s ran out"):
                lock.release()
            assert process.lock("x").acquire(block=False) is False
        with process.lock("x", block=False):
            pass


def test_a_lock_does_not_hold_a_reference(make: Make, keys: Keys) -> None:
    process = make()
    with process.lock("x"):
        reference = process.create_reference("x")
        assert reference.dereference() is True
        assert process.get_registry() == ["x"]
    assert process.get_registry() == []
    with process.lock("x"):
        reference.refresh_session()
    assert reference.count() == 1
    assert reference.dereference() is True
    assert keys() == {"{=x}:memory"}


def test_stop_frees_locks_and_sends_waiters_away(make: Make, in_line: InLine) -> None:
    one, two = make(), make()
    held = two.lock("y")
    assert held.acquire()
    with one.lock("x"), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(two.lock("x").acquire) for _ in range(2)]
        wait_until(lambda: in_line(2))
        began = time.monotonic()
        two.stop()
        for future in waiting:
            with pytest.raises(ProcessStoppedError, match="nobody waits for 'x'"):
                future.result()
        assert time.monotonic() - began < 2
        assert in_line(0)
    assert one.lock("y").acquire(block=False)
    assert not held.owned()
    with pytest.raises(LockLostError):
        held.release()


def test_any_text_is_a_lock_key(make: Make) -> None:
    one, two = make(), make()
    for name in ["", "}", "{a}", "a}b{c", "\n", "ключ", "x" * 10_000, "a/b", "a:wake:b"]:
        lock = one.lock(name)
        assert lock.acquire()
        with ThreadPoolExecutor(1) as pool:
            assert two.lock(name).acquire(block=False) is False
            waiting = pool.submit(two.lock(name).acquire)
            wait_until(lambda: two.waiters)
            lock.release()
            assert waiting.result() is True
