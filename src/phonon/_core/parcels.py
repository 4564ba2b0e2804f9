"""Parcels: local data on its way to the server, in groups that travel as one operation."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

#: The most changes in one operation, and how many are sent while the next ones are made.
GROUP = 128
AHEAD = 32
#: Bytes of partials in one operation, so that a few of them are a call.
MOST_BYTES = 256 * 1024


class Parcel(Protocol):
    """Local data on its way to the server: the only interface of an update that the core knows."""

    #: The resource.
    resource_id: str

    @property
    def forced(self) -> bool:
        """Return whether the session ends without waiting for other processes."""

    def take(self) -> bytes | None:
        """Move the unsent data out, as one partial; None if there is none."""

    def take_last(self) -> tuple[bytes | None, Any]:
        """Do what `take` does, and return the content too, or None if it has to be decoded."""

    def put_back(self, partial: bytes) -> None:
        """Take back a partial that the server refused: its data is unsent again."""


class Ending(NamedTuple):
    """A session to be ended here.

    Attributes:
        resource: The resource.
        parcel: The update with the last data, which executes the batch if this process gets it.
        force: Whether to execute the data so far even if others hold the resource.
        modifications: Whether to ask for the session's modifications.
    """

    resource: str
    parcel: Any = None
    force: bool = False
    modifications: bool = False


#: The modifications of most sessions, for which no caller has asked.
_NOT_ASKED_FOR: dict[str, int] = {}


class SessionResult:
    """The result of ending a session.

    Attributes:
        last: Whether this process was the last member.
        left: The number of members that are left.
        modifications: By process id, if they were asked for.
        errors: The errors of sending the data, or of ``execute``; see `failed`.
        sent: Whether the data is on the server.
    """

    __slots__ = ("errors", "last", "left", "modifications", "sent")

    def __init__(self) -> None:
        self.last = False
        self.left = 0
        self.modifications = _NOT_ASKED_FOR
        self.errors: Sequence[BaseException] = ()  # there are many results, and few errors
        self.sent = False

    def failed(self, error: BaseException) -> None:
        """Add an error."""
        self.errors = [*self.errors, error]


class Group(NamedTuple):
    """Items of one partition that travel together.

    Attributes:
        partition: The partition.
        items: The items.
        names: The server's names of their resources.
    """

    partition: int
    items: Sequence[Any]
    names: Sequence[bytes]


def groups(items: Iterable[Any], places: Iterable[tuple[int, bytes]]) -> list[Group]:
    """Return items in groups of a partition, each of a size that travels as one operation.

    Args:
        items: Anything.
        places: The partition of each, and the server's name of its resource.
    """
    partitions: dict[int, tuple[list[Any], list[bytes]]] = {}
    for item, (partition, name) in zip(items, places, strict=True):
        group = partitions.get(partition)
        if group is None:
            group = partitions[partition] = [], []
        group[0].append(item)
        group[1].append(name)
    return [
        Group(partition, members[first : first + GROUP], names[first : first + GROUP])
        for partition, (members, names) in partitions.items()
        for first in range(0, len(members), GROUP)
    ]


def while_sending(making: Iterator[int], count: int) -> Iterator[object] | None:
    """Return an iterator that makes changes, as many with each step as are worth sending.

    Args:
        making: Makes some changes with each step, and yields their number.
        count: The number of all changes. If it is small, they are made now.
    """
    if count >= 2 * AHEAD:
        return _worth_sending(making)
    deque(making, 0)
    return None


def _worth_sending(making: Iterator[int]) -> Iterator[None]:
    unsent = 0
    for count in making:
        unsent += count
        if unsent >= AHEAD:
            yield
            unsent = 0
    yield


def pieces(partials: Sequence[bytes]) -> Iterator[slice]:
    """Return slices of partials that travel as one operation: one slice, unless they are large."""
    sizes = list(map(len, partials))
    if sum(sizes) <= MOST_BYTES:
        yield slice(0, len(sizes))
        return
    first = size = 0
    for at, length in enumerate(sizes):
        if size and size + length > MOST_BYTES:
            yield slice(first, at)
            first, size = at, 0
        size += length
    yield slice(first, len(sizes))


def one_each(endings: Sequence[Ending]) -> list[Ending]:
    """Return one ending for each update and resource."""
    return list({(ending.resource, id(ending.parcel)): ending for ending in endings}.values())
