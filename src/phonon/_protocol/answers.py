"""Answers to operations, as the server packs them: a code, or a list that begins with one."""

from enum import IntEnum
from typing import Any, NamedTuple


class Reply(IntEnum):
    """The codes of answers to operations. The Lua text gets them as constants.

    ``STORED`` is 1, so that it and a number of partials can share one answer of ``append``.
    """

    JOINED = 0
    STORED = 1
    HELD = 2
    LAST = 3
    DEFERRED = 4
    RUN = 5
    DONE = 6
    AGAIN = 7
    LOST = 8
    RETRY = 9
    PARKED = 10
    GRANTED = 11
    WAIT = 12
    BUSY = 13
    RELEASED = 14
    NOT_HELD = 15
    RENEWED = 16
    REAPED = 17
    CLOSED = 18
    LEFT_OVER = 19
    HANDED = 20
    MISSING = 21
    RUNNING = 22
    DISCARDED = 23
    COMPACTED = 24
    CHANGED = 25
    MEETING = 26
    CLAIMED = 40
    REFUSED = 41
    INGESTED = 42
    SEEN = 43
    FAILED = 99


#: The codes that come with the content of a batch.
STARTS_BATCH = frozenset({int(Reply.RUN), int(Reply.AGAIN)})


class Run(NamedTuple):
    """A batch to be executed: an answer with `Reply.RUN` or `Reply.AGAIN`, field by field.

    Attributes:
        code: One of the two.
        left: Members left.
        last: 1 if the caller was the last member.
        token: The partition's token of the batch.
        size: The number of its partials.
        attempts: The number of failed executions.
        crashes: The number of its owners that have died.
        modifications: The session's modifications, if asked for: process, times, process, ...
        content: The first partials; the rest is fetched. False if another process has the batch.
    """

    code: int
    left: int
    last: int
    token: int
    size: int
    attempts: int
    crashes: int
    modifications: list[Any] | None
    content: Any


class Taken(NamedTuple):
    """A lock is held, or promised to a waiter: an answer with `Reply.WAIT` or `Reply.BUSY`.

    Attributes:
        code: One of the two.
        again_ms: Milliseconds after which to ask again; below 0 if that is not known.
        holder: The name of the holder.
        since_ms: When the holder got the lock, by the server's clock.
        thread: The name of the thread that took it.
    """

    code: int
    again_ms: int
    holder: bytes
    since_ms: int
    thread: bytes


class Reaped(NamedTuple):
    """The part of a dead process that a reap has taken over.

    Attributes:
        code: `Reply.REAPED`.
        left: Resources that the caller can still take over.
        left_in_all: The same, and those that the caller leaves to others.
        batches: The caller's new batches: resource, token, ms until it is due, resource, ...
        wrong: Resources that could not be reaped: resource, error, resource, ...
        resources: The number of resources that the caller has taken over, without those it leaves.
    """

    code: int
    left: int
    left_in_all: int
    batches: list[Any]
    wrong: list[Any]
    resources: int
