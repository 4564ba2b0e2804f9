"""A program with an event loop that a test can kill, and tell what to do; see `member`."""

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from phonon.aio import AsyncLock, AsyncLruCache, AsyncProcess, AsyncUpdate
from support.member import FOLDER, Member, note


class AsyncEntry(AsyncUpdate):
    """Adds up ``doc``. The ``execute`` of ``hang-…`` waits for `Journal.open`."""

    def merge(self, other: Any) -> None:
        self.doc = dict(Counter(self.doc) + Counter(other.doc))

    async def execute(self) -> None:
        folder, record = Path(os.environ[FOLDER]), str(self._id)
        if record.startswith("hang-"):
            (folder / f"begun-{record}").touch()
            while not (folder / f"open-{record}").exists():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.002)
        note(self)


class AsyncActor:
    """The actions of an `AsyncMember`."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process
        self._cache: AsyncLruCache[AsyncEntry] = AsyncLruCache()
        self._locks: list[AsyncLock] = []

    async def id(self) -> str:
        return self._process.id

    async def put(self, record: str, n: int = 1) -> None:
        """Store a message about a record."""
        await self._cache.set(record, AsyncEntry(self._process, record, doc={"n": n}))

    async def end(self, record: str) -> None:
        await self._cache.expire(record)

    async def acquire(self, resource: str) -> None:
        self._locks.append(self._process.lock(resource))
        await self._locks[-1].acquire()


class AsyncMember(Member):
    """A program with an event loop that does what a test says."""

    program = "from support import async_member; async_member.main()"


async def _serve() -> None:
    async with AsyncProcess(**json.loads(sys.argv[1])) as process, asyncio.TaskGroup() as tasks:
        actor = AsyncActor(process)

        async def act(number: int, action: str, args: list[Any]) -> None:
            result, failure = None, None
            try:
                result = await getattr(actor, action)(*args)
            except Exception as error:  # noqa: BLE001 - it is the test's
                failure = [type(error).__name__, str(error)]
            print(json.dumps([number, result, failure]), flush=True)  # noqa: T201 - for the test

        while line := await asyncio.to_thread(sys.stdin.readline):
            tasks.create_task(act(*json.loads(line)))


def main() -> None:
    """Run in the interpreter that an `AsyncMember` starts."""
    asyncio.run(_serve())
