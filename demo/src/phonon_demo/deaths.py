"""What becomes of workers that have died: who takes over what they had, and when that is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from phonon import Process
from phonon_demo.errors import WorkerError
from phonon_demo.pool import Worker

#: Seconds between two looks.
INTERVAL = 0.02
#: Seconds after which nobody will take over any more: many times what it takes.
TIMEOUT = 60.0


@dataclass
class Death:
    """A worker that has ended before its time.

    Attributes:
        worker: Which.
        at: When, by the monotonic clock.
        sessions: Its open sessions.
        seconds: How long it took until all of them were taken over; None as yet.
    """

    worker: Worker
    at: float
    sessions: int
    seconds: float | None = None


class Watch:
    """Looks on as survivors take over from the dead.

    Args:
        process: One of the same namespace, to look with.

    Attributes:
        deaths: In the order in which they were noticed.
    """

    def __init__(self, process: Process) -> None:
        self.deaths: list[Death] = []
        self._process = process
        self._looked = 0.0

    def died(self, worker: Worker) -> Death:
        """Begin to look after a worker that has died."""
        own = self._process.registry_key
        registry = own.removesuffix(self._process.id) + worker.process
        sessions = len(self._process.get_registry(registry)) if worker.process else 0
        self.deaths.append(Death(worker, time.monotonic(), sessions))
        return self.deaths[-1]

    def look(self) -> list[Death]:
        """Those of whom all has been taken over since the last look."""
        now = time.monotonic()
        waiting = [death for death in self.deaths if death.seconds is None]
        if not waiting or now - self._looked < INTERVAL:
            return []
        self._looked = now
        done = []
        for death in waiting:
            # It is listed until nothing of it is left.
            processes = self._process.heartbeat_hash_name
            if self._process.client.zscore(processes, death.worker.process) is None:
                death.seconds = now - death.at
                done.append(death)
            elif now - death.at > TIMEOUT:
                raise WorkerError(f"nobody has taken over from {death.worker.name}")
        return done

    @property
    def done(self) -> bool:
        """Whether all has been taken over from all of them."""
        return all(death.seconds is not None for death in self.deaths)


def takers(death: Death, workers: Sequence[Worker]) -> dict[Worker, int]:
    """Who has taken over how many sessions."""
    taken = {
        worker: sum(
            takeover.sessions
            for takeover in worker.takeovers
            if takeover.dead == death.worker.process
        )
        for worker in workers
    }
    return {worker: sessions for worker, sessions in taken.items() if sessions}
