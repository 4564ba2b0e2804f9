"""Flows of locks, exclusive and shared, and of semaphores."""

from typing import NamedTuple

from phonon.protocol import messages
from phonon.protocol.effects import Call, Flow, Participant, Wait
from phonon.protocol.messages import Locked

#: How long a wake-up that nobody takes stays.
WAKE_MS = 10_000


class Wish(NamedTuple):
    """What somebody wants of a lock.

    Attributes:
        base: The resource, or the semaphore.
        holder: Names this acquisition; see `name_of`.
        lease_ms: How long the grant lasts unless renewed.
        thread: Who in the process wants it, for others to read.
    """

    base: bytes
    holder: str
    lease_ms: int
    thread: str = ""


class Locker(NamedTuple):
    """Who holds a lock.

    Attributes:
        holder: See `Wish`.
        token: Of the grant.
        since_ms: Since when, by the server's clock.
        left_ms: How long its lease still runs.
        thread: See `Wish`.
    """

    holder: str
    token: int
    since_ms: int
    left_ms: int
    thread: str


class Lockers(NamedTuple):
    """Who holds a lock, and who waits for it, in order."""

    holders: list[Locker]
    waiters: list[str]


def name_of(process_id: str, number: int, *, shared: bool = False, places: int = 0) -> str:
    """How a holder or waiter is called, which tells the server what it wants.

    Args:
        process_id: Whose it is.
        number: A number that the process has used for no other.
        shared: Whether it shares the lock with others who do.
        places: How many may share it at the same time; 0 if any number may.
    """
    return f"{process_id}/{number}{'s' * shared}{places or ''}"


def process_of(holder: str) -> str:
    """The id of the process that a holder or waiter belongs to."""
    return holder.rpartition("/")[0]


def is_shared(holder: str) -> bool:
    """Whether a holder shares the lock, or a waiter wants to."""
    return "s" in holder.rpartition("/")[2]


def acquire(me: Participant, wish: Wish, *, queue: bool) -> Flow[Locked]:
    """Ask for the lock once.

    Args:
        me: The process.
        wish: What is wanted.
        queue: Whether to wait in line if it is taken.
    """
    base = wish.base
    yield from me.hold(base, lock=True)
    args = (wish.holder, wish.lease_ms, int(queue), wish.thread)
    locked = messages.locked((yield me.step("lock", base, *args)))
    yield from me.let_go(base, locked.clear)
    return locked


def release(me: Participant, base: bytes, holder: str) -> Flow[bool]:
    """Give the lock back, or give up waiting for it.

    Returns:
        Whether the lock was this holder's.
    """
    answer = yield me.step("unlock", base, holder, keep=True)
    yield from me.let_go(base, answer[1])
    return bool(answer[0] == b"released")


def lockers(me: Participant, base: bytes) -> Flow[Lockers]:
    """Who holds the lock, and who waits for it."""
    answer = yield me.plain("lockers", base)
    end = next(i for i in range(0, len(answer), 5) if answer[i] == b"")
    holders = [
        Locker(holder.decode(), token, since, left, thread.decode("utf-8", "replace"))
        for holder, token, since, left, thread in zip(
            *(answer[i:end:5] for i in range(5)), strict=True
        )
    ]
    return Lockers(holders, [waiter.decode() for waiter in answer[end + 1 :]])


def wake(base: bytes, holder: str) -> Flow[None]:
    """Wake a waiter out of turn, who will find out why."""
    key = base + b":wake:" + holder.encode()
    yield Call("", key, (b"RPUSH", key, b"1"))
    yield Call("", key, (b"PEXPIRE", key, WAKE_MS))


def wait(base: bytes, holder: str, timeout: float) -> Flow[bool]:
    """Wait to be woken, ``timeout`` seconds at the most."""
    return bool((yield Wait(base + b":wake:" + holder.encode(), timeout)))
