"""A worker to start from: it counts messages by key, and writes one row a key and session.

    python worker.py produce 100000     put so many messages into the queue
    python worker.py                    work until Ctrl-C; start as many as you like, and kill some
    python worker.py show               print the table

Replace `produce` by whatever sends your messages, and `Count.execute` by your database.
"""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from phonon import ConflictFreeUpdate, LruCache, Process
from phonon.sources.streams import StreamEntry, StreamSource

# In production: redis://host:6379/1. Without, a bundled server that keeps its data here.
URL = os.environ.get("PHONON_URL") or f"embedded://{Path.cwd() / 'server'}"
DATABASE = os.environ.get("DATABASE", "counts.db")
QUEUE = "messages"
TABLE = "CREATE TABLE IF NOT EXISTS counts (key TEXT PRIMARY KEY, n INTEGER, token INTEGER)"
# A batch that comes again, after a crash, has the token that the row has already.
ADD = """INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE
         SET n = n + excluded.n, token = excluded.token WHERE excluded.token > token"""


class Count(ConflictFreeUpdate, name="count"):
    """Data about one key: numbers that add up, wherever their messages arrive."""

    def execute(self) -> None:
        """Write the record. The last process to leave the key calls this, once a session."""
        with closing(sqlite3.connect(DATABASE, timeout=30)) as database, database:
            database.execute(TABLE)
            database.execute(ADD, (self._id, self.doc["n"], self.token))


def work() -> None:
    """Take messages, merge them, store them, acknowledge them, until Ctrl-C or SIGTERM."""
    cache: LruCache[Count] = LruCache(max_entries=10_000)
    with Process(URL, heartbeat_interval=1) as process:

        def handle(message: StreamEntry) -> None:
            key = message.fields[b"key"].decode()
            # A key's session ends when nothing has come for it for two seconds.
            cache.set(key, Count(process, key, doc={"n": 1}, soft_session=2))

        StreamSource(process, QUEUE, "workers", sessions=cache, claim_idle=5).run(handle)


def produce(number: int) -> None:
    """Put messages into the queue: so many, of a hundred keys in turn."""
    with Process(URL) as process, process.client.pipeline(transaction=False) as queue:
        for i in range(number):
            queue.xadd(QUEUE, {"key": f"key-{i % 100:02}"})
        queue.execute()


def show() -> None:
    """Print the table."""
    with closing(sqlite3.connect(DATABASE, timeout=30)) as database:
        database.execute(TABLE)  # nothing may have been written yet
        for key, n in database.execute("SELECT key, n FROM counts ORDER BY key"):
            print(key, n)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["produce", number]:
            produce(int(number))
        case ["show"]:
            show()
        case _:
            work()
