"""The counters of a process. A list of operations is counted in one step."""

import itertools
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

#: The end of an execution.
ExecutionStatus = Literal["ok", "failed"]
#: Upper bounds of a histogram's buckets: seconds, and partials of a batch.
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)
PARTIALS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Histogram:
    """Counts values in buckets.

    Args:
        bounds: The buckets' upper bounds.

    Attributes:
        counts: The number of values in each bucket; the last one counts values above all bounds.
        total: The sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Measures:
    """The counters of one process.

    Attributes:
        messages: Counts updates that were made; see `made`.
        folded: Messages that collections of models have taken. Like `opened` it is incremented
            without the lock: no other thread can interrupt one addition.
        stored: Partials that the server has taken.
        stored_bytes: The size of these partials.
        opened: Sessions that were joined here.
        ended: Sessions that were ended here; other processes may still hold them.
        executed: Executions, by class and outcome.
        seconds: Their durations, by class.
        batch_partials: The numbers of partials of batches.
        retries: Batches that are tried again.
        parked: Batches that were parked.
        reaped: Resources that were taken over from dead processes.
        reaped_batches: Batches that were taken over from dead processes.
        lost_locks: Locks that were lost.
        lock_wait: The times that callers waited for locks.
        lock_hold: The times that locks were held.
        on_observe: Called with each value of a histogram: its name, the value, the class or "".
        on_execution: Called with each execution, if traced: the resource, the class, the seconds
            that it took, and its error.
        on_left: Called with each resource whose batch is not executed here, if traced.
    """

    def __init__(self) -> None:
        self.messages = itertools.count()
        # A signal handler or a finalizer may count while its own thread counts.
        self._lock = threading.RLock()
        self.folded = self.stored = self.stored_bytes = self.opened = self.ended = 0
        self.executed: Counter[tuple[str, ExecutionStatus]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batch_partials = Histogram(PARTIALS)
        self.retries = self.parked = self.reaped = self.reaped_batches = self.lost_locks = 0
        self.lock_wait, self.lock_hold = Histogram(SECONDS), Histogram(SECONDS)
        self.on_observe: Callable[[str, float, str], object] | None = None
        self.on_execution: Callable[[str, type, float, BaseException | None], object] | None = None
        self.on_left: Callable[[str], object] | None = None

    @property
    def made(self) -> int:
        """The number of messages: updates that were made, and rows that collections took."""
        made: Any = self.messages.__reduce__()[1]  # the only way to read an itertools.count
        return int(made[0]) + self.folded

    def add(self, name: str, count: int = 1) -> None:
        """Add to a counter."""
        if count:
            with self._lock:
                setattr(self, name, getattr(self, name) + count)

    def add_stored(self, partials: int, size: int) -> None:
        """Count partials that the server has taken."""
        if partials:
            with self._lock:
                self.stored += partials
                self.stored_bytes += size

    def end(self, sessions: int, *, opened: int = 0) -> None:
        """Count sessions that were ended, and those of them that the same operation has opened."""
        if sessions:
            with self._lock:
                self.ended += sessions
                self.opened += opened

    def execution(self, class_name: str, seconds: float, *, failed: bool, times: int = 1) -> None:
        """Count executions that took so long each."""
        with self._lock:
            self.executed[class_name, "failed" if failed else "ok"] += times
            known = self.seconds.get(class_name)
            if known is None:
                known = self.seconds[class_name] = Histogram(SECONDS)
            known.observe(seconds, times)
        self._tell("seconds", seconds, class_name, times)

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Count a value of a histogram that has no classes."""
        with self._lock:
            getattr(self, name).observe(value, times)
        self._tell(name, value, "", times)

    def _tell(self, name: str, value: float, class_name: str, times: int) -> None:
        if self.on_observe is not None:
            for _ in range(times):
                self.on_observe(name, value, class_name)

    def figures(self) -> dict[str, int]:
        """Return the figures that each heartbeat publishes for operators."""
        with self._lock:
            executed = sum(self.executed.values())
            failed = sum(n for (_, outcome), n in self.executed.items() if outcome == "failed")
            return {
                "messages": self.made,
                "stored": self.stored,
                "stored_bytes": self.stored_bytes,
                "ended": self.ended,
                "executed": executed,
                "failed": failed,
                "retries": self.retries,
                "parked": self.parked,
                "reaped": self.reaped,
                "lost_locks": self.lost_locks,
            }
