"""Schedulers on many machines: only one of them runs a job.

With APScheduler, or any other that calls a function::

    scheduler.add_job(only_one(process, "report", every=3600)(report), "interval", hours=1)

With cron, on every machine: ``phonon once nightly --every 3600 -- python report.py``.
"""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from phonon.lock import Lock
from phonon.process import Process
from phonon.settings import check_name, check_owner, check_seconds

log = logging.getLogger("phonon")

P = ParamSpec("P")
R = TypeVar("R")

#: The share of the time between two runs in which no other runs; the rest allows for clock skew.
_SHARE = 0.75


class Turn:
    """The right to run a job now: no other process runs it, or has run it this time.

    Args:
        process: The process that wants it.
        name: The job's name, the same on all machines.
        every: Seconds between two runs. A machine that comes late, because its clock is behind,
            finds that the job was done. None: any process may run it when no other does.
    """

    def __init__(self, process: Process, name: str, every: float | None = None) -> None:
        check_owner(process)
        check_name("name", name)
        self._every = None if every is None else check_seconds("every", every)
        self._process = process
        self._key = f"phonon-schedule:{process.namespace}:{name}"
        self.lock: Lock = process.lock(f"schedule/{name}", block=False)

    def take(self) -> bool:
        """Return whether this process has the turn; then call `done` or `fail`."""
        if not self.lock.acquire():
            return False
        try:
            if self._every is None or not self._process.client.exists(self._key):
                return True
        except BaseException:
            self.lock.release()  # otherwise nobody would run the job as long as this process lives
            raise
        self.lock.release()
        return False

    def done(self) -> None:
        """Note that the job was done, so that it is not due before the next time."""
        try:
            if self._every is not None:
                milliseconds = max(1, int(self._every * _SHARE * 1000))
                self._process.client.set(self._key, self._process.id, px=milliseconds)
        finally:
            self.lock.release()

    def fail(self) -> None:
        """Note that the job failed, so that the next process may try."""
        self.lock.release()


def only_one(
    process: Process, name: str, *, every: float | None = None
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Decorate a job that all machines schedule and one machine runs.

    The lock lasts as long as the process lives, even if the job takes long. If the process is
    killed, the next scheduled one runs. A job that raises counts as not done.

    Args:
        process: The process that wants to run the job.
        name: The job's name, the same on all machines.
        every: Seconds between two runs; see `Turn`.

    Returns:
        A decorator. A decorated job returns its result; None if another process has the turn.
    """
    check_owner(process)
    check_name("name", name)
    if every is not None:
        check_seconds("every", every)

    def decorate(job: Callable[P, R]) -> Callable[P, R | None]:
        @functools.wraps(job)
        def run(*args: P.args, **kwargs: P.kwargs) -> R | None:
            turn = Turn(process, name, every)
            if not turn.take():
                log.info("job %r is, or was, run by another process", name)
                return None
            try:
                result = job(*args, **kwargs)
            except BaseException:
                turn.fail()
                raise
            turn.done()
            return result

        return run

    return decorate
