"""The database that all contenders write to."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comparison.stream import Total

_TABLES = """
CREATE TABLE total (key TEXT PRIMARY KEY, n INTEGER, high INTEGER, token INTEGER) WITHOUT ROWID;
CREATE TABLE seen (key TEXT, element TEXT, PRIMARY KEY (key, element)) WITHOUT ROWID;
"""
_TOTAL = """
INSERT INTO total VALUES (?1, ?2, ?3, ?4) ON CONFLICT (key) DO UPDATE SET
n = n + ?2, high = max(high, ?3), token = ?4 WHERE ?4 > token
"""
# Data without a token counts each time it comes.
_UNGUARDED = _TOTAL.replace("WHERE ?4 > token", "")
_SEEN = "INSERT OR IGNORE INTO seen SELECT ?1, value FROM json_each(?2)"

#: A key, its sum, its elements, its maximum, and the token of the batch.
Row = tuple[str, int, Iterable[str], int, int]


def make(path: Path) -> None:
    """A new database."""
    path.unlink(missing_ok=True)
    with _open(path) as database:
        database.executescript(_TABLES)


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    try:
        # As SQLite is by default: what was committed survives a power cut.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        yield database
    finally:
        database.close()


class Sink:
    """A connection to it.

    Args:
        path: The path of the database.
    """

    def __init__(self, path: Path) -> None:
        self._opened = _open(path)
        self._database = self._opened.__enter__()

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows to the stored ones, in one transaction.

        A row with a token counts once, however often it is written; one with 0 each time.
        """
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        try:
            for key, n, elements, high, token in rows:
                execute(_TOTAL if token else _UNGUARDED, (key, n, high, token))
                execute(_SEEN, (key, json.dumps(list(elements))))
        except BaseException:
            execute("ROLLBACK")
            raise
        execute("COMMIT")

    def close(self) -> None:
        """Close it."""
        self._opened.__exit__(None, None, None)


def read(path: Path) -> dict[str, Total]:
    """Return the totals in the database."""
    with _open(path) as database:
        seen: dict[str, set[str]] = {}
        for key, element in database.execute("SELECT key, element FROM seen"):
            seen.setdefault(key, set()).add(element)
        rows = database.execute("SELECT key, n, high FROM total")
        return {key: (n, frozenset(seen.get(key, ())), high) for key, n, high in rows}
