"""Many finished sessions at once: one statement for all of them, or threads that overlap."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process, RetryPolicy
from phonon.errors import ConfigurationError
from support.world import Make

ONCE = RetryPolicy(attempts=1)


class Row(ConflictFreeUpdate):
    """Writes many rows with one statement, in one transaction."""

    database_path: ClassVar[str] = ""
    calls: ClassVar[list[int]] = []
    refused: ClassVar[set[Any]] = set()

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> Iterable[tuple[Self, Exception]] | None:
        cls.calls.append(len(updates))
        rows = [(update._id, update.doc["n"], update.token) for update in updates]
        # Threads that write at once may starve one of them for more than SQLite's five seconds.
        with closing(sqlite3.connect(cls.database_path, timeout=60)) as database, database:
            database.execute("PRAGMA synchronous = OFF")
            database.executemany("INSERT INTO row VALUES (?, ?, ?)", rows)
            if not cls.refused.isdisjoint(update._id for update in updates):
                raise ZeroDivisionError("not these")  # which rolls back
        return None


class Told(Row):
    """Says itself which ones have failed."""

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> Iterable[tuple[Self, Exception]] | None:
        good = [update for update in updates if update._id not in cls.refused]
        super().execute_many(good)
        return [(update, KeyError(update._id)) for update in updates if update not in good]


class Single(ConflictFreeUpdate):
    executed: ClassVar[list[Any]] = []

    def execute(self) -> None:
        self.executed.append(self._id)


class Both(Row):
    def execute(self) -> None:
        raise AssertionError("execute_many does it")


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "rows"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE row (id, n INTEGER, token INTEGER)")
    Row.database_path = str(path)
    yield path
    for recorded in (Row.calls, Row.refused, Single.executed):
        recorded.clear()


def rows(path: Path) -> dict[Any, int]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT id, sum(n) FROM row GROUP BY id"))


def fill(process: Process, cls: type[ConflictFreeUpdate], count: int) -> LruCache[Any]:
    cache: LruCache[Any] = LruCache()
    with process.batch():
        for i in range(count):
            cache.set(i, cls(process, i, doc={"n": i + 1}))
    return cache


def test_sessions_that_end_together_are_written_together(make: Make, database: Path) -> None:
    cache = fill(make(), Row, 600)
    cache.expire_all()
    assert rows(database) == {i: i + 1 for i in range(600)}
    assert sorted(Row.calls) == [100, 250, 250]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM row WHERE token > 0").fetchone() == (600,)


def test_one_session_alone_is_a_list_of_one(make: Make, database: Path) -> None:
    update = Row(make(), "a", doc={"n": 1})
    update.end_session()
    assert (rows(database), Row.calls) == ({"a": 1}, [1])
    assert update.token is None


def test_a_class_with_both_is_written_by_execute_many(make: Make, database: Path) -> None:
    fill(make(), Both, 3).expire_all()
    assert rows(database) == {0: 1, 1: 2, 2: 3}


def test_only_the_record_at_fault_fails(make: Make, database: Path, keys: Any) -> None:
    process = make(retry=ONCE)
    Row.refused.update({3, 7})
    with pytest.raises(ExceptionGroup) as failure:
        fill(process, Row, 10).expire_all()
    assert [type(error) for error in failure.value.exceptions] == [ZeroDivisionError] * 2
    assert rows(database) == {i: i + 1 for i in range(10) if i not in {3, 7}}
    assert Row.calls == [10] + [1] * 10
    parked = process.parked()
    assert sorted(entry.resource for entry in parked) == ["test.test.3", "test.test.7"]
    Row.refused.clear()
    for entry in parked:
        process.replay(entry.resource, entry.token)
    assert rows(database) == {i: i + 1 for i in range(10)}


def test_it_may_say_which_have_failed(make: Make, database: Path) -> None:
    process = make(retry=ONCE)
    Row.refused.add(2)
    with pytest.raises(ExceptionGroup, match="1 of the sessions"):
        fill(process, Told, 5).expire_all()
    assert rows(database) == {i: i + 1 for i in (0, 1, 3, 4)}
    assert Row.calls == [4]
    assert [entry.resource for entry in process.parked()] == ["test.test.2"]


def test_records_of_two_classes_on_one_resource_go_by_themselves(
    make: Make, database: Path
) -> None:
    process = make()
    update, other = Row(process, "a", doc={"n": 1}), Single(process, "a", doc={"n": 1})
    other.cache()
    update.end_session()
    assert rows(database) == {"a": 1}
    assert Single.executed == ["a"]


def test_what_newer_data_came_meanwhile_stays(make: Make, database: Path) -> None:
    """While it executes, an update may be merged into: that belongs to the next session."""
    process = make()

    class Busy(Row):
        @classmethod
        def execute_many(cls, updates: Sequence[Self]) -> None:
            super().execute_many(updates)
            if len(cls.calls) == 1:
                update.refresh(Busy(process, "a", doc={"n": 10}, init_cache=False))

    update = Busy(process, "a", doc={"n": 1})
    update.end_session()
    assert rows(database) == {"a": 1}
    update.end_session()
    assert rows(database) == {"a": 11}


# Threads


class Meeting(ConflictFreeUpdate):
    """Executes only if others do at the same time."""

    barrier: ClassVar[threading.Barrier]
    names: ClassVar[set[str]] = set()

    def execute(self) -> None:
        self.names.add(threading.current_thread().name)
        self.barrier.wait(timeout=30)


def test_executions_overlap_in_the_executors_threads(make: Make) -> None:
    Meeting.barrier = threading.Barrier(4)
    Meeting.names.clear()
    with ThreadPoolExecutor(4, thread_name_prefix="writer") as executor:
        process = make(executor=executor)
        fill(process, Meeting, 12).expire_all()
        assert process.get_registry() == []
        process.stop()
    assert len(Meeting.names) == 4
    assert all(name.startswith("writer") for name in Meeting.names)


def test_errors_come_out_of_the_threads(make: Make, database: Path) -> None:
    Row.refused.add(3)
    with ThreadPoolExecutor(4) as executor:
        process = make(executor=executor, retry=ONCE)
        with pytest.raises(ExceptionGroup, match="1 of the sessions"):
            fill(process, Row, 1000).expire_all()
        process.stop()
    assert rows(database) == {i: i + 1 for i in range(1000) if i != 3}


def test_what_takes_long_holds_up_no_completion(make: Make) -> None:
    """One is still being written when the others are complete on the server already."""
    done, go_on = threading.Event(), threading.Event()

    class Slow(ConflictFreeUpdate):
        def execute(self) -> None:
            if self._id == 0:
                done.set()
                assert go_on.wait(timeout=30)

    with ThreadPoolExecutor(2) as executor:
        process = make(executor=executor)
        cache = fill(process, Slow, 5)
        ending = threading.Thread(target=cache.expire_all)
        ending.start()
        assert done.wait(timeout=30)
        while len(process.get_registry()) > 1:
            assert ending.is_alive()
        assert process.get_registry() == ["test.test.0"]
        go_on.set()
        ending.join(timeout=30)
        assert process.get_registry() == []
        process.stop()


def test_an_executor_that_was_shut_down_is_done_without(make: Make, database: Path) -> None:
    executor = ThreadPoolExecutor(1)
    process = make(executor=executor)
    executor.shutdown()
    fill(process, Row, 3).expire_all()
    assert rows(database) == {0: 1, 1: 2, 2: 3}


def test_a_callback_runs_in_the_callers_thread(make: Make) -> None:
    with ThreadPoolExecutor(1) as executor:
        process = make(executor=executor)
        names: list[str] = []
        process.create_reference("x").dereference(
            lambda: names.append(threading.current_thread().name)
        )
        process.stop()
    assert names == [threading.current_thread().name]


def test_processes_cannot_execute(make: Make) -> None:
    with ProcessPoolExecutor(1) as executor, pytest.raises(ConfigurationError, match="ThreadPool"):
        make(executor=executor)


def test_who_defines_neither_is_told(make: Make) -> None:
    class Neither(ConflictFreeUpdate):
        pass

    with pytest.raises(NotImplementedError, match="execute"):
        Neither(make(retry=ONCE), "a", doc={"n": 1}).end_session()
