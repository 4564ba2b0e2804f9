"""Events of a process: listeners are called, and lines of the log have fields."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from phonon import ConflictFreeUpdate, RetryPolicy
from phonon.aio import AsyncProcess
from phonon.errors import ConfigurationError, LockLostError
from support.member import Crew
from support.world import Make, Redis, key_for, wait_until


class Failing(ConflictFreeUpdate):
    """Fails."""

    def execute(self) -> None:
        raise OSError("no database")


def test_a_parked_batch(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    told: list[Any] = []
    process.on("parked", told.append)
    process.on("takeover", told.append)
    with caplog.at_level(logging.WARNING, "phonon"), pytest.raises(OSError, match="no database"):
        Failing(process, "a", doc={"n": 1}).end_session()
    (event,) = told
    (letter,) = process.parked()
    assert (event.name, event.resource, event.token) == ("parked", "test.test.a", letter.token)
    assert event.process == process.id
    assert isinstance(event.error, OSError)
    (record,) = [r for r in caplog.records if "parked" in r.message]
    fields: Any = record
    assert (fields.resource, fields.token) == ("test.test.a", letter.token)
    assert fields.process_id == process.id


def test_a_takeover(server: Redis, namespace: str, tmp_path: Path) -> None:
    with Crew(server.url, namespace, tmp_path) as crew:
        process, member = crew.process(), crew.member()
        told: list[Any] = []
        process.on("takeover", told.append)
        member.do("put", "a")
        dead = member.id
        member.kill()
        wait_until(lambda: told)
        assert told[0].process == dead
        assert "has taken over 1 resources" in told[0].text


def test_a_lost_lock(server: Redis, make: Make) -> None:
    process = make()
    told: list[Any] = []
    process.on("lock_lost", told.append)
    lock = process.lock("x")
    lock.acquire()
    with server.client() as client:
        client.delete(key_for(process, "lock", "x"))
    with pytest.raises(LockLostError):
        lock.release()
    wait_until(lambda: told)
    assert [event.name for event in told] == ["lock_lost"]


def test_a_listener_that_raises_harms_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    process = make(retry=RetryPolicy(attempts=1))

    def broken(_: Any) -> None:
        raise ValueError("broken listener")

    told: list[Any] = []
    process.on("parked", broken)
    process.on("parked", told.append)
    with pytest.raises(OSError, match="no database"):
        Failing(process, "a", doc={"n": 1}).end_session()
    assert len(told) == 1
    assert "broken listener" in caplog.text


def test_a_listener_may_be_a_coroutine_function(server: Redis, namespace: str) -> None:
    told: list[Any] = []

    async def listen(event: Any) -> None:
        told.append(event)

    async def run() -> None:
        async with AsyncProcess(url=server.url, namespace=namespace) as process:
            process.on("lock_lost", listen)
            lock = process.lock("x")
            await lock.acquire()
            with server.client() as client:
                client.delete(key_for(process, "lock", "x"))
            with pytest.raises(LockLostError):
                await lock.release()
            for _ in range(1000):
                if told:
                    break
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert [event.name for event in told] == ["lock_lost"]


def test_names_are_checked(make: Make) -> None:
    process = make()
    nothing: Any = None
    with pytest.raises(ConfigurationError, match="an event is one of parked"):
        process.on("parkd", print)
    with pytest.raises(ConfigurationError, match="cannot be"):
        process.on("parked", nothing)
