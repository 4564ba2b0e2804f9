"""A worker process of the chaos run.

It takes messages, merges them in a cache, and acknowledges them once they are on the server. On
SIGTERM and SIGINT it finishes the list in hand, ends its sessions and leaves.
Started by `chaos.pool` as ``python -m chaos.worker <file descriptor>``.
"""

import contextlib
import logging
import signal
import sqlite3
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from chaos.sink import Sink
from chaos.wire import Failed, Log, Progress, Ready, TookOver, WorkerSettings
from phonon import LruCache, PhononError, Process, Update
from phonon._core.takeover import TAKEN_OVER
from phonon.errors import DeclaredDeadError, ServerUnreachableError

#: Seconds between two reports while sessions are written.
REPORT_INTERVAL = 0.1


class ParentGone(Exception):  # noqa: N818 - it tells a worker to stop
    """The program has closed the connection: it was interrupted, or it is dead."""


class Stopped(BaseException):
    """A signal asks the worker to leave, and it has no list in hand."""


class Stop:
    """The handler of signals that ask the worker to leave.

    An exception at any moment would leave work half done. So the handler raises only while the
    worker waits for messages; otherwise the next attempt to wait raises.

    Attributes:
        number: The signal that has come; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal."""
        del frame
        self.number = number
        if self._waiting:
            self._waiting = False
            raise Stopped

    def __enter__(self) -> None:
        self._waiting = True
        if self.number is not None:
            self._waiting = False
            raise Stopped

    def __exit__(self, *_: object) -> None:
        self._waiting = False


class Link:
    """The connection to the program.

    Args:
        connection: The connection.
        stop: The handler that ends the waiting.
    """

    def __init__(self, connection: "Connection[Any, Any]", stop: Stop) -> None:
        self._connection = connection
        self._stop = stop
        self._lock = threading.Lock()  # other threads log

    def send(self, message: Ready | Progress | TookOver | Log | Failed) -> None:
        """Send a message to the program."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise ParentGone from error

    def fileno(self) -> int:
        """The descriptor for messages of the program."""
        return self._connection.fileno()

    def receive(self) -> Any:
        """Wait for the program.

        Raises:
            ParentGone: The program has gone.
            Stopped: A signal has come.
        """
        try:
            with self._stop:
                return self._connection.recv()
        except (EOFError, OSError) as error:
            raise ParentGone from error


class _LogToProgram(logging.Handler):
    """Sends log lines to the program, whose terminal may have a live display."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        message: Log | TookOver = Log(record.getMessage())
        if record.msg == TAKEN_OVER and isinstance(record.args, tuple):
            _, sessions, dead, batches = record.args
            message = TookOver(str(dead), int(str(sessions)), int(str(batches)))
        with contextlib.suppress(ParentGone):
            self._link.send(message)


class ProgressReporter:
    """Reports this worker's progress to the program."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reported = time.monotonic()
        self.lists = self.messages = self.reborn = 0

    def acknowledge(self, messages: int) -> None:
        """Note that all data of a list is on the server."""
        self.lists += 1
        self.messages += messages
        self.report()

    def written(self) -> None:
        """Note that a session was written, and report now and then."""
        if time.monotonic() - self._reported > REPORT_INTERVAL:
            # The program may be gone; sessions are written all the same.
            with contextlib.suppress(ParentGone):
                self.report()

    def trouble(self, error: Exception) -> None:
        """Count a background error that is a rebirth."""
        self.reborn += isinstance(error, DeclaredDeadError)

    def report(self, *, done: bool = False) -> None:
        """Send a message to the program."""
        self._reported = time.monotonic()
        sink = Sink.current
        self._link.send(
            Progress(self.lists, self.messages, sink.writes, sink.repeats, self.reborn, done)
        )


def work(link: Link, settings: WorkerSettings) -> None:
    """Handle messages until there are no more."""
    job = settings.job
    reporter = ProgressReporter(link)
    Sink.current = Sink(settings.database, job.table, reporter.written)
    with (
        contextlib.closing(Sink.current),
        _connect(settings, reporter) as process,
    ):
        cache: LruCache[Update] = LruCache(settings.max_entries)
        link.send(Ready(process.id))
        while (messages := link.receive()) is not None:
            with process.batch():
                for message in messages:
                    cache.set(message[0], job.update(process, message))
            # Only now is all data on the server: here a program would acknowledge to its broker.
            reporter.acknowledge(len(messages))
        cache.expire_all()
        process.stop()
        reporter.report(done=True)


def options(settings: WorkerSettings, reporter: ProgressReporter) -> dict[str, Any]:
    """Return the arguments of the worker's process."""
    return {
        "url": settings.url,
        "namespace": settings.namespace,
        "heartbeat_interval": settings.heartbeat,
        "durability": settings.durability,
        "on_error": reporter.trouble,
    }


def _connect(settings: WorkerSettings, reporter: ProgressReporter) -> Process:
    give_up = time.monotonic() + settings.patience
    while True:
        try:
            return Process(**options(settings, reporter))
        except ServerUnreachableError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(REPORT_INTERVAL)


def failure(error: BaseException) -> Failed:
    """Return the report of an error to the program."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # usually all are alike
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, PhononError | sqlite3.Error):
        return Failed(text)
    return Failed(text, "".join(traceback.format_exception(error)))


def main() -> None:
    """Work for the program at the other end of the connection."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    link = Link(Connection(int(sys.argv[1])), stop)
    log = logging.getLogger("phonon")
    log.addHandler(_LogToProgram(link))
    log.propagate = False
    try:
        settings: WorkerSettings = link.receive()
        if settings.asyncio:
            from chaos.async_worker import run  # noqa: PLC0415 - imports this file

            run(link, settings, stop)
        else:
            work(link, settings)
    except ParentGone:
        sys.exit(1)
    except Stopped:  # its sessions have ended
        sys.exit(128 + (stop.number or 0))
    except Exception as error:  # noqa: BLE001 - the program prints any error
        with contextlib.suppress(ParentGone):
            link.send(failure(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
