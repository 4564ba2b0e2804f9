r"""A worker as one would run it: many of these, each in a process of its own.

It reads ``user,page`` lines from standard input in place of a message broker. Try it with

    printf 'ada,/home\nada,/cart\n' | PHONON_URL=embedded:// python examples/worker.py views.db
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


class PageViews(Update):
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


def batches(lines: Iterator[str]) -> Iterator[list[str]]:
    """Messages as a broker hands them out, some at a time."""
    while batch := list(itertools.islice(lines, BATCH)):
        yield batch


def stop(*_: Any) -> None:
    """SIGTERM ends the worker like Ctrl-C does: the ``with`` block ends its sessions."""
    raise KeyboardInterrupt


def main(path: str) -> None:
    """Work until the messages end or somebody says stop."""
    PageViews.database_path = path
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.close()
    signal.signal(signal.SIGTERM, stop)
    cache: LruCache[PageViews] = LruCache(max_entries=10_000)
    try:
        with Process() as process:
            for messages in batches(iter(sys.stdin)):
                with process.batch():
                    for message in messages:
                        user, page = message.strip().split(",")
                        cache.set(user, PageViews(process, user, spec={"_id": user}, doc={page: 1}))
                # Everything is in Redis: acknowledge the messages to the broker here.
                cache.purge()  # sessions that have fallen silent
    except KeyboardInterrupt:
        print("stopped: all sessions are ended", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
