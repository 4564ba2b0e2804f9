"""Taking over from dead processes, on behalf of one that lives."""

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from phonon.errors import ServerUnreachableError
from phonon.partials import can_execute
from phonon.protocol import heirs, recovery

if TYPE_CHECKING:
    from phonon.engine import Engine

log = logging.getLogger("phonon")

#: What is logged: who, how many resources, from whom, how many batches.
TAKEN_OVER = (
    "process %s has taken over %d resources from %s, which is dead, and executed %d of its batches"
)


def take_over(engine: "Engine", dead: Iterable[str], enough: Callable[[], bool]) -> None:
    """Release what dead processes held, and execute what they have left.

    Others do the same at the same time; each gets its share.

    Args:
        engine: Who takes over.
        dead: Ids of dead processes, and of heirs.
        enough: Tells when to leave the rest to others.

    Raises:
        ConnectionLostError: The server does not answer.
    """
    for process_id in dead:
        if process_id == engine.name:
            continue  # paused while it took this id: the next beat tells, and then it has another
        class_name = heirs.inherits(process_id)
        if class_name is None or can_execute(engine, class_name):
            _take_over(engine, process_id, enough)


def _take_over(engine: "Engine", dead: str, enough: Callable[[], bool]) -> None:
    resources = batches = 0
    while not enough():
        claim = engine.driver.run(b"recovery", recovery.claim(engine.me, dead, engine.claim_ms))
        if not claim.bases:
            # Should others still have some in hand, they will bury it.
            if not claim.left:
                engine.driver.run(b"recovery", recovery.bury(engine.me, dead))
            break
        tasks = [engine.recovering(base, dead) for base in claim.bases]
        engine.driver.run_all(tasks)
        for task in tasks:
            if isinstance(task.error, ServerUnreachableError):
                raise task.error
            if task.error is not None:
                resource = engine.keys.resource(task.base)
                log.error("%r could not be taken over from %s: %s", resource, dead, task.error)
            else:
                resources += 1
                batches += task.result.executed
    if resources:
        log.warning(
            TAKEN_OVER,
            engine.name,
            resources,
            dead,
            batches,
        )
