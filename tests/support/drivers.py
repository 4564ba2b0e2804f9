"""A process reduced to its lanes, for tests of the drivers: real servers, no heartbeat."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import redis
import redis.asyncio

from phonon._core.flows import REBORN, Flow, Send
from phonon._protocol.lane import Lane, add_contents
from phonon._protocol.library import Library, Request, default
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import Partitions
from phonon._transport.async_io import AsyncNode
from phonon._transport.server import Server
from phonon._transport.sync_io import SyncNode
from support import operations as ops
from support.world import Redis

COUNT = 16


class Identity:
    """Lanes, and a rebirth that is done when the test says so.

    Args:
        namespace: The namespace.

    Attributes:
        suspects: The lanes that drivers have suspected.
        deliver: The driver's.
    """

    def __init__(self, namespace: str) -> None:
        self.partitions = Partitions(namespace, COUNT)
        self.library: Library = default()
        self.lanes: list[Lane] = []
        self.suspects: list[tuple[Lane, str, int]] = []
        self.deliver: Callable[[Operation, Any], object] = lambda *_: None
        self._callbacks: list[Callable[[], object]] = []

    def suspect(self, lane: Lane, kind: str, last: int) -> None:
        lane.fence()
        self.suspects.append((lane, kind, last))

    def on_rebirth(self, callback: Callable[[], object]) -> None:
        self._callbacks.append(callback)

    def everywhere(self, name: str, *arguments: bytes) -> list[Request]:
        return [self.library.request(name, p, *arguments) for p in self.partitions.prefixes]

    def opening(self, process: bytes) -> list[Request]:
        return self.everywhere("open", process, b"%d" % COUNT)

    def opened(self, process: bytes, replies: Iterable[Any]) -> list[Lane]:
        return [Lane(p, process, number) for p, (number, _) in enumerate(replies)]

    def rebirth(self, new: bytes) -> Generator[list[Request], list[Any], None]:
        """Go on under another id: fence all lanes, find out what became of their calls."""
        old = self.lanes
        for lane in old:
            lane.fence()
        opened = self.opened(new, (yield self.opening(new)))
        records = yield self.everywhere("fence", old[0].process)
        self.lanes = opened
        for lane, into, record in zip(old, opened, records, strict=True):
            call = lane.call
            lane.call = None
            if call is not None:
                done = record[0] == call.sequence and record[2] == call.digest
                answers = _unpacked(record[1]) if done else []
                for i, operation in enumerate(call.operations):
                    if done:
                        self.deliver(operation, answers[i])
                    else:
                        self._again(operation, into)
            for queue in (lane.queue, lane.deferred):
                while queue:
                    self._again(queue.popleft(), into)
        for callback in self._callbacks:
            callback()

    def _again(self, operation: Operation, lane: Lane) -> None:
        if operation.code in (ops.Code.LOCK, ops.Code.UNLOCK):
            self.deliver(operation, REBORN)
        else:
            lane.enqueue(operation)

    def place(self, name: bytes) -> tuple[int, bytes]:
        return self.partitions.of(name), name

    def key(self, kind: str, name: bytes) -> bytes:
        prefix = self.partitions.prefixes[self.partitions.of(name)]
        return prefix + kind.encode() + b":" + name

    def append(self, name: bytes, partial: bytes) -> Operation:
        return ops.append(*self.place(name), partial)


def _unpacked(packed: bytes) -> list[Any]:
    import msgpack  # noqa: PLC0415 - only here

    answers: list[Any] = msgpack.unpackb(packed, raw=True)
    add_contents(answers, None)
    return answers


def sync_server(path: str) -> Server:
    options = {"path": path, "db": 1}
    node = SyncNode(redis.connection.UnixDomainSocketConnection, options)
    return Server(node, default(), "the server", longest_pause=0.05)


def async_server(path: str) -> Server:
    options = {"path": path, "db": 1}
    node = AsyncNode(redis.asyncio.UnixDomainSocketConnection, options)
    return Server(node, default(), "the server", longest_pause=0.05)


def send(operations: Sequence[Operation], *, first: bool = False) -> Flow[list[Any]]:
    answers: list[Any] = yield Send(operations, first)
    return answers


def calls_of(server: Redis) -> int:
    """Return the number of functions that the server has run."""
    with server.client() as client:
        stats = client.info("commandstats")
        return sum(
            stats[name]["calls"] for name in ("cmdstat_fcall", "cmdstat_fcall_ro") if name in stats
        )


def partials(server: Redis, identity: Identity, name: bytes) -> list[bytes]:
    with server.client() as client:
        return [bytes(value) for value in client.lrange(identity.key("partials", name), 0, -1)]
