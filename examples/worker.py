r"""A worker as one would run it: many of these, each in a process of its own.

It reads ``user,page`` lines from standard input in place of a message broker. Try it with

    printf 'ada,/home\nada,/cart\n' | PHONON_URL=embedded:// python examples/worker.py views.db

SIGTERM and SIGINT (Ctrl-C) end it in good order: the messages in hand are stored and acknowledged,
its sessions end, its locks are free, and nothing is left to be taken over. A worker that is killed
leaves its sessions to the others, and its broker delivers again what it had not acknowledged.
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
    """Somebody wants the worker to end, and it has no messages in hand."""


class Stop:
    """The handler of SIGTERM and SIGINT.

    An exception raised by a handler comes at any line, also between "stored" and "acknowledged",
    or in the middle of ending the sessions. So this one only takes note, and raises while the
    worker waits for messages: ``with stop: ...``. If your broker's client waits with a time limit,
    ask for ``stop.wanted`` after each wait instead, and raise nothing at all.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._waiting = False

    def __call__(self, *_: Any) -> None:
        """A signal has come."""
        self.wanted = True
        self._raise_if_waiting()

    def __enter__(self) -> None:
        self._waiting = True
        if self.wanted:  # it came before we began to wait
            self._raise_if_waiting()

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def _raise_if_waiting(self) -> None:
        if self._waiting:
            self._waiting = False  # once: a second signal must not disturb the end
            raise Stopped


def batches(lines: Iterator[str], stop: Stop) -> Iterator[list[str]]:
    """Messages as a broker hands them out, some at a time."""
    while True:
        with stop:
            # Lines that were read when it raises are not acknowledged: they are the broker's.
            batch = list(itertools.islice(lines, BATCH))
        if not batch:
            return
        yield batch


def main(path: str) -> None:
    """Work until the messages end or somebody says stop."""
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
        # Leaving the block, however that happens, ends the sessions and executes what falls to us.
        with Process() as process:
            for messages in batches(iter(sys.stdin), stop):
                with process.batch():
                    for message in messages:
                        user, page = message.strip().split(",")
                        cache.set(user, PageViews(process, user, spec={"_id": user}, doc={page: 1}))
                # Everything is in Redis: acknowledge the messages to the broker here.
                acknowledged += len(messages)
                cache.purge()  # sessions that have fallen silent
    except Stopped:
        print("stopped: all sessions are ended", file=sys.stderr)
    print(f"{acknowledged} messages acknowledged", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
