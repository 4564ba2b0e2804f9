"""Merging partials of a session that goes on, so that a busy one neither grows nor ends slowly.

The process whose `append` was the last of a number merges the collected partials: it reads
partials, merges them, and replaces them if they are still there. No process's death loses anything
at any point: until the one step that replaces them, the partials are as they were. The step may be
refused (the session has ended, another process was faster) without harm.
"""

import hashlib
from collections.abc import Callable, Iterable

from phonon._core.flows import Flow, call, read, single
from phonon._core.identity import Identity
from phonon._protocol import operations
from phonon.errors import PhononError

#: Each time that so many more partials have come together it is time to merge; as in prelude.lua.
COMPACT_AT = 64
#: Of so many partials at least one must go; otherwise it is left for a time when more is won.
WORTHWHILE = 4

#: Merges partials, in their order, into fewer. Those that it cannot merge it leaves as they are.
Merge = Callable[[list[bytes]], list[bytes]]


def window(count: int) -> int:
    """Return how many of the last partials to look at, when there are so many.

    Most often that is all of them. Where partials have piled up that no process here can merge, it
    is now and then many and mostly few: to look at all of them would be more work each time.
    """
    times = count // COMPACT_AT
    return COMPACT_AT * (times & -times)


def digest(partials: Iterable[bytes]) -> str:
    """Return the digest by which the server sees that the partials are still the same."""
    total = hashlib.sha1(usedforsecurity=False)
    for partial in partials:
        total.update(b"%d:" % len(partial))
        total.update(partial)
    return total.hexdigest()


def compact(
    identity: Identity, partition: int, name: bytes, count: int, merge: Merge
) -> Flow[bool]:
    """Merge some of the partials that are not in a batch. Errors leave them as they are.

    Args:
        identity: The process. It need not be a member.
        partition: Where the resource is.
        name: The server's name of it.
        count: How many partials there are.
        merge: Merges some.

    Returns:
        Whether there are fewer now.
    """
    try:
        first = count - window(count)
        start, size, *partials = yield from read(
            identity.in_partition(partition, "candidates", name, b"%d" % first, b"%d" % (count - 1))
        )
        while len(partials) < size:
            at = start + len(partials)
            piece = yield from read(
                identity.in_partition(
                    partition, "session", name, b"%d" % at, b"%d" % (start + size - 1)
                )
            )
            if not piece:  # taken into a batch meanwhile
                return False
            partials += piece
        if not partials:
            return False
        outcome = yield from call(lambda: merge(partials))
        if outcome.error is not None and not isinstance(outcome.error, Exception):
            raise outcome.error
        merged = outcome.value
        if not merged or (len(partials) - len(merged)) * WORTHWHILE < len(partials):
            return False
        answer = yield from single(
            operations.compact(partition, name, start, size, digest(partials), merged)
        )
    except PhononError:
        return False
    return isinstance(answer, list)
