"""Tables of real databases: each batch once, whoever writes it how often."""

import datetime as dt
import math
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from chaos.servers import PostgreSQL
from phonon import ConflictFreeUpdate, Model
from phonon.errors import ConfigurationError
from phonon.fields import (
    ID,
    AllOf,
    AnyOf,
    Count,
    Counter,
    Diff,
    First,
    Latest,
    ListAppend,
    Max,
    Mean,
    Min,
    SetAppend,
    Stats,
    Sum,
    Window,
)
from phonon.sinks import SqlTable, once, table_of, tokens_table
from support.world import Make, wait_until


class Plain(Model, name="sql_plain"):
    user: ID[str]
    views: Sum[int] = Sum()
    balance: Diff[int] = Diff()
    times: Count = Count()
    longest: Max[int] = Max()
    shortest: Min[float] = Min()
    any_error: AnyOf = AnyOf()
    all_paid: AllOf = AllOf()


class Rich(Model, name="sql_rich"):
    user: ID[int]
    views: Sum[int] = Sum()
    price: Sum[Decimal] = Sum()
    weight: Sum[float] = Sum()
    longest: Max[int] = Max()
    status: Latest[str] = Latest()
    first: First[str] = First()
    seen: Max[dt.datetime] = Max()
    mean: Mean[int] = Mean()
    stats: Stats[int] = Stats()
    pages: Counter[str] = Counter()
    tags: SetAppend[str] = SetAppend()
    events: ListAppend[str] = ListAppend()
    recent: Window[str] = Window(2)


class Children(Model, name="sql_children"):
    user: ID[str]
    views: Sum[int] = Sum()
    pages: Counter[str] = Counter()
    tags: SetAppend[str] = SetAppend()


class Tally(ConflictFreeUpdate, name="sql_tally"):
    engine: Any = None

    def execute(self) -> None:
        with self.engine.begin() as connection, once(connection, self) as fresh:
            if fresh:
                connection.execute(
                    sa.text("INSERT INTO tally VALUES (:key, :n)"),
                    {"key": self._id, "n": self.doc["n"]},
                )


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    with PostgreSQL() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    if request.param == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path}/test.db", connect_args={"timeout": 20})
    else:
        server: PostgreSQL = request.getfixturevalue("postgresql")
        engine = sa.create_engine(server.url)
    yield engine
    if request.param == "postgresql":
        metadata = sa.MetaData()
        metadata.reflect(engine)
        metadata.drop_all(engine)
    engine.dispose()


