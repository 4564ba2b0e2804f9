"""Flows of membership: join, leave, count."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from phonon.protocol.effects import Call, Flow, Participant
from phonon.protocol.messages import pairs


def join(me: Participant, base: bytes, restore: Mapping[bytes, int] | None = None) -> Flow[None]:
    """Become a member, or renew the membership.

    Args:
        me: The process.
        base: The resource.
        restore: Modifications to put back, by process id.
    """
    yield from me.hold(base)
    # Dying before the join leaves a registry entry that names nothing: recovery finds it harmless.
    put_back = [part for pair in restore.items() for part in pair] if restore else ()
    yield me.step("join", base, me.lease_ms, *put_back)


def meet(me: Participant, base: bytes, parties: int) -> Flow[None]:
    """Join a session that is over only when so many different processes have been in it."""
    yield from me.hold(base)
    yield me.step("meet", base, me.lease_ms, parties)


class Meeting(NamedTuple):
    """How a session of known parties stands.

    Attributes:
        parties: How many are to come; 0 if it is over, or there never was one.
        arrived: How many have come, whether or not they have left.
        remaining: How many are there now.
        member: Whether this process is one of them.
    """

    parties: int
    arrived: int
    remaining: int
    member: bool


def meeting(me: Participant, base: bytes, waiter: str) -> Flow[Meeting]:
    """How a session of known parties stands. A waiter is woken when that changes."""
    parties, arrived, remaining, member = yield me.plain("meeting", base, waiter)
    return Meeting(parties, arrived, remaining, bool(member))


def stop_waiting(base: bytes, waiter: str) -> Flow[None]:
    """Wake a waiter no more. Dying before leaves a field that goes with the session."""
    parties, wake = base + b":parties", base + b":wake:" + waiter.encode()
    yield Call("", parties, (b"HDEL", parties, b">" + waiter.encode()))
    yield Call("", wake, (b"DEL", wake))


def modify(me: Participant, base: bytes, times: int = 1) -> Flow[None]:
    """Count that this process modified the resource."""
    yield from me.hold(base)
    yield me.step("modify", base, me.lease_ms, times, keep=True)


def count(me: Participant, base: bytes) -> Flow[int]:
    """The number of live members."""
    return int((yield me.plain("count", base)))


def members(me: Participant, base: bytes) -> Flow[list[str]]:
    """The ids of the live members."""
    return [process_id.decode() for process_id in (yield me.plain("members", base))]


def modified(me: Participant, base: bytes) -> Flow[dict[bytes, int]]:
    """How often each process modified the resource in this session."""
    return pairs((yield me.plain("modified", base)))


def renew(me: Participant, base: bytes, locks: Sequence[tuple[str, int]]) -> Flow[list[bool]]:
    """Prolong the membership and the locks held on a resource.

    Args:
        me: The process.
        base: The resource.
        locks: Holders, and how long each one's lease is from now on, milliseconds.

    Returns:
        Whether this process still is a member, then for each holder whether it has its lock.
    """
    words = [word for lock in locks for word in lock]
    answer = yield me.plain("renew", base, me.lease_ms, *words)
    return [bool(flag) for flag in answer]
