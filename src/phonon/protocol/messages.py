"""The answers of the steps. Each begins with its kind and whether the registry may be cleared."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Batch(NamedTuple):
    """All partials of one session, taken together for execution.

    Attributes:
        token: Grows strictly per resource; the same in every attempt at this batch.
        attempt: How many attempts have failed so far.
        size: How many partials there are.
        partials: The first of them; the rest is fetched.
    """

    token: int
    attempt: int
    size: int
    partials: list[bytes]


class Left(NamedTuple):
    """The answer of ``leave``.

    Attributes:
        clear: 1 if the process has nothing more to do with the resource.
        last: Whether the process was a member and nobody is left.
        remaining: Members that are left.
        deferred: Whether the partials wait for the running batch's owner.
        modifications: Process id and number of times, for each that modified the resource.
        batch: What this process is to execute, if anything.
        many: How many partials there are, if it is time to merge some; else 0.
    """

    clear: int
    last: bool
    remaining: int
    deferred: bool
    modifications: dict[bytes, int]
    batch: Batch | None
    many: int = 0


class Ran(NamedTuple):
    """The answer of ``complete``, ``fail`` and ``resume``.

    Attributes:
        kind: done, again, run, retry, parked or lost.
        clear: 1 if the process has nothing more to do with the resource.
        batch: What this process is to execute next, if anything.
    """

    kind: str
    clear: int
    batch: Batch | None


class Locked(NamedTuple):
    """The answer of ``lock``.

    Attributes:
        kind: granted, wait or busy.
        clear: 1 if the process has nothing more to do with the resource.
        number: The token if granted, else milliseconds until it is worth asking again.
        holder: Who is in the way, if somebody is.
        since_ms: When it came, by the server's clock.
        thread: Its thread.
    """

    kind: str
    clear: int
    number: int
    holder: str = ""
    since_ms: int = 0
    thread: str = ""


def pairs(flat: Sequence[Any]) -> dict[bytes, int]:
    """``[k, v, k, v, ...]`` as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def stored(answer: Sequence[Any]) -> int:
    """Read the answer of ``append``: how many partials there are, if some are to be merged."""
    return sum(answer[2:])


def left(answer: Sequence[Any]) -> Left:
    """Read the answer of ``leave``."""
    kind = answer[0]
    # "lost" is a repeat of "run" whose batch was taken over meanwhile: all else stands.
    _, clear, token, remaining, was_member = answer[:5]
    if kind == b"held":
        many = sum(answer[5:])
        return Left(clear, False, remaining, False, {}, None, many)  # noqa: FBT003 - in field order
    batch = Batch(token, *answer[6:9]) if kind == b"run" else None
    last = bool(was_member) and not remaining
    deferred = kind in (b"deferred", b"lost")
    many = sum(answer[6:]) if kind == b"deferred" else 0
    return Left(clear, last, remaining, deferred, pairs(answer[5]), batch, many)


def ran(answer: Sequence[Any]) -> Ran:
    """Read the answer of ``complete``, ``fail`` or ``resume``."""
    kind = answer[0].decode()
    batch = Batch(*answer[2:6]) if kind in ("again", "run") else None
    return Ran(kind, answer[1], batch)


def locked(answer: Sequence[Any]) -> Locked:
    """Read the answer of ``lock``."""
    kind, clear, number = answer[0].decode(), answer[1], answer[2]
    if kind == "granted":
        return Locked(kind, clear, number)
    thread = answer[5].decode("utf-8", "replace")
    return Locked(kind, clear, number, answer[3].decode(), answer[4], thread)
