"""A collection of a model's records, for tasks."""

from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

from phonon._core.engine import errors_only
from phonon._core.flows import EXECUTING, Flow, Sleep
from phonon._models.collecting import TOGETHER, BaseCollection, Rejected
from phonon.aio.cache import AsyncLruCache
from phonon.batch import raise_together
from phonon.collection import BaseRecordCache
from phonon.settings import check_arguments

P = ParamSpec("P")
M = TypeVar("M")

#: Seconds between two checks for room for new messages.
_LOOK = 0.02


class AsyncRecordCache(BaseRecordCache, AsyncLruCache[Any]):
    """The records of a collection, for tasks."""

    async def end(self, evicted: Sequence[tuple[Hashable, Any]]) -> list[Exception]:
        """End the sessions of records that have left the cache. Return the errors."""
        return await self._end(evicted)


class AsyncCollection(BaseCollection[P, M]):
    """Merges messages into records by key; see `Collection`. Made by `AsyncProcess.collect`.

    The model's ``on_complete`` may be a coroutine function; an ordinary function runs in a thread.

    Example:
        >>> import asyncio
        >>> from phonon import Model
        >>> from phonon.aio import AsyncProcess
        >>> from phonon.fields import ID, Sum
        >>> class PageViews(Model, name="page_views_of_tasks"):
        ...     user: ID[str]
        ...     views: Sum[int] = Sum()
        ...     def on_complete(self):
        ...         print("write", self.user, self.views)
        >>> async def main():
        ...     async with AsyncProcess() as process:
        ...         views = process.collect(PageViews, idle=30, longest=3600)
        ...         async with process.batch():
        ...             await views.add("ada", views=1)
        ...             await views.add("ada", views=1)
        >>> asyncio.run(main())
        write ada 2
    """

    def _make_cache(self, max_entries: int) -> AsyncRecordCache:
        return AsyncRecordCache(max_entries, self._build)

    def _wait_for_room(self) -> None:
        """Do nothing: tasks wait before their messages are folded."""

    async def add(self, *values: P.args, **named: P.kwargs) -> None:
        """Merge a message into the record of its key; see `Collection.add`.

        Raises:
            InvalidMessageError: The model refuses the message. No part of it was merged.
            ConnectionLostError: The server does not answer. The data is kept and stored once, when
                the server is back: do not hand the message back to its broker.
            BacklogFullError: Too much work is unfinished; the message was not taken in.
            Exception: The error of ending an evicted record's session; the message was merged.
        """
        if self._engine.outbox.full:
            await self._room()
        rest = self._fold_one(*values, **named)
        if rest is not None:
            await self._finished(*rest)

    async def add_many(self, rows: Iterable[Any]) -> list[Rejected]:
        """Merge many messages; see `Collection.add_many`."""
        self._check_rows(rows)
        await self._room()
        rejected: list[Rejected] = []
        if self._engine.batch is not None:
            await self._rows(rows, 0, rejected)
            return rejected
        for first, piece in self._pieces(rows, TOGETHER):
            async with self._process.batch():
                await self._rows(piece, first, rejected)
        return rejected

    async def add_table(self, table: Any) -> list[Rejected]:
        """Merge the rows of a table; see `Collection.add_table`."""
        rows = self._rows_of(table)
        if rows.table is None:
            return await self.add_many(rows.rows)
        await self._room()
        # Not inside another batch, which would become durable.
        async with nullcontext() if self._engine.batch is not None else self._process.batch():
            evicted = self._put_table(rows)
            raise_together("ending sessions failed", await self._cache.end(evicted))
        return [Rejected(*each) for each in rows.rejected]

    async def add_record(self, record: Any, arguments: Any = (), named: Any = None) -> None:
        """Merge a record of one message; see `Collection.add_record`."""
        await self._room()
        rest = self._folded_record(
            record, *check_arguments(arguments, named, ("arguments", "named"))
        )
        if rest is not None:
            await self._finished(*rest)

    async def _finished(self, record: Any, evicted: Any, alone: bool) -> None:
        errors: list[Exception] = []
        if alone:
            errors += errors_only(await self._engine.run(self._storing(record)))  # type: ignore[attr-defined]  # of tasks
        errors += await self._cache.end(evicted)
        raise_together("not everything went well", errors)

    def _finish(self, record: Any, evicted: Sequence[tuple[Hashable, Any]], alone: bool) -> Any:
        """Return the arguments, because the calling task awaits the rest."""
        return record, evicted, alone

    async def _rows(self, rows: Any, first: int, rejected: list[Rejected]) -> None:
        evicted = self._put_rows(rows, first, rejected)
        raise_together("ending sessions failed", await self._cache.end(evicted))

    async def read(self, key: Any) -> M | None:
        """Return the data that all processes have stored of a key; see `Collection.read`."""
        found: M | None = await self._engine.run(self._reading(key))  # type: ignore[attr-defined]  # of tasks
        return found

    async def expire(self, key: Any) -> None:
        """End this process's session of a key; see `Collection.expire`."""
        await self._cache.expire(key)

    async def expire_all(self) -> None:
        """End all sessions of this process, many at a time; see `Collection.expire_all`."""
        await self._cache.expire_all()

    async def _room(self) -> None:
        if self._engine.outbox.full:
            await self._engine.run(self._waiting_for_room())  # type: ignore[attr-defined]  # of tasks

    def _waiting_for_room(self) -> Flow[None]:
        outbox, clock = self._engine.outbox, self._engine.identity.clock
        deadline = clock() + self._process.BLOCKING_TIMEOUT
        while outbox.full and not EXECUTING.get():
            if not outbox.blocks or clock() >= deadline:
                raise outbox.refusal()
            yield Sleep(_LOOK)
