"""Sinks with asynchronous engines."""

import asyncio
from collections import Counter as Totals
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from chaos.servers import PostgreSQL
from phonon import Model
from phonon.aio import AsyncProcess, AsyncUpdate
from phonon.aio.sinks import AsyncSqlTable, once
from phonon.fields import ID, Counter, Sum
from phonon.sinks import tokens_table
from support.world import Redis


class Views(Model, name="aio_sink_views"):
    user: ID[str]
    views: Sum[int] = Sum()
    pages: Counter[str] = Counter()


class Tally(AsyncUpdate, name="aio_sink_tally"):
    engine: object = None

    def merge(self, other: "Tally") -> None:
        self.doc["n"] += other.doc["n"]

    async def execute(self) -> None:
        async with self.engine.begin() as connection, once(connection, self) as fresh:  # type: ignore[attr-defined]
            if fresh:
                query = sa.text("INSERT INTO tally VALUES (:key, :n)")
                await connection.execute(query, {"key": self._id, "n": self.doc["n"]})


def test_a_table_with_an_asynchronous_engine(tmp_path: Path) -> None:
    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/test.db")
        sink = AsyncSqlTable(engine, "views", Views)
        await sink.create_table()
        records = []
        for token in (1, 2, 2):
            doc = {"views": 1, "pages": {"/": 1}}
            record = Views.from_states("ada", doc, token)
            record.__dict__["_states_"] = doc
            records.append(record)
        for record in records:
            await sink.write([record])
        async with engine.connect() as connection:
            (row,) = (await connection.execute(sa.select(sink.table))).all()
        assert (row.views, row.pages, row.token) == (2, {"/": 2}, 2)
        await engine.dispose()

    asyncio.run(main())


def test_an_update_asks_whether_its_batch_is_new(
    tmp_path: Path, server: Redis, namespace: str
) -> None:
    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/test.db")
        Tally.engine = engine
        metadata = sa.MetaData()
        tokens_table(metadata)
        tally = sa.Table("tally", metadata, sa.Column("key", sa.Text), sa.Column("n", sa.Integer))
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        async with AsyncProcess(url=server.url, namespace=namespace) as process:
            source = await process.source("s")
            messages = [(n, "ada") for n in range(5)]
            for _ in range(2):
                async with source.batch(messages) as batch:
                    async for _offset, key in batch:
                        Tally(process, key, doc={"n": 1})
            await source.settle()
            assert source.position() == 5
            await source.claim()
            assert source.position() == 5
            async with process.batch([("id", "ada"), ("id", "ada")], dedupe="q") as many:
                async for _id, key in many:
                    Tally(process, key, doc={"n": 1})
            await source.forget()
        async with engine.connect() as connection:
            rows = (await connection.execute(sa.select(tally))).all()
        assert [tuple(row) for row in rows] == [("ada", 6)]
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_a_collection_writes(
    tmp_path: Path, server: Redis, namespace: str, database: str
) -> None:
    """Of two processes, with sessions that end in between; a failed transaction is repeated."""
    totals = Totals(f"user-{n * n % 7}" for n in range(300))

    async def main(url: str) -> None:
        engine = create_async_engine(url)
        sink = AsyncSqlTable(engine, "aio_views", Views)
        await sink.create_table()
        async with (
            AsyncProcess(url=server.url, namespace=namespace) as one,
            AsyncProcess(url=server.url, namespace=namespace) as other,
        ):
            both = [process.collect(Views, 3, sink=sink) for process in (one, other)]
            for n in range(300):
                key = f"user-{n * n % 7}"
                await both[n % 2].add(key, views=1, pages={f"/{n % 3}": 1})
            for views in both:
                await views.expire_all()
        async with engine.connect() as connection:
            rows = (await connection.execute(sa.select(sink.table))).all()
        assert {row.user: row.views for row in rows} == totals
        assert sum(sum(row.pages.values()) for row in rows) == 300
        await engine.dispose()

    if database == "sqlite":
        asyncio.run(main(f"sqlite+aiosqlite:///{tmp_path}/test.db"))
        return
    with PostgreSQL() as postgresql:
        asyncio.run(main(postgresql.url))
