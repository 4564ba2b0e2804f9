"""Merging partials of a session that goes on, so that a busy one neither grows nor ends slowly.

The process whose `append` was the last of a number merges the collected partials: it reads
partials, merges them, and replaces them if they are still there. No process's death loses anything
at any point: until the one step that replaces them, the partials are as they were. The step may be
refused (the session has ended, another process was faster) without harm.
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

#: Each time that so many more partials have come together it is time to merge; as in prelude.lua.
COMPACT_AT = 64
#: Of so many partials at least one must go; otherwise it is left for a time when more is won.
WORTHWHILE = 4

#: Sessions whose partials are merged at a time: a bound on what is held in memory.
TOGETHER = 8

#: Merges partials of a resource, in their order, into fewer. Those that it cannot merge it leaves.
Merge = Callable[[bytes, list[bytes]], list[bytes]]


class LongSession(NamedTuple):
    """A session with many partials.

    Attributes:
        partition: Where its resource is.
        name: The server's name of that.
        partials: How many there are.
    """

    partition: int
    name: bytes
    partials: int


def window(count: int) -> int:
    """Return how many of the last partials to look at, when there are so many.

    Most often that is all of them. Where partials have piled up that no process here can merge, it
    is now and then many and mostly few: to look at all of them would be more work each time.
    """
    times = count // COMPACT_AT
    return COMPACT_AT * (times & -times)


def digest(partials: Iterable[bytes]) -> str:
    """Return the digest by which the server sees that the partials are still the same."""
    parts = [part for partial in partials for part in (b"%d:" % len(partial), partial)]
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()


def compact(identity: Identity, sessions: Sequence[LongSession], merge: Merge) -> Flow[int]:
    """Merge some of the partials that are not in a batch. Errors leave them as they are.

    Args:
        identity: The process. It need not be a member.
        sessions: Those with many partials.
        merge: Merges some.

    Returns:
        How many sessions have fewer now.
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
    """Return the operations that replace partials by what they come to."""
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
        Whether they are all here: they may have been taken into a batch meanwhile.
    """
    partition, name = place
    last = b"%d" % (start + size - 1)
    while len(partials) < size:
        words = b"%d" % (start + len(partials)), last
        try:
            piece = yield from read(identity.in_partition(partition, "session", name, *words))
        except PhononError:
            return False
        if not piece:
            return False
        partials += piece
    return True