def rows(engine: sa.Engine, table: sa.Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        query = sa.select(table).order_by(*table.primary_key)
        return [dict(row._mapping) for row in connection.execute(query)]


def record(model: Any, token: int, *values: Any, **named: Any) -> Any:
    """A record as a sink gets it."""
    doc: dict[str, Any] = {}
    identifier = model._code().fold(doc, *values, **named)
    made = model.from_states(identifier, doc, token)
    made.__dict__["_states_"] = doc
    return made


def test_what_the_database_merges(engine: sa.Engine) -> None:
    sink = SqlTable(engine, "plain", Plain)
    sink.create_table()
    sink.create_table()
    full = {"views": 3, "balance": 2, "times": 1, "longest": 5, "shortest": 1.5}
    first = record(Plain, 10, "a", **full, any_error=False, all_paid=True)
    empty = record(Plain, 11, "b")
    sink.write([empty, first])
    again = {"views": 4, "balance": 1, "times": 2, "longest": 4, "shortest": 0.5}
    second = record(Plain, 12, "a", **again, any_error=True, all_paid=False)
    third = record(Plain, 13, "b", longest=-7)
    sink.write([second, third])
    sink.write([second, first, third])  # again, and an older one
    a, b = rows(engine, sink.table)
    assert a == {
        "user": "a",
        "views": 7,
        "balance": -3,
        "times": 3,
        "longest": 5,
        "shortest": 0.5,
        "any_error": True,
        "all_paid": False,
        "token": 12,
    }
    assert (b["views"], b["longest"], b["shortest"], b["any_error"], b["all_paid"], b["token"]) == (
        0,
        -7,
        None,
        False,
        True,
        13,
    )


def test_what_is_merged_by_the_model(engine: sa.Engine) -> None:
    sink = SqlTable(engine, "rich", Rich)
    sink.create_table()
    zone = dt.UTC
    early = dt.datetime(2026, 1, 1, tzinfo=zone)
    late = dt.datetime(2026, 1, 2, tzinfo=zone)
    one = record(
        Rich, 10, 1, views=1, price=Decimal("0.1"), weight=0.1, longest=3, status=(2, "new"),
        first=(2, "new"), seen=late, mean=1, stats=1, pages={"/": 1}, tags=["x"], events=["e1"],
        recent=[(1, "r1"), (2, "r2")],
    )  # fmt: skip
    other = record(
        Rich, 11, 1, views=2, price=Decimal("0.2"), weight=0.2, longest=2, status=(1, "old"),
        first=(1, "old"), seen=early, mean=4, stats=3, pages={"/": 2, "/b": 1}, tags=["y"],
        events=["e0"], recent=[(3, "r3")],
    )  # fmt: skip
    sink.write([one])
    sink.write([one, record(Rich, 5, 2, views=1)])
    sink.write([other])
    sink.write([other, one])
    row, two = rows(engine, sink.table)
    assert (row["views"], row["longest"], row["token"]) == (3, 3, 11)
    assert row["price"] == Decimal("0.3")
    assert row["weight"] == math.fsum([0.1, 0.2])
    assert (row["status"], row["first"], row["mean"]) == ("new", "old", 2.5)
    assert row["seen"].replace(tzinfo=zone) == late
    assert row["stats"]["count"] == 2
    assert row["pages"] == {"/": 3, "/b": 1}
    assert (row["tags"], row["events"]) == (["x", "y"], ["e0", "e1"])
    assert sorted(row["recent"]) == ["r2", "r3"]
    assert (two["views"], two["status"], two["tags"]) == (1, None, [])


def test_counters_and_sets_in_tables_of_their_own(engine: sa.Engine) -> None:
    children = {"pages": "pages", "tags": "tags"}
    sink = SqlTable(engine, "parents", Children, children=children)
    sink.create_table()
    one = record(Children, 10, "a", views=1, pages={"/": 1, "/b": 2}, tags=["x"])
    other = record(Children, 11, "a", views=1, pages={"/": 1}, tags=["x", "y"])
    sink.write([one])
    sink.write([one])
    sink.write([other])
    sink.write([one, record(Children, 5, "b")])
    _, pages, tags = sink.tables
    assert rows(engine, pages) == [
        {"user": "a", "item": "/", "n": 2},
        {"user": "a", "item": "/b", "n": 2},
    ]
    assert [row["item"] for row in rows(engine, tags)] == ["x", "y"]
    assert [row["views"] for row in rows(engine, sink.table)] == [2, 0]


def test_rows_from_before_a_field_was_added_count_from_its_zero(engine: sa.Engine) -> None:
    older = sa.Table("plain", sa.MetaData(), *_columns("user", "longest", "shortest", "token"))
    older.create(engine)
    with engine.begin() as connection:
        connection.execute(older.insert(), {"user": "a", "token": 1})
        for name in ("views", "balance", "times"):  # as a migration adds them: empty
            connection.execute(sa.text(f"ALTER TABLE plain ADD COLUMN {name} BIGINT"))
        for name in ("any_error", "all_paid"):
            connection.execute(sa.text(f"ALTER TABLE plain ADD COLUMN {name} BOOLEAN"))
    sink = SqlTable(engine, "plain", Plain)
    sink.write([record(Plain, 2, "a", views=2, balance=1, times=1, all_paid=True)])
    (row,) = rows(engine, sink.table)
    assert (row["views"], row["balance"], row["times"]) == (2, -1, 1)
    assert (row["any_error"], row["all_paid"]) == (False, True)


def _columns(*names: str) -> list[sa.Column[Any]]:
    types: dict[str, Any] = {"user": sa.Text(), "token": sa.BigInteger(), "shortest": sa.Double()}
    return [
        sa.Column(name, types.get(name, sa.BigInteger()), primary_key=name == "user")
        for name in names
    ]


def test_an_older_release_keeps_what_a_newer_one_has_stored(engine: sa.Engine) -> None:
    class Newer(Model, name="sql_newer"):
        user: ID[str]
        pages: Counter[str] = Counter()
        tags: SetAppend[str] = SetAppend()

    class Older(Model, name="sql_older"):
        user: ID[str]
        pages: Counter[str] = Counter()

    newer, older = SqlTable(engine, "released", Newer), SqlTable(engine, "released", Older)
    newer.create_table()
    newer.write([record(Newer, 1, "a", pages={"/": 1}, tags=["x"])])
    older.write([record(Older, 2, "a", pages={"/": 1})])
    newer.write([record(Newer, 3, "a", pages={"/": 1}, tags=["y"])])
    (row,) = rows(engine, newer.table)
    assert (row["pages"], row["tags"]) == ({"/": 3}, ["x", "y"])


def test_a_sum_that_does_not_fit_its_column_is_refused(engine: sa.Engine) -> None:
    children = {"pages": "large_pages"}
    plain = SqlTable(engine, "large", Plain)
    rich = SqlTable(engine, "large_too", Children, children=children)
    for sink, model, doc in (
        (plain, Plain, {"views": 2**63 - 1}),
        (rich, Children, {"views": 2**63 - 1}),
        (rich, Children, {"pages": {"/": 2**63 - 1}}),
    ):
        sink.create_table()
        key = str(doc)
        sink.write([record(model, 1, key, **doc)])
        before = [rows(engine, table) for table in sink.tables]
        with pytest.raises(sa.exc.DBAPIError, match=r"overflow|out of range"):
            sink.write([record(model, 2, key, **doc)])
        assert [rows(engine, table) for table in sink.tables] == before


def test_what_a_database_cannot_show_is_stored_all_the_same(engine: sa.Engine) -> None:
    sink = SqlTable(engine, "rich", Rich)
    sink.create_table()
    odd = "a\0b\ud800"
    doc = {"status": (1, odd), "first": (1, odd), "pages": {odd: 1}, "tags": [odd]}
    for token in (1, 2):
        sink.write([record(Rich, token, 1, **doc, events=[odd], recent=[(1, odd)])])
    (row,) = rows(engine, sink.table)
    shown = "a\ufffdb\ufffd"
    assert (row["status"], row["first"], row["pages"]) == (shown, shown, {shown: 2})
    assert (row["tags"], row["events"]) == ([shown], [shown, shown])


def test_times_are_shown_as_instants(engine: sa.Engine) -> None:
    sink = SqlTable(engine, "rich", Rich)
    sink.create_table()
    noon = dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=5)))
    sink.write([record(Rich, 1, 1, seen=noon)])
    last = dt.datetime(9999, 12, 31, 23, tzinfo=dt.timezone(-dt.timedelta(hours=5)))
    if engine.dialect.name == "sqlite":  # a driver of PostgreSQL stores it, and cannot read it
        sink.write([record(Rich, 1, 2, seen=last)])
    seen = rows(engine, sink.table)[0]["seen"]
    assert (seen if seen.tzinfo else seen.replace(tzinfo=dt.UTC)) == noon


