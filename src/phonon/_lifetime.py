"""Stops processes at the end of the interpreter, and resets their copies after a fork."""

import atexit
import logging
import multiprocessing.util
import os
import sys
import weakref
from typing import Protocol

from phonon._core import forks
from phonon._transport import connect

log = logging.getLogger("phonon")

#: Packages whose children end without the interpreter's exit functions.
_PACKAGES = (multiprocessing.util.__name__, "billiard.util")
#: The last of all: finalizers of the user's may still need their process.
_LAST = -100


class Stoppable(Protocol):
    """A process that stops without an event loop."""

    def stop(self) -> None:
        """End everything."""


class Forkable(Protocol):
    """A process that has a copy in a forked child."""

    def begin_after_fork(self) -> None:
        """Reset the child's copy."""


_stoppable: "weakref.WeakSet[Stoppable]" = weakref.WeakSet()
_forkable: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
#: The operating system's process in which each package calls `stop_all`.
_watched: dict[str, int] = {}


def is_to_be_forked() -> bool:
    """Return whether this is uWSGI's master, which imports the program for its workers.

    It forks in C, without regard to other threads: if one of them runs Python code at that moment,
    the worker can never run Python code again.
    """
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and uwsgi.worker_id() == 0


def stop_at_exit(process: Stoppable) -> None:
    """Stop a process at the end of the interpreter, unless it was stopped before."""
    _stoppable.add(process)
    _watch_all()


def forget(process: Stoppable) -> None:
    """Do not stop a process at the end of the interpreter: it has been stopped."""
    _stoppable.discard(process)


def tell_of_forks(process: Forkable) -> None:
    """Reset a process's copy in each forked child."""
    _forkable.add(process)


def stop_all(**_: object) -> None:
    """Stop all processes, so that nothing is left to take over. Celery passes arguments."""
    for process in list(_stoppable):
        try:
            process.stop()
        except Exception:
            log.exception("stopping %r at exit left something undone", process)


def _watch_all() -> None:
    """Make packages that end their children in another way call `stop_all` first."""
    for package in _PACKAGES:
        _watch(package)
    signals = sys.modules.get("celery.signals")
    if signals is not None:
        # A worker of Celery's pool ends by os._exit, without billiard's finalizers.
        signals.worker_process_shutdown.connect(stop_all, weak=False, dispatch_uid="phonon")


def _watch(package: str, *, anew: bool = False) -> None:
    """Have a package that forks workers call `stop_all` at their end."""
    util = sys.modules.get(package)
    if util is None or (_watched.get(package) == os.getpid() and not anew):
        return
    is_first = package not in _watched
    _watched[package] = os.getpid()
    util.Finalize(None, stop_all, exitpriority=_LAST)
    if is_first:
        # A child drops its parent's finalizers, and then runs this.
        util.register_after_fork(stop_all, lambda _: _watch(package, anew=True))


def _after_fork_in_child() -> None:
    connect.after_fork_in_child()
    for process in list(_forkable):
        process.begin_after_fork()
    if _stoppable:
        _watch_all()  # the forking package may have been imported after the process was made


# Runs after the non-daemon threads have ended, which may use a process until then.
atexit.register(stop_all)
forks.call_in_child(_after_fork_in_child)
