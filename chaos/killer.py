"""Strikes at random moments: kills and pauses workers, cuts connections, kills the server."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chaos.mortal import MortalServer
from chaos.pool import Pool, Worker
from chaos.proxy import CuttingProxy
from phonon._core.heartbeat import DEAD_AFTER

#: Seconds between two strikes of a kind, on average; the first comes after half of that.
KILLS, PAUSES, CUTS, RESTARTS = 0.35, 1.5, 0.8, 6.0
#: The length of a pause, as a multiple of the time after which a process counts as dead.
SHORTEST_PAUSE, LONGEST_PAUSE = 1.1, 2.0
#: The share of kills that spare paused workers.
SPARED = 0.8


@dataclass
class Strikes:
    """The number of strikes of each kind."""

    kills: int = 0
    pauses: int = 0
    cuts: int = 0
    restarts: int = 0


class Schedule:
    """Calls functions at random moments.

    Args:
        chance: Chooses the moments.
        kinds: The functions, each with the seconds between two calls, on average.
        delay: Seconds before which nothing is called.
    """

    def __init__(
        self,
        chance: random.Random,
        kinds: Sequence[tuple[float, Callable[[], None]]],
        delay: float = 0.0,
    ) -> None:
        self._chance = chance
        now = time.monotonic() + delay
        self._due = [(now + mean / 2, mean, strike) for mean, strike in kinds]

    def strike(self) -> None:
        """Call the functions that are due."""
        now = time.monotonic()
        for i, (at, mean, strike) in enumerate(self._due):
            if now >= at:
                strike()
                self._due[i] = now + self._chance.expovariate(1 / mean), mean, strike

    @property
    def next(self) -> float:
        """The time of the next function, by the monotonic clock."""
        return min(at for at, _, _ in self._due)


class Killer:
    """Kills and pauses workers, cuts connections and kills the server at random moments.

    Args:
        chance: Chooses moments and victims.
        pool: The workers.
        heartbeat: The workers' heartbeat interval.
        proxy: Cuts their connections; None for no cuts.
        server: The server to kill; None to leave it alone.

    Attributes:
        strikes: The number of strikes.
    """

    def __init__(
        self,
        chance: random.Random,
        pool: Pool,
        heartbeat: float,
        proxy: CuttingProxy | None,
        server: MortalServer | None,
    ) -> None:
        self.strikes = Strikes()
        self._chance = chance
        self._pool = pool
        self._dead_after = DEAD_AFTER * heartbeat
        self._paused: dict[Worker, float] = {}
        self._proxy = proxy
        self._server = server
        kinds: list[tuple[float, Callable[[], None]]] = [(KILLS, self._kill), (PAUSES, self._pause)]
        if proxy is not None:
            kinds.append((CUTS, self._cut))
        if server is not None:
            kinds.append((RESTARTS, self._restart))
        self._schedule = Schedule(chance, kinds)

    def is_paused(self, worker: Worker) -> bool:
        """Return whether a worker is paused, and would not answer."""
        return worker in self._paused

    def strike(self) -> None:
        """End pauses that are over, and carry out the strikes that are due."""
        now = time.monotonic()
        for worker, until in list(self._paused.items()):
            if now >= until:
                self._go_on(worker)
        self._schedule.strike()

    def pause(self) -> float:
        """Seconds until something is due."""
        return max(0.0, min([self._schedule.next, *self._paused.values()]) - time.monotonic())

    def retire(self) -> None:
        """Let all paused workers go on."""
        for worker in list(self._paused):
            self._go_on(worker)

    def _go_on(self, worker: Worker) -> None:
        del self._paused[worker]
        if not worker.fate:
            worker.popen.send_signal(signal.SIGCONT)

    def _ready(self) -> list[Worker]:
        """Return the workers that have begun, or those about to begin if there are none."""
        alive = self._pool.alive
        return [worker for worker in alive if worker.process] or alive

    def _kill(self) -> None:
        ready = self._ready()
        # Most paused workers should go on after they are believed dead; few would live that long.
        running = [worker for worker in ready if worker not in self._paused]
        spared = running and self._chance.random() < SPARED
        worker = self._chance.choice(running if spared else ready)
        self._paused.pop(worker, None)
        self._pool.kill(worker)
        self.strikes.kills += 1

    def _pause(self) -> None:
        running = [worker for worker in self._ready() if worker not in self._paused]
        if len(running) > 1:  # another worker has to take over
            worker = self._chance.choice(running)
            seconds = self._dead_after * self._chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE)
            self._paused[worker] = time.monotonic() + seconds
            worker.popen.send_signal(signal.SIGSTOP)
            self.strikes.pauses += 1

    def _cut(self) -> None:
        if self._proxy is not None:
            self.strikes.cuts += self._proxy.cut()

    def _restart(self) -> None:
        if self._server is not None:
            self._server.restart()
            self.strikes.restarts += 1
