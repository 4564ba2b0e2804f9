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

    Our registry names the resource until the heir's does and the heir is listed. Should we die
    before that, whoever recovers the resource from us finds it in the heir's hands, and sees to it.
    """
    call = me.step("entrust", base, batch.token, heir, keep=True)
    call.registry = None  # the step must not clear it
    answer = yield call
    if answer[0] == b"entrusted":
        yield from inherit(me, base, heir)
    if answer[1]:
        yield from clear(me.registry, base)
    return messages.ran(answer)._replace(clear=0)


def inherit(me: Participant, base: bytes, heir: bytes) -> Flow[None]:
    """Have an heir found that has a batch of a resource.

    Only now that it has: an entry from before may have been worked off, and with it cleared.
    """
    yield Call("hold", me.keys.registry(heir), (base, heir), keep=True)
    yield from announce(me, heir)


def announce(me: Participant, heir: bytes) -> Flow[bytes]:
    """List an heir among the dead, if it is not. The result is a mark of this listing."""
    mark: bytes = yield Call("announce", me.keys.processes, (heir,), keep=True)
    return mark


def dismiss(me: Participant, heir: bytes) -> Flow[bool]:
    """List an heir no more, if nothing is left to it and nobody has listed it meanwhile.

    Returns:
        Whether it is listed no more.
    """
    registry = me.keys.registry(heir)
    mark = yield from announce(me, heir)
    if (yield Call("", registry, (b"ZCARD", registry))):
        return False
    return bool((yield Call("resign", me.keys.processes, (heir, mark))))
