"""A worker with an event loop: the same program as `phonon_demo.worker`, for asyncio."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
from sqlalchemy.ext.asyncio import create_async_engine

from phonon.aio import AsyncProcess
from phonon.aio.sinks import AsyncSqlTable
from phonon.errors import AlreadyStoredError
from phonon_demo.rows import JOBS
from phonon_demo.worker import BATCH, GROUP, Plan, written_by

#: Seconds to wait before a server that did not answer is asked again.
PAUSE = 0.5
#: Stores entries of a stream, ids and fields. Returns whether all of them are stored.
Store = Callable[[Sequence[Any]], Awaitable[bool]]


def work(plan: Plan) -> int:
    """Read, merge and write until a signal comes; see `phonon_demo.worker.work`."""
    return asyncio.run(_work(plan))


async def _work(plan: Plan) -> int:
    job = JOBS[plan.job]
    engine = create_async_engine(plan.database.replace("sqlite://", "sqlite+aiosqlite://"))
    table = AsyncSqlTable(engine, job.table, job.model)
    async with AsyncProcess(
        plan.url, namespace=plan.namespace, heartbeat_interval=plan.heartbeat
    ) as process:
        records: Any = process.collect(job.model, plan.max_entries, sink=table)

        async def store(entries: Sequence[Any]) -> bool:
            try:
                async with process.batch(entries, dedupe=plan.stream) as batch:
                    async for _, fields in batch:
                        await records.add(fields[b"key"].decode(), *json.loads(fields[b"value"]))
            except AlreadyStoredError:  # a worker that was believed dead has stored some of them
                return False  # they are claimed again, and then it is known which
            return True

        await read(plan, process.id, store)
        await records.expire_all()
        written = written_by(process)
    await engine.dispose()
    return written


async def read(plan: Plan, consumer: str, store: Store) -> None:
    """Store the entries of the stream until a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with redis.asyncio.Redis.from_url(plan.url) as client:
        has_group = False
        while not stop.is_set():
            try:
                if not has_group:
                    with contextlib.suppress(redis.ResponseError):  # BUSYGROUP: it is made
                        await client.xgroup_create(plan.stream, GROUP, id="0", mkstream=True)
                    has_group = True
                entries = await _entries(client, plan, consumer)
                if entries and await store(entries):
                    await client.xack(plan.stream, GROUP, *(id_ for id_, _ in entries))
            except (redis.ConnectionError, redis.TimeoutError):
                await asyncio.sleep(PAUSE)


async def _entries(client: "redis.asyncio.Redis", plan: Plan, consumer: str) -> list[Any]:
    """Return first the entries that a dead worker was given and has not acknowledged."""
    idle_ms = int(4000 * plan.heartbeat)
    _, entries, *_ = await client.xautoclaim(plan.stream, GROUP, consumer, idle_ms, count=BATCH)
    if not entries:
        found = await client.xreadgroup(GROUP, consumer, {plan.stream: ">"}, count=BATCH, block=100)
        streams = found.items() if isinstance(found, dict) else found
        entries = [entry for _, some in streams for entry in some]
    return list(entries)
