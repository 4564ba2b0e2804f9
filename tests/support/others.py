"""A process of its own that takes locks on demand, to be paused and killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phonon import Process
from phonon.errors import PhononError
from phonon.lock import Lock
from support.world import Redis

#: A heartbeat for tests that wait for a death: it takes four.
QUICK = 0.1
TESTS = str(Path(__file__).parents[1])
CODE = f"import sys; sys.path.insert(0, {TESTS!r}); from support import others; others.main()"


class Other:
    """Another process, with one lock.

    Args:
        url: Its server.
        namespace: Its namespace.
        lock: Arguments of `Process.lock`; with ``places``, of `Process.semaphore`.
        options: Arguments of `Process`.
    """

    def __init__(self, url: str, namespace: str, lock: dict[str, Any], **options: Any) -> None:
        options = {"url": url, "namespace": namespace, "heartbeat_interval": QUICK, **options}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(options), json.dumps(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.id = self.answer()

    def send(self, method: str, **arguments: Any) -> None:
        """Have it call a method of its lock, or read an attribute."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps([method, arguments]) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> Any:
        """What came of it; the name of the error if it raised."""
        assert self.popen.stdout is not None
        return json.loads(self.popen.stdout.readline())

    def ask(self, method: str, **arguments: Any) -> Any:
        self.send(method, **arguments)
        return self.answer()

    def pause(self) -> None:
        os.kill(self.popen.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.popen.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


Others = Callable[..., Other]


@pytest.fixture
def other(server: Redis, namespace: str) -> Iterator[Others]:
    """Makes such processes, and kills those that are left."""
    with contextlib.ExitStack() as stack:

        def make(lock_key: str = "x", *, on: Redis = server, **lock: Any) -> Other:
            process = lock.pop("process", {})
            made = Other(on.url, namespace, {"lock_key": lock_key, **lock}, **process)
            stack.callback(made.kill)
            return made

        yield make


def main() -> None:
    """What runs there."""
    told: list[str] = []
    lost: list[str] = []

    def lost_it(lock: Lock) -> None:
        lost.append(lock.name)

    options, arguments = map(json.loads, sys.argv[1:])
    process = Process(**options, on_error=lambda error: told.append(type(error).__name__))
    print(json.dumps(process.id), flush=True)  # noqa: T201 - read by the test
    lock: Lock
    if "places" in arguments:
        name = arguments.pop("lock_key")
        lock = process.semaphore(name, **arguments, on_lost=lost_it)
    else:
        lock = process.lock(**arguments, on_lost=lost_it)
    for line in sys.stdin:
        method, values = json.loads(line)
        result: Any
        if method == "told":
            result = told
        elif method == "lost":
            result = lost
        else:
            result = getattr(lock, method)
            if callable(result):
                try:
                    result = result(**values)
                except PhononError as error:
                    result = type(error).__name__
        print(json.dumps(result), flush=True)  # noqa: T201 - read by the test
