"""A database or a server in trouble: what is left undone is bounded, and nothing is lost."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from phonon import LruCache, Process, Update
from phonon.errors import BacklogFullError, ConfigurationError, ServerUnreachableError
from support.world import ALWAYS, Make, Redis, wait_until


class Database:
    """The database of `Row`."""

    def __init__(self) -> None:
        self.up = threading.Event()
        self.rows: Counter[Any] = Counter()

    def write(self, record: Any, n: int) -> None:
        if not self.up.is_set():
            raise OSError("the database is down")
        self.rows[record] += n


class Row(Update):
    store: ClassVar[Database]

    def merge(self, other: "Row") -> None:
        self.doc += other.doc

    def execute(self) -> None:
        self.store.write(self._id, self.doc)


@pytest.fixture
def database() -> Iterator[Database]:
    Row.store = Database()
    yield Row.store
    Row.store.up.set()


def fill(process: Process, cache: "LruCache[Row]", most: int) -> int:
    """Take messages in while there is room, and say how many that were."""
    taken = 0
    while not process.engine.outbox.full:
        update = Row(process, taken, doc=1, init_cache=False)
        taken += 1
        try:
            cache.set(update._id, update)
        except OSError:
            assert taken < most + 20, "it is never full"
    return taken


def begin(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_new_update_waits_for_room(make: Make, database: Database) -> None:
    process, cache = make(retry=ALWAYS, max_backlog=5), LruCache[Row](1)
    taken = fill(process, cache, 5)
    taken_in = threading.Event()

    def one_more() -> None:
        cache.set("late", Row(process, "late", doc=1, init_cache=False))
        taken_in.set()

    thread = begin(one_more)
    assert not taken_in.wait(0.1)
    database.up.set()
    thread.join(20)
    assert taken_in.is_set()
    cache.expire_all()
    wait_until(lambda: len(database.rows) == taken + 1)
    assert set(database.rows.values()) == {1}


def test_a_new_update_is_refused(make: Make, database: Database) -> None:
    process, cache = make(retry=ALWAYS, max_backlog=5, overflow="raise"), LruCache[Row](1)
    taken = fill(process, cache, 5)
    with pytest.raises(BacklogFullError, match="5 sessions"):
        Row(process, "refused", doc=1)
    database.up.set()
    wait_until(lambda: not process.engine.outbox.full)
    cache.set("late", Row(process, "late", doc=1))
    cache.expire_all()
    wait_until(lambda: len(database.rows) == taken + 1)
    assert "refused" not in database.rows
    wait_until(lambda: process.get_registry() == [])


def test_it_is_not_waited_for_ever(
    make: Make, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "BLOCKING_TIMEOUT", 0.05)
    process, cache = make(retry=ALWAYS, max_backlog=2), LruCache[Row](1)
    fill(process, cache, 2)
    with pytest.raises(BacklogFullError):
        Row(process, "refused", doc=1)
    assert not database.rows


def test_whoever_works_on_the_backlog_is_let_in(make: Make, database: Database) -> None:
    """An ``execute`` that makes updates of its own, or else nothing would ever be done."""

    class Nested(Row):
        def execute(self) -> None:
            Row(self.process(), ("nested", self._id), doc=1).end_session()
            super().execute()

    process = make(retry=ALWAYS, max_backlog=4)
    outer = list("ab")
    for record in outer:
        with pytest.raises(OSError, match="down"):
            Nested(process, record, doc=1, init_cache=False).end_session()
    wait_until(lambda: process.engine.outbox.full)
    database.up.set()
    wait_until(lambda: not process.engine.outbox.full)
    wait_until(lambda: all(database.rows[record] == 1 for record in outer))
    wait_until(lambda: all(database.rows["nested", record] for record in outer))


def test_what_cannot_be_sent_counts(own_server: Redis, database: Database) -> None:
    """Sessions that ended while the server was away are ended when it is there again."""
    database.up.set()
    url = f"{own_server.url}&socket_timeout=0.5"
    process = Process(
        url=url, retry_timeout=0.5, max_backlog=3, overflow="raise", heartbeat_interval=0.5
    )
    try:
        cache = LruCache[Row](100)
        for i in range(10):
            cache.set(i, Row(process, i, doc=1, init_cache=False))
        own_server.pause()
        try:
            for i in range(3):
                assert not process.engine.outbox.full
                with pytest.raises(ServerUnreachableError):
                    cache.expire(i)
            with pytest.raises(BacklogFullError, match="3 sessions"):
                Row(process, "refused", doc=1)
        finally:
            own_server.go_on()
        wait_until(lambda: not process.engine.outbox.full)
        cache.expire_all()
        wait_until(lambda: len(database.rows) == 10)
        assert set(database.rows.values()) == {1}
    finally:
        process.stop()


def test_stopping_lets_everybody_go(make: Make, database: Database) -> None:
    process, cache = make(retry=ALWAYS, max_backlog=2), LruCache[Row](1)
    fill(process, cache, 2)
    ended: list[BaseException] = []

    def one_more() -> None:
        try:
            Row(process, "late", doc=1)
        except Exception as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    thread = begin(one_more)
    with pytest.raises(ExceptionGroup) as raised:
        process.stop()
    assert {str(error) for error in raised.value.exceptions} == {"the database is down"}
    thread.join(20)
    assert not thread.is_alive()
    assert not database.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_backlog": 0}, "at least 1"),
        ({"overflow": "drop"}, 'overflow is "block" or "raise"'),
    ],
)
def test_arguments_that_cannot_be_meant(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**options)
