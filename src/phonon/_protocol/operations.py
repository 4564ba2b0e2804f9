"""Operations: one change of one resource each. A call of a lane carries many of them."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any


class Code(IntEnum):
    """The codes of operations. The Lua text gets them as constants."""

    JOIN = 1
    APPEND = 2
    LEAVE = 3
    COMPLETE = 4
    FAIL = 5
    RESUME = 6
    REAP = 7
    LOCK = 8
    UNLOCK = 9
    RENEW = 10
    CLOSE = 11
    MODIFY = 12
    RESTORE = 13
    MEET = 14
    AWAIT = 15
    FORGET = 16
    HAND_OFF = 17
    REPLAY = 18
    DISCARD = 19
    COMPACT = 20
    TRACK = 21
    UNTRACK = 22
    CLAIM = 40
    DROP_SOURCE = 41
    INGEST = 42
    INGEST_NEW = 43


#: A full server still runs a call of nothing but these: they free memory, or lead to that.
_FREES = frozenset(
    map(
        int,
        {
            Code.LEAVE,
            Code.COMPLETE,
            Code.FAIL,
            Code.RESUME,
            Code.REAP,
            Code.UNLOCK,
            Code.RENEW,
            Code.CLOSE,
            Code.FORGET,
            Code.HAND_OFF,
            Code.DISCARD,
            Code.COMPACT,
            Code.UNTRACK,
        },
    )
)

#: The name of a lock's holder or waiter on the server; see `holder_name`.
Holder = str

#: Flags of `leave_many`.
FORCE = 1
MODIFICATIONS = 2

# Converted once, not for each message.
_JOIN, _APPEND, _LEAVE, _COMPLETE, _LOCK, _UNLOCK = (
    int(Code.JOIN),
    int(Code.APPEND),
    int(Code.LEAVE),
    int(Code.COMPLETE),
    int(Code.LOCK),
    int(Code.UNLOCK),
)


#: The bytes that each of many changes counts at the least, so that 256 of them fill a call.
_SHARE = 2048


class Operation:
    """One change, or many of a kind, on the way to the server.

    Many of a kind travel together, as one object: the server carries them out one by one and
    answers each, and none of them is ever sent without the others.

    Args:
        partition: The resource's partition.
        words: Code, the server's name of the resource, and further arguments; for many changes,
            the arguments of one after those of the other.
        size: About how many bytes it has.
        count: The number of changes.

    Attributes:
        owner: The object that waits for the answer; only the driver uses it.
        index: Its place among those that the owner sent together.
        sent: The calls that it was ever part of, latest first, as ``(call, place, earlier)``.
        held: Of a leave, the resources that its process was a member of: it is one again before the
            leave is repeated under another identity.
        ahead: Whether it goes before the operations that wait for the former self's reap, also when
            it is repeated under another identity.
    """

    __slots__ = ("ahead", "count", "held", "index", "owner", "partition", "sent", "size", "words")

    def __init__(
        self, partition: int, words: Sequence[Any], size: int = 64, count: int = 1
    ) -> None:
        self.partition = partition
        self.words = words
        self.size = size
        self.count = count
        self.owner: Any = None
        self.index = 0
        self.sent: tuple[Any, int, Any] | None = None
        self.held: Sequence[bytes] = ()
        self.ahead = False

    def __repr__(self) -> str:
        return f"<{self.code.name} {self.words[1:]!r} in partition {self.partition}>"

    @property
    def code(self) -> Code:
        """Return the operation's code."""
        return Code(self.words[0])

    @property
    def resource(self) -> bytes:
        """The server's name of the resource."""
        name: bytes = self.words[1]
        return name

    def changes(self) -> list[Sequence[Any]]:
        """Return the words of each change."""
        width = len(self.words) // self.count
        return [self.words[at : at + width] for at in range(0, len(self.words), width)]

    def each(self, answer: Any) -> Sequence[Any]:
        """Return the answers to the changes. A single answer is the answer to each of them."""
        if self.count == 1:
            return (answer,)
        return answer if answer.__class__ is list else [answer] * self.count

    @property
    def frees(self) -> bool:
        """Return whether a server that is out of memory still has to run it."""
        # A rebirth's join replaces a membership that is reaped, so it needs no more memory.
        return self.words[0] in _FREES or self.ahead


