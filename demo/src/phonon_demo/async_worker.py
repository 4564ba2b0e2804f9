"""A worker with an event loop: the same program as `phonon_demo.worker`, for asyncio."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate
from phonon.aio.sinks import AsyncSqlTable
from phonon.errors import AlreadyStoredError
from phonon_demo.aggregations import AGGREGATIONS
from phonon_demo.plan import GROUP, Plan
from phonon_demo.updates import FlightUpdate, flight
from phonon_demo.worker import BATCH, main, say

Handle = Callable[[dict[bytes, bytes]], Awaitable[object]]


class AsyncFlightUpdate(FlightUpdate, AsyncUpdate, name="phonon_demo_async_flights"):
    """The flights of one aircraft. A thread writes them."""

    @classmethod
    async def execute_many(cls, updates: Sequence[Any]) -> None:  # type: ignore[override]  # as of an AsyncUpdate
        """Add sessions to their rows."""
        await asyncio.to_thread(super().execute_many, updates)


class CountedTable(AsyncSqlTable):
    """A table that counts the records written to it."""

    written = 0

    async def write(self, records: Sequence[Any]) -> None:
        """Write records, and count them."""
        await super().write(records)
        self.written += len(records)


async def work(plan: Plan) -> None:
    """Read, merge and write until a signal comes."""
    aggregation = AGGREGATIONS[plan.aggregation]
    engine = create_async_engine(plan.database.replace("sqlite://", "sqlite+aiosqlite://"))
    sink: Any = CountedTable(engine, aggregation.table, aggregation.model)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncProcess(
        url=plan.url, namespace=plan.namespace, heartbeat_interval=plan.heartbeat
    ) as process:
        sessions: Any
        if plan.updates:
            sink = FlightUpdate
            sink.engine = sa.create_engine(plan.database)
            sessions = AsyncLruCache(plan.max_entries)

            async def handle(fields: dict[bytes, bytes]) -> None:
                name, doc = fields[b"key"].decode(), flight(json.loads(fields[b"value"]))
                await sessions.set(name, AsyncFlightUpdate(process, name, doc=doc))
        else:
            sessions = process.collect(aggregation.model, plan.max_entries, sink=sink)

            async def handle(fields: dict[bytes, bytes]) -> None:
                values = aggregation.values(json.loads(fields[b"value"]))
                await sessions.add(fields[b"key"].decode(), *values)

        say(process.id)
        await read(plan, stop, process, handle)
        await sessions.expire_all()
    await engine.dispose()
    say(json.dumps({"sessions": sink.written}))


async def read(plan: Plan, stop: asyncio.Event, process: AsyncProcess, handle: Handle) -> None:
    """Hand each entry of the stream to a function, and store what it has made of them, once."""
    scope, idle_ms = f"stream/{GROUP}/{plan.topic}", int(4000 * plan.heartbeat)
    async with redis.asyncio.Redis.from_url(plan.broker) as client:
        with contextlib.suppress(redis.ResponseError):  # BUSYGROUP: another worker has made it
            await client.xgroup_create(plan.topic, GROUP, id="0", mkstream=True)
        while not stop.is_set():
            # First the entries that a dead worker was given and has not acknowledged.
            _, entries, *_ = await client.xautoclaim(
                plan.topic, GROUP, process.id, idle_ms, count=BATCH
            )
            if not entries:
                found = await client.xreadgroup(
                    GROUP, process.id, {plan.topic: ">"}, count=BATCH, block=100
                )
                streams = found.items() if isinstance(found, dict) else found
                entries = [entry for _, some in streams for entry in some]
            if entries and await store(process, scope, entries, handle):
                await client.xack(plan.topic, GROUP, *(id_ for id_, _ in entries))


async def store(process: AsyncProcess, scope: str, entries: list[Any], handle: Handle) -> bool:
    """Store entries, each once. Return whether all of them are stored."""
    try:
        async with process.batch(entries, dedupe=scope) as batch:
            async for _, fields in batch:
                await handle(fields)
    except AlreadyStoredError:  # a worker that was believed dead has stored some of them
        return False  # they are claimed again, and then it is known which
    return True


if __name__ == "__main__":
    main(lambda plan: asyncio.run(work(plan)), Plan)
