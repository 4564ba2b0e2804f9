"""The ends and forks of the interpreter, and what they mean for its processes."""

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

#: Packages whose children end without the interpreter's exit functions: Celery's workers, say.
_PACKAGES = (multiprocessing.util.__name__, "billiard.util")
#: Behind all others: finalizers of the user's may still need their process.
_LAST = -100


class Stoppable(Protocol):
    """A process that stops without an event loop."""

    def stop(self) -> None:
        """End everything."""


class Forkable(Protocol):
    """A process that has a copy in a forked child."""

    def begin_after_fork(self) -> None:
        """Be the child's copy."""


_stoppable: "weakref.WeakSet[Stoppable]" = weakref.WeakSet()
_forkable: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
#: The operating system's process in which each package calls `stop_all`.
_watched: dict[str, int] = {}


def stop_at_exit(process: Stoppable) -> None:
    """Stop a process at the end of the interpreter, unless it was stopped before."""
    _stoppable.add(process)
    for package in _PACKAGES:
        _watch(package)


def forget(process: Stoppable) -> None:
    """Leave a process alone at the end of the interpreter: it has been stopped."""
    _stoppable.discard(process)


def tell_of_forks(process: Forkable) -> None:
    """Have a process's copy in a forked child begin anew."""
    _forkable.add(process)


def stop_all() -> None:
    """Leave nothing to take over."""
    for process in list(_stoppable):
        try:
            process.stop()
        except Exception:
            log.exception("stopping %r at exit left something undone", process)


def _watch(package: str, *, anew: bool = False) -> None:
    """Have a package that forks workers call `stop_all` at their end."""
    util = sys.modules.get(package)
    if util is None or (_watched.get(package) == os.getpid() and not anew):
        return
    is_first = package not in _watched
    _watched[package] = os.getpid()
    util.Finalize(None, stop_all, exitpriority=_LAST)
    if is_first:
        # A child forgets the finalizers of its parent, and runs this afterwards.
        util.register_after_fork(stop_all, lambda _: _watch(package, anew=True))


def _after_fork_in_child() -> None:
    connect.after_fork_in_child()
    for process in list(_forkable):
        process.begin_after_fork()


# After the non-daemon threads have ended, which may use a process until then.
atexit.register(stop_all)
forks.call_in_child(_after_fork_in_child)
