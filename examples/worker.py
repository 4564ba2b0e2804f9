r"""A worker for production. Run many of them, each in a process of its own.

It reads ``user,page`` lines from standard input in place of a message broker. Try it with

    printf 'ada,/home\nada,/cart\n' | PHONON_URL=embedded:// python examples/worker.py views.db

SIGTERM and SIGINT (Ctrl-C) end it cleanly: it stores and acknowledges the messages that it has
read, ends its sessions, and leaves nothing to take over. If a worker is killed, the others take
over its sessions, and the broker delivers its unacknowledged messages again.
"""

import itertools
import signal
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any

from phonon import LruCache, Process, Update

SCHEMA = """
CREATE TABLE IF NOT EXISTS views (user, page, count, PRIMARY KEY (user, page));
CREATE TABLE IF NOT EXISTS applied (resource PRIMARY KEY, token)
"""
BATCH = 500


class PageViews(Update, name="page_views"):
    """Views by page, of one user."""

    database_path: str

    def merge(self, other: "PageViews") -> None:
        """Add up the views of each page."""
        for page, views in other.doc.items():
            self.doc[page] = self.doc.get(page, 0) + views

    def execute(self) -> None:
        """Write the record and its token in one transaction: a repeated batch is skipped."""
        connection = sqlite3.connect(self.database_path, timeout=30)
        try:
            with connection:
                newer = connection.execute(
                    "INSERT INTO applied VALUES (?, ?) ON CONFLICT DO UPDATE "
                    "SET token = excluded.token WHERE excluded.token > token",
                    (self.resource_id, self.token),
                ).rowcount
                if newer:
                    connection.executemany(
                        "INSERT INTO views VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
                        "SET count = count + excluded.count",
                        [(self.spec["_id"], page, views) for page, views in self.doc.items()],
                    )
        finally:
            connection.close()


class Stopped(BaseException):
    """A signal asks the worker to end while it waits for messages."""


class Stop:
    """The handler of SIGTERM and SIGINT.

    An exception from a handler may come at any line, also between "stored" and "acknowledged", or
    while the sessions end. So this handler sets a flag, and raises only while the worker waits for
    messages: ``with stop: ...``. If your broker's client waits with a time limit, check
    ``stop.wanted`` after each wait instead, and raise nothing.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._waiting = False

    def __call__(self, *_: Any) -> None:
        """Note a signal."""
        self.wanted = True
        self._raise_if_waiting()

    def __enter__(self) -> None:
        self._waiting = True
        if self.wanted:  # the signal came before the wait
            self._raise_if_waiting()

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def _raise_if_waiting(self) -> None:
        if self._waiting:
            self._waiting = False  # once: a second signal must not interrupt the end
            raise Stopped


def batches(lines: Iterator[str], stop: Stop) -> Iterator[list[str]]:
    """Yield batches of messages, as from a broker."""
    while True:
        with stop:
            # If this raises, the lines that were read are not acknowledged.
            batch = list(itertools.islice(lines, BATCH))
        if not batch:
            return
        yield batch


def main(path: str) -> None:
    """Work until the messages end or a signal comes."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    PageViews.database_path = path
    connection = sqlite3.connect(path, timeout=30)
    connection.executescript(SCHEMA)
    connection.close()
    cache: LruCache[PageViews] = LruCache(max_entries=10_000)
    acknowledged = 0
    try:
        # The end of the block ends the sessions and executes batches, also after an exception.
        with Process() as process:
            for messages in batches(iter(sys.stdin), stop):
                with process.batch():
                    for message in messages:
                        user, page = message.strip().split(",")
                        cache.set(user, PageViews(process, user, spec={"_id": user}, doc={page: 1}))
                # All data is on the server: acknowledge the messages to the broker here.
                acknowledged += len(messages)
                cache.purge()  # end silent sessions
    except Stopped:
        print("stopped: all sessions are ended", file=sys.stderr)
    print(f"{acknowledged} messages acknowledged", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
