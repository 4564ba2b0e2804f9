"""A process of its own with one lock, to be paused and killed: a `Member` that has nothing else."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from phonon import Process
from phonon.errors import PhononError
from phonon.lock import Lock
from support import member
from support.member import PATIENCE, Journal, Member
from support.world import Redis

#: A heartbeat for tests that wait for a death: it takes four.
QUICK = 0.25


class LockActor:
    """The actions of an `Other`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._told: list[str] = []
        self._lost: list[str] = []
        name, arguments = options.pop("lock")
        self._process = Process(
            **options, on_error=lambda error: self._told.append(type(error).__name__)
        )
        kind = self._process.semaphore if "places" in arguments else self._process.lock
        self._lock: Lock = kind(
            name, **arguments, on_lost=lambda lock: self._lost.append(lock.name)
        )

    def id(self) -> str:
        return self._process.id

    def told(self) -> list[str]:
        """The errors that ``on_error`` was called with."""
        return self._told

    def lost(self) -> list[str]:
        """The locks that ``on_lost`` was called with."""
        return self._lost

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call a method of the lock, or read an attribute; the name of the error if it raises."""
        found = getattr(self._lock, name)
        try:
            return found(**arguments) if callable(found) else found
        except PhononError as error:
            return type(error).__name__


class Other(Member):
    """Another process, with one lock."""

    program = "from support import others; others.main()"

    def send(self, method: str, **arguments: Any) -> "Future[Any]":
        """Have it call a method of its lock, or read an attribute."""
        return self.begin("call", method, arguments)

    def ask(self, method: str, **arguments: Any) -> Any:
        """The same, and return the result; the name of the error if it raised."""
        if method in ("told", "lost"):
            return self.do(method)
        return self.send(method, **arguments).result(PATIENCE)


Others = Callable[..., Other]


@pytest.fixture
def other(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Others]:
    """Makes such processes, and kills those that are left."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "x", *, on: Redis = server, **lock: Any) -> Other:
            options = {"url": on.url, "namespace": namespace, "heartbeat_interval": QUICK}
            options |= lock.pop("process", {})
            made = Other(Journal(tmp_path), {**options, "lock": [name, lock]})
            stack.callback(made.close)
            return made

        yield make


def main() -> None:
    """Run in the interpreter that an `Other` starts."""
    member.main(LockActor)
