"""The SQLite database for sessions, with each batch exactly once.

Every row has the token of its last batch, and the upsert does nothing unless the new token is
greater. So a batch that is executed twice, because its process died before it could report back,
changes nothing the second time: check and addition are one statement.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

#: Seconds to wait while another worker writes.
BUSY_TIMEOUT = 60.0


@dataclass(frozen=True)
class Table:
    """A table with one row a key.

    Attributes:
        name: Its name.
        key: The column of the key.
        figures: The other columns, each with the SQL expression that merges two values of it,
            ``{old}`` and ``{new}``.
    """

    name: str
    key: str
    figures: dict[str, str]

    @property
    def create(self) -> str:
        """The SQL that makes the table."""
        figures = "".join(f"{_quoted(figure)}, " for figure in self.figures)
        return (
            f"CREATE TABLE {self.name} ({self.key} TEXT PRIMARY KEY, {figures}"
            "sessions INTEGER NOT NULL, token INTEGER NOT NULL)"
        )

    @property
    def upsert(self) -> str:
        """The SQL that adds a session: key, figures, token."""
        merges = "".join(
            f"{(name := _quoted(figure))} = "
            + merge.format(old=f"{self.name}.{name}", new=f"excluded.{name}")
            + ", "
            for figure, merge in self.figures.items()
        )
        values = ", ".join("?" * (1 + len(self.figures)))
        return (
            f"INSERT INTO {self.name} VALUES ({values}, 1, ?) "  # noqa: S608 - the names are quoted
            f"ON CONFLICT ({self.key}) DO UPDATE SET {merges}"
            f"sessions = {self.name}.sessions + 1, token = excluded.token "
            f"WHERE excluded.token > {self.name}.token"
        )

    @property
    def select(self) -> str:
        """The SQL that reads keys and figures."""
        figures = ", ".join([self.key, *map(_quoted, self.figures)])
        return f"SELECT {figures} FROM {self.name}"  # noqa: S608 - the names are quoted


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Sink:
    """One worker's connection to the database. It is opened by the first write.

    An update from another process was made without its constructor, so it has no attribute with the
    connection. Each process has one connection, `Sink.current`.

    Args:
        path: The database, made by `create`.
        table: The table.
        written: Called after every write.

    Attributes:
        writes: The number of sessions that were written.
        repeats: The number of those that had been written before, and were skipped.
    """

    current: ClassVar["Sink"]

    def __init__(self, path: str, table: Table, written: Callable[[], object]) -> None:
        self._path = path
        self._upsert = table.upsert
        self._written = written
        self._connection: sqlite3.Connection | None = None
        # Another thread retries a failed batch.
        self._lock = threading.Lock()
        self.writes = 0
        self.repeats = 0

    def write(self, key: str, figures: Sequence[Any], token: int | None) -> None:
        """Add a session to the row of its key, unless that was done before."""
        with self._lock:
            if self._connection is None:
                self._connection = connect(self._path)
            if self._connection.execute(self._upsert, (key, *figures, token)).rowcount:
                self.writes += 1
            else:
                self.repeats += 1
        self._written()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def connect(path: str) -> sqlite3.Connection:
    """Open the database. Every statement is a transaction of its own."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    # With the write-ahead log this is safe if any process ends at any time.
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def sessions(database: sqlite3.Connection, table: Table) -> int:
    """Return the number of sessions in the table."""
    select = f"SELECT coalesce(sum(sessions), 0) FROM {table.name}"  # noqa: S608 - our name
    (count,) = database.execute(select).fetchone()
    return int(count)


@contextlib.contextmanager
def create(path: str, table: Table) -> Iterator[sqlite3.Connection]:
    """Make the database."""
    with contextlib.closing(connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(table.create)
        yield connection