def test_one_metadata_may_know_the_table_already(engine: sa.Engine) -> None:
    metadata = sa.MetaData()
    table = table_of(Children, "shared", metadata)  # for Alembic
    children = {"pages": "shared_pages"}
    sink = SqlTable(engine, "shared", Children, metadata=metadata)
    assert sink.table is table
    with pytest.raises(
        ConfigurationError, match=r"'shared' without the column .* that Plain needs"
    ):
        SqlTable(engine, "shared", Plain, metadata=metadata)
    for _ in range(2):
        sink = SqlTable(engine, "parents", Children, metadata=metadata, children=children)
    sink.create_table()
    sink.write([record(Children, 1, "a", views=1, pages={"/": 1})])
    assert [row["n"] for row in rows(engine, sink.tables[1])] == [1]


@pytest.mark.parametrize("model", [Plain, Children])
def test_writers_side_by_side_neither_wait_for_ever_nor_lose(engine: sa.Engine, model: Any) -> None:
    sink = SqlTable(engine, "many", model)
    sink.create_table()
    errors: list[BaseException] = []

    def write(first: int) -> None:
        keys = list(range(20))
        try:
            for round_ in range(10):
                token = 100 * round_ + first + 1
                keys.reverse()
                sink.write([record(model, token, f"k{key}", views=1) for key in keys])
        except BaseException as error:  # noqa: BLE001 - for the test to see
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = rows(engine, sink.table)
    assert {row["token"] for row in found} == {903}
    assert all(10 <= row["views"] <= 30 for row in found)  # an older token may come too late


def test_a_collection_writes_to_its_sink(make: Make, engine: sa.Engine) -> None:
    sink = SqlTable(engine, "collected")
    process, other = make(), make()
    collections = [each.collect(Children, 5, sink=sink) for each in (process, other)]
    sink.create_table()
    for n in range(200):
        collections[n % 2].add(f"user-{n % 10}", views=1, pages={f"/{n % 3}": 1}, tags=["x"])
    for collection in collections:
        collection.expire_all()
    found = {row["user"]: row for row in rows(engine, sink.table)}
    assert {key: row["views"] for key, row in found.items()} == {f"user-{n}": 20 for n in range(10)}
    assert sum(found["user-0"]["pages"].values()) == 20


def test_a_batch_waits_for_a_process_that_has_the_sink(make: Make, engine: sa.Engine) -> None:
    class Late(Model, name="sql_late"):
        user: ID[str]
        views: Sum[int] = Sum()

    process = make(heartbeat_interval=0.1)
    sink = SqlTable(engine, "late")
    views = process.collect(Late, sink=sink)
    sink.create_table()
    views.add("a", views=1)
    record_class: Any = Late._record
    record_class.sink = None  # as in a process that has imported the class and no more
    with pytest.raises(ExceptionGroup) as raised:
        views.expire_all()
    assert "lacks a sink" in str(raised.value.exceptions[0])
    assert rows(engine, sink.table) == []
    process.collect(Late, sink=sink)
    wait_until(lambda: [row["views"] for row in rows(engine, sink.table)] == [1])


