"""A replica that lags is promoted in the middle of work: with `Durability` nothing of it is lost.

`PHONON_TEST_FAILOVERS` asks for more rounds of each kind.
"""

import asyncio
import contextlib
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import pytest

from phonon import Durability
from phonon.errors import ServerStateLostError
from support.both import APIS, Api, got
from support.links import Lagging
from support.world import sequence_of, wait_until

ROUNDS = int(os.environ.get("PHONON_TEST_FAILOVERS", "1"))
COPIED = Durability(fsync=False, replicas=1, timeout=2.0)
LAG = 0.15
AT_ONCE = 10


class Written(NamedTuple):
    record: str
    ids: list[int]
    token: int


def ids_of(api: Api) -> Any:
    """A class of updates that collect numbers."""

    class Ids(api.update):  # type: ignore[misc,name-defined]  # either of them
        doc: dict[str, list[int]]
        written: ClassVar[list[Written]] = []

        def merge(self, other: Any) -> None:
            self.doc = {"ids": self.doc["ids"] + other.doc["ids"]}

        def note(self) -> None:
            self.written.append(Written(str(self._id), self.doc["ids"], self.token))

        execute = api.user_code(lambda self: self.note())

    return Ids


def applied(written: list[Written]) -> Counter[int]:
    """Return the rows of a database that skips a token not greater than the last one."""
    last: dict[str, int] = {}
    found: Counter[int] = Counter()
    for record, ids, token in written:
        if token > last.get(record, 0):
            last[record] = token
            found.update(ids)
    return found


class Work:
    """Workers that store numbers and end sessions until they are told to stop."""

    def __init__(self, api: Api, kind: Any, seed: int) -> None:
        self.api, self.kind, self.seed = api, kind, seed
        self.numbers = itertools.count()
        self.stored: list[int] = []
        self.stop = threading.Event()

    async def run(self, process: Any, cache: Any, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - no secret
        while not self.stop.is_set():
            some = [next(self.numbers) for _ in range(AT_ONCE)]
            keys = [f"r{n}" for n in range(4)] + [f"w{seed}-{n}" for n in range(4)]
            async with self.api.enter(process.batch()):
                for number in some:
                    key = chance.choice(keys)
                    update = self.kind(process, key, doc={"ids": [number]}, init_cache=False)
                    await got(cache.set(key, update))
            self.stored += some
            for _ in range(3):
                with contextlib.suppress(KeyError):
                    await got(cache.expire(chance.choice(keys)))
            await asyncio.sleep(0)

    def start(self, process: Any, cache: Any, seed: int) -> Any:
        if self.api.is_async:
            return asyncio.ensure_future(self.run(process, cache, seed))
        return asyncio.ensure_future(
            asyncio.to_thread(lambda: asyncio.run(self.run(process, cache, seed)))
        )


def calls_gone(process: Any, servers: Lagging) -> int:
    """How many calls of a process were answered that the new primary does not know of."""
    identity, gone = process.engine.identity, 0
    with servers.replica.client() as client:
        for prefix, lane in zip(identity.partitions.prefixes, identity.lanes, strict=True):
            key = (prefix + b"lane:" + lane.process).decode()
            known: Any = client.hmget(key, "state", "fenced")
            gone += max(0, lane.answered - sequence_of(known))
    return gone


def fail_over(api: Api, namespace: str, seed: int, durability: Durability | None) -> None:
    """Kill the primary while three processes work, and see what became of their data."""
    kind = ids_of(api)
    work = Work(api, kind, seed)
    told: list[list[Exception]] = [[], [], []]
    gone: list[int] = []

    async def beside(function: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(function)

    with Lagging(LAG) as servers:

        async def test() -> None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
            processes = [
                api.process(
                    url=servers.url,
                    namespace=namespace,
                    heartbeat_interval=1.0,
                    retry_timeout=30.0,
                    durability=durability,
                    on_error=errors.append,
                )
                for errors in told
            ]
            async with api.enter(processes[0]), api.enter(processes[1]), api.enter(processes[2]):
                workers = []
                for i, process in enumerate(processes):
                    cache = api.cache()
                    workers += [work.start(process, cache, 9 * seed + 2 * i + n) for n in range(2)]
                await beside(lambda: wait_until(lambda: len(kind.written) > 40, 60))
                await asyncio.sleep(0.1 * (seed % 5))
                await beside(servers.kill_primary)
                # Nobody reaches a server now. Answers that had arrived are still taken in.
                while gone != (now := [calls_gone(process, servers) for process in processes]):
                    gone[:] = now
                    await asyncio.sleep(0.1)
                servers.let_in()
                begun = len(work.stored)
                await beside(lambda: wait_until(lambda: len(work.stored) > begun + 100, 60))
                work.stop.set()
                await asyncio.gather(*workers)

        api.run(test)
    losses = [[e for e in errors if isinstance(e, ServerStateLostError)] for errors in told]
    found = applied(kind.written)
    lost = set(work.stored) - found.keys()
    doubled = {number for number, times in found.items() if times > 1}
    # Each process is told what it has lost by its next call or heartbeat.
    calls = [sum(e.calls for e in mine) for mine in losses]
    if durability is None:
        assert calls == gone
        assert any(gone) or not (lost or doubled), "nobody is told"
    else:
        # An answer waits while others of its exchange are confirmed, so it may be taken in later.
        assert all(known <= of_all for known, of_all in zip(gone, calls, strict=True))
        assert not lost
        assert not doubled


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
@pytest.mark.timeout(180)
def test_with_durability_nothing_is_lost_and_nothing_doubled(
    api: Api, seed: int, namespace: str
) -> None:
    fail_over(api, namespace, seed, COPIED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("api", APIS[:2], ids=lambda api: api.name)
@pytest.mark.timeout(180)
def test_without_it_each_process_is_told_what_it_has_lost(
    api: Api, seed: int, namespace: str
) -> None:
    fail_over(api, namespace, seed, None)
