"""A worker to start from: it counts messages by key, and writes one row a key and session.

    python worker.py produce 100000     put so many messages into the queue
    python worker.py                    work until Ctrl-C; start as many as you like, and kill some
    python worker.py show               print the table

Replace `produce` by whatever sends your messages, and `Count.execute` by your database.
"""

import signal
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from redis.exceptions import ResponseError

from phonon import ConflictFreeUpdate, LruCache, Process

# A bundled server that keeps its data here. In production: redis://host:6379/1
URL = f"embedded://{Path.cwd() / 'server'}"
DATABASE = "counts.db"
QUEUE, GROUP = "messages", "workers"
TABLE = "CREATE TABLE IF NOT EXISTS counts (key TEXT PRIMARY KEY, n INTEGER, token INTEGER)"
# A batch that comes again, after a crash, has the token that the row has already.
ADD = """INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE
         SET n = n + excluded.n, token = excluded.token WHERE excluded.token > token"""


class Count(ConflictFreeUpdate, name="count"):
    """Data about one key: numbers that add up, wherever their messages arrive."""

    def execute(self) -> None:
        """Write the record; the last process to let go of the key does, once a session."""
        with closing(sqlite3.connect(DATABASE, timeout=30)) as database, database:
            database.execute(TABLE)
            database.execute(ADD, (self._id, self.doc["n"], self.token))


def work() -> None:
    """Take messages, merge them, store them, acknowledge them."""
    with Process(URL, heartbeat_interval=1) as process:
        queue: Any = process.client
        with suppress(ResponseError):  # the group is there already
            queue.xgroup_create(QUEUE, GROUP, id="0", mkstream=True)
        cache: LruCache[Count] = LruCache(max_entries=10_000)
        while True:
            # What a dead worker had taken and not acknowledged comes first, then what is new.
            _, claimed, _ = queue.xautoclaim(QUEUE, GROUP, process.id, 5_000, count=500)
            found = queue.xreadgroup(GROUP, process.id, {QUEUE: ">"}, count=500, block=1_000)
            messages = claimed + [message for _, some in found or () for message in some]
            if not messages:
                cache.expire_all()  # nothing comes: end the sessions
                continue
            with process.batch(messages, dedupe=QUEUE) as batch:  # by their ids, each counts once
                for _, fields in batch:
                    key = fields[b"key"].decode()
                    cache.set(key, Count(process, key, doc={"n": 1}, soft_session=60))
            # All of it is on the server now, and survives this process.
            queue.xack(QUEUE, GROUP, *[number for number, _ in messages])
            cache.purge()  # ends the sessions that have fallen silent


def produce(number: int) -> None:
    """Put messages into the queue: so many, of a hundred keys in turn."""
    with Process(URL) as process, process.client.pipeline(transaction=False) as queue:
        for i in range(number):
            queue.xadd(QUEUE, {"key": f"key-{i % 100:02}"})
        queue.execute()


def show() -> None:
    """Print the table."""
    with closing(sqlite3.connect(DATABASE)) as database:
        for key, n in database.execute("SELECT key, n FROM counts ORDER BY key"):
            print(key, n)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    match sys.argv[1:]:
        case ["produce", number]:
            produce(int(number))
        case ["show"]:
            show()
        case _:
            with suppress(KeyboardInterrupt):
                work()
