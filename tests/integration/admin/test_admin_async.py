"""The operator's view of programs with an event loop is the same one."""

import asyncio

import pytest

from phonon import Admin
from phonon.aio import AsyncAdmin
from phonon.errors import ConfigurationError
from support.world import Make, Redis


def test_it_shows_the_same(server: Redis, namespace: str, make: Make) -> None:
    process = make(heartbeat_interval=400)
    for i in range(200):
        process.create_reference(f"r{i}")
    process.lock("x").acquire()

    async def look() -> None:
        async with AsyncAdmin(server.url, namespace=namespace) as admin:
            with Admin(server.url, namespace=namespace) as other:
                ids = [p.id for p in await admin.processes()]
                assert ids == [p.id for p in other.processes()] == [process.id]
                found = {session.resource async for session in admin.sessions()}
                assert found == {session.resource for session in other.sessions()}
                assert len(found) == 200
                assert [lock async for lock in admin.locks()] == list(other.locks())
                assert await admin.lock("x") == other.lock("x")
                assert await admin.resource("r1") == other.resource("r1")
                assert [b async for b in admin.batches()] == []
                assert len(await admin.oldest_sessions(3)) == 3
                assert await admin.sources() == []
                lock = await admin.lock("x")
                assert lock is not None
                assert "is released" in await admin.break_lock("x", lock.holders[0].token)
                assert [act.act for act in await admin.acts()] == ["unlock"]

    asyncio.run(look())


def test_one_that_was_not_started_says_so(server: Redis) -> None:
    admin = AsyncAdmin(server.url)
    with pytest.raises(ConfigurationError, match="async with"):
        asyncio.run(admin.processes())
