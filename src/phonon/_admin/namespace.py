"""An operator's access to a namespace: calls outside of lanes, without a process."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from phonon._protocol.library import Library, Request
from phonon._protocol.partitions import DEFAULT_PARTITIONS, Partitions
from phonon._transport.server import Server
from phonon._transport.steps import Steps
from phonon.errors import ServerError

#: The most processes whose cards and counts are asked for in one call.
MOST_PROCESSES = 50


class Namespace:
    """Asks the partitions of a namespace.

    Args:
        server: The server.
        library: Knows the names of the server's functions.
        name: The namespace.
        timeout: Seconds to go on asking a server that does not answer.

    Attributes:
        is_known: Whether any process has ever used the namespace on this server.
        skew: Seconds that the server's clock is ahead of this machine's; see `now`.
    """

    def __init__(self, server: Server, library: Library, name: str, timeout: float) -> None:
        self.server = server
        self.library = library
        self.name = name
        self.timeout = timeout
        self.partitions = Partitions(name, DEFAULT_PARTITIONS)
        self.is_known = False
        self._cards: dict[bytes, tuple[str, int]] = {}

    def ask(self, requests: Sequence[Request]) -> Steps[list[Any]]:
        """Return the answers to requests, in order.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        replies = yield from self.server.exchange(requests, self.timeout)
        for request, reply in zip(requests, replies, strict=True):
            if isinstance(reply, Exception):
                raise self._explained(request, reply)
        return replies

    def _explained(self, request: Request, error: Exception) -> Exception:
        from redis.exceptions import ResponseError  # noqa: PLC0415

        if not isinstance(error, ResponseError):
            return error
        if "FUNCTION" in str(error).upper() and "NOPERM" in str(error):
            return ServerError(
                f"{self.server.address} lacks the function library of this release of Phonon, and "
                "this user may not load it: start a worker of the same release, or grant "
                "+function|load"
            )
        return self.server.explain(error, request.words[4:5])

    def read(self, partition: int | None, function: str, *arguments: bytes) -> Request:
        """Return the call of a function that writes nothing.

        Args:
            partition: The partition; None for a function of the namespace.
            function: The function's name, without the library's.
            arguments: As the function takes them.
        """
        prefix = self._prefix(partition)
        # A user with only the right to read may not run FCALL.
        words = (b"FCALL_RO", self.library.function(function), b"1", prefix, *arguments)
        return Request(prefix, words)

    def write(self, partition: int | None, function: str, *arguments: bytes) -> Request:
        """Return the call of a function that writes."""
        prefix = self._prefix(partition)
        return self.library.request(function, prefix, *arguments)

    def _prefix(self, partition: int | None) -> bytes:
        partitions = self.partitions
        return partitions.prefix if partition is None else partitions.prefixes[partition]

    def everywhere(self, function: str, *arguments: bytes) -> list[Request]:
        """Return the call of a function that reads, for each partition."""
        return [self.read(p, function, *arguments) for p in range(self.partitions.count)]

    def roster(self) -> Steps[tuple[float, dict[bytes, tuple[int, bytes, bytes]]]]:
        """Return the time, and the deadline, the card and the report of each process.

        Returns:
            Seconds since the epoch by the server's clock; and by process id: microseconds, or 0 if
            it was declared dead, its card, and its report.
        """
        found: dict[bytes, tuple[int, bytes, bytes]] = {}
        cursor, now = b"0", 0.0
        while True:
            request = self.read(None, "admin_roster", cursor)
            ((now_us, count, cursor, rows),) = yield from self.ask([request])
            now = now_us / 1e6
            self.is_known = count != b""
            if self.is_known and int(count) != self.partitions.count:
                self.partitions = Partitions(self.name, int(count))
            for pid, deadline, card, report in zip(
                rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True
            ):
                found[pid] = int(float(deadline)), card, report
                self._cards[pid] = place_of(card)
            if cursor == b"0":
                return now, found

    def places(self, processes: Iterable[bytes]) -> Steps[dict[bytes, tuple[str, int]]]:
        """Return host and pid of processes, by id."""
        wanted = list(dict.fromkeys(processes))
        unknown = [pid for pid in wanted if pid not in self._cards]
        for first in range(0, len(unknown), MOST_PROCESSES):
            page = unknown[first : first + MOST_PROCESSES]
            (cards,) = yield from self.ask([self.read(None, "cards", *page)])
            for pid, card in zip(page, cards, strict=True):
                if card:
                    self._cards[pid] = place_of(card)
        return {pid: self._cards.get(pid, ("", 0)) for pid in wanted}


def unpacked(data: bytes) -> dict[str, Any]:
    """Return a process's card or report; nothing if it cannot be read."""
    try:
        found = msgpack.unpackb(data, strict_map_key=False)
    except Exception:  # noqa: BLE001 - msgpack raises many errors; an operator must see the other processes
        return {}
    return found if isinstance(found, dict) else {}


def place_of(card: bytes) -> tuple[str, int]:
    """Return the host and the pid of a card."""
    known = unpacked(card)
    pid = known.get("pid", 0)
    return str(known.get("host", "")), pid if isinstance(pid, int) else 0
