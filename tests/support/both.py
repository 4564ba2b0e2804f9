"""The two APIs behind one face, so that a test is written once."""

import asyncio
import contextlib
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ClassVar, NamedTuple

import uvloop

from phonon import ConflictFreeUpdate, LruCache, Process, Update
from phonon.aio import AsyncConflictFreeUpdate, AsyncLruCache, AsyncProcess, AsyncUpdate


class Api(NamedTuple):
    """One of the APIs.

    Attributes:
        name: threads, asyncio or uvloop.
        process: Its `Process`.
        update: Its `Update`.
        cache: Its `LruCache`.
        sums: Its `ConflictFreeUpdate`.
    """

    name: str
    process: Any
    update: Any
    cache: Any
    sums: Any

    @property
    def is_async(self) -> bool:
        return self.update is AsyncUpdate

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a test. What it leaves running is a mistake."""

        async def checked() -> None:
            before = asyncio.all_tasks()
            async with asyncio.timeout(60):
                await test()
            assert asyncio.all_tasks() == before

        factory = uvloop.new_event_loop if self.name == "uvloop" else None
        with asyncio.Runner(loop_factory=factory, debug=self.name == "asyncio") as runner:
            runner.run(checked())

    def tally(self) -> Any:
        """A class of updates that remember what they have written."""
        return _tally() if self.is_async else _sync_tally()

    def user_code(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An ``execute``, ``execute_many`` or callback that does what a function does."""
        if not self.is_async:
            return function

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return await got(function(*args, **kwargs))

        return awaited

    @contextlib.asynccontextmanager
    async def enter(self, manager: Any) -> AsyncIterator[Any]:
        """A ``with`` or an ``async with`` block."""
        if self.is_async:
            async with manager as entered:
                yield entered
        else:
            with manager as entered:
                yield entered

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Call something beside the test: in a task, or in a thread."""
        if self.is_async:
            task: Awaitable[Any] = asyncio.ensure_future(function(*args, **kwargs))
            return task
        return asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))


async def got(result: Any) -> Any:
    """Return the result of a method, awaited if it belongs to the asyncio API."""
    return await result if inspect.isawaitable(result) else result


async def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition."""
    async with asyncio.timeout(20):
        while not (found := await got(condition())):  # noqa: ASYNC110 - no event tells of the condition
            await asyncio.sleep(0.002)
        return found


class Written(NamedTuple):
    """One call of ``execute``."""

    record: Any
    doc: dict[str, Any]
    token: int
    process: str


def _sync_tally() -> type[Update]:
    class Sheet(Update):
        written: ClassVar[list[Written]] = []

        def merge(self, other: Any) -> None:
            self.doc = dict(Counter(self.doc) + Counter(other.doc))

        def execute(self) -> None:
            assert type(self.token) is int
            entry = Written(self._id, dict(self.doc), self.token, self.process().id)
            type(self).written.append(entry)

    return Sheet


def _tally() -> type[AsyncUpdate]:
    class Sheet(AsyncUpdate):
        written: ClassVar[list[Written]] = []

        def merge(self, other: Any) -> None:
            self.doc = dict(Counter(self.doc) + Counter(other.doc))

        async def execute(self) -> None:
            assert type(self.token) is int
            await asyncio.sleep(0)
            entry = Written(self._id, dict(self.doc), self.token, self.process().id)
            type(self).written.append(entry)

    return Sheet


APIS = [
    Api("threads", Process, Update, LruCache, ConflictFreeUpdate),
    Api("asyncio", AsyncProcess, AsyncUpdate, AsyncLruCache, AsyncConflictFreeUpdate),
    Api("uvloop", AsyncProcess, AsyncUpdate, AsyncLruCache, AsyncConflictFreeUpdate),
]
