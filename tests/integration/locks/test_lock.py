"""Locks: one holder at a time, in order of arrival, and nothing left of those who give up."""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import redis

from phonon import Lock, Process
from phonon.errors import (
    AlreadyLockedError,
    ConfigurationError,
    DeadlockError,
    LockLostError,
    PhononError,
    ProcessStoppedError,
)
from phonon.lock import LockHolder
from support.samples import fresh, put
from support.world import Make, Redis, key_of, wait_until

Keys = Callable[[], set[str]]
InLine = Callable[[int], bool]


class Impatient(Process):
    """It waits for a lock only for a moment."""

    BLOCKING_TIMEOUT = 0.05


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
    """Return whether so many wait for the lock on "x"."""
    queue = key_of(namespace, "queue", "x")
    return lambda number: bool(admin.zcard(queue) == number)


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
    assert keys() == set()


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
        # A waiter that gives up leaves neither a place in the queue nor a wake-up behind.
        assert keys() == {"lock:x"}
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
        assert keys() == {"lock:x"}
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
    process: Process, admin: "redis.Redis", namespace: str, keys: Keys
) -> None:
    """Those of the resource, and the partition's last token too."""
    token = key_of(namespace, "token", "x").removesuffix(b":x")
    last = 0
    for _ in range(10):
        with process.lock("x") as lock:
            assert lock.token is not None
            assert lock.token > last
            last = lock.token
        assert keys() == set()
        admin.delete(token)


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


@pytest.mark.parametrize("shared", [False, True])
def test_a_thread_that_would_wait_for_itself_is_told(process: Process, shared: bool) -> None:
    """At once, also if it is shared: that would go well until a writer waits in between."""
    lock, other = process.lock("x"), process.lock("x", shared=shared)
    for held, wanted in [(lock, lock), (lock, other), (other, lock), (other, other)]:
        with held:
            with pytest.raises(DeadlockError, match="this thread holds 'x' already") as raised:
                wanted.acquire()
            with pytest.raises(RuntimeError), wanted:
                pass
            assert isinstance(raised.value, AlreadyLockedError)
            assert held.owned()
        assert not held.locked()


def test_another_thread_waits_for_the_same_object(process: Process, in_line: InLine) -> None:
    lock = process.lock("x")
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(lock.acquire)
            wait_until(lambda: in_line(1))
            assert not waiting.done()
            mine = lock.token
        assert waiting.result() is True
        assert lock.token is not None
        assert mine is not None
        assert lock.token > mine
        pool.submit(lock.release).result()
    assert not lock.locked()


def test_the_threads_of_one_reference_exclude_each_other(process: Process, in_line: InLine) -> None:
    reference = process.create_reference("x")
    first = reference.lock()
    with ThreadPoolExecutor(1) as pool:
        with first:
            waiting = pool.submit(reference.lock().acquire)
            wait_until(lambda: in_line(1))
            with pytest.raises(DeadlockError):
                reference.lock().acquire()
        assert waiting.result() is True


def test_a_new_thread_with_the_number_of_an_ended_one_waits(process: Process) -> None:
    """It is not the one that took it: the system gives numbers of threads again and again."""
    lock = process.lock("x")
    numbers: list[int] = []

    def take(block: bool) -> None:
        numbers.append(threading.get_ident())
        taken.append(lock.acquire(timeout=0.01) if block else lock.acquire())

    taken: list[bool] = []
    for block in (False, True):
        thread = threading.Thread(target=take, args=[block])
        thread.start()
        thread.join()
    assert taken == [True, False], numbers
    lock.release()


def test_a_reentrant_lock(make: Make) -> None:
    one, two = make(), make()
    lock, same, plain = (one.lock("x", reentrant=again) for again in (True, True, False))
    with lock:
        token = lock.token
        with lock, same:
            assert lock.acquire(block=False)
            assert lock.token == same.token == token
            lock.release()
            with pytest.raises(DeadlockError):
                plain.acquire()
        assert lock.owned()
        assert not same.owned(), "it has given back what it took"
        with pytest.raises(LockLostError):
            same.release()
        assert not two.lock("x").acquire(block=False)
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lock.acquire, block=False).result()
    assert two.lock("x").acquire(block=False)


def test_a_reentrant_lock_is_free_when_its_last_object_lets_go(make: Make) -> None:
    one, two = make(), make()
    first, second = one.lock("x", reentrant=True), one.lock("x", reentrant=True)
    assert first.acquire()
    assert second.acquire()
    first.release()
    assert second.owned()
    assert not first.owned()
    assert not two.lock("x").acquire(block=False)
    second.release()
    assert two.lock("x").acquire(block=False)


def test_a_reentrant_lock_is_no_stronger_than_what_is_held(process: Process) -> None:
    with process.lock("x"), process.lock("x", shared=True, reentrant=True):
        pass
    with process.lock("x", shared=True), pytest.raises(DeadlockError):
        process.lock("x", reentrant=True).acquire()


