"""Updates, for tasks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from phonon._core.detached import DetachedEngine
from phonon._core.flows import EXECUTING, Flow, Sleep
from phonon._core.local import DEFAULT, HARD_SESSION, SOFT_SESSION
from phonon.aio.reference import AsyncReference
from phonon.errors import ConfigurationError
from phonon.update import Update, add_up, raise_first

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess

#: Seconds between two checks for room for a new update.
_LOOK = 0.02


class AsyncUpdate(Update):
    """Data about one record, merged wherever it arrives and written once; see `Update`.

    Subclass it and override `merge`, which is an ordinary method, and ``async def execute``. The
    constructor does not wait for the server: `AsyncLruCache.set`, `cache` or `end_session` store
    the data. If the server does not answer such a call, or the call is cancelled, the process keeps
    the data and stores it, once, as soon as it can: call again with the same update to wait for
    that, and do not hand the message back to its broker. Inside `AsyncProcess.batch` the data is
    stored when the block ends.

    Processes with an event loop execute its batches. A process without an event loop that takes
    over such a batch leaves it to them.

    Args:
        process: The process it belongs to. None, for a unit test of `merge` and `execute`.
        _id: The record's key; with ``database`` and ``collection`` it names the resource.
        database: The name of the database, for your `execute`.
        collection: The name of the collection or table, for your `execute`.
        spec: The identification of the record, for your `execute`. The update has a copy.
        doc: The data. The update has a copy.
        init_cache: Whether to store the data on the server, so that it survives this process.
        block: Taken for compatibility; ending a session needs no lock.
        hard_session: Seconds after which the session is over although messages keep coming.
        soft_session: Seconds without a message after which the session is over.

    Raises:
        NotStorableError: A value has a type that cannot be stored.
        ConfigurationError: The process is not an `AsyncProcess`, or an argument is invalid.
        ProcessStoppedError: The process was not started.

    Example:
        >>> class Visits(AsyncUpdate):
        ...     def merge(self, other):
        ...         self.doc["n"] += other.doc["n"]
        ...     async def execute(self):
        ...         print("write", self._id, self.doc["n"])
        >>> cache = AsyncLruCache(max_entries=1000)
        >>> for user in ("ada", "ada"):
        ...     await cache.set(user, Visits(process, user, doc={"n": 1}))
        True
        False
        >>> await cache.expire_all()
        write ada 2
    """

    is_async: ClassVar[bool] = True
    #: The argument ``init_cache``, until the constructor's work is done.
    _init_cache_: bool | None = None

    def __init__(
        self,
        process: "AsyncProcess | None",
        _id: Any,
        database: str = DEFAULT,
        collection: str = DEFAULT,
        spec: Any = None,
        doc: Any = None,
        init_cache: bool = True,
        block: bool = True,
        hard_session: float = HARD_SESSION,
        soft_session: float = SOFT_SESSION,
    ) -> None:
        super().__init__(
            process,  # type: ignore[arg-type]  # its twin
            _id,
            database,
            collection,
            spec,
            doc,
            init_cache,
            block,
            hard_session,
            soft_session,
        )

    def _begin_(self, engine: Any, *, init_cache: bool) -> None:
        if not engine.is_async:
            raise self._in_wrong_process_()
        if type(engine) is DetachedEngine:
            return
        if engine.outbox.full or not self._is_left_to_others_(engine, init_cache=init_cache):
            self._init_cache_ = init_cache

    @property
    def is_to_be_opened(self) -> bool:
        """Return whether the constructor left work that has to wait."""
        return self._init_cache_ is not None

    async def open_now(self) -> None:
        """Do the part of the constructor that has to wait."""
        init_cache = self._init_cache_
        if init_cache is None:
            return
        engine = self._own_engine_()
        if engine.outbox.full:
            await engine.run(self._waiting_for_room_(engine))
        if self._init_cache_ is None or self._is_left_to_others_(engine, init_cache=init_cache):
            self._init_cache_ = None
            return
        if init_cache:
            raise_first(await engine.run(self.storing(engine)))
        else:
            await engine.run(engine.members.join(self.resource_id))
        self._init_cache_ = None
        self._open_(engine)

    def _waiting_for_room_(self, engine: Any) -> Flow[None]:
        outbox, clock = engine.outbox, engine.identity.clock
        deadline = clock() + self._process_.BLOCKING_TIMEOUT
        while outbox.full and not EXECUTING.get():
            if not outbox.blocks or clock() >= deadline:
                raise outbox.refusal()
            yield Sleep(_LOOK)

    def _check_loop_(self, engine: Any) -> None:
        del engine
        raise ConfigurationError(
            f"{type(self).__qualname__} belongs to an AsyncProcess and this cannot be called from "
            "here: await the method of its asyncio twin, phonon.aio.AsyncUpdate"
        )

    # To override

    async def execute(self) -> None:
        """Write the merged record to the database; see `Update.execute`.

        It runs in a separate task; `AsyncProcess(max_concurrent=)` limits the number of these
        tasks. If the call that ended the session is cancelled, `execute` goes on nevertheless: if
        it may take too long, limit its time inside it.
        """
        if not self.executes_many():
            raise NotImplementedError(f"{type(self).__qualname__} must define execute()")
        for _, error in await self.execute_many([self]) or ():
            raise error

    @classmethod
    async def execute_many(cls, updates: Sequence[Self]) -> Iterable[tuple[Self, Exception]] | None:
        """Write many merged records at once, if it is overridden; see `Update.execute_many`."""
        raise NotImplementedError(f"{cls.__qualname__} must define execute() or execute_many()")

    @classmethod
    def executes_many(cls) -> bool:
        """Return whether the class has an `execute_many` of its own."""
        return cls.execute_many.__func__ is not AsyncUpdate.execute_many.__func__  # type: ignore[attr-defined]  # of classmethods

    # To use

    def process(self) -> "AsyncProcess":  # type: ignore[override]  # its twin
        """Return the process that this update belongs to."""
        process: AsyncProcess = self._process_
        return process

    @property
    def ref(self) -> AsyncReference:  # type: ignore[override]  # its twin
        """The reference to the record's resource."""
        if self._ref_ is None:
            self._ref_ = AsyncReference(self._process_, self.resource_id, self.block)
        reference: AsyncReference = self._ref_
        return reference

    async def cache(self) -> None:  # type: ignore[override]  # to be awaited
        """See `Update.cache`."""
        engine = self._own_engine_()
        engine.ensure_alive()
        batch = engine.batch
        if batch is not None:
            batch.keep(self)
            batch.add(self)
        else:
            raise_first(await engine.run(self.storing(engine)))
        self._init_cache_ = None

    async def end_session(self, block: bool = True) -> None:  # type: ignore[override]  # to be awaited
        """See `Update.end_session`."""
        del block
        engine = self._own_engine_()
        engine.ensure_alive()
        batch = engine.batch
        self._init_cache_ = None
        if batch is not None:
            batch.end(self)
            return
        try:
            errors = await engine.run(self.ending(engine))
        finally:
            self._renew_()
        raise_first(errors)

    async def force_expiry(self) -> None:  # type: ignore[override]  # to be awaited
        """See `Update.force_expiry`."""
        self.ref.force_expiry = True
        try:
            await self.end_session()
        finally:
            self.ref.force_expiry = False


class AsyncConflictFreeUpdate(AsyncUpdate):
    """An update whose numbers add up; see `ConflictFreeUpdate`.

    Example:
        >>> class Views(AsyncConflictFreeUpdate):
        ...     async def execute(self):
        ...         print("write", self._id, self.doc)
        >>> await Views(process, "/home", doc={"views": 1}).end_session()
        write /home {'views': 1}
    """

    def merge(self, other: Any) -> None:
        """Add up the numbers of two docs."""
        add_up(self, other)
