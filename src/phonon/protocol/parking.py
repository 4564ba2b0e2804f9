"""Flows of parked batches: list them, look into them, execute them after all, delete them.

A registry of its own names the resources that have any. Like a process's it may name too many but
never too few: it is written before a batch is parked, and cleared when somebody finds none.
"""

from typing import Any, NamedTuple

import msgpack

from phonon.protocol.effects import Call, Flow, Participant
from phonon.protocol.messages import Batch

#: As much of an error's text as is kept with a batch, characters.
ERROR_LENGTH = 4000

#: Stands where a process's id does.
_NAME = b"parked"


class Entry(NamedTuple):
    """A parked batch, as the server knows it.

    Attributes:
        base: Whose it is.
        token: Which.
        error: What its last attempt raised.
        attempts: How many there were.
        owner: The process that made the last one.
        since_ms: When the session ended, by the server's clock.
        at_ms: When it was parked.
        size: How many partials it has.
    """

    base: bytes
    token: int
    error: str
    attempts: int
    owner: str
    since_ms: int
    at_ms: int
    size: int


def text_of(error: BaseException) -> bytes:
    """An error, as it is kept with a batch."""
    text = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
    return text.encode("utf-8", "backslashreplace")


def index(me: Participant, base: bytes) -> Flow[None]:
    """Note that a resource has, or is about to have, a parked batch."""
    yield Call("hold", me.keys.registry(_NAME), (base, _NAME), keep=True)


def resources(me: Participant) -> Flow[list[bytes]]:
    """The bases of the resources that may have parked batches."""
    key = me.keys.registry(_NAME)
    return list((yield Call("", key, (b"ZRANGE", key, 0, -1))))


def entries(me: Participant, base: bytes) -> Flow[list[Entry]]:
    """The parked batches of a resource, in token order. Without any it is indexed no more."""
    found = yield from _entries(me, base)
    if not found:
        key = me.keys.registry(_NAME)
        yield Call("", key, (b"ZREM", key, base))
        found = yield from _entries(me, base)
        if found:  # in the meantime
            yield from index(me, base)
    return found


def _entries(me: Participant, base: bytes) -> Flow[list[Entry]]:
    answer = yield me.plain("parked", base)
    return sorted(map(_entry, [base] * (len(answer) // 3), answer[::3], answer[1::3], answer[2::3]))


def _entry(base: bytes, token: bytes, packed: bytes, size: int) -> Entry:
    facts: dict[str, Any] = msgpack.unpackb(packed, unicode_errors="backslashreplace")
    return Entry(
        base,
        int(token),
        facts["error"],
        facts["attempts"],
        facts["owner"],
        facts["since"],
        facts["at"],
        size,
    )


def look(me: Participant, base: bytes, token: int, first: int, last: int) -> Flow[list[bytes]]:
    """Some of a parked batch's partials."""
    return list((yield me.plain("look", base, token, first, last)))


class Replayed(NamedTuple):
    """The answer of ``replay``.

    Attributes:
        kind: run, busy or missing; lost if it ran but was taken over.
        batch: What is to be executed now, under its new token.
    """

    kind: str
    batch: Batch | None


def replay(me: Participant, base: bytes, token: int) -> Flow[Replayed]:
    """Take a parked batch up again, under a new token."""
    yield from me.hold(base)
    answer = yield me.step("replay", base, token, keep=True)
    kind = answer[0].decode()
    if kind == "run":
        return Replayed(kind, Batch(*answer[2:6]))
    yield from me.let_go(base, answer[1])
    return Replayed(kind, None)


def discard(me: Participant, base: bytes, token: int) -> Flow[bool]:
    """Delete a parked batch.

    Returns:
        Whether it was there.
    """
    answer = yield me.step("discard", base, token)
    yield from me.let_go(base, answer[1])
    yield from entries(me, base)
    return bool(answer[0] == b"discarded")
