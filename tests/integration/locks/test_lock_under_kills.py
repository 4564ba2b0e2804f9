"""Locks of processes that are killed at random: watched by the kernel and by SQLite, not by Redis.

Each holder takes a `flock` of its kind without waiting, which the kernel frees when a process dies,
and writes its token into a database. ``PHONON_KILL_SECONDS`` says how long the killing lasts.
"""

import contextlib
import fcntl
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from phonon import Process
from support.world import Redis, wait_until

SECONDS = float(os.environ.get("PHONON_KILL_SECONDS", "6"))
PROCESSES, THREADS = 8, 4
#: Four of them are a death: long enough for a busy machine, so that nobody is taken for dead.
HEARTBEAT = 0.75
FOLDER = Path(__file__).parent
CODE = (
    f"import sys; sys.path[:0] = {[str(FOLDER), str(FOLDER.parents[1])]!r}; "
    "import test_lock_under_kills; test_lock_under_kills.main()"
)
TABLES = """
PRAGMA journal_mode = WAL;
CREATE TABLE entry (id INTEGER PRIMARY KEY, worker TEXT, shared INTEGER, token INTEGER);
CREATE TABLE trouble (text TEXT);
"""


class Witness:
    """Where holders say that they are inside; it needs no server.

    Args:
        folder: Of the database, and of the file that is locked.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.folder / "entries", timeout=60, isolation_level=None)
        with contextlib.closing(connection):
            connection.execute("PRAGMA synchronous = OFF")
            yield connection

    @contextlib.contextmanager
    def inside(self, *, shared: bool) -> Iterator[None]:
        """Raises BlockingIOError if somebody is inside who must not be."""
        with (self.folder / "inside").open("a") as file:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            yield


def work(
    process: Process, witness: Witness, readers: float, number: int, done: threading.Event
) -> None:
    """Take the lock again and again."""
    choices = random.Random()  # noqa: S311 - no secret
    worker = f"{os.getpid()}/{number}"
    with witness.database() as database:
        try:
            while not done.is_set():
                shared = choices.random() < readers
                lock = process.lock("x", shared=shared)
                # Some give up.
                if not lock.acquire(timeout=choices.choice([0, 0.005, 60, 60, 60])):
                    continue
                with witness.inside(shared=shared):
                    row = (worker, shared, lock.token)
                    database.execute(
                        "INSERT INTO entry (worker, shared, token) VALUES (?, ?, ?)", row
                    )
                    time.sleep(choices.random() * 0.002)
                lock.release()
        except BaseException as error:
            text = f"{worker}: {error!r}"
            database.execute("INSERT INTO trouble VALUES (?)", (text,))
            raise


def main() -> None:
    """The program of the processes that are killed."""
    url, namespace, folder, readers = json.loads(sys.argv[1])
    done = threading.Event()
    witness = Witness(folder)
    with Process(url=url, namespace=namespace, heartbeat_interval=HEARTBEAT) as process:
        threads = [
            threading.Thread(target=work, args=(process, witness, readers, number, done))
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()  # until the test closes it
        done.set()
        for thread in threads:
            thread.join()


def passed(moment: float) -> bool:
    return time.monotonic() > moment


class Crowd:
    """The processes.

    Args:
        arguments: Of each.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.living: list[subprocess.Popen[bytes]] = []

    def add(self) -> None:
        command = [sys.executable, "-c", CODE, json.dumps(self.arguments)]
        self.living.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    def kill(self, index: int) -> None:
        victim = self.living.pop(index)
        victim.kill()
        victim.communicate()

    def end(self) -> list[int]:
        """Let them finish; their exit codes."""
        for popen in self.living:
            assert popen.stdin is not None
            popen.stdin.close()
        return [popen.wait(60) for popen in self.living]

    def close(self) -> None:
        while self.living:
            self.kill(0)


@pytest.mark.slow
@pytest.mark.parametrize("readers", [0.0, 0.8], ids=["writers", "readers and writers"])
def test_locks_of_processes_that_are_killed(
    readers: float, server: Redis, namespace: str, tmp_path: Path, keys: Callable[[], set[str]]
) -> None:
    seed = random.randrange(2**32)  # noqa: S311 - no secret
    print(f"seed {seed}")  # noqa: T201 - to be seen when it fails
    choices = random.Random(seed)  # noqa: S311 - no secret
    witness = Witness(str(tmp_path))
    crowd = Crowd(server.url, namespace, str(tmp_path), readers)
    killed = 0
    with contextlib.closing(crowd), witness.database() as database:
        database.executescript(TABLES)

        def entries() -> int:
            return int(database.execute("SELECT count(*) FROM entry").fetchone()[0])

        for _ in range(PROCESSES):
            crowd.add()
        wait_until(lambda: entries() > PROCESSES, 60)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            pause = time.monotonic() + choices.uniform(0.2, 1.8)
            wait_until(partial(passed, pause))
            crowd.kill(choices.randrange(PROCESSES))
            crowd.add()
            killed += 1
        wait_until(lambda: entries() > SECONDS * 5, 60)  # they do not stand still
        before = entries()
        expected = {f"{popen.pid}/{number}" for popen in crowd.living for number in range(THREADS)}

        def all_go_on() -> bool:
            rows = database.execute("SELECT DISTINCT worker FROM entry WHERE id > ?", (before,))
            return expected <= {worker for (worker,) in rows}

        wait_until(all_go_on, 60)
        assert crowd.end() == [0] * PROCESSES
        assert database.execute("SELECT text FROM trouble").fetchall() == []
        check_order(database.execute("SELECT shared, token FROM entry ORDER BY id").fetchall())
        assert killed > SECONDS / 4
        print("entries", before, "killed", killed)  # noqa: T201 - as above
    # The next process takes over from processes without survivors.
    with Process(url=server.url, namespace=namespace, heartbeat_interval=HEARTBEAT):
        wait_until(lambda: keys() == set(), 60)


def check_order(rows: list[tuple[int, int]]) -> None:
    """A writer's token is above all before it, a reader's above those of all writers before it."""
    highest = highest_writer = 0
    for shared, token in rows:
        assert token > (highest_writer if shared else highest)
        highest = max(highest, token)
        if not shared:
            highest_writer = token
    tokens = [token for _, token in rows]
    assert len(set(tokens)) == len(tokens)
