"""Measures what Phonon costs while nothing happens: beats, memory, connections, and keys left.

    python benchmarks/footprint.py [--memberships 1000000] [--locks 10000] [--tasks 1000]

Commands and calls are counted by the server (``INFO commandstats``), and so is its memory.
"""

import argparse
import asyncio
import time
from typing import Any

import redis

from common import on_server, plain_client, processes
from phonon import LruCache, Update
from phonon.aio import AsyncProcess

#: Seconds between two beats; so many of them are counted.
BEAT, BEATS = 1.0, 20
TOGETHER = 50_000


class Nothing(Update, name="nothing"):
    """An update without data."""

    def merge(self, other: Any) -> None:
        """Add nothing."""

    def execute(self) -> None:
        """Write nothing."""


def commands(client: Any) -> dict[str, int]:
    """Return how often each command was called since the counts were reset."""
    stats = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}


def beats(memberships: int, locks: int) -> None:
    """Count the cost of a beat that keeps all of these alive."""
    with processes(heartbeat_interval=BEAT) as [process]:
        there = on_server(process)
        for first in range(0, memberships, TOGETHER):
            with process.batch():
                for i in range(first, min(first + TOGETHER, memberships)):
                    process.create_reference(f"user:{i:07}")
        each = (on_server(process) - there) / memberships
        print(f"{memberships:,} references of one process: {each:,.0f} bytes each on the server")
        held = [process.lock(f"lock:{i:05}") for i in range(locks)]
        assert all(lock.acquire() for lock in held)
        heart = process.engine.heartbeat
        begun = heart.beats
        while heart.beats == begun:
            time.sleep(0.001)
        process.client.config_resetstat()
        begun, cpu = heart.beats, time.process_time()
        while heart.beats < begun + BEATS:
            time.sleep(0.05)
        busy = time.process_time() - cpu
        counted = commands(process.client)
        sent = counted.pop("fcall", 0) + counted.pop("fcall_ro", 0)
        inner = sum(counted.values())
        print(
            f"with these and {locks:,} locks a beat costs {busy / BEATS * 1000:.1f} ms of CPU here,"
        )
        print(f"  {sent / BEATS:.1f} calls, and {inner / BEATS:.0f} commands inside of them")
        process.engine.close()  # to leave all takes longer than to measure


def memory(sessions: int = 100_000) -> None:
    """Count the bytes of an open session that has stored no data."""
    with processes() as [process]:
        cache: LruCache[Nothing] = LruCache(sessions)
        names = [f"user{i}" for i in range(sessions)]
        there = on_server(process)
        with process.batch(durable=False):
            for name in names:
                cache.set(name, Nothing(process, name, init_cache=False))
        each = (on_server(process) - there) / sessions
        print(f"an open session of one process, without data: {each:,.0f} bytes on the server")
        cache.expire_all()


async def waiting(url: str, tasks: int) -> int:
    """Return the number of connections while tasks wait for locks."""
    async with AsyncProcess.from_url(url) as process:
        held = [process.lock(f"lock{i}") for i in range(10)]
        for lock in held:
            await lock.acquire()

        async def wait(number: int) -> None:
            async with process.lock(f"lock{number % 10}"):
                pass

        waiters = [asyncio.create_task(wait(i)) for i in range(tasks)]
        while sum([len(await lock.waiters()) for lock in held]) < tasks:  # noqa: ASYNC110 - the server announces no waiters
            await asyncio.sleep(0.05)
        with redis.Redis.from_url(url) as client:
            found = len(client.client_list()) - 1
        for lock in held:
            await lock.release()
        await asyncio.gather(*waiters)
        return found


def leftovers(sessions: int = 10_000) -> dict[str, int]:
    """Return the kinds of keys that are left when all is over, and how many of each."""
    with processes(2) as made:
        client = plain_client(made[0])
        for process in made:
            cache: LruCache[Nothing] = LruCache(sessions)
            with process.batch():
                for i in range(sessions):
                    cache.set(i, Nothing(process, i))
            cache.expire_all()
            with process.lock("lock"):
                pass
        for process in made:
            process.stop()
        kinds: dict[str, int] = {}
        for key in client.scan_iter(count=1000):
            kind = key.decode().rpartition("}:")[2]
            kinds[kind] = kinds.get(kind, 0) + 1
        client.close()
        return kinds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memberships", type=int, default=1_000_000)
    parser.add_argument("--locks", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=1000)
    options = parser.parse_args()
    beats(options.memberships, options.locks)
    memory()
    with processes() as [process]:
        kwargs = process.client.connection_pool.connection_kwargs
        mine = len(process.client.client_list())
        url = f"unix://{kwargs['path']}?db=1"
        found = asyncio.run(waiting(url, options.tasks)) - mine
    print(f"{options.tasks:,} tasks that wait for locks: {found} connections")
    print(f"keys left when all sessions are over and all processes have stopped: {leftovers()}")


if __name__ == "__main__":
    main()
