"""The exclusive lock, across processes and threads."""

import itertools
import threading
from collections.abc import Callable

import pytest

from conftest import Make, Redis, wait_until
from phonon import Process
from phonon.errors import LockLostError


class Impatient(Process):
    BLOCKING_TIMEOUT = 0.05


class ShortLease(Process):
    TTL = 0.6


def test_one_at_a_time(make: Make) -> None:
    processes = [make() for _ in range(3)]
    inside: list[int] = []
    most = 0

    def work(process: Process) -> None:
        nonlocal most
        for _ in range(30):
            with process.lock("x"):
                inside.append(1)
                most = max(most, len(inside))
                inside.pop()

    threads = [threading.Thread(target=work, args=(p,)) for p in processes for _ in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_taken_lock_is_refused_with_its_owner(make: Make) -> None:
    one, other = make(), make()
    with one.lock("x"):
        with pytest.raises(Process.AlreadyLocked, match=one.id), other.lock("x", block=False):
            pass
        assert not other.lock("x").acquire(block=False)
    with other.lock("x", block=False):
        pass


def test_waiting_is_bounded_and_leaves_no_trace(
    server: Redis, namespace: str, make: Make, keys: Callable[[], set[str]]
) -> None:
    holder = make()
    with Impatient(url=server.url, namespace=namespace) as process, holder.lock("x"):
        with pytest.raises(Process.AlreadyLocked, match=r"0\.05 s of waiting"), process.lock("x"):
            pass
        assert keys() == {"{=x}:lock", "{=x}:memory"}
    assert keys() == {"{=x}:memory"}


def test_waiters_are_served_in_order_of_arrival(make: Make, server: Redis) -> None:
    holder = make()
    order: list[int] = []
    threads = []
    client = server.client()
    queue = holder.engine.keys.base("x") + b":queue"
    with holder.lock("x"):
        for number in range(4):
            process = make()

            def wait(process: Process = process, number: int = number) -> None:
                with process.lock("x"):
                    order.append(number)

            threads.append(threading.Thread(target=wait))
            threads[-1].start()
            wait_until(lambda: client.zcard(queue) == len(threads))
    for thread in threads:
        thread.join()
    client.close()
    assert order == [0, 1, 2, 3]


def test_tokens_grow(make: Make) -> None:
    one, other = make(), make()
    tokens = []
    for _ in range(5):
        for process in (one, other):
            with process.lock("x") as lock:
                tokens.append(lock.token)
    assert all(a < b for a, b in itertools.pairwise(tokens) if a and b)
    assert None not in tokens


def test_a_lock_outlives_its_lease_while_its_process_lives(server: Redis, namespace: str) -> None:
    with ShortLease(url=server.url, namespace=namespace, heartbeat_interval=0.1) as process:
        client = server.client()
        key = process.engine.keys.base("x") + b":lock"
        with process.lock("x"):
            first = int(client.hget(key, "until"))  # type: ignore[arg-type]
            wait_until(lambda: int(client.hget(key, "until")) > first + 600)  # type: ignore[arg-type]
        client.close()


def test_a_lost_lock_is_reported_and_hides_no_other_error(make: Make, server: Redis) -> None:
    process = make(heartbeat_interval=0.05)
    client = server.client()
    key = process.engine.keys.base("x") + b":lock"
    with pytest.raises(LockLostError), process.lock("x") as lock:
        client.delete(key)  # an operator
        wait_until(lambda: not lock.owned())
    with pytest.raises(ZeroDivisionError) as raised, process.lock("x"):
        client.delete(key)
        raise ZeroDivisionError
    assert "lost" in raised.value.__notes__[0]
    client.close()
