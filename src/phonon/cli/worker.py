"""A worker of the demo, an OS process of its own. This is what a user's program looks like.

It takes messages, merges them in a cache, and acknowledges them once they are on the server.
Started by `phonon.cli.pool` as ``python -m phonon.cli.worker <file descriptor>``.
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

from phonon import LruCache, PhononError, Process, Update
from phonon.cli.sink import Sink
from phonon.cli.wire import Failed, Log, Progress, Ready, Setup

#: Seconds between two reports while sessions are written.
REPORT_INTERVAL = 0.1


class ParentGone(Exception):  # noqa: N818 - this is how a worker is told to stop
    """The demo has closed the connection: it was interrupted, or it is dead."""


class Link:
    """The connection to the demo."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()  # the heartbeat's thread logs

    def send(self, message: Ready | Progress | Log | Failed) -> None:
        """Tell the demo."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise ParentGone from error

    def receive(self) -> Any:
        """Wait for the demo."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise ParentGone from error


class _LogToDemo(logging.Handler):
    """The terminal belongs to the demo, which may have a live display on it."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(ParentGone):
            self._link.send(Log(record.getMessage()))


class _Counter:
    """Tells the demo how far this worker is."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reported = time.monotonic()
        self.lists = self.messages = 0

    def acknowledge(self, messages: int) -> None:
        """All of a list is on the server."""
        self.lists += 1
        self.messages += messages
        self.report()

    def written(self) -> None:
        """A session was written; say so now and then."""
        if time.monotonic() - self._reported > REPORT_INTERVAL:
            # Nobody may be there any more; what has come together is written all the same.
            with contextlib.suppress(ParentGone):
                self.report()

    def report(self, *, done: bool = False) -> None:
        """Tell the demo."""
        self._reported = time.monotonic()
        sink = Sink.current
        self._link.send(Progress(self.lists, self.messages, sink.writes, sink.repeats, done))


def work(link: Link, setup: Setup) -> None:
    """Handle messages until there are no more."""
    job = setup.job
    counter = _Counter(link)
    Sink.current = Sink(setup.database, job.table, counter.written)
    with (
        contextlib.closing(Sink.current),
        Process(url=setup.url, namespace=setup.namespace) as process,
    ):
        cache: LruCache[Update] = LruCache(setup.max_entries)
        link.send(Ready())
        while (messages := link.receive()) is not None:
            with process.batch():
                for message in messages:
                    cache.set(message[0], job.update(process, message))
            # Only now are they all on the server, and safe: a broker would be told here.
            counter.acknowledge(len(messages))
        cache.expire_all()
        process.stop()
        counter.report(done=True)


def failure(error: BaseException) -> Failed:
    """What to tell the demo about an error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # they tend to be all alike
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, PhononError | sqlite3.Error):
        return Failed(text)
    return Failed(text, "".join(traceback.format_exception(error)))


def _leave(signal_number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + signal_number)


def main() -> None:
    """Do what the demo at the other end of the connection says."""
    signal.signal(signal.SIGTERM, _leave)
    link = Link(Connection(int(sys.argv[1])))
    log = logging.getLogger("phonon")
    log.addHandler(_LogToDemo(link))
    log.propagate = False
    try:
        work(link, link.receive())
    except ParentGone:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the demo says it, whatever it is
        with contextlib.suppress(ParentGone):
            link.send(failure(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
