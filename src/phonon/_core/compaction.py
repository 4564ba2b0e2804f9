"""Merges partials of open sessions, so that a busy session neither grows nor ends slowly.

Each time a session has so many more partials, the process that stored the last one merges some: it
reads partials, merges them, and replaces them if they are unchanged. A process that dies meanwhile
loses no data, because the partials stay as they are until the one step that replaces them. That
step may be refused (the session has ended, another process was faster) without harm.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from phonon._core.flows import Flow, Read, Send, call, read
from phonon._core.identity import Identity
from phonon._protocol import operations
from phonon._protocol.operations import Operation
from phonon.errors import PhononError

#: The growth of a session, in partials, after which some are merged; as in prelude.lua.
COMPACT_AT = 64
#: The merge must remove one in so many partials; otherwise it is left for later.
WORTHWHILE = 4

#: Sessions whose partials are merged at a time: a bound on what is held in memory.
TOGETHER = 8

#: Merges partials of a resource, in order, into fewer, and leaves those that do not merge.
Merge = Callable[[bytes, list[bytes]], list[bytes]]


class LongSession(NamedTuple):
    """A session with many partials.

    Attributes:
        partition: The resource's partition.
        name: The server's name of the resource.
        partials: The number of its partials.
    """

    partition: int
    name: bytes
    partials: int


def window(count: int) -> int:
    """Return how many of the last partials to read, given their number.

    Usually all of them. If many partials have piled up that no process can merge, it is usually
    few and now and then many: reading all of them each time would be more and more work.
    """
    times = count // COMPACT_AT
    return COMPACT_AT * (times & -times)


def digest(partials: Iterable[bytes]) -> str:
    """Return the digest with which the server checks that the partials are unchanged."""
    parts = [part for partial in partials for part in (b"%d:" % len(partial), partial)]
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()


def compact(identity: Identity, sessions: Sequence[LongSession], merge: Merge) -> Flow[int]:
    """Merge some of the partials that are not in a batch. Errors leave them as they are.

    Args:
        identity: The process. It need not be a member.
        sessions: The sessions with many partials.
        merge: Merges partials.

    Returns:
        How many sessions have fewer partials now.
    """
    shorter = 0
    for first in range(0, len(sessions), TOGETHER):
        sent = yield from _merged(identity, sessions[first : first + TOGETHER], merge)
        answers = (yield Send(sent)) if sent else ()
        shorter += sum([isinstance(answer, list) for answer in answers])
    return shorter


def _merged(
    identity: Identity, sessions: Sequence[LongSession], merge: Merge
) -> Flow[list[Operation]]:
    """Return the operations that replace partials by their merge."""
    requests = []
    for partition, name, count in sessions:
        words = b"%d" % (count - window(count)), b"%d" % (count - 1)
        requests.append(identity.in_partition(partition, "candidates", name, *words))
    replies = yield Read(requests)
    sent: list[Operation] = []
    for (partition, name, _), reply in zip(sessions, replies, strict=True):
        if isinstance(reply, Exception):
            continue
        start, size, *partials = reply
        place = partition, name
        complete = yield from _complete(identity, place, start, size, partials)
        if not partials or not complete:
            continue
        outcome = yield from call(functools.partial(merge, name, partials))
        if outcome.error is not None and not isinstance(outcome.error, Exception):
            raise outcome.error
        merged = outcome.value
        if merged and (len(partials) - len(merged)) * WORTHWHILE >= len(partials):
            seen = digest(partials)
            sent.append(operations.compact(partition, name, start, size, seen, merged))
    return sent


def _complete(
    identity: Identity, place: tuple[int, bytes], start: int, size: int, partials: list[bytes]
) -> Flow[bool]:
    """Fetch partials that did not fit into the first answer.

    Returns:
        Whether all were fetched: a batch may have taken them meanwhile.
    """
    partition, name = place
    last = b"%d" % (start + size - 1)
    while len(partials) < size:
        words = b"%d" % (start + len(partials)), last
        try:
            more = yield from read(identity.in_partition(partition, "session", name, *words))
        except PhononError:
            return False
        if not more:
            return False
        partials += more
    return True
