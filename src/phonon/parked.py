"""Parked batches: those that failed too often, kept until somebody decides about them."""

from typing import TYPE_CHECKING, NamedTuple

from phonon.drivers.sync import Task
from phonon.errors import BatchMissingError, BatchRunningError
from phonon.partials import rebuild
from phonon.protocol import parking, updates
from phonon.protocol.effects import Flow, Participant
from phonon.protocol.updates import PIECE, Ended

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.update import Update


class Parked(NamedTuple):
    """A batch that was given up on.

    Attributes:
        resource: The resource whose it is.
        token: Its number, for `Process.replay` and `Process.discard`.
        error: What its last attempt raised: type and text.
        attempts: How often it was tried.
        owner: The id of the process that tried last.
        since: When its session ended, seconds since the epoch by the server's clock.
        parked_at: When it was given up on.
        size: The number of its partials.
    """

    resource: str
    token: int
    error: str
    attempts: int
    owner: str
    since: float
    parked_at: float
    size: int


def find(engine: "Engine") -> list[Parked]:
    """All parked batches of the namespace, by resource and token."""
    # They are nobody's operations on the resources: nothing to take turns about.
    bases = engine.run(b"parked", parking.resources(engine.me))
    tasks = [Task(b"parked " + base, parking.entries(engine.me, base)) for base in bases]
    engine.run_all(tasks)
    return sorted(
        Parked(
            engine.keys.resource(entry.base),
            entry.token,
            entry.error,
            entry.attempts,
            entry.owner,
            entry.since_ms / 1000,
            entry.at_ms / 1000,
            entry.size,
        )
        for task in tasks
        for entry in task.outcome()
    )


def look(engine: "Engine", resource: str, token: int) -> "list[Update]":
    """See `Process.look`."""
    base = engine.keys.base(resource)
    partials: list[bytes] = []
    while True:
        first = len(partials)
        flow = parking.look(engine.me, base, token, first, first + PIECE - 1)
        piece = engine.run(b"parked " + base, flow)
        if not piece:
            break
        partials += piece
    if not partials:
        raise _missing(resource, token)
    where = f"{base.decode('utf-8', 'replace')}:parked:{token}"
    return [rebuild(engine, resource, partial, where) for partial in partials]


def replay(engine: "Engine", resource: str, token: int) -> None:
    """See `Process.replay`."""
    base = engine.keys.base(resource)

    def flow(me: Participant) -> Flow[Ended]:
        replayed = yield from parking.replay(me, base, token)
        if replayed.kind == "missing":
            raise _missing(resource, token)
        if replayed.kind == "busy":
            raise BatchRunningError(
                f"another batch of {resource!r} is being executed: replay {token} when it is done"
            )
        executed, failures, lost = yield from updates.execute(
            me, base, replayed.batch, engine.runner(resource, None), engine.policy
        )
        return Ended(False, 0, {}, executed, failures, lost)  # noqa: FBT003 - in field order

    task = Task(base, engine.living(flow), lambda ended: engine.report(base, ended, None))
    engine.run_all([task])
    for error in engine.errors_of(task):
        raise error


def discard(engine: "Engine", resource: str, token: int) -> None:
    """See `Process.discard`."""
    base = engine.keys.base(resource)
    if not engine.run(base, parking.discard(engine.me, base, token)):
        raise _missing(resource, token)


def _missing(resource: str, token: int) -> BatchMissingError:
    return BatchMissingError(
        f"{resource!r} has no parked batch {token}: it was replayed or discarded; "
        "Process.parked() lists those that there are"
    )