def join(partition: int, resource: bytes) -> Operation:
    """Become a member."""
    return Operation(partition, (_JOIN, resource))


def _many(partition: int, code: int, columns: Sequence[Sequence[Any]], size: int = 0) -> Operation:
    """Return many changes of a kind, given their arguments column by column."""
    count, width = len(columns[0]), len(columns) + 1
    words: list[Any] = [code] * (count * width)
    for place, column in enumerate(columns, 1):
        words[place::width] = column
    return Operation(partition, words, max(size + 64 * count, _SHARE * count), count)


def join_many(partition: int, resources: Sequence[bytes]) -> Operation:
    """Become a member of many resources."""
    return _many(partition, _JOIN, (resources,))


def append_many(partition: int, resources: Sequence[bytes], partials: Sequence[bytes]) -> Operation:
    """Become a member of many resources, and store a partial of each."""
    return _many(partition, _APPEND, (resources, partials), sum(map(len, partials)))


def leave_many(
    partition: int, resources: Sequence[bytes], flags: Sequence[int], partials: Sequence[bytes]
) -> Operation:
    """Store last partials, where not empty, and end memberships; see `FORCE`, `MODIFICATIONS`."""
    return _many(partition, _LEAVE, (resources, flags, partials), sum(map(len, partials)))


def complete_many(partition: int, resources: Sequence[bytes], tokens: Sequence[int]) -> Operation:
    """Drop many batches that were executed."""
    return _many(partition, _COMPLETE, (resources, tokens))


def resume_many(partition: int, resources: Sequence[bytes], tokens: Sequence[int]) -> Operation:
    """Take many batches of one's own up again."""
    return _many(partition, int(Code.RESUME), (resources, tokens))


def fail(
    partition: int, resource: bytes, token: int, error: bytes, delay_ms: int, attempts: int
) -> Operation:
    """Keep a batch whose execution failed for a retry, or park it after so many attempts."""
    words = (int(Code.FAIL), resource, token, error, delay_ms, attempts)
    return Operation(partition, words, len(error) + 64)


def hand_off(partition: int, resource: bytes, token: int, queue: bytes) -> Operation:
    """Leave a batch to a process that knows its class; see `class_queue`."""
    return Operation(partition, (int(Code.HAND_OFF), resource, token, queue))


def replay(partition: int, resource: bytes, token: int) -> Operation:
    """Take a parked batch up again, under a token of its own."""
    return Operation(partition, (int(Code.REPLAY), resource, token))


def discard(partition: int, resource: bytes, token: int) -> Operation:
    """Delete a parked batch."""
    return Operation(partition, (int(Code.DISCARD), resource, token))


def compact(
    partition: int, resource: bytes, first: int, count: int, digest: str, merged: list[bytes]
) -> Operation:
    """Replace partials by their merge, if the digest shows that they are unchanged."""
    words = (int(Code.COMPACT), resource, first, count, digest, merged)
    return Operation(partition, words, sum(map(len, merged)) + 128)


def modify(partition: int, resource: bytes, times: int = 1) -> Operation:
    """Become a member and count modifications."""
    return Operation(partition, (int(Code.MODIFY), resource, times))


def restore(partition: int, resource: bytes, modifications: dict[bytes, int]) -> Operation:
    """Become a member again, with the modifications of a session that had ended."""
    pairs = [word for pair in modifications.items() for word in pair]
    return Operation(partition, (int(Code.RESTORE), resource, pairs), 64 * (len(pairs) + 1))


def meet(partition: int, resource: bytes, parties: int, first_id: bytes) -> Operation:
    """Join a session of known parties, under the process's first id: a rebirth counts once."""
    return Operation(partition, (int(Code.MEET), resource, parties, first_id))


def await_parties(partition: int, resource: bytes, waiter: Holder) -> Operation:
    """Return the parties that came and left, and ask for mail when they change."""
    return Operation(partition, (int(Code.AWAIT), resource, waiter))


def forget(partition: int, resource: bytes, waiter: Holder) -> Operation:
    """Stop waiting for parties."""
    return Operation(partition, (int(Code.FORGET), resource, waiter))


def lock(
    partition: int,
    resource: bytes,
    holder: Holder,
    *,
    queue: bool,
    lease_ms: int = 0,
    thread: str = "",
) -> Operation:
    """Ask for a lock; ``lease_ms`` 0 ties it to the process's lease."""
    words = (_LOCK, resource, holder, int(queue), lease_ms, thread)
    return Operation(partition, words, 128)