def test_who_holds_it_is_said(process: Process, impatient: Process) -> None:
    before = time.time()
    with ThreadPoolExecutor(1, thread_name_prefix="painter") as pool:
        lock = process.lock("x")
        pool.submit(lock.acquire).result()
    with pytest.raises(AlreadyLockedError) as raised:
        impatient.lock("x", block=False).__enter__()
    holder = raised.value.holder
    assert isinstance(holder, LockHolder)
    assert holder[:5] == (process.id, socket.gethostname(), os.getpid(), "painter_0", False)
    assert before - 1 <= holder.since <= time.time() + 1
    for part in ("'x'", "exclusive", *map(str, holder[:4]), "since 20"):
        assert part in str(raised.value)
    (found,) = impatient.lock("x").holders()
    assert found == holder._replace(token=lock.token or 0)
    lock.release()
    with process.lock("x", shared=True), pytest.raises(AlreadyLockedError, match=r"\(shared\)"):
        impatient.lock("x", block=False).__enter__()


def test_to_look_at(make: Make, in_line: InLine) -> None:
    one, two = make(), make()
    lock, other = one.lock("x", lease=7), two.lock("x")
    assert not lock.locked()
    assert lock.name == "x"
    assert repr(lock) == f"<phonon.Lock 'x' of process {one.id}: not held>"
    with ThreadPoolExecutor(2) as pool:
        with lock:
            assert lock.locked()
            assert other.locked()
            assert lock.owned()
            assert not other.owned()
            assert other.token is None
            assert f"held by MainThread, token {lock.token}, lease 7.0 s" in repr(lock)
            first = pool.submit(other.acquire)
            wait_until(lambda: in_line(1))
            second = pool.submit(two.lock("x", shared=True).acquire, timeout=0.1)
            wait_until(lambda: in_line(2))
            assert [(w.id, w.shared, w.pid) for w in lock.waiters()] == [
                (two.id, False, os.getpid()),
                (two.id, True, os.getpid()),
            ]
            assert not second.result()
            assert [holder.id for holder in other.holders()] == [one.id]
        assert first.result()
    assert [holder.id for holder in lock.holders()] == [two.id]
    assert lock.waiters() == []


def test_extend(process: Process, admin: "redis.Redis", namespace: str) -> None:
    lock = process.lock("x", lease=20)

    def left() -> float:
        leases = admin.zrange(key_of(namespace, "leases", "x"), 0, -1, withscores=True)
        assert len(leases) == 1
        return float(leases[0][1]) / 1000 - time.time()

    with lock:
        assert lock.extend(10) is True
        assert 28 < left() < 31
        assert lock.extend(100, replace_ttl=True) is True
        assert 98 < left() < 101
        process.engine.run(process.engine.leases.renew_all())
        assert 98 < left() < 101, "what was extended stays"
        lock.check()
        assert 98 < left() < 101
        assert lock.reacquire() is True
        assert lock.extend(5, replace_ttl=True) is True
        assert 98 < left() < 101, "it is never made shorter"
        assert lock.owned()
        for nonsense in (0, -5, float("nan"), float("inf")):
            with pytest.raises(ConfigurationError):
                lock.extend(nonsense)
        assert 98 < left() < 101
    for act in (lock.extend, lock.reacquire, lock.check):
        with pytest.raises(LockLostError, match="is not held"):
            act()


@pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf")])
def test_a_lease_is_a_time(process: Process, lease: float) -> None:
    with pytest.raises(ConfigurationError, match="lease is a number of seconds above 0"):
        process.lock("x", lease=lease)


def test_a_forked_child_has_no_locks(process: Process) -> None:
    """And its copy of the object does not release the parent's."""
    lock = process.lock("x")
    assert lock.acquire()
    token = lock.token
    child = os.fork()
    if not child:
        good = False
        with contextlib.suppress(BaseException):
            good = not lock.owned() and not process.engine.leases.everywhere()
            good = good and not lock.acquire(block=False)
            with contextlib.suppress(LockLostError):
                lock.release()
                good = False
            process.stop()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lock.check()
    assert lock.owned()
    assert lock.token == token
    lock.release()


def test_tokens_grow_over_a_restart_of_the_server(namespace: str) -> None:
    server = Redis("--appendonly", "yes", "--appendfsync", "always")
    tokens: list[int] = []
    try:
        with Process(url=server.url, namespace=namespace) as process:
            for restart in (True, True, False):
                for shared in (True, False):
                    with process.lock("x", shared=shared) as lock:
                        assert lock.token is not None
                        tokens.append(lock.token)
                held = process.lock("y")
                assert held.acquire()
                if restart:
                    server.kill()
                    server.start()
                held.check()
                held.release()
    finally:
        server.close()
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 6


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


def test_a_lease_runs_out(make: Make) -> None:
    """Of a process that lives and does not renew: what was locked is free, and it is told."""
    process, other = make(), make()
    process.engine.leases.start_worker = lambda: None
    lock = process.lock("x", lease=0.3)
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
    assert keys() == set()


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
            with pytest.raises(ProcessStoppedError, match="waits no longer for 'x'"):
                future.result()
        assert time.monotonic() - began < 4.5, "they ask by themselves after 5 s"
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
            wait_until(lock.waiters)
            lock.release()
            assert waiting.result() is True
