"""The background workers of a process: threads, or tasks of its event loop.

One beats, one tries failed batches again, one goes on with what was under way when the server went,
and one takes over from dead processes: the user's code runs in these, for as long as it likes, and
the heart beats on.
"""

import contextlib
import heapq
import itertools
import logging
import math
import threading
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from phonon.errors import ServerUnreachableError
from phonon.runtime import Worker
from phonon.takeover import take_over

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.update import Update

log = logging.getLogger("phonon")


def _join(worker: Worker | None, timeout: float | None = None) -> None:
    if worker is not None and worker.is_alive():
        with contextlib.suppress(RuntimeError):  # it is ourselves
            worker.join(timeout)


class Upkeep:
    """Keeps a process alive, and its failed batches in hand.

    They hold the engine weakly: a process that nobody holds any more stops beating, and
    survivors take over what it held.

    Args:
        engine: Whose.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = weakref.ref(engine)
        self._runtime = engine.runtime
        self._interval = engine.heartbeat_interval
        self._name = engine.name[:8]
        self._stopping = threading.Event()
        self._beat_due = self._runtime.condition()
        #: When the next beat is due at the latest.
        self._beat_at = math.inf
        self._beating: Worker | None = None
        self._retrying: Worker | None = None
        self._catching_up: Worker | None = None
        self._recovering: Worker | None = None
        self._dead: dict[str, None] = {}
        self._leaving = threading.Event()
        self._order = itertools.count()
        self._due: list[tuple[float, int, bytes, int, Update | None]] = []
        self._changed = self._runtime.condition()

    def start(self) -> None:
        """Begin to beat."""
        self._beating = self._runtime.spawn(self._beat, f"phonon-heartbeat-{self._name}")

    def stop(self) -> None:
        """End the workers. One that is in the middle of something is waited for, for a while."""
        self._stopping.set()
        self._leaving.set()
        self.beat_in(0.0)
        with self._changed:
            self._changed.notify_all()
        for thread in (self._beating, self._retrying):
            _join(thread, timeout=2.0)

    def wind_down(self) -> None:
        """Take no more over from dead processes than is in hand already."""
        self._leaving.set()

    def beat_in(self, seconds: float) -> None:
        """Beat by then, if not earlier."""
        due = time.monotonic() + seconds
        if due < self._beat_at:
            with self._beat_due:
                self._beat_at = min(due, self._beat_at)
                self._beat_due.notify()

    def _wait_for_beat(self, seconds: float) -> None:
        """Wait for so long, or for less if somebody says so meanwhile, or has since the last."""
        with self._beat_due:
            self._beat_at = min(time.monotonic() + seconds, self._beat_at)
            while (left := self._beat_at - time.monotonic()) > 0:
                self._beat_due.wait(left)
            self._beat_at = math.inf

    def join(self) -> None:
        """Wait until that is done, and what was under way when the server went has been tried."""
        _join(self._recovering)
        _join(self._catching_up)

    def catch_up(self) -> None:
        """Go on with what was under way when the server went. Called by the heartbeat."""
        if self._catching_up is None or not self._catching_up.is_alive():
            # As with a retry.
            with contextlib.suppress(RuntimeError):
                self._catching_up = self._runtime.spawn(
                    self._catch_up, f"phonon-catch-up-{self._name}"
                )

    def recover(self, dead: Iterable[str]) -> None:
        """Take over from dead processes. Called by the heartbeat."""
        with self._changed:
            self._dead.update(dict.fromkeys(dead))
            if not self._dead or self._leaving.is_set() or self._recovering is not None:
                return
            # As with a retry.
            with contextlib.suppress(RuntimeError):
                self._recovering = self._runtime.spawn(
                    self._recover, f"phonon-recovery-{self._name}"
                )

    def retry_in(self, seconds: float, base: bytes, token: int, update: "Update | None") -> None:
        """Try a batch again later."""
        with self._changed:
            entry = (time.monotonic() + seconds, next(self._order), base, token, update)
            heapq.heappush(self._due, entry)
            if self._retrying is None and not self._stopping.is_set():
                # The interpreter starts no threads while it ends; then stop() tries again.
                with contextlib.suppress(RuntimeError):
                    self._retrying = self._runtime.spawn(self._retry, f"phonon-retry-{self._name}")
            self._changed.notify_all()

    @property
    def failed(self) -> int:
        """How many batches wait to be tried again."""
        return len(self._due)

    def drop_retries(self) -> None:
        """Try no batch again: they were another identity's, and whoever takes over does."""
        with self._changed:
            self._due = []

    def retry_now(self) -> list[Exception]:
        """Try all failed batches once more, due or not. Returns what went wrong."""
        engine = self._engine()
        with self._changed:
            due, self._due = self._due, []
        if engine is None or not due:
            return []
        tasks = [engine.retrying(base, token, update) for _, _, base, token, update in due]
        engine.driver.run_all(tasks)
        return [task.error for task in tasks if isinstance(task.error, Exception)]

    def _beat(self) -> None:
        try:
            self._keep_beating()
        finally:
            engine = self._engine()
            if engine is not None and not self._stopping.is_set():
                engine.heart_stopped()

    def _keep_beating(self) -> None:
        complained = False
        pause = self._interval
        while True:
            self._wait_for_beat(pause)
            if self._stopping.is_set():
                return
            pause = self._interval
            engine = self._engine()
            if engine is None:
                return
            # Whatever goes wrong, the next beat comes: a process that has stopped beating is
            # taken for dead while it works.
            try:
                pause = min(pause, engine.beat())
            except ServerUnreachableError as error:
                if not complained:
                    log.warning("no heartbeat: %s", error)
                complained = True
            except Exception:
                log.exception("a heartbeat of process %s failed", self._name)
            else:
                if complained:
                    log.warning("the heartbeat of process %s is back", self._name)
                complained = False
            pause = min(pause, engine.soonest())
            del engine

    def _catch_up(self) -> None:
        engine = self._engine()
        try:
            if engine is not None:
                with engine.backlog.working():
                    engine.catch_up()
        except Exception:
            log.exception("process %s could not do all that was left to do", self._name)

    def _recover(self) -> None:
        while True:
            engine = self._engine()
            process = engine.wanted_by if engine else None  # it is needed until we are done
            with self._changed:
                if not engine or not process or not self._dead or self._leaving.is_set():
                    self._recovering = None
                    return
                dead, self._dead = self._dead, {}
            try:
                with engine.backlog.working():
                    take_over(engine, dead, self._leaving.is_set)
            except ServerUnreachableError as error:
                log.warning("process %s takes over later: %s", self._name, error)
            except Exception:
                log.exception("process %s could not take over", self._name)
            del engine, process

    def _retry(self) -> None:
        while True:
            with self._changed:
                left = self._due[0][0] - time.monotonic() if self._due else self._interval
                if left > 0 or not self._due:
                    self._changed.wait(min(left, self._interval))
                if self._stopping.is_set() or self._engine() is None:
                    return
                if not self._due or self._due[0][0] > time.monotonic():
                    continue
                _, _, base, token, update = heapq.heappop(self._due)
            engine = self._engine()
            if engine is None:
                return
            try:
                with engine.backlog.working():
                    engine.run_all([engine.retrying(base, token, update)])
            except Exception:
                log.exception("a retry of batch %d failed", token)
            del engine, update
