"""Updates, for tasks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from phonon.aio.process import AsyncProcess
from phonon.aio.reference import AsyncReference
from phonon.aio.twin import twin
from phonon.errors import ConfigurationError
from phonon.update import HARD_SESSION, SOFT_SESSION, ConflictFreeUpdate, Update

if TYPE_CHECKING:
    from phonon.engine import Engine


class AsyncUpdate(Update):
    """What has become known about one record, to be merged and written once; see `Update`.

    Subclass it and override `merge`, which is an ordinary method, and ``async def execute``. The
    constructor does not wait for the server: `AsyncLruCache.set`, `cache` or `end_session` store
    the data. If the server does not answer then, or the call is cancelled, the process has the
    data and stores it, once, as soon as it can: call again with the same update to wait for that,
    and do not hand the message back to its broker. Inside `AsyncProcess.batch` the data is stored
    when the block ends.

    Its batches are executed by processes with an event loop. Another one that inherits such a
    batch leaves it to them.

    Args:
        process: The process it belongs to.
        _id: The record's key; with ``database`` and ``collection`` it names the resource.
        database: The name of the database, for your `execute`.
        collection: The name of the collection or table, for your `execute`.
        spec: What identifies the record, for your `execute`.
        doc: The data.
        init_cache: Whether to store the data on the server, so that it survives this process.
        block: Taken for compatibility; ending a session needs no lock.
        hard_session: Seconds after which the session is over although messages keep coming.
        soft_session: Seconds without a message after which the session is over.

    Raises:
        NotStorableError: A value has a type that cannot be stored.
        ConfigurationError: The process is not an `AsyncProcess`, or was not started.
    """

    is_async: ClassVar[bool] = True
    #: The argument ``init_cache``, as long as nothing has come of it.
    __init_cache: bool | None = None
    __reference: AsyncReference | None = None

    def __init__(
        self,
        process: AsyncProcess,
        _id: Any,
        database: str = "test",
        collection: str = "test",
        spec: Any = None,
        doc: Any = None,
        init_cache: bool = True,
        block: bool = True,
        hard_session: float = HARD_SESSION,
        soft_session: float = SOFT_SESSION,
    ) -> None:
        if not isinstance(process, AsyncProcess):
            raise ConfigurationError(
                f"{type(self).__qualname__} is an AsyncUpdate and needs an AsyncProcess, not "
                f"{process!r}"
            )
        super().__init__(
            process,  # type: ignore[arg-type]  # it has what is needed here: the engine
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

    def _open(self, engine: "Engine", *, init_cache: bool, keep: bool = False) -> None:
        if engine.batch is not None and not engine.backlog.full:
            super()._open(engine, init_cache=init_cache, keep=keep)
        else:
            self.__init_cache = init_cache

    @property
    def is_to_be_opened(self) -> bool:
        """Whether there is something that the constructor could not do."""
        return self.__init_cache is not None

    def open_now(self) -> None:
        """Do what the constructor would have done, had it been able to wait."""
        init_cache, self.__init_cache = self.__init_cache, None
        if init_cache is not None:
            try:
                super()._open(self._engine, init_cache=init_cache, keep=True)
            except BaseException:
                self.__init_cache = init_cache
                raise

    @property
    def _engine(self) -> "Engine":
        return super().process().engine

    @property
    def _sync(self) -> Self:
        return self

    # To override

    async def execute(self) -> None:
        """Write the merged record to the database; see `Update.execute`.

        It runs in a task of its own; `AsyncProcess` says how many do at a time. If the call that
        ended the session is cancelled, it goes on nevertheless: if it may take too long, limit
        that here.
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
        """Whether it has an `execute_many` of its own."""
        return cls.execute_many.__func__ is not AsyncUpdate.execute_many.__func__  # type: ignore[attr-defined]  # of classmethods

    # To use

    def process(self) -> AsyncProcess:  # type: ignore[override]  # its twin
        """The process that this update belongs to."""
        return super().process()  # type: ignore[return-value]

    @property
    def ref(self) -> AsyncReference:  # type: ignore[override]  # its twin
        """The reference to the record's resource."""
        if self.__reference is None:
            self.__reference = AsyncReference.to(self.process(), super().ref)
        return self.__reference

    cache = twin(Update.cache)  # type: ignore[assignment]  # to be awaited
    end_session = twin(Update.end_session)  # type: ignore[assignment]  # to be awaited

    async def force_expiry(self) -> None:  # type: ignore[override]  # to be awaited
        """Execute what has come together so far; see `Update.force_expiry`."""
        self.ref.force_expiry = True
        try:
            await self.end_session()
        finally:
            self.ref.force_expiry = False


class AsyncConflictFreeUpdate(AsyncUpdate):
    """An update whose numbers add up; see `ConflictFreeUpdate`."""

    merge = ConflictFreeUpdate.merge
