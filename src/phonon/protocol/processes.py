"""Flows of a process's own life: appear, beat, disappear."""

from typing import Any, NamedTuple

from phonon.errors import DeclaredDeadError, ServerError
from phonon.protocol.effects import Call, Flow, Participant

#: What a registry holds once its process is dead and all it was responsible for is taken over.
TOMBSTONE = b"dead"
#: The fields of a process's card.
CARD = ("host", "pid", "start", "version")


class Beat(NamedTuple):
    """The answer to a heartbeat.

    Attributes:
        kind: "alive"; "dead" if the process was silent for too long and has to go on under
            another id; "forgotten" if the server has lost its data and knows nobody any more.
        epoch: Names the server's data: another one means that it was lost.
        next_death: Seconds until another process is dead unless it beats; None if there is none.
        dead: Ids of processes whose deadline has passed.
    """

    kind: str
    epoch: bytes
    next_death: float | None
    dead: list[str]


def enrol(me: Participant, card: dict[str, str | int], ttl_ms: int) -> Flow[Beat]:
    """Say that this process lives, then who it is: a card is cleared up with its process."""
    words = [word for pair in card.items() for word in pair]
    key = me.keys.card(me.id)
    first = yield from beat(me, ttl_ms, b"")
    yield Call("", key, (b"HSET", key, *words))
    return first


def beat(me: Participant, ttl_ms: int, epoch: bytes, *, outage: bool = False) -> Flow[Beat]:
    """Prolong this process's life.

    Args:
        me: The process.
        ttl_ms: How long it counts as alive from now on.
        epoch: What the last beat answered; empty in the first one.
        outage: Whether the last beat failed because the server was not to be reached. If nobody
            else could beat either, that is no reason to take anybody for dead.
    """
    answer = yield me.plain("beat", me.keys.processes, ttl_ms, epoch, int(outage))
    kind, found, _, next_death, *dead = answer
    return Beat(
        kind.decode(),
        found,
        next_death / 1000 if next_death >= 0 else None,
        [process_id.decode() for process_id in dead],
    )


def resign(me: Participant) -> Flow[None]:
    """Disappear, leaving nothing behind: the list last, which has others look after the rest."""
    card = me.keys.card(me.id)
    yield Call("", card, (b"DEL", card))
    yield me.plain("resign", me.keys.processes)


def registry(me: Participant, key: bytes | None = None) -> Flow[list[bytes]]:
    """The bases of all that a process may be responsible for: this one, or whose key it is.

    Raises:
        DeclaredDeadError: It is this one, and there is a tombstone.
    """
    key = key or me.registry
    try:
        return list((yield Call("", key, (b"ZRANGE", key, 0, -1))))
    except ServerError:
        if (yield Call("", key, (b"GET", key))) != TOMBSTONE:
            raise
    if key == me.registry:
        raise DeclaredDeadError(f"process {me.id.decode()} was declared dead")
    return []


def is_buried(me: Participant) -> Flow[bool]:
    """Whether this process was declared dead, and all it was responsible for is taken over."""
    try:
        yield from registry(me)
    except DeclaredDeadError:
        return True
    return False


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
    try:
        since = yield Call("", registry, (b"ZSCORE", registry, base))
    except ServerError:  # it has died since, and there is a tombstone
        since = 0
    known = {
        name: value.decode("utf-8", "replace")
        for name, value in zip(CARD, values, strict=True)
        if value is not None
    }
    return Stay(known, abs(int(float(since or 0))))
