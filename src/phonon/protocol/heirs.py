"""Heirs: who gets a batch whose owner has not imported its class.

An heir is an id that stands for a class in place of a process. It has a registry, and it counts as
dead from the start, so whoever knows the class recovers what it was left as from any dead process.
"""

from phonon.protocol import messages
from phonon.protocol.effects import Call, Flow, Participant, clear
from phonon.protocol.messages import Batch, Ran

_PREFIX = "class:"


def heir(class_name: str) -> bytes:
    """The id that stands for a class."""
    return (_PREFIX + class_name).encode()


def inherits(process_id: str) -> str | None:
    """The class that an id stands for; None if it is a process's."""
    return process_id[len(_PREFIX) :] if process_id.startswith(_PREFIX) else None


def entrust(me: Participant, base: bytes, batch: Batch, heir: bytes) -> Flow[Ran]:
    """Leave a batch of ours to an heir.

    Its registry is written before, and it is listed after. Dying in between leaves our registry
    naming the resource: who recovers that finds the heir there, and lists it.
    """
    yield Call("hold", me.keys.registry(heir), (base, heir))
    call = me.step("entrust", base, batch.token, heir, keep=True)
    call.registry = None  # the step must not clear it
    answer = yield call
    if answer[0] == b"entrusted":
        yield from announce(me, heir)
    if answer[1]:
        yield from clear(me.registry, base)
    return messages.ran(answer)._replace(clear=0)


def announce(me: Participant, heir: bytes) -> Flow[None]:
    """List an heir among the dead."""
    key = me.keys.processes
    yield Call("", key, (b"ZADD", key, b"NX", 0, heir), keep=True)


def dismiss(me: Participant, heir: bytes) -> Flow[bool]:
    """List an heir no more, if nothing is left to it. Somebody may be about to leave it something.

    Returns:
        Whether nothing was left.
    """
    registry = me.keys.registry(heir)
    if (yield Call("", registry, (b"ZCARD", registry))):
        return False
    yield Call("resign", me.keys.processes, (heir,))
    if (yield Call("", registry, (b"ZCARD", registry))):
        yield from announce(me, heir)
        return False
    return True
