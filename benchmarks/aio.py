"""Measures phonon.aio against the same in threads, on one server, in turns.

Durable ingest: `batch()` of a thousand messages, of a zipf-distributed stream, in one process. And
a thousand tasks, beside as many threads' work by eight threads, that take one of a hundred locks
or join and leave one of a hundred resources.

    python benchmarks/aio.py [--rounds 5] [--uvloop]
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import processes
from comparison import stream
from comparison.stream import Message
from phonon import LruCache, Process, Update
from phonon.aio import AsyncLruCache, AsyncProcess, AsyncUpdate

MESSAGES = 50_000
KEYS = 20_000
TASKS = 1000
RESOURCES = 100
THREADS = 8


class Summed:
    """Sum and union."""

    doc: dict[str, Any]

    def __init__(self, process: Any, message: Message) -> None:
        doc = {"n": message.times, "seen": {message.element}}
        super().__init__(process, message.key, doc=doc)  # type: ignore[call-arg]  # of an update

    def merge(self, other: Any) -> None:
        """Add the other one."""
        self.doc["n"] += other.doc["n"]
        self.doc["seen"] |= other.doc["seen"]


class Sum(Summed, Update):
    """For threads."""

    written = 0

    def execute(self) -> None:
        """Count it."""
        Sum.written += self.doc["n"]


class AsyncSum(Summed, AsyncUpdate):
    """For tasks."""

    written = 0

    async def execute(self) -> None:
        """Count it."""
        AsyncSum.written += self.doc["n"]


def ingest(process: Process, messages: list[Message]) -> tuple[float, float]:
    """Seconds to store all, and to end all sessions."""
    cache: LruCache[Sum] = LruCache(len(messages))
    begun = time.perf_counter()
    for batch in stream.batches(messages):
        with process.batch():
            for message in batch:
                cache.set(message.key, Sum(process, message))
    stored = time.perf_counter()
    cache.expire_all()
    return stored - begun, time.perf_counter() - stored


async def async_ingest(process: AsyncProcess, messages: list[Message]) -> tuple[float, float]:
    """The same."""
    cache: AsyncLruCache[AsyncSum] = AsyncLruCache(len(messages))
    begun = time.perf_counter()
    for batch in stream.batches(messages):
        async with process.batch():
            for message in batch:
                await cache.set(message.key, AsyncSum(process, message))
    stored = time.perf_counter()
    await cache.expire_all()
    return stored - begun, time.perf_counter() - stored


def many(process: Process) -> tuple[float, float]:
    """Seconds for some threads to take so many locks, and to make and leave references."""

    def lock(i: int) -> None:
        with process.lock(f"lock{i % RESOURCES}"):
            pass

    def refer(i: int) -> None:
        process.create_reference(f"resource{i % RESOURCES}").dereference()

    def seconds(work: Callable[[int], None]) -> float:
        begun = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(TASKS)))
        return time.perf_counter() - begun

    return seconds(lock), seconds(refer)


async def async_many(process: AsyncProcess) -> tuple[float, float]:
    """The same, by as many tasks, all at once."""

    async def lock(i: int) -> None:
        async with process.lock(f"lock{i % RESOURCES}"):
            pass

    async def refer(i: int) -> None:
        await (await process.create_reference(f"resource{i % RESOURCES}")).dereference()

    async def seconds(work: Callable[[int], Any]) -> float:
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i in range(TASKS):
                group.create_task(work(i))
        return time.perf_counter() - begun

    return await seconds(lock), await seconds(refer)


def runner(*, uvloop: bool) -> asyncio.Runner:
    """The runner of the asyncio side."""
    if not uvloop:
        return asyncio.Runner()
    import uvloop as fast  # noqa: PLC0415 - only if it is wanted

    return asyncio.Runner(loop_factory=fast.new_event_loop)


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    messages = stream.zipf(MESSAGES, KEYS, seed=1)
    rounds: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    with processes() as [process], runner(uvloop=options.uvloop) as loop:
        path = process.client.connection_pool.connection_kwargs["path"]
        other = loop.run(AsyncProcess(url=f"unix://{path}?db=1", namespace="aio").start())
        for _ in range(options.rounds):
            sync = (*ingest(process, messages), *many(process))
            twin = (*loop.run(async_ingest(other, messages)), *loop.run(async_many(other)))
            rounds.append((sync, twin))
        loop.run(other.stop())
    wanted = options.rounds * sum(message.times for message in messages)
    assert Sum.written == AsyncSum.written == wanted, "a total is wrong"
    print(f"{'':44}{'threads':>10}{'asyncio':>10}{'ratio':>7}  (lowest to highest)")
    sessions = len({message.key for message in messages})
    names = {
        f"stored in batch() of {stream.BATCH:,}, messages/s": MESSAGES,
        "expire_all, sessions/s": sessions,
        f"{TASKS:,} locks on {RESOURCES} resources, locks/s": TASKS,
        f"{TASKS:,} references on {RESOURCES} resources, pairs/s": TASKS,
    }
    for i, (name, count) in enumerate(names.items()):
        ratios = [sync[i] / twin[i] for sync, twin in rounds]
        ours, theirs = (count / statistics.median(r[side][i] for r in rounds) for side in (0, 1))
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:44}{ours:10,.0f}{theirs:10,.0f}{statistics.median(ratios):7.2f}  {spread}")


if __name__ == "__main__":
    main()
