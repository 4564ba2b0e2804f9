"""Counts the exchanges with the server that each operation takes.

    python benchmarks/round_trips.py

Calls are counted by the server (``INFO commandstats``), exchanges by a socket: one begins with what
is sent behind an answer, however many calls are sent before the next answer is read. A call carries
many operations.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import redis

from common import Count, processes
from phonon import LruCache, Process


class Trips(NamedTuple):
    """The cost of an operation.

    Attributes:
        exchanges: Times that it waited for the server.
        calls: Calls of server functions in them, as the server counted.
    """

    exchanges: int
    calls: int


class CountingSocket(socket.socket):
    """A socket that counts how often something is sent behind an answer."""

    sent = 0
    is_behind_answer = True

    def sendall(self, *arguments: Any) -> None:
        """Count, and send."""
        if self.is_behind_answer:
            CountingSocket.sent += 1
            self.is_behind_answer = False
        super().sendall(*arguments)

    def recv(self, *arguments: Any) -> bytes:
        """Receive, and note it."""
        self.is_behind_answer = True
        return super().recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        """Receive, and note it."""
        self.is_behind_answer = True
        return super().recv_into(*arguments)


class Counting(redis.UnixDomainSocketConnection):
    """A connection that counts exchanges."""

    def _connect(self) -> CountingSocket:
        with super()._connect() as plain:
            timeout = plain.gettimeout()
            counting = CountingSocket(fileno=plain.detach())
        counting.settimeout(timeout)
        return counting


@contextmanager
def counted_processes(path: str, number: int) -> Iterator[list[Process]]:
    """Processes over connections that count, in a namespace of their own.

    Args:
        path: The server's socket.
        number: The number.
    """
    with ExitStack() as stack:
        pool = redis.ConnectionPool(connection_class=Counting, path=path, db=1)
        client = stack.enter_context(redis.Redis(connection_pool=pool))
        stack.callback(pool.disconnect)
        made = [
            stack.enter_context(Process(client=client, namespace="trips", heartbeat_interval=50))
            for _ in range(number)
        ]
        # No heartbeat comes in between: the first was at the start.
        while not all(process.engine.heartbeat.beats for process in made):
            time.sleep(0.01)
        yield made


def count(client: Any, operation: Callable[[], object]) -> Trips:
    """Count the cost of an operation."""
    client.config_resetstat()
    before = CountingSocket.sent
    operation()
    exchanges = CountingSocket.sent - before
    calls = client.info("commandstats").get("cmdstat_fcall", {"calls": 0})["calls"]
    return Trips(exchanges, calls)


def measure(path: str) -> dict[str, Trips]:
    """Count the operations that matter.

    Args:
        path: The socket of a server without other clients.
    """
    found: dict[str, Trips] = {}
    with counted_processes(path, 2) as (one, other), redis.Redis(unix_socket_path=path) as client:
        here = one.create_reference("x")  # the work of a first call is done now
        found["join"] = count(client, lambda: other.create_reference("x"))
        there = other.create_reference("x")
        found["leave, not the last"] = count(client, here.dereference)
        found["leave, the last, nothing to execute"] = count(client, there.dereference)
        update = Count(one, 1, doc={"n": 1}, init_cache=False)
        found["append"] = count(client, update.cache)
        found["leave, the last, with a batch"] = count(client, update.end_session)
        cache: LruCache[Count] = LruCache()

        def batch() -> None:
            with one.batch():
                for i in range(1000):
                    cache.set(i % 600, Count(one, i % 600, doc={"n": 1}))

        found["batch of 1,000 messages on 600 keys"] = count(client, batch)
        cache.expire_all()
        with one.batch():
            for i in range(10_000):
                cache.set(i, Count(one, i, doc={"n": 1}))
        found["expire_all of 10,000 sessions"] = count(client, cache.expire_all)
    return found


#: Exchanges at the most.
TARGETS = {
    "join": 1,
    "append": 1,
    "leave, not the last": 1,
    "leave, the last, nothing to execute": 1,
    "leave, the last, with a batch": 2,
    "batch of 1,000 messages on 600 keys": 1,
    "expire_all of 10,000 sessions": 20,
}


def main() -> None:
    """Print a table."""
    with processes() as (process,):
        path = process.client.connection_pool.connection_kwargs["path"]
        found = measure(path)
    print(f"{'operation':<40}{'exchanges':>10}{'at most':>10}{'calls':>10}")
    for name, trips in found.items():
        print(f"{name:<40}{trips.exchanges:>10}{TARGETS[name]:>10}{trips.calls:>10}")


if __name__ == "__main__":
    main()
