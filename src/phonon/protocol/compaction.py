"""Merging partials of a session that goes on, so that a busy one neither grows nor ends slowly.

Whoever's `append` was the last of a number merges what has come together, on its own account: it
reads partials, merges them, and replaces them if they are still there. Nothing is lost at any
point, by anybody's death: until the one step that replaces them, the partials are as they were. It
may be refused (the session has ended, another process was faster) without harm.
"""

import hashlib
from collections.abc import Callable, Iterable

from phonon.errors import PhononError
from phonon.protocol.effects import Execute, Flow, Participant

#: Each time that so many partials more have come together it is time to merge; as in updates.lua.
COMPACT_AT = 64
#: Of so many partials at least one must go; otherwise it is left for a time when more is won.
WORTHWHILE = 4

#: Merges partials, in their order, into fewer. What it cannot merge it leaves as it is.
Merger = Callable[[list[bytes]], list[bytes]]


def window(count: int) -> int:
    """How many of the last partials to look at, when there are so many.

    Most often that is all of them. Where partials have piled up that nobody here can merge it is
    now and then many and mostly few: to look at all of them each time would be more work with
    each time.
    """
    times = count // COMPACT_AT
    return COMPACT_AT * (times & -times)


def digest(partials: Iterable[bytes]) -> str:
    """What the step ``compact`` compares: the partials are still the same."""
    total = hashlib.sha1(usedforsecurity=False)
    for partial in partials:
        total.update(b"%d:" % len(partial))
        total.update(partial)
    return total.hexdigest()


def compact(me: Participant, base: bytes, count: int, merge: Merger) -> Flow[bool]:
    """Merge some of the partials that are not in a batch.

    What goes wrong leaves them as they are, and is nobody's business: an answer that does not come
    as well as an error of the server's.

    Args:
        me: The process. It need not be a member.
        base: The resource.
        count: How many partials there are.
        merge: Merges some.

    Returns:
        Whether there are fewer now.
    """
    try:
        first, size, *partials = yield me.plain(
            "candidates", base, count - window(count), count - 1
        )
        while len(partials) < size:
            at = first + len(partials)
            piece = yield me.plain("session", base, at, first + size - 1)
            if not piece:  # taken into a batch meanwhile
                return False
            partials += piece
        if not partials:
            return False
        outcome = yield Execute(lambda: merge(partials))
        if outcome.error is not None and not isinstance(outcome.error, Exception):
            raise outcome.error
        merged = outcome.value
        if not merged or (len(partials) - len(merged)) * WORTHWHILE < len(partials):
            return False
        # Not kept: whoever comes next does it as well.
        answer = yield me.step("compact", base, first, size, digest(partials), *merged)
    except PhononError:
        return False
    return bool(answer[0] == b"compacted")
