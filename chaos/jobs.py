"""Flights per aircraft, with the number of each message, so that a lost or doubled one shows.

Sessions go to SQLite, each once: a session whose token is not greater than the last of its key was
written before. Its process died before it could report back, and the write changes nothing.
"""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from phonon import Process, Update
from phonon.aio import AsyncUpdate

#: Seconds to wait while another worker writes.
BUSY_TIMEOUT = 60.0
#: The totals of the rows of one aircraft, and the numbers of their messages.
Doc = dict[str, Any]

_TABLE = """
CREATE TABLE sessions (tailnum TEXT, token INTEGER, doc TEXT);
CREATE INDEX tokens ON sessions (tailnum, token);
"""
_WRITE = "INSERT INTO sessions SELECT ?1, ?2, ?3"
_NEWER = " WHERE ?2 > (SELECT coalesce(max(token), 0) FROM sessions WHERE tailnum = ?1)"


class Sink:
    """The connection of a worker to the database.

    An update from another process was made without its constructor, so it has no attribute with the
    connection. Each process has one connection, `Sink.current`.

    Args:
        path: The database, made by `create`.
        note: Called with the name of each event: ``"written"`` or ``"repeated"``.
        checks: Whether the token is checked.
    """

    current: ClassVar["Sink"]

    def __init__(self, path: str, note: Callable[[str], object], *, checks: bool) -> None:
        self._connection = connect(path)
        self._note = note
        self._statement = _WRITE + _NEWER * checks

    def write(self, key: str, doc: Doc, token: int | None) -> None:
        """Write a session, unless that was done before."""
        written = self._connection.execute(self._statement, (key, token, json.dumps(doc))).rowcount
        self._note("written" if written else "repeated")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def connect(path: str) -> sqlite3.Connection:
    """Open the database. Every statement is a transaction of its own."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    # With the write-ahead log this is safe if any process ends at any time.
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


@contextlib.contextmanager
def create(path: str) -> Iterator[sqlite3.Connection]:
    """Make the database."""
    with contextlib.closing(connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_TABLE)
        yield connection


def read(database: sqlite3.Connection) -> dict[str, Doc]:
    """Return the sums of all sessions by key."""
    found: dict[str, Doc] = {}
    for key, text in database.execute("SELECT tailnum, doc FROM sessions"):
        doc = json.loads(text)
        found[key] = added(found[key], doc) if key in found else doc
    return found


def added(one: Doc, other: Doc) -> Doc:
    """Return the sum of two docs."""
    delays = [each["worst_delay"] for each in (one, other) if each["worst_delay"] is not None]
    return {
        "airports": sorted({*one["airports"], *other["airports"]}),
        "worst_delay": max(delays, default=None),
        **{n: one[n] + other[n] for n in ("miles", "air_minutes", "flights", "numbers")},
    }


class NumberedUpdate(Update):
    """The flights of one aircraft, with the numbers of their messages.

    Args:
        process: The process.
        tailnum: The aircraft.
        content: The values of a message, with a number at the end.
    """

    def __init__(self, process: Process, tailnum: str, content: list[Any]) -> None:
        airports, miles, delay, minutes, number = content
        doc = {
            "airports": sorted(airports),
            "worst_delay": delay,
            "miles": miles,
            "air_minutes": minutes or 0,
            "flights": 1,
            "numbers": [number],
        }
        super().__init__(process, tailnum, doc=doc)

    def merge(self, other: "NumberedUpdate") -> None:
        """Add another update."""
        self.doc = added(self.doc, other.doc)

    def execute(self) -> None:
        """Write the session to the database, with the numbers of its messages."""
        Sink.current.write(self._id, self.doc, self.token)


class AsyncNumberedUpdate(NumberedUpdate, AsyncUpdate):
    """A `NumberedUpdate` for workers with an event loop. A thread writes to SQLite."""

    async def execute(self) -> None:  # type: ignore[override]  # as an AsyncUpdate does
        """Write the session to the database."""
        await asyncio.to_thread(super().execute)
