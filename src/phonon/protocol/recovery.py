"""Flows that take over what dead processes have left.

A dead process's registry names all that it may have been responsible for. Survivors take some
resources at a time in hand, so that they share the work, and recover each: all of this is harmless
when repeated. Once the registry is empty a tombstone takes its place, so that the process, should
it only have been paused, is refused when it goes on under its old id.
"""

from collections.abc import Iterable
from typing import NamedTuple

from phonon.errors import PhononError
from phonon.protocol import heirs, updates
from phonon.protocol.effects import Call, Flow, Participant, clear
from phonon.protocol.messages import Batch
from phonon.protocol.updates import Failure, RetryPolicy, Runner

#: Resources that are taken in hand at a time.
CHUNK = 256
#: How long they stay in one survivor's hands, should it not see to them. To recover a resource
#: takes well under a millisecond.
CLAIM_MS = 10_000
#: How long a dead process is refused: longer than any process is paused and then goes on.
TOMBSTONE_MS = 7 * 24 * 3600 * 1000


class Claim(NamedTuple):
    """Resources of a dead process.

    Attributes:
        left: How many there are, these and those in others' hands included.
        bases: Those that are in our hands for a while.
    """

    left: int
    bases: list[bytes]


class Recovered(NamedTuple):
    """What came of recovering one resource.

    Attributes:
        token: The batch that is ours now; None if there is none.
        retry_in: Seconds until that batch is due, if it has failed before.
        executed: How many batches were executed.
        failures: Those that failed.
        lost: Tokens of batches that were executed here but taken over meanwhile.
    """

    token: int | None = None
    retry_in: float | None = None
    executed: int = 0
    failures: Iterable[Failure] = ()
    lost: Iterable[int] = ()


def claim(me: Participant, dead: str, claim_ms: int = CLAIM_MS) -> Flow[Claim]:
    """Take resources of a dead process in hand."""
    registry = me.keys.registry(dead.encode())
    left, *bases = yield Call("claim", registry, (CHUNK, claim_ms))
    return Claim(max(left, 0), bases)


def recover(
    me: Participant, base: bytes, dead: str, run: Runner, policy: RetryPolicy
) -> Flow[Recovered]:
    """Take over what a dead process has left of a resource, and execute what falls to us.

    Dying before the step changes nothing. From then on the batch is ours and our registry names
    it, whether or not the dead one's does too.
    """
    registry = me.keys.registry(dead.encode())
    died = heirs.inherits(dead) is None
    yield from me.hold(base)
    if not died and not me.colocated:
        # An heir may be left the resource anew at any time: nothing of that must be cleared. If we
        # die before the step, our registry names the resource.
        yield from clear(registry, base)
    here = (registry,) if me.colocated else ()
    args = (base, dead, int(died), me.lease_ms, *here)
    answer = yield me.step("recover", *args, keep=True)
    while answer[0] == b"free" and heirs.inherits(answer[2].decode()) is not None:
        # Whoever left it to its heir may have died before it could say so.
        listed = answer[2]
        yield from heirs.inherit(me, base, listed)
        if not me.colocated:
            break
        # Only now the dead one's registry may forget it.
        answer = yield me.step("recover", *args, listed, keep=True)
        if answer[2:] == [listed]:
            break
    if died and not me.colocated:
        # A cluster's resource knows its dead: none of them can have entered it anew meanwhile.
        yield from clear(registry, base)
    kind = answer[0]
    if kind == b"later":
        return Recovered(answer[2], answer[3] / 1000)
    if kind != b"run":
        yield from me.let_go(base, answer[1])
        return Recovered()
    token, crashes = answer[2:4]
    batch = Batch(token, *answer[4:7])
    if crashes > policy.crashes:
        error = PhononError(f"{crashes} processes have died while they executed it")
        ran, failure = yield from updates.park(me, base, batch, error)
        executed, failures, lost = yield from updates.execute(me, base, ran.batch, run, policy)
        return Recovered(token, None, executed, [failure, *failures], lost)
    result = yield from updates.execute(me, base, batch, run, policy)
    return Recovered(token, None, *result)


def bury(me: Participant, dead: str) -> Flow[bool]:
    """Forget a dead process of which nothing is left.

    Dying in between leaves it listed as dead, and the next survivor buries it again.

    Returns:
        Whether nothing was left.
    """
    process_id = dead.encode()
    registry = me.keys.registry(process_id)
    if heirs.inherits(dead) is not None:
        return (yield from heirs.dismiss(me, process_id))
    if not (yield Call("bury", registry, (TOMBSTONE_MS,))):
        return False
    # The list last: nobody would come for the card of one that is not listed any more.
    card = me.keys.card(process_id)
    yield Call("", card, (b"DEL", card))
    yield Call("resign", me.keys.processes, (process_id,))
    return True
