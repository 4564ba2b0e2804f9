"""A process that stops in the middle of a takeover finishes what it has taken."""

import asyncio
import random
from collections import Counter

import pytest

from phonon.aio import AsyncProcess, AsyncUpdate
from support.world import Redis, wait_until

DEAD, EACH = 4, 100


class Row(AsyncUpdate):
    executed: Counter[str] = Counter()  # noqa: RUF012 - of all of them

    def merge(self, other: "Row") -> None:
        self.doc["n"] += other.doc["n"]

    async def execute(self) -> None:
        self.executed[self._id] += self.doc["n"]


async def die(process: AsyncProcess) -> None:
    """End all that a process does, without its doing."""
    engine = process.engine
    engine.close()
    await engine.driver.close()


@pytest.mark.leaves_connections
@pytest.mark.parametrize("seed", range(8))
def test_stopping_leaves_nothing(own_server: Redis, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - when it stops
    Row.executed.clear()

    async def main() -> None:
        dead = [
            await AsyncProcess(own_server.url, heartbeat_interval=0.25).start() for _ in range(DEAD)
        ]
        for number, process in enumerate(dead):
            async with process.batch():
                for i in range(EACH):
                    Row(process, f"{number}-{i}", doc={"n": 1})
        for process in dead:
            await die(process)
        with own_server.client() as client:
            client.zadd(dead[0].heartbeat_hash_name, {process.id: 0 for process in dead})
            survivor = await AsyncProcess(own_server.url, heartbeat_interval=0.25).start()
            await asyncio.sleep(chance.random() * 0.04)
            await survivor.stop()
            listed = client.zrange(survivor.heartbeat_hash_name, 0, -1)
        assert survivor.id.encode() not in listed, "it was left to be taken over itself"
        # The next process finds the work that is left.
        async with AsyncProcess(own_server.url, heartbeat_interval=0.25):
            with own_server.client() as client:
                name = survivor.heartbeat_hash_name
                await asyncio.to_thread(wait_until, lambda: client.zcard(name) == 1)

    asyncio.run(main())
    assert Row.executed == Counter({f"{d}-{i}": 1 for d in range(DEAD) for i in range(EACH)})
    with own_server.client() as client:
        assert not [key for key in client.keys("*") if b":batch:" in key or b":partials:" in key]
