"""Ends sessions by time: without messages for too long, or open for too long.

One worker for each process watches the sessions in all of its caches. A heap orders them by the
time at which each may be over. A session that was extended meanwhile goes back into the heap, so
that a message costs nothing here.
"""

import heapq
import itertools
import logging
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from phonon._core.flows import Branch, Flow, Signal, Wait
from phonon._core.outbox import Outbox
from phonon._core.parcels import Ending
from phonon._core.reports import Reports

log = logging.getLogger("phonon")

#: Sessions that began together end spread over this part of their length. A million of them at one
#: moment would be one call after another, and keep the server from all other work.
SPREAD = 0.1
#: Seconds after the end of an update's session for which the worker leaves it to the next message.
GRACE = 1.0
#: Sessions that are ended together.
PIECE = 1000
#: The most seconds between two looks, because a test may have moved the clock on.
_LOOK = 1.0
#: Seconds after which to look again at a session that cannot end now.
_AGAIN = 0.25
#: The most outdated deadlines in the heap, besides one for each session.
_LEFTOVERS = 1000


class ExpiringCache(Protocol):
    """A cache whose sessions end by themselves."""

    def __len__(self) -> int: ...

    def deadline(self, key: Hashable) -> float:
        """Return when a key's session may be over, by the monotonic clock; never: infinity."""

    def take_over(self, key: Hashable, now: float, sessions: "Sessions") -> Any:
        """Remove and return the update of a key whose session is over; None if it is not.

        Args:
            key: The key.
            now: The time, by the monotonic clock.
            sessions: The sessions of the process that the update has to belong to.
        """

    def restore(self, key: Hashable, update: Any) -> None:
        """Take back an update whose data could not be sent."""


def share(resource: str) -> float:
    """Return a resource's share of the spread, from 0 to 1, the same in all processes."""
    return zlib.crc32(resource.encode("utf-8", "surrogatepass")) / 2**32


class Sessions:
    """Ends the sessions of a process when they are over.

    Args:
        outbox: Ends them.
        reports: Told about errors.
        is_referenced: Tells whether the public process object still exists.

    Attributes:
        signal: Wakes the worker.
        start_worker: Starts it, if it does not run.
    """

    def __init__(self, outbox: Outbox, reports: Reports, is_referenced: Callable[[], bool]) -> None:
        self._outbox = outbox
        self._reports = reports
        self._is_referenced = is_referenced
        self.signal: Signal | None = None
        self.start_worker: Callable[[], None] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Start without sessions: at first, and in a forked child."""
        self.stopping = False
        # Reentrant: a signal handler may call this during a call of the same thread.
        self._lock = threading.RLock()
        self._heap: list[tuple[float, int, weakref.ref[Any], Hashable]] = []
        self._order = itertools.count()
        self._is_working = False

    def watch(self, cache: "weakref.ref[Any]", key: Hashable, deadline: float) -> None:
        """Watch a session from the time on at which it may be over."""
        with self._lock:
            is_first = not self._heap or deadline < self._heap[0][0]
            heapq.heappush(self._heap, (deadline, next(self._order), cache, key))
        if not self._is_working and not self.stopping:
            self._is_working = True
            self.start_worker()
        elif is_first and self.signal is not None:
            self.signal.set()

    def work(self) -> Flow[None]:
        """End sessions until the process stops."""
        self._is_working = True
        try:
            while not self.stopping and self._is_referenced():
                try:
                    pause = yield from self._end_some()
                except Exception:
                    log.exception("ending sessions that are over has failed, and goes on")
                    pause = _LOOK
                if self.signal is not None and pause > 0 and not self.stopping:
                    yield Wait(self.signal, pause)
        finally:
            self._is_working = False

    def _end_some(self) -> Flow[float]:
        """End sessions that are over, so many at a time.

        Returns:
            Seconds until the next one may be over.
        """
        now = time.monotonic()
        taken: list[tuple[Any, Hashable, Any]] = []
        for cache_ref, key in self._pop(now):
            cache: ExpiringCache | None = cache_ref()
            if cache is None:
                continue
            update = cache.take_over(key, now, self)
            if update is not None:
                taken.append((cache_ref, key, update))
                continue
            deadline = cache.deadline(key)
            if deadline < float("inf"):
                # The session was extended; or a batch is about to store its data. If this worker
                # took the data, the batch would tell its caller too early that it is safe.
                self.watch(cache_ref, key, max(deadline, now + _AGAIN))
        cache = None
        if taken:
            yield from self._end(taken)
        with self._lock:
            if not self._heap:
                return _LOOK
            return min(_LOOK, max(0.0, self._heap[0][0] - time.monotonic()))

    def _pop(self, now: float) -> list[tuple[Any, Hashable]]:
        due: list[tuple[Any, Hashable]] = []
        with self._lock:
            heap = self._heap
            while heap and heap[0][0] <= now and len(due) < PIECE:
                _, _, cache, key = heapq.heappop(heap)
                due.append((cache, key))
            # A session that ended in another way leaves its deadline behind.
            # By identity: what refers to a cache that is gone has no hash.
            refs = {id(ref): ref for _, _, ref, _ in heap[:PIECE]}
            caches = [ref() for ref in refs.values()]
            living = sum(len(cache) for cache in caches if cache is not None)
            if len(heap) > 2 * living + _LEFTOVERS:
                self._heap = [item for item in heap if _is_there(item[2], item[3])]
                heapq.heapify(self._heap)
        return due

    def _end(self, taken: Sequence[tuple[Any, Hashable, Any]]) -> Flow[None]:
        outcome = yield Branch(self._outbox.end([_ending(update) for _, _, update in taken]))
        results = outcome.value or [None] * len(taken)
        for (cache_ref, key, update), result in zip(taken, results, strict=True):
            errors = [outcome.error] if result is None else result.errors
            for error in errors:
                if isinstance(error, Exception):
                    self._reports.notify(error)
            cache: ExpiringCache | None = cache_ref()
            if errors and cache is not None and update.has_unsent():
                cache.restore(key, update)
                self.watch(cache_ref, key, time.monotonic() + _LOOK)


def _is_there(cache_ref: "weakref.ref[Any]", key: Hashable) -> bool:
    cache = cache_ref()
    return cache is not None and key in cache


def _ending(update: Any) -> Ending:
    return Ending(update.resource_id, update, update.forced)
