"""The two examples that users of the original know, with their promises kept."""

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

from phonon import Process
from support.world import Make, Redis


def test_whoever_is_last_to_update_a_record_writes_it_once(make: Make) -> None:
    services = {"email": make(), "address": make()}
    for round_number in range(25):
        record: dict[str, str] = {}
        writes: list[tuple[str, dict[str, str]]] = []
        start = threading.Barrier(len(services))
        name = f"me-{round_number}"
        references = {field: p.create_reference(name) for field, p in services.items()}
        assert {reference.count() for reference in references.values()} == {2}

        def apply(field: str) -> None:
            reference = references[field]  # noqa: B023 - the threads end within the round
            start.wait()  # noqa: B023
            try:
                with reference.lock():
                    record[field] = f"{field} of me"  # noqa: B023
            except Process.AlreadyLocked as error:
                raise AssertionError("timed out") from error
            reference.dereference(lambda: writes.append((field, dict(record))))  # noqa: B023

        threads = [threading.Thread(target=apply, args=(field,)) for field in services]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(writes) == 1
        assert writes[0][1] == {"email": "email of me", "address": "address of me"}


WORKER = """
import sqlite3, sys
from phonon import LruCache, Process, Update


class UserUpdate(Update):
    def __init__(self, *args, pages=(), **kwargs):
        self.pages = dict.fromkeys(pages, 1)
        super().__init__(*args, **kwargs)

    def state(self):
        return {"pages": self.pages}

    def reset_states(self):
        self.pages = {}

    def merge(self, other):
        for page, count in other.pages.items():
            self.pages[page] = self.pages.get(page, 0) + count
        self.doc["seen"] = self.doc.get("seen", 0) + other.doc.get("seen", 0)

    def execute(self):
        connection = sqlite3.connect(sys.argv[1], timeout=30)
        with connection:
            connection.executemany(
                "INSERT INTO pages VALUES (?, ?, ?)",
                [(self.spec["_id"], page, count) for page, count in self.pages.items()],
            )
            seen = self.spec["_id"], self.doc["seen"]
            connection.execute("INSERT INTO seen VALUES (?, ?)", seen)
        connection.close()


lru_cache = LruCache(max_entries=10000)
p = Process()
print("ready", flush=True)
for line in sys.stdin:
    if line == "end\\n":
        print("all set", flush=True)
        continue
    if line == "go\\n":
        lru_cache.expire_all()
        break
    user, page = line.split()
    options = {"spec": {"_id": user}, "doc": {"seen": 1}, "init_cache": INIT_CACHE}
    lru_cache.set(user, UserUpdate(p, user, pages=[page], **options))
p.stop()
"""


def run_workers(server: Redis, database: Path, *, init_cache: bool) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE pages (user, page, count)")
        connection.execute("CREATE TABLE seen (user, count)")
    program = WORKER.replace("INIT_CACHE", str(init_cache))
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore:UserUpdate is defined in",
                "-c",
                program,
                str(database),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PHONON_URL": server.url},
            text=True,
        )
        for _ in range(2)
    ]
    for number, worker in enumerate(workers):
        assert worker.stdin
        assert worker.stdout
        messages = [f"user{i % 11} page{i % 4}\n" for i in range(number, 600, 2)]
        worker.stdin.writelines([*messages, "end\n"])
        worker.stdin.flush()
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"
        assert worker.stdout.readline() == "all set\n", "both hold every user from here on"
    for worker in workers:
        worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0


def check_totals(database: Path) -> None:
    pages: dict[tuple[str, str], int] = {}
    seen: dict[str, int] = {}
    for i in range(600):
        user, page = f"user{i % 11}", f"page{i % 4}"
        pages[user, page] = pages.get((user, page), 0) + 1
        seen[user] = seen.get(user, 0) + 1
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT * FROM pages").fetchall()
        assert sorted(rows) == sorted((*key, count) for key, count in pages.items())
        # One row a user: it was written once, by whichever worker let go last.
        assert dict(connection.execute("SELECT * FROM seen").fetchall()) == seen
        assert connection.execute("SELECT count(*) FROM seen").fetchone() == (len(seen),)


def test_updates_meet_and_are_written_once_when_stored_at_the_end(
    own_server: Redis, tmp_path: Path
) -> None:
    run_workers(own_server, tmp_path / "db", init_cache=False)
    check_totals(tmp_path / "db")


def test_updates_meet_and_are_written_once_when_stored_at_once(
    own_server: Redis, tmp_path: Path
) -> None:
    run_workers(own_server, tmp_path / "db", init_cache=True)
    check_totals(tmp_path / "db")