def test_an_update_asks_whether_its_batch_is_new(make: Make, engine: sa.Engine) -> None:
    Tally.engine = engine
    metadata = sa.MetaData()
    tokens_table(metadata)
    tally = sa.Table("tally", metadata, sa.Column("key", sa.Text), sa.Column("n", sa.Integer))
    metadata.create_all(engine)
    process = make()
    Tally(process, "a", doc={"n": 1}).end_session()
    update = Tally(process, "a", doc={"n": 2})
    update.end_session()
    assert [row["n"] for row in rows_of(engine, tally)] == [1, 2]
    late = Tally(process, "a", doc={"n": 9}, init_cache=False)
    with pytest.raises(ConfigurationError, match="has a token while it runs"):
        late.execute()
    with engine.connect() as connection:
        token = int(connection.execute(sa.text("SELECT token FROM phonon_tokens")).scalar_one())
    for again in (token, token - 1):
        late.token = again
        late.execute()
    late.token = token + 1
    late.execute()
    late.token = None
    assert [row["n"] for row in rows_of(engine, tally)] == [1, 2, 9]
    with engine.begin() as connection:  # neither without the other
        late.token = token + 2
        with once(connection, late) as fresh:
            assert fresh
        connection.rollback()
    with engine.begin() as connection, once(connection, late) as fresh:
        assert fresh
    late.token = None


def rows_of(engine: sa.Engine, table: sa.Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(sa.select(table))]


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_statements_of_other_databases(dialect: str) -> None:
    sink = SqlTable(sa.create_engine("sqlite://"), "plain", Plain)
    statement = sink.statement(dialect).values([{"user": "a", "views": 1, "token": 5}])
    compiled = str(statement.compile(dialect=mysql.dialect(is_mariadb=dialect == "mariadb")))
    _, _, changes = compiled.partition("ON DUPLICATE KEY UPDATE ")
    assert changes.startswith("views = CASE WHEN")
    names = [change.split(" = ")[0] for change in changes.split(" END, ")]
    assert names[-1] == "token"
    assert len(names) == 8
    ddl = str(sa.schema.CreateTable(sink.table).compile(dialect=mysql.dialect()))
    assert "VARCHAR(255)" in ddl
    rich = str(sa.schema.CreateTable(table_of(Rich, "rich")).compile(dialect=mysql.dialect()))
    assert "price TEXT" in rich
    assert "status LONGTEXT" in rich
    with pytest.raises(ConfigurationError, match="no upsert that is known"):
        sink.statement("oracle")


def test_what_cannot_be_a_table_is_refused() -> None:
    class Bad(Model, name="sql_bad"):
        key: ID[bytes]
        token_: Sum[int] = Sum()

    with pytest.raises(ConfigurationError, match="cannot be the key of a table"):
        table_of(Bad, "bad")
    with pytest.raises(ConfigurationError, match="cannot have a table of its own"):
        SqlTable(sa.create_engine("sqlite://"), "x", Plain, children={"views": "y"})
    with pytest.raises(ConfigurationError, match="has no field 'other'"):
        SqlTable(sa.create_engine("sqlite://"), "x", Plain, children={"other": "y"})
    sink = SqlTable(sa.create_engine("sqlite://"), "x")
    with pytest.raises(ConfigurationError, match="has no model yet"):
        _ = sink.table
    sink.prepare(Plain)
    sink.prepare(Plain)
    with pytest.raises(ConfigurationError, match="make another SqlTable"):
        sink.prepare(Rich)


def test_a_transaction_that_lost_is_tried_again(engine: sa.Engine) -> None:
    sink = SqlTable(engine, "again", Children)
    sink.create_table()
    write, failures = sink._write, iter([False, True, True, False])
    doc = {"views": 1, "tags": ["x"]}

    class LostError(Exception):
        sqlstate = "40001"

    def fail(connection: Any, records: Any) -> None:
        write(connection, records)
        if next(failures):
            raise sa.exc.OperationalError("x", {}, LostError())

    sink._write = fail  # type: ignore[method-assign]
    sink.write([record(Children, 1, "a", **doc)])
    sink.write([record(Children, 2, "a", **doc)])
    assert [(row["views"], row["tags"]) for row in rows(engine, sink.table)] == [(2, ["x"])]
    failures = iter([True] * 10)
    with pytest.raises(sa.exc.OperationalError):
        sink.write([record(Children, 3, "a", **doc)])
