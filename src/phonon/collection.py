"""A collection of a model's records, which merges messages without making objects of them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

from phonon._core.engine import Engine, errors_only
from phonon._models.collecting import TOGETHER, BaseCollection, Rejected, SessionLimits
from phonon.batch import raise_together
from phonon.cache import BaseCache, LruCache
from phonon.settings import check_arguments

P = ParamSpec("P")
M = TypeVar("M")


class BaseRecordCache(SessionLimits, BaseCache[Any]):
    """The records of a collection: everything but the waiting.

    Args:
        max_entries: The number of keys to keep at the most.
        on_fork: Called in a forked child, after the parent's records were dropped.
    """

    def __init__(self, max_entries: int, on_fork: Callable[[], None]) -> None:
        super().__init__(max_entries)
        self._on_fork = on_fork
        #: Records that have left the cache, and whose sessions have still to be ended.
        self.left: list[tuple[Hashable, Any]] = []

    def insert(self, key: Hashable, record: Any) -> None:
        """Add a record, under the lock. Records that leave the cache for it are in `left`."""
        self._make_room()
        self.left += self._insert(key, record)

    def drain(self) -> list[tuple[Hashable, Any]]:
        """Remove and return the records that have left the cache."""
        with self._lock:
            left = self.left[:]
            del self.left[:]
            return left

    def endings_for(self, engine: Engine) -> list[tuple[Any, Callable[[], object]]]:
        """Remove the records; see `BaseCache`."""
        # Records are left over if an interrupt came before their sessions were ended.
        for key, record in self.drain():
            self.restore(key, record)
        return super().endings_for(engine)

    def forget_for(self, engine: Engine) -> None:
        """Drop the records, which belong to the parent after a fork."""
        super().forget_for(engine)
        del self.left[:]
        self._on_fork()


class RecordCache(BaseRecordCache, LruCache[Any]):
    """The records of a collection, for threads."""

    def end(self, evicted: Sequence[tuple[Hashable, Any]]) -> list[Exception]:
        """End the sessions of records that have left the cache. Return the errors."""
        return self._end(evicted)


class Collection(BaseCollection[P, M]):
    """Merges messages into records by key; the keys without messages for the longest time go first.

    Made by `Process.collect`. A record that leaves the collection ends its session. The last
    process to end it runs the model's ``on_complete`` on the merged data of all processes. Several
    threads may call all methods. Keys leave in the order of a clock (second chance), which is close
    to the order of use and costs nothing for a message.

    Inside `Process.batch` all data is on the server when the block ends; outside of a block, when
    the method returns. Inside ``batch(durable=False)`` it stays here until the session ends.

    Example:
        >>> from phonon.fields import ID, Sum
        >>> class PageViews(Model, name="page_views"):
        ...     user: ID[str]
        ...     views: Sum[int] = Sum()
        ...     def on_complete(self):
        ...         print("write", self.user, self.views)
        >>> views = process.collect(PageViews, idle=30, longest=3600)
        >>> with process.batch():
        ...     for user in ("ada", "ada"):
        ...         views.add(user, views=1)
        >>> process.stop()  # ends all sessions
        write ada 2
    """

    def _make_cache(self, max_entries: int) -> RecordCache:
        return RecordCache(max_entries, self._build)

    def _build(self) -> None:
        super()._build()
        self.add = self._fold_one  # type: ignore[method-assign]  # a call less for each message

    def add(self, *values: P.args, **named: P.kwargs) -> None:
        """Merge a message into the record of its key.

        Args:
            values: The message's values, the ID first.
            named: The same values by name.

        Raises:
            InvalidMessageError: The model refuses the message. No part of it was merged.
            ConnectionLostError: The server does not answer. The data is kept and stored once, when
                the server is back: do not hand the message back to its broker.
            BacklogFullError: Too much work is unfinished; the message was not taken in.
            Exception: The error of ending an evicted record's session; the message was merged.
        """
        raise NotImplementedError  # each instance has a compiled one

    def add_many(self, rows: Iterable[Any]) -> list[Rejected]:
        """Merge many messages: dicts, dataclasses, msgspec structs or pydantic models.

        Args:
            rows: The messages.

        Returns:
            The messages that the model refuses, with their numbers. All others were merged.

        Raises:
            ConfigurationError: The argument is a single message.
            ConnectionLostError: The server does not answer; see `add`.
            Exception: As `add`.
        """
        self._check_rows(rows)
        self._wait_for_room()
        rejected: list[Rejected] = []
        if self._engine.batch is not None:
            self._rows(rows, 0, rejected)
            self._engine.check()
            return rejected
        for first, piece in self._pieces(rows, TOGETHER):
            with self._process.batch():
                self._rows(piece, first, rejected)
            # A signal handler that stops the process ends the block at this point.
            self._engine.check()
        return rejected

    def add_table(self, table: Any) -> list[Rejected]:
        """Merge the rows of a table, which has a column for each field.

        pyarrow (``pip install phonon[columns]``) groups and reduces the rows, so that there is one
        merge for each key.

        Args:
            table: A polars or pandas frame, an Arrow table or record batch, or anything else with
                the Arrow PyCapsule interface.

        Returns:
            The rows that the model refuses, with their numbers. All others were merged.

        Raises:
            ConfigurationError: pyarrow is not installed, or this is not a table.
            InvalidMessageError: The ID has no column, or the model does not have a column's field.
            ConnectionLostError: The server does not answer; see `add`.
            Exception: As `add`.
        """
        rows = self._rows_of(table)
        if rows.table is None:
            return self.add_many(rows.rows)
        self._wait_for_room()
        # Not inside another batch, which would become durable.
        with nullcontext() if self._engine.batch is not None else self._process.batch():
            evicted = self._put_table(rows)
            raise_together("ending sessions failed", self._cache.end(evicted))
        self._engine.check()
        return [Rejected(*each) for each in rows.rejected]

    def add_record(self, record: Any, arguments: Any = (), named: Any = None) -> None:
        """Merge a record of one message, with arguments for its ``on_complete``.

        Args:
            record: A record that you have made, as in ``PageViews("ada", views=1)``.
            arguments: The arguments of ``on_complete`` if this process completes the session; later
                ones replace earlier ones.
            named: The same arguments by name.

        Raises:
            InvalidMessageError: The model refuses the message. No part of it was merged.
            ConnectionLostError: The server does not answer; see `add`.
            Exception: As `add`.
        """
        self._folded_record(record, *check_arguments(arguments, named, ("arguments", "named")))

    def _rows(self, rows: Any, first: int, rejected: list[Rejected]) -> None:
        evicted = self._put_rows(rows, first, rejected)
        raise_together("ending sessions failed", self._cache.end(evicted))

    def read(self, key: Any) -> M | None:
        """Return the data that all processes have stored of a key in its open session.

        Returns:
            The record; None if no data is stored.
        """
        found: M | None = self._engine.run(self._reading(key))  # type: ignore[attr-defined]  # of threads
        return found

    def expire(self, key: Any) -> None:
        """End this process's session of a key.

        Raises:
            KeyError: The key is not in the collection.
            Exception: The error of ending the session.
        """
        self._cache.expire(key)

    def expire_all(self) -> None:
        """End all sessions of this process, many at a time.

        Raises:
            ExceptionGroup: The errors of ending some of them; the others have ended.
        """
        self._cache.expire_all()

    def _finish(self, record: Any, evicted: Sequence[tuple[Hashable, Any]], alone: bool) -> None:
        """Store a message outside of a batch, and end the sessions of records that it displaced."""
        errors: list[Exception] = []
        if alone:
            errors += errors_only(self._engine.run(self._storing(record)))  # type: ignore[attr-defined]  # of threads
        errors += self._cache.end(evicted)
        raise_together("not everything went well", errors)

    def _wait_for_room(self) -> None:
        if self._engine.outbox.full:
            self._engine.outbox.wait_for_room(self._process.BLOCKING_TIMEOUT)
