"""Stands in for a process if a unit test makes an update without one.

Such an update merges and executes. It cannot be stored, so a method that needs a server raises an
error with the remedy.
"""

import itertools
import threading
import weakref
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn

from phonon._core.engine import STRIPES
from phonon.errors import ConfigurationError
from phonon.serializers import ExactSerializer


class DetachedEngine:
    """The parts of a process that an update uses without a server.

    Args:
        is_async: Whether it stands in for the engine of an `AsyncProcess`.
    """

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async
        self.messages = itertools.count()
        self.merged = 0
        self.trace = None
        self.identity = SimpleNamespace(generation=object())
        self.codec = SimpleNamespace(serializer=ExactSerializer())
        self.outbox = SimpleNamespace(full=False)
        self.members = SimpleNamespace(held={})
        self.sessions = SimpleNamespace(watch=lambda *_: None)  # only `expire` ends them
        self.prefixes: dict[tuple[str, str], str] = {}
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.batches: frozenset[Any] = frozenset()
        self.durable_batches = self.batches
        self.stripes = [threading.RLock() for _ in range(STRIPES)]

    @property
    def batch(self) -> NoReturn:
        """Refuse: a caller with a batch is about to store data."""
        raise _refusal()

    def ensure_alive(self) -> NoReturn:
        """Refuse what needs a server."""
        raise _refusal()

    def run(self, flow: Any) -> NoReturn:
        """Refuse what needs a server."""
        flow.close()
        raise _refusal()


class DetachedProcess:
    """The value of `Update.process` for an update that was made without a process."""

    def __init__(self, *, is_async: bool) -> None:
        self.engine = DetachedEngine(is_async=is_async)

    def __repr__(self) -> str:
        return "<no process: the update was made without one>"


def _refusal() -> ConfigurationError:
    return ConfigurationError(
        "this update was made without a process: merge() and execute() work, methods that "
        "need the server do not; give a Process as the first argument"
    )


@cache
def detached(*, is_async: bool) -> DetachedProcess:
    """Return the stand-in for a process; there is one for each API."""
    return DetachedProcess(is_async=is_async)