def unlock(partition: int, resource: bytes, holder: Holder) -> Operation:
    """Release a lock, or leave its queue."""
    return Operation(partition, (_UNLOCK, resource, holder))


def renew(partition: int, resource: bytes, holder: Holder, lease_ms: int) -> Operation:
    """Make a lock's own lease longer, never shorter; 0 only asks whether it is held."""
    return Operation(partition, (int(Code.RENEW), resource, holder, lease_ms))


def reap(partition: int, dead: bytes, most: int, *, recovers: bool) -> Operation:
    """Take over up to so many resources of a dead process, or of a class queue."""
    return Operation(partition, (int(Code.REAP), dead, most, int(recovers)))


def close(partition: int) -> Operation:
    """Close the lane: the process stops."""
    return Operation(partition, (int(Code.CLOSE),))


def track(partition: int, resource: bytes) -> Operation:
    """Enter a resource into the registry by hand."""
    return Operation(partition, (int(Code.TRACK), resource))


def untrack(partition: int, resource: bytes) -> Operation:
    """Remove a resource from the registry by hand."""
    return Operation(partition, (int(Code.UNTRACK), resource))


def claim(partition: int, source: bytes, epoch: int = 0, position: bytes = b"") -> Operation:
    """Become the only reader of an ordered source, under a new epoch if ``epoch`` is 0."""
    return Operation(partition, (int(Code.CLAIM), source, epoch, position))


def drop_source(partition: int, source: bytes, epoch: int) -> Operation:
    """Forget where an ordered source is."""
    return Operation(partition, (int(Code.DROP_SOURCE), source, epoch))


def ingest(
    partition: int,
    source: bytes,
    epoch: int,
    positions: tuple[bytes, bytes],
    items: list[bytes],
) -> Operation:
    """Append the messages of an ordered source from one position to the next.

    Args:
        partition: The partition.
        source: The server's name of the source.
        epoch: The epoch of the claim.
        positions: The present position, empty at first, and the next one.
        items: Resource, partial, resource, partial, ...
    """
    words = (int(Code.INGEST), source, epoch, *positions, items)
    return Operation(partition, words, _size(items))


def ingest_new(
    partition: int, scope: bytes, window_ms: int, ids: list[bytes], items: list[bytes]
) -> Operation:
    """Append the partials of messages, unless messages with these ids were stored before.

    Args:
        partition: The partition.
        scope: The name within which the ids are unique.
        window_ms: Milliseconds for which the ids are remembered.
        ids: The ids of the messages.
        items: Resource, partial, resource, partial, ...
    """
    words = (int(Code.INGEST_NEW), scope, window_ms, ids, items)
    return Operation(partition, words, _size(items) + sum(map(len, ids)))


#: The bytes that each item of an operation counts at the least, so that 512 of them fill a call.
_ITEM = 1024


def _size(items: list[bytes]) -> int:
    return max(sum(map(len, items)), _ITEM * (len(items) // 2)) + 128


def holder_name(process: str, number: int, *, shared: bool = False, places: int = 0) -> Holder:
    """Return the name of a holder or waiter, which tells the server its request.

    Args:
        process: The id of its process.
        number: A number that the process has used for no other.
        shared: Whether it shares the lock with others that do.
        places: The number of holders that may share it at the same time; 0: any number.
    """
    return f"{process}/{number}{'s' * shared}{places or ''}"


def process_of(holder: Holder) -> str:
    """Return the id of the process that a holder or waiter belongs to."""
    return holder.rpartition("/")[0]


def is_shared(holder: Holder) -> bool:
    """Return whether a holder shares the lock, or a waiter wants to."""
    return "s" in holder.rpartition("/")[2]


_CLASS = "class:"


def class_queue(class_name: str) -> bytes:
    """Return the id under which batches of a class wait for a process that knows it."""
    return f"{_CLASS}{class_name}".encode("utf-8", "surrogatepass")


def class_of_queue(process: bytes) -> str | None:
    """Return whose batches wait under an id; None if it is a process's, or no id of ours."""
    try:
        text = process.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return text.removeprefix(_CLASS) if text.startswith(_CLASS) else None
