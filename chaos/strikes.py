"""Strikes at random moments: kills and pauses workers, cuts connections, kills a server."""

import functools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import click

from chaos import journal
from chaos.proxy import CuttingProxy
from phonon._core.heartbeat import DEAD_AFTER
from phonon_demo.pool import Pool, Worker

#: The length of a pause, as a multiple of the time after which a process counts as dead.
SHORTEST_PAUSE, LONGEST_PAUSE = 1.1, 2.0
#: The share of kills that spare paused workers.
SPARED = 0.8
#: Seconds between two lines about the progress, and between two looks.
LINE_INTERVAL, INTERVAL = 5.0, 0.02


class StruckPool(Pool):
    """A pool that replaces each worker that has died.

    Args:
        work: See `Worker`.
        plan: The workers' plan, with the folder of their `journal`.
        count: The number of workers.

    Attributes:
        died: The number of workers that have been replaced.
    """

    def __init__(self, work: Callable[[Any], int], plan: Any, count: int) -> None:
        self._start = functools.partial(Worker, work, plan)
        self._journal: str = plan.journal
        self.died = 0
        super().__init__([self._start() for _ in range(count)])

    @property
    def alive(self) -> list[Worker]:
        """The workers, after each that has died was replaced."""
        for i, worker in enumerate(self.workers):
            if not worker.is_alive:
                self.workers[i] = self._start()
                self.died += 1
        return list(self.workers)

    @property
    def at_work(self) -> list[Worker]:
        """The workers that have begun."""
        return [worker for worker in self.alive if journal.is_at_work(self._journal, worker.pid)]


class Mortal(Protocol):
    """A server."""

    def restart(self) -> None:
        """Kill it, and start it again."""


class Means(NamedTuple):
    """Seconds between two strikes of a kind, on average; the first comes after half of that."""

    kill: float
    pause: float
    cut: float
    restart: float


class Killer:
    """Kills and pauses workers, cuts connections and kills a server at random moments.

    Args:
        chance: Chooses moments and victims.
        pool: The workers.
        heartbeat: The workers' heartbeat interval.
        means: The mean seconds between two strikes.
        proxies: Cut the workers' connections, by name.
        server: The server to kill; None to leave it alone.

    Attributes:
        strikes: The number of strikes by kind: ``"kills"``, ``"pauses"``, ``"restarts"``, and the
            connections cut by the name of their proxy.
    """

    def __init__(
        self,
        chance: random.Random,
        pool: StruckPool,
        heartbeat: float,
        means: Means,
        proxies: dict[str, CuttingProxy],
        server: Mortal | None,
    ) -> None:
        self.strikes: Counter[str] = Counter()
        self._chance = chance
        self._pool = pool
        self._dead_after = DEAD_AFTER * heartbeat
        self._paused: dict[Worker, float] = {}
        kinds: list[tuple[float, Callable[[], bool]]] = [
            (means.kill, self._kill),
            (means.pause, self._pause),
        ]
        kinds += [
            (means.cut, functools.partial(self._cut, name, proxy))
            for name, proxy in proxies.items()
        ]
        if server is not None:
            kinds.append((means.restart, functools.partial(self._restart, server)))
        now = time.monotonic()
        self._due = [(now + mean / 2, mean, strike) for mean, strike in kinds]

    def strike_until(self, is_over: Callable[[], bool]) -> None:
        """Strike the working workers, and let all paused ones go on in the end."""
        begun = said = time.monotonic()
        try:
            while not is_over():
                if self._pool.at_work:
                    self._strike(time.monotonic())
                if (now := time.monotonic()) - said > LINE_INTERVAL:
                    said = now
                    click.echo(f"{now - begun:.0f} s: {dict(self.strikes)}", err=True)
                time.sleep(INTERVAL)
        finally:
            self._go_on(float("inf"))

    def _strike(self, now: float) -> None:
        self._go_on(now)
        for i, (at, mean, strike) in enumerate(self._due):
            if now >= at and strike():
                self._due[i] = now + self._chance.expovariate(1 / mean), mean, strike

    def _go_on(self, now: float) -> None:
        """End the pauses that are over."""
        for worker, until in list(self._paused.items()):
            if now >= until:
                del self._paused[worker]
                worker.signal(signal.SIGCONT)

    def _running(self) -> Sequence[Worker]:
        return [worker for worker in self._pool.at_work if worker not in self._paused]

    # A strike that is not possible as yet stays due, and returns False.

    def _kill(self) -> bool:
        # Most paused workers should go on after they are believed dead; few would live that long.
        running = self._running()
        spared = running and self._chance.random() < SPARED
        victims = running if spared else self._pool.at_work
        if victims:
            worker = self._chance.choice(victims)
            self._paused.pop(worker, None)
            worker.kill()
            self.strikes["kills"] += 1
        return bool(victims)

    def _pause(self) -> bool:
        running = self._running()
        if not running[1:]:  # another worker has to take over
            return False
        worker = self._chance.choice(running)
        seconds = self._dead_after * self._chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE)
        self._paused[worker] = time.monotonic() + seconds
        worker.signal(signal.SIGSTOP)
        self.strikes["pauses"] += 1
        return True

    def _cut(self, name: str, proxy: CuttingProxy) -> bool:
        self.strikes[name] += proxy.cut()
        return True

    def _restart(self, server: Mortal) -> bool:
        server.restart()
        self.strikes["restarts"] += 1
        return True
