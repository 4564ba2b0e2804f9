"""The worker processes, as the demo sees them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from phonon.cli.errors import WorkerError
from phonon.cli.jobs import Message
from phonon.cli.wire import Failed, Log, Progress, Ready, Setup

#: Lists of messages that a worker may have unacknowledged; then the demo waits for it.
WINDOW = 4
#: Seconds for workers to end their sessions and leave when they are told to stop early.
GRACE = 10.0


class Worker:
    """One worker process.

    Attributes:
        number: From 1 on.
        progress: What it has done so far.
    """

    def __init__(self, number: int, setup: Setup) -> None:
        self.number = number
        self.progress = Progress()
        self.ready = False
        self.sent = 0
        self.connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self.popen = subprocess.Popen(  # noqa: S603 - no word of it comes from outside
                # -P: a file in the user's folder must not take the place of a module.
                [sys.executable, "-P", "-m", "phonon.cli.worker", str(descriptor)],
                pass_fds=[descriptor],
                env=os.environ | {"PYTHONPATH": _path()},
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the demo, which then tells its workers to leave in good order.
                process_group=0,
            )
        with contextlib.suppress(BrokenPipeError):  # its end is noticed when its answer is awaited
            self.connection.send(setup)

    @property
    def pid(self) -> int:
        """Its OS process id."""
        return self.popen.pid

    @property
    def unacknowledged(self) -> int:
        """How many lists it was sent and has not acknowledged."""
        return self.sent - self.progress.lists


class Listener(Protocol):
    """Who wants to know how the workers are doing."""

    def progressed(self, workers: Sequence[Worker]) -> None:
        """Something has changed."""

    def log(self, text: str) -> None:
        """A worker has something to say."""


class Pool:
    """The worker processes of a run; a context manager that leaves none of them behind.

    Args:
        setup: What they are to do.
        count: How many.
        listener: Who wants to know.

    Attributes:
        workers: The workers.
    """

    def __init__(self, setup: Setup, count: int, listener: Listener) -> None:
        self.workers: list[Worker] = []
        self._setup = setup
        self._count = count
        self._listener = listener

    def __enter__(self) -> Self:
        try:
            for number in range(1, self._count + 1):
                self.workers.append(Worker(number, self._setup))
            while not all(worker.ready for worker in self.workers):
                self._listen()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, worker: Worker, messages: list[Message]) -> None:
        """Hand messages to a worker, when it has acknowledged enough of those before.

        Raises:
            WorkerError: A worker has ended.
        """
        self._listen(0)
        while worker.unacknowledged >= WINDOW:
            self._listen()
        self._send(worker, messages)
        worker.sent += 1

    def finish(self) -> None:
        """Wait until all is acknowledged, tell the workers to end, and wait until they have left.

        Raises:
            WorkerError: A worker has ended before that.
        """
        # A worker that left earlier would be the last to hold a key that another is still to get.
        while any(worker.unacknowledged for worker in self.workers):
            self._listen()
        for worker in self.workers:
            self._send(worker, None)
        while not all(worker.progress.done for worker in self.workers):
            self._listen()

    def close(self) -> None:
        """End the workers. Those that do not leave in time are killed."""
        for worker in self.workers:
            worker.connection.close()  # which tells a worker to leave
        deadline = time.monotonic() + GRACE
        for worker in self.workers:
            try:
                worker.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.popen.kill()
                worker.popen.wait()
                self._listener.log(f"worker {worker.number} did not leave in time and was killed")

    def _send(self, worker: Worker, messages: list[Message] | None) -> None:
        try:
            worker.connection.send(messages)
        except OSError:
            # It has ended. What it had to say about that is still to be read.
            while True:
                self._hear(worker)

    def _listen(self, timeout: float | None = None) -> None:
        """Take in what workers have to say."""
        talking = {w.connection: w for w in self.workers if not w.progress.done}
        ready: list[Any] = wait(list(talking), timeout)
        for connection in ready:
            self._hear(talking[connection])
        if ready:
            self._listener.progressed(self.workers)

    def _hear(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            raise WorkerError(_epitaph(worker)) from None
        match message:
            case Ready():
                worker.ready = True
            case Progress():
                worker.progress = message
            case Log(text):
                self._listener.log(f"worker {worker.number}: {text}")
            case Failed(text, traceback):
                if traceback:
                    self._listener.log(traceback)
                raise WorkerError(f"worker {worker.number} (pid {worker.pid}) gave up: {text}")


def _path() -> str:
    """Where this process finds its modules, for its workers."""
    return os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)


def _epitaph(worker: Worker) -> str:
    """How a worker ended, which did not say why."""
    try:
        status = worker.popen.wait(GRACE)
    except subprocess.TimeoutExpired:
        how = "closed its connection"
    else:
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
    return f"worker {worker.number} (pid {worker.pid}) {how} before its work was done"
