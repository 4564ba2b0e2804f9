"""A batch block whose body raises stores nothing of what was set inside."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from support.both import APIS, Api, got
from support.world import Redis


class Broken(Exception):  # noqa: N818 - it is what is broken
    """The exception of a block's body."""


@pytest.fixture(params=APIS, ids=lambda api: api.name)
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.param
    return found


class World:
    """A process, its cache, and what was written."""

    def __init__(self, api: Api, process: Any) -> None:
        self.api = api
        self.process = process
        self.kind = api.tally()
        self.cache = api.cache(max_entries=3)

    def update(self, record: str, n: int, **options: Any) -> Any:
        return self.kind(self.process, record, doc={"n": n}, **options)

    async def set(self, record: str, n: int, **options: Any) -> Any:
        update = self.update(record, n, **options)
        await got(self.cache.set(record, update))
        return update

    async def totals(self) -> dict[str, int]:
        """Return the written records, once all sessions have ended."""
        await got(self.process.stop())
        totals: dict[str, int] = {}
        for entry in self.kind.written:
            totals[entry.record] = totals.get(entry.record, 0) + entry.doc.get("n", 0)
        return {record: total for record, total in totals.items() if total}

    @asynccontextmanager
    async def failing(self, **options: Any) -> AsyncIterator[None]:
        """A block whose body raises at its end."""
        with suppress(Broken):
            async with self.api.enter(self.process.batch(**options)):
                yield
                raise Broken


def play(api: Api, server: Redis, namespace: str, scene: Any) -> None:
    """Run a scene in a world of its own."""

    async def played() -> None:
        process = api.process(url=server.url, namespace=namespace)
        if api.is_async:
            await process.start()
        try:
            await scene(World(api, process))
        finally:
            await got(process.stop())

    api.run(played)


def test_nothing_is_stored_and_all_messages_may_come_again(
    api: Api, server: Redis, namespace: str
) -> None:
    async def scene(world: World) -> None:
        messages = [f"record-{i % 3}" for i in range(30)]
        async with world.failing():
            for record in messages[:20]:
                await world.set(record, 1)
        async with api.enter(world.process.batch()):
            for record in messages:
                await world.set(record, 1)
        assert await world.totals() == dict.fromkeys(messages, 10)

    play(api, server, namespace, scene)


def test_without_a_cache(api: Api, server: Redis, namespace: str) -> None:
    async def scene(world: World) -> None:
        async with world.failing():
            for _ in range(2000):  # so many are merged on the way
                world.update("record", 1)
            await got(world.update("ended", 1).end_session())
            await got(world.process.create_reference("resource"))
        assert await got(world.process.get_registry()) == []
        assert await world.totals() == {}

    play(api, server, namespace, scene)


@pytest.mark.parametrize("stored", [True, False])
def test_what_was_there_before_the_block_stays(
    api: Api, server: Redis, namespace: str, stored: bool
) -> None:
    async def scene(world: World) -> None:
        for record in ("merged", "untouched"):
            await world.set(record, 100, init_cache=stored)
        async with world.failing():
            await world.set("merged", 1, init_cache=stored)
            await world.set("merged", 1, init_cache=stored)
        await world.set("merged", 10, init_cache=stored)
        assert await world.totals() == {"merged": 110, "untouched": 100}

    play(api, server, namespace, scene)


def test_updates_from_before_the_block(api: Api, server: Redis, namespace: str) -> None:
    """One that was only made before is set inside, and goes; one that is told to store keeps."""

    async def scene(world: World) -> None:
        old = world.update("cached", 5, init_cache=False)
        entry = await world.set("merged", 7, init_cache=False)
        other = world.update("merged", 1, init_cache=False)
        async with world.failing():
            await got(world.cache.set("merged", other))
            await got(old.cache())
            old.refresh(world.update("cached", 1))
        assert entry.doc == {"n": 7}
        await got(old.end_session())
        assert await world.totals() == {"merged": 7, "cached": 5}

    play(api, server, namespace, scene)


def test_a_session_that_the_cache_has_ended_ends_with_what_it_had(
    api: Api, server: Redis, namespace: str
) -> None:
    async def scene(world: World) -> None:
        await world.set("old", 5, init_cache=False)
        async with world.failing():
            await world.set("old", 1)
            for i in range(4):
                await world.set(f"new-{i}", 1)
        await asyncio.sleep(0)
        assert [(w.record, w.doc) for w in world.kind.written] == [("old", {"n": 5})]
        assert await world.totals() == {"old": 5}

    play(api, server, namespace, scene)


def test_a_block_inside_is_part_of_the_outer_one(api: Api, server: Redis, namespace: str) -> None:
    async def scene(world: World) -> None:
        async with world.failing(), api.enter(world.process.batch()):
            await world.set("record", 1)
        async with api.enter(world.process.batch()), world.failing():
            await world.set("record", 10)
        assert await world.totals() == {"record": 10}

    play(api, server, namespace, scene)


def test_the_next_block_begins_anew(api: Api, server: Redis, namespace: str) -> None:
    async def scene(world: World) -> None:
        block = world.process.batch()
        with suppress(Broken):
            async with api.enter(block):
                await world.set("record", 1)
                raise Broken
        async with api.enter(block):  # the same object, even
            await world.set("record", 2)
        assert await world.totals() == {"record": 2}

    play(api, server, namespace, scene)


def test_a_task_that_is_cancelled(server: Redis, namespace: str) -> None:
    async def scene(world: World) -> None:
        async def handle() -> None:
            async with world.process.batch():
                await world.set("record", 1)
                begun.set()
                await asyncio.sleep(60)

        begun = asyncio.Event()
        task = asyncio.ensure_future(handle())
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert await world.totals() == {}

    play(APIS[1], server, namespace, scene)


@pytest.mark.parametrize("is_failing", [True, False])
def test_what_another_thread_has_merged_meanwhile_stays(
    server: Redis, namespace: str, is_failing: bool
) -> None:
    """It was acknowledged to that thread, and not by the block."""

    async def scene(world: World) -> None:
        async def merge() -> None:
            await world.set("record", 1)
            other = threading.Thread(
                target=lambda: world.cache.set("record", world.update("record", 10, **local))
            )
            other.start()
            other.join()
            await world.set("record", 1)

        local = {"init_cache": False}
        if is_failing:
            async with world.failing():
                await merge()
        else:
            async with world.api.enter(world.process.batch()):
                await merge()
        assert await world.totals() == {"record": 10 if is_failing else 12}

    play(APIS[0], server, namespace, scene)
