"""Flows of the exclusive lock."""

from phonon.protocol import messages
from phonon.protocol.effects import Call, Flow, Participant, Wait
from phonon.protocol.messages import Locked

#: How long a wake-up that nobody takes stays.
WAKE_MS = 10_000


def acquire(
    me: Participant, base: bytes, holder: str, lease_ms: int, *, queue: bool
) -> Flow[Locked]:
    """Ask for the lock once.

    Args:
        me: The process.
        base: The resource.
        holder: Names this acquisition: ``<process id>/<number>``.
        lease_ms: How long the grant lasts unless renewed.
        queue: Whether to wait in line if it is taken.
    """
    yield from me.hold(base, lock=True)
    locked = messages.locked((yield me.step("lock", base, holder, lease_ms, int(queue))))
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


def wake(base: bytes, holder: str) -> Flow[None]:
    """Wake a waiter out of turn, who will find out why."""
    key = base + b":wake:" + holder.encode()
    yield Call("", key, (b"RPUSH", key, b"1"))
    yield Call("", key, (b"PEXPIRE", key, WAKE_MS))


def wait(base: bytes, holder: str, timeout: float) -> Flow[bool]:
    """Wait to be woken, ``timeout`` seconds at the most."""
    return bool((yield Wait(base + b":wake:" + holder.encode(), timeout)))
