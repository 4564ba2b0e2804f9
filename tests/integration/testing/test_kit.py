"""The testing kit does to processes what its words say."""

import multiprocessing
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process, RetryPolicy
from phonon._protocol import library
from phonon.aio import AsyncProcess
from phonon.errors import AlreadyLockedError, ConfigurationError, ProcessStoppedError
from phonon.testing import Clock, Lab, Server, assert_exact, kill, lose_answers, pause

table: dict[str, tuple[int, int]] = {}


@pytest.fixture(autouse=True)
def _empty() -> None:
    table.clear()


class Exact(ConflictFreeUpdate):
    """Checks the token."""

    def execute(self) -> None:
        n, token = table.get(self._id, (0, 0))
        assert self.token
        if self.token > token:
            table[self._id] = n + self.doc["n"], self.token


class Careless(ConflictFreeUpdate):
    """Does not."""

    def execute(self) -> None:
        n, _ = table.get(self._id, (0, 0))
        table[self._id] = n + self.doc["n"], 0


def totals() -> dict[str, int]:
    return {key: n for key, (n, _) in table.items()}


# The clock


def test_a_lease_runs_out(phonon_processes: Any, phonon_clock: Clock) -> None:
    one, two = phonon_processes(), phonon_processes()
    reference = one.create_reference("job")
    two.create_reference("job")
    lock = two.lock("door")
    lock.acquire()
    kill(two)
    assert reference.count() == 2
    begun = time.monotonic()
    phonon_clock.advance(60)
    assert time.monotonic() - begun < 10
    assert reference.count() == 1
    assert one.lock("door").acquire(block=False)
    with pytest.raises(ProcessStoppedError):
        two.lock("door").acquire()


def test_a_session_is_over(phonon_process: Process, phonon_clock: Clock) -> None:
    cache: LruCache[Exact] = LruCache()
    cache.set("ada", Exact(phonon_process, "ada", doc={"n": 1}, soft_session=600))
    cache.purge()
    assert totals() == {}
    phonon_clock.advance(601)
    cache.purge()
    assert totals() == {"ada": 1}


def test_a_retry_comes(phonon_processes: Any, phonon_clock: Clock) -> None:
    attempts: list[int] = []

    class Failing(ConflictFreeUpdate):
        def execute(self) -> None:
            attempts.append(1)
            if len(attempts) < 3:
                raise OSError("the database is down")

    retry = RetryPolicy(first_delay=3600, longest_delay=3600, jitter=0)
    process = phonon_processes(retry=retry, heartbeat_interval=400)
    with pytest.raises(OSError, match="is down"):
        Failing(process, "ada", doc={"n": 1}).end_session()
    phonon_clock.advance(3500)
    assert len(attempts) == 1
    phonon_clock.advance(101)
    assert len(attempts) == 2
    phonon_clock.advance(3601)
    assert len(attempts) == 3


def test_a_wait_for_a_lock_ends(phonon_processes: Any, phonon_clock: Clock) -> None:
    import threading  # noqa: PLC0415 - only here

    one, two = phonon_processes(), phonon_processes()
    refused: list[bool] = []

    def wait() -> None:
        try:
            with two.lock("door", timeout=300):
                pass
        except AlreadyLockedError:
            refused.append(True)

    with one.lock("door") as lock:
        thread = threading.Thread(target=wait)
        thread.start()
        while not lock.waiters():
            time.sleep(0.002)
        phonon_clock.advance(301)
        thread.join(10)
        assert refused == [True]


def test_a_process_that_lives_stays_alive(phonon_processes: Any, phonon_clock: Clock) -> None:
    one, two = phonon_processes(), phonon_processes()
    names = one.id, two.id
    with one.lock("door", lease=5) as lock:
        two.create_reference("job")
        phonon_clock.advance(300)
        assert lock.owned()
    assert (one.id, two.id) == names
    assert one.create_reference("job").count() == 2


def test_in_an_event_loop(phonon_lab: Lab) -> None:
    import asyncio  # noqa: PLC0415 - only here

    async def main() -> None:
        one, two = (phonon_lab.process(AsyncProcess) for _ in range(2))
        async with one:
            await two.start()
            reference = await one.create_reference("job")
            await two.create_reference("job")
            kill(two)
            with pytest.raises(ConfigurationError, match=r"await clock\.advance_async"):
                phonon_lab.clock.advance(1)
            await phonon_lab.clock.advance_async(60)
            assert await reference.count() == 1
            await two.engine.driver.close()

    asyncio.run(main())


