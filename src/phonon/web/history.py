"""Figures of the last hour for the page's graphs, in memory, from the first request on."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from phonon.admin import BatchState, ProcessStatus
from phonon.aio.admin import AsyncAdmin
from phonon.errors import PhononError

#: Seconds between two samples, and the number of samples of an hour.
PAUSE = 5.0
KEPT = 720
#: The greatest age, in seconds, of a sample that answers a request.
FRESH = 1.5
#: The most dead letters that are counted; more are "many".
MOST = 1000


@dataclass
class Sample:
    """The figures of a namespace at one time.

    Attributes:
        at: The time, seconds since the epoch.
        processes: The processes.
        parked: The number of parked batches.
        waiting: The number of batches that wait for a class or a survivor.
        calls: Calls a second since the sample before; None for the first one.
        messages: Messages a second; None if no process counts them.
    """

    at: float = 0.0
    processes: list[ProcessStatus] = field(default_factory=list)
    parked: int = 0
    waiting: int = 0
    calls: float | None = None
    messages: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return the samples to draw."""
        return {
            "at": self.at,
            "calls": self.calls,
            "messages": self.messages,
            "sessions": sum(p.memberships for p in self.processes),
            "parked": self.parked,
            "waiting": self.waiting,
            "backlog": sum(p.backlog or 0 for p in self.processes),
        }


class History:
    """Samples a namespace.

    Args:
        admin: The admin to read with.
    """

    def __init__(self, admin: AsyncAdmin) -> None:
        self._admin = admin
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._latest = Sample()
        self._sampling = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def ensure_alive(self) -> None:
        """Start sampling in the background, unless it runs."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def close(self) -> None:
        """Stop sampling."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of the last hour, the oldest first."""
        return list(self._samples)

    async def latest(self) -> Sample:
        """Return a sample that is fresh.

        Raises:
            PhononError: The server does not answer.
        """
        async with self._sampling:
            if time.time() - self._latest.at > FRESH:
                self._latest = await self._sample()
            return self._latest

    async def _work(self) -> None:
        while True:
            try:
                sample = await self.latest()
            except PhononError:
                pass  # a gap in the graphs; a request gets the error
            else:
                self._samples.append(sample.figures())
            await asyncio.sleep(PAUSE)

    async def _sample(self) -> Sample:
        admin, before = self._admin, self._latest
        processes = await admin.processes()
        # The time is taken after the answer: otherwise slow answers would show as peaks of rates.
        sample = Sample(time.time(), processes)
        sample.parked = await _count(admin.batches("parked"))
        states: list[BatchState] = ["waiting-for-class", "waiting-for-survivor"]
        sample.waiting = await _count(admin.batches(states))
        if before.at:
            known = {process.id: process for process in before.processes}
            both = [(p, known[p.id]) for p in sample.processes if p.id in known]
            seconds = sample.at - before.at
            sample.calls = sum(max(0, p.calls - b.calls) for p, b in both) / seconds
            counted = [
                (p.counters["messages"], b.counters.get("messages", 0))
                for p, b in both
                if "messages" in p.counters
            ]
            if counted:
                sample.messages = sum(max(0, now - then) for now, then in counted) / seconds
        return sample


async def _count(entries: Any) -> int:
    count = 0
    async for _ in entries:
        count += 1
        if count >= MOST:
            break
    return count
