"""The worker processes of a run, some of which die."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, Protocol, Self

from chaos.jobs import Message
from chaos.wire import Failed, Log, Progress, Ready, TookOver, WorkerSettings
from phonon_demo.errors import WorkerError

#: The most unacknowledged lists of messages of a worker; then the program waits for it.
WINDOW = 4
#: Seconds for workers to end their sessions and leave after an early stop.
GRACE = 10.0


class Worker:
    """One worker process.

    Attributes:
        number: The worker's number, from 1 on.
        progress: Its progress so far.
        process: The id of its `phonon.Process`; empty until it is ready.
        unacknowledged: The lists that were sent and are not acknowledged, oldest first.
        fate: The cause of its end before its time; empty if it has not ended.
        takeovers: Its takeovers from others.
    """

    def __init__(self, number: int, settings: WorkerSettings) -> None:
        self.number = number
        self.progress = Progress()
        self.process = ""
        self.unacknowledged: deque[list[Message]] = deque()
        self.fate = ""
        self.takeovers: list[TookOver] = []
        self.connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self.popen = subprocess.Popen(  # noqa: S603 - all words are the program's own
                # -P: a file in the user's folder must not take the place of a module.
                [sys.executable, "-P", "-m", "chaos.worker", str(descriptor)],
                pass_fds=[descriptor],
                env=os.environ | {"PYTHONPATH": _path()},
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the program, which then tells its workers to leave in good order.
                process_group=0,
            )
        with contextlib.suppress(BrokenPipeError):  # its end is noticed when its answer is awaited
            self.connection.send(settings)

    @property
    def pid(self) -> int:
        """Its OS process id."""
        return self.popen.pid

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return f"worker {self.number} (pid {self.pid})"


class Listener(Protocol):
    """The interface of an object that follows the workers."""

    def progressed(self, workers: Sequence[Worker]) -> None:
        """Take note of progress."""

    def log(self, text: str) -> None:
        """Show a line of a worker."""

    def acknowledged(self, messages: list[Message]) -> None:
        """Note that all data of a list is on the server."""

    def died(self, worker: Worker) -> None:
        """Note that a worker has died. Its unacknowledged lists are in `Pool.orphans`."""


class Pool:
    """The worker processes of a run; a context manager that ends all of them.

    Args:
        settings: The workers' settings.
        count: The number of workers.
        listener: Follows the workers.

    Attributes:
        workers: The workers, including those that have ended.
        orphans: Lists that their workers have not acknowledged before they ended.
    """

    def __init__(self, settings: WorkerSettings, count: int, listener: Listener) -> None:
        self.workers: list[Worker] = []
        self.orphans: deque[list[Message]] = deque()
        self._setup = settings
        self._count = count
        self._listener = listener

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self.start()
            while not all(worker.process for worker in self.workers):
                self.listen()
                _require(self.workers, "before it was ready")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> list[Worker]:
        """The workers that have not ended before their time, as far as is known.

        Raises:
            WorkerError: There are none.
        """
        alive = [worker for worker in self.workers if not worker.fate]
        if not alive:
            last = self.workers[-1]
            raise WorkerError(
                f"{last.name} {last.fate} before its work was done, and no other worker is left"
            )
        return alive

    def start(self) -> Worker:
        """Start one more worker, without waiting until it is ready."""
        self.workers.append(Worker(len(self.workers) + 1, self._setup))
        return self.workers[-1]

    def send(self, worker: Worker, messages: list[Message]) -> None:
        """Hand messages to a worker, when it has acknowledged enough of those before.

        If the worker has ended, the messages become orphans.
        """
        self.listen(0)
        while len(worker.unacknowledged) >= WINDOW:
            self.listen()
        if worker.fate:
            self.orphans.append(messages)
        else:
            worker.unacknowledged.append(messages)
            self._send(worker, messages)

    def kill(self, worker: Worker) -> None:
        """End a worker with SIGKILL, and take in its last messages."""
        worker.popen.kill()
        while not worker.fate:
            self._hear(worker)

    def finish(self) -> None:
        """Tell the workers to end, and wait until they have left.

        All messages have to be acknowledged before. Otherwise a worker could leave as the last one
        to hold a key that another worker gets later.

        Raises:
            WorkerError: A worker has ended before that.
        """
        alive = self.alive
        for worker in alive:
            self._send(worker, None)
        while not all(worker.progress.done for worker in alive):
            self.listen()
            _require(alive, "while it ended its sessions")

    def close(self) -> None:
        """End the workers, and kill those that do not leave in time."""
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

    def listen(self, timeout: float | None = None) -> None:
        """Take in the messages of workers."""
        talking = {w.connection: w for w in self.workers if not w.fate and not w.progress.done}
        ready: list[Any] = wait(list(talking), timeout)
        for connection in ready:
            self._hear(talking[connection])
        if ready:
            self._listener.progressed(self.workers)

    def _send(self, worker: Worker, messages: list[Message] | None) -> None:
        try:
            worker.connection.send(messages)
        except OSError:
            # It has ended. Its last messages are still to be read.
            while not worker.fate:
                self._hear(worker)

    def _hear(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.fate = _fate(worker)
            worker.connection.close()
            self.orphans.extend(worker.unacknowledged)
            self._listener.died(worker)
            return
        match message:
            case Ready(process):
                worker.process = process
            case Progress():
                for _ in range(message.lists - worker.progress.lists):
                    self._listener.acknowledged(worker.unacknowledged.popleft())
                worker.progress = message
            case TookOver():
                worker.takeovers.append(message)
            case Log(text):
                self._listener.log(f"worker {worker.number}: {text}")
            case Failed(text, traceback):
                if traceback:
                    self._listener.log(traceback)
                raise WorkerError(f"{worker.name} gave up: {text}")


def _require(workers: Sequence[Worker], when: str) -> None:
    """Raise if one of the workers has ended."""
    for worker in workers:
        if worker.fate:
            raise WorkerError(f"{worker.name} {worker.fate} {when}")


def _path() -> str:
    """Return the module path of this process, for its workers."""
    return os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)


def _fate(worker: Worker) -> str:
    """Return how a worker ended that did not report an error."""
    try:
        status = worker.popen.wait(GRACE)
    except subprocess.TimeoutExpired:
        worker.popen.kill()
        worker.popen.wait()
        return "closed its connection"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