def test_it_leaves_nothing_behind(phonon_server: Server) -> None:
    shipped = library.default()
    with Lab(phonon_server) as lab:
        assert library.default() is not shipped
        lab.process()
        lab.clock.advance(1)
    assert library.default() is shipped
    from phonon import update  # noqa: PLC0415 - what the clock had changed

    assert update.time is time  # type: ignore[attr-defined]
    assert not phonon_server.client.exists("phonon-testing:clock")


def test_the_shipped_library_has_no_such_key() -> None:
    assert "phonon-testing" not in library.default().source


def test_time_does_not_go_back(phonon_clock: Clock) -> None:
    with pytest.raises(ConfigurationError, match="time does not go back"):
        phonon_clock.advance(-1)


# Faults


def test_a_paused_process_finds_out_that_it_was_believed_dead(
    phonon_processes: Any, phonon_clock: Clock
) -> None:
    one, two = phonon_processes(), phonon_processes()
    name = two.id
    lock = two.lock("door")
    lock.acquire()
    with pause(two):
        phonon_clock.advance(60)
        assert one.lock("door").acquire(block=False)
        assert not lock.owned()
    phonon_clock.advance(0.01)
    assert two.id != name


def test_a_lost_answer_changes_nothing(phonon_processes: Any) -> None:
    process = phonon_processes()
    reference = process.create_reference("job")
    with lose_answers(process, 3):
        for _ in range(5):
            reference.increment_times_modified()
    assert reference.get_times_modified() == 5


def _sleep() -> None:
    time.sleep(60)


def test_real_processes_are_killed_and_paused() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pause(child):
        assert child.poll() is None
    kill(child)
    assert child.returncode == -9
    other = multiprocessing.get_context("spawn").Process(target=_sleep)
    other.start()
    kill(other)
    assert other.exitcode == -9
    other.close()


def test_a_process_of_somebody_elses_is_refused(phonon_server: Server) -> None:
    with (
        Process(url=phonon_server.url, namespace="elsewhere") as process,
        pytest.raises(ConfigurationError, match="phonon_processes"),
    ):
        kill(process)


def test_the_url_is_for_programs_that_make_their_own(phonon_url: str) -> None:
    with Process() as process:
        assert process.client.ping()
        assert "unix://" in phonon_url


# Exactness

MESSAGES = ["ada", "bob", "ada", "ada", "eve"]
EXPECTED = {"ada": 3, "bob": 1, "eve": 1}


def test_a_sink_that_checks_the_token_is_exact(phonon_server: Server) -> None:
    assert_exact(
        lambda process, key: Exact(process, key, doc={"n": 1}),
        MESSAGES,
        read=totals,
        expected=EXPECTED,
        clear=table.clear,
        server=phonon_server,
    )


def test_one_that_does_not_is_found_out(phonon_server: Server) -> None:
    with pytest.raises(AssertionError, match=r"(?s)dies after execute.*under the same self.token"):
        assert_exact(
            lambda process, key: Careless(process, key, doc={"n": 1}),
            MESSAGES,
            read=totals,
            expected=EXPECTED,
            clear=table.clear,
            server=phonon_server,
        )


def test_a_merge_that_forgets_is_found_out(phonon_server: Server) -> None:
    class Forgetful(Exact):
        def merge(self, other: Any) -> None:
            self.doc = other.doc

    with pytest.raises(AssertionError, match="nothing happens"):
        assert_exact(
            lambda process, key: Forgetful(process, key, doc={"n": 1}),
            MESSAGES,
            read=totals,
            expected=EXPECTED,
            clear=table.clear,
            server=phonon_server,
        )


class Many(ConflictFreeUpdate):
    """Writes many at once, into a real database."""

    path: str

    @classmethod
    def execute_many(cls, updates: Any) -> None:
        with closing(sqlite3.connect(cls.path)) as database, database:
            database.executemany(
                "INSERT INTO visits VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                "n = n + excluded.n, token = excluded.token WHERE excluded.token > token",
                [(update._id, update.doc["n"], update.token) for update in updates],
            )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    Many.path = str(tmp_path / "visits.db")
    with closing(sqlite3.connect(Many.path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE visits (key TEXT PRIMARY KEY, n INT, token INT)")
        yield connection


def test_a_class_that_writes_many_at_once(
    database: sqlite3.Connection, phonon_server: Server
) -> None:
    assert_exact(
        lambda process, key: Many(process, key, doc={"n": 1}),
        MESSAGES,
        read=lambda: dict(database.execute("SELECT key, n FROM visits").fetchall()),
        expected=EXPECTED,
        clear=lambda: database.execute("DELETE FROM visits"),
        server=phonon_server,
    )
