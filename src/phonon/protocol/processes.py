"""Flows of a process's own life: appear, beat, disappear."""

from typing import Any, NamedTuple

from phonon.protocol.effects import Call, Flow, Participant


class Beat(NamedTuple):
    """The answer to a heartbeat.

    Attributes:
        known: Whether the process was alive until now.
        now_ms: The server's clock.
        dead: Ids of processes whose deadline has passed.
    """

    known: bool
    now_ms: int
    dead: list[str]


def enrol(me: Participant, card: dict[str, str | int], ttl_ms: int) -> Flow[Beat]:
    """Say who this process is, then that it lives."""
    words = [word for pair in card.items() for word in pair]
    key = me.keys.card(me.id)
    yield Call("", key, (b"HSET", key, *words))
    return (yield from beat(me, ttl_ms))


def beat(me: Participant, ttl_ms: int) -> Flow[Beat]:
    """Prolong this process's life."""
    answer = yield me.plain("beat", me.keys.processes, ttl_ms)
    return Beat(bool(answer[0]), answer[1], [dead.decode() for dead in answer[2:]])


def resign(me: Participant) -> Flow[None]:
    """Disappear, leaving nothing behind."""
    yield Call("", me.keys.processes, (b"ZREM", me.keys.processes, me.id))
    card = me.keys.card(me.id)
    yield Call("", card, (b"DEL", card))


def registry(me: Participant, key: bytes | None = None) -> Flow[list[bytes]]:
    """The bases of all that a process may be responsible for: this one, or whose key it is."""
    key = key or me.registry
    return list((yield Call("", key, (b"HKEYS", key))))


def single(call: Call) -> Flow[Any]:
    """Nothing but one call."""
    return (yield call)


class Stay(NamedTuple):
    """A process that holds a resource.

    Attributes:
        card: Where the process runs; empty if it is not known.
        since_ms: Since when it holds the resource, by the server's clock; 0 if it is not known.
    """

    card: dict[str, str]
    since_ms: int


def stay(me: Participant, process_id: str, base: bytes) -> Flow[Stay]:
    """Where a process runs, and since when it holds a resource."""
    card = me.keys.card(process_id.encode())
    values = yield Call("", card, (b"HMGET", card, *CARD))
    registry = me.keys.registry(process_id.encode())
    since = yield Call("", registry, (b"HGET", registry, base))
    known = {
        name: value.decode("utf-8", "replace")
        for name, value in zip(CARD, values, strict=True)
        if value is not None
    }
    return Stay(known, int(since or 0))


#: The fields of a process's card.
CARD = ("host", "pid", "start", "version")
