"""A process of an event loop."""

import asyncio
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self, TypeVar, overload

from phonon import _lifetime
from phonon._core.dead_letters import Parked
from phonon._core.engine import ProcessOptions, TaskEngine, errors_only
from phonon._core.flows import Flow
from phonon._protocol import library
from phonon._transport import async_io, connect
from phonon._transport.asyncio import AsyncDriver
from phonon._transport.connect import SharedConnection
from phonon.aio.batch import AsyncBatch
from phonon.aio.collection import AsyncCollection
from phonon.aio.lock import AsyncLock, AsyncSemaphore
from phonon.aio.reference import AsyncReference
from phonon.aio.source import AsyncMessages, AsyncSource
from phonon.batch import raise_together
from phonon.errors import ProcessStoppedError
from phonon.process import SESSION_LENGTH, BaseProcess, make_codec, url_first
from phonon.serializers import ExactSerializer, Serializer
from phonon.settings import (
    Durability,
    Overflow,
    RetryPolicy,
    check_count,
    check_flag,
    check_name,
    check_position,
    check_process,
    url_of,
)
from phonon.source import WINDOW, id_of, unordered

if TYPE_CHECKING:
    from phonon.aio.update import AsyncUpdate

P = ParamSpec("P")
M = TypeVar("M")


class AsyncProcess(BaseProcess):
    """A process for programs with an event loop; see `Process`.

    Use it in an ``async with`` block, or await `start` and `stop`. It belongs to the event loop in
    which it was started: its heartbeat and its other background work are tasks of that loop, which
    end with `stop`. Other processes, of this program or others, with or without an event loop, may
    use the same resources.

    A call that is cancelled is as safe as one whose answer was lost: it is finished in the
    background. After ``os.fork`` the child cannot use it.

    Args:
        session_length: As for a `Process`, like the next ones.
        host: The server's host.
        port: The server's port.
        db: The server's database.
        heartbeat_interval: Seconds between two heartbeats. Code that blocks the event loop for four
            of them makes others declare this process dead.
        recover_failed_processes: Whether this process executes the batches of dead ones.
        hosts: Nodes of a cluster, ``"host:port"`` each, instead of ``host`` and ``port``.
        url: The server's URL, instead of those.
        client: A ``redis.asyncio.Redis`` or ``redis.asyncio.RedisCluster`` of the same event loop
            to use, instead of those.
        namespace: Processes of different namespaces do not see each other. Any text.
        partitions: The number of partitions, if this is the namespace's first process.
        serializer: Encodes partials; the same in all processes.
        retry: The times at which a batch whose ``execute`` fails is tried again, or parked.
        retry_timeout: Seconds to go on repeating a call that is not answered, before its caller
            gets a `ConnectionLostError`.
        durability: The confirmation that a call which stores data waits for.
        on_error: Called with every background error. If it returns an awaitable, that is awaited.
        max_concurrent: The most ``execute`` calls at the same time, each in a task of its own. A
            resource's batches stay in order.
        max_backlog: The most unfinished sessions and calls with which new updates are taken in.
            Work is unfinished if ``execute`` fails or the server does not answer.
        overflow: Whether `AsyncLruCache.set` then waits for room, for `BLOCKING_TIMEOUT` at the
            most (``"block"``), or raises a `BacklogFullError` at once (``"raise"``).

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> async with AsyncProcess() as process:
        ...     reference = await process.create_reference("import-42")
        ...     print(await reference.count())
        1
    """

    Lock: ClassVar = AsyncLock

    def __init__(
        self,
        session_length: float | str = SESSION_LENGTH,
        host: str = "localhost",
        port: int = 6379,
        db: int = 1,
        heartbeat_interval: float = 10,
        recover_failed_processes: bool = True,
        *,
        hosts: Sequence[str] | None = None,
        url: str | None = None,
        client: Any = None,
        namespace: str = "phonon",
        partitions: int | None = None,
        serializer: Serializer | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
        retry_timeout: float = 15.0,
        durability: Durability | None = None,
        on_error: Callable[[Exception], object] | None = None,
        max_concurrent: int = 10,
        max_backlog: int = 100_000,
        overflow: Overflow = "block",
    ) -> None:
        length, url = url_first(session_length, url)
        check_process(
            session_length=length,
            heartbeat_interval=heartbeat_interval,
            retry_timeout=retry_timeout,
            namespace=namespace,
            partitions=partitions,
            serializer=serializer,
            retry=retry,
            durability=durability,
            on_error=on_error,
            max_backlog=max_backlog,
            overflow=overflow,
            is_async=True,
        )
        check_count("max_concurrent", max_concurrent)
        self.session_length = length
        self.heartbeat_interval = heartbeat_interval
        self.recover_failed_processes = check_flag(
            "recover_failed_processes", recover_failed_processes
        )
        self.max_concurrent = max_concurrent
        self.namespace = namespace
        self._url = url_of(url, hosts, client, (host, port, db))
        self._client = client
        self._serializer = serializer or ExactSerializer()
        self._on_error = on_error
        self._retry_timeout = retry_timeout
        self._durability = durability
        self._options = ProcessOptions(
            namespace,
            partitions,
            heartbeat_interval,
            self.recover_failed_processes,
            retry,
            max_backlog,
            overflow,
        )
        self._starting = asyncio.Lock()
        self._connection: SharedConnection | None = None
        self._engine: TaskEngine | None = None

    def __repr__(self) -> str:
        if self._engine is None:
            return "<phonon.aio.AsyncProcess, not started>"
        return f"<phonon.aio.AsyncProcess {self.id} at {self._engine.address}>"

    # Life

    async def start(self) -> Self:
        """Connect, and start the heartbeat. A second call does nothing.

        Raises:
            ConfigurationError: An argument is invalid.
            ServerUnreachableError: There is no server at that address.
            ServerError: The server cannot be used: too old, wrong password.
        """
        async with self._starting:
            if self._engine is None:
                connection = await self._connect()
                try:
                    self._engine = await self._started(connection)
                except BaseException:
                    await async_io.run(connection.close())
                    raise
                self._connection = connection
                _lifetime.tell_of_forks(self)
        return self

    async def _connect(self) -> SharedConnection:
        return await async_io.run(
            connect.connect(
                self._url,
                self._client,
                library.default(),
                async_io.backend(asyncio.get_running_loop()),
                longest_pause=self.RETRY_SLEEP,
                durability=self._durability,
            )
        )

    async def _started(self, connection: SharedConnection) -> TaskEngine:
        server, functions = connection.server, library.default()
        engine = TaskEngine(
            self._options,
            weakref.ref(self),
            functions,
            lambda identity: AsyncDriver(
                server,
                functions,
                identity,
                retry_timeout=self._retry_timeout,
                max_concurrent=self.max_concurrent,
            ),
            lambda engine: make_codec(engine, self._serializer, is_async=True),
            on_error=self._on_error,
            address=server.address,
            client=connection.client,
        )
        try:
            await engine.start()
        except BaseException:
            engine.close()
            await engine.driver.close()
            raise
        return engine

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and stopping the process failed: {failure}")

    @property
    def engine(self) -> TaskEngine:
        """The process's parts, which are private.

        Raises:
            ProcessStoppedError: The process was not started.
        """
        if self._engine is None:
            raise ProcessStoppedError(
                "this AsyncProcess was not started: use it in an async with block, or await start()"
            )
        return self._engine

    async def stop(self) -> None:
        """See `Process.stop`."""
        if self._starting.locked() and self.engine.is_worker:
            return  # an on_error calls this while another task stops the process and waits for it
        async with self._starting:
            engine = self.engine
            if engine.stopped:
                return
            engine.driver.check()  # another loop, or a forked child, must not stop this process
            errors: list[BaseException] = []
            try:
                batch = engine.batch
                if batch is not None:
                    errors += await batch.close()
                errors += await engine.stop()
            finally:
                engine.close()
                if self._connection is not None:
                    await async_io.run(self._connection.close())
        raise_together("stopping left something undone", errors_only(errors))

    def begin_after_fork(self) -> None:
        """Disable the child's copy: it has no event loop, and refuses every call."""
        self.engine.after_fork_in_child()

        # Objects of the process

    async def create_reference(
        self, resource: str, block: bool = True, parties: int | None = None
    ) -> AsyncReference:
        """Join a resource, and return a reference to it; see `Process.create_reference`."""
        reference = AsyncReference(self, resource, block, parties)
        if not self._joins_in_a_batch(reference):
            await self.engine.run(reference.joining())
        return reference

    def lock(
        self,
        lock_key: str,
        block: bool = True,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncLock:
        """Return a lock on a resource, for an ``async with`` block; see `Process.lock`."""
        return AsyncLock(
            self,
            lock_key,
            block,
            shared=shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
            timeout=timeout,
        )

    def semaphore(
        self,
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncSemaphore:
        """Return a semaphore, for an ``async with`` block; see `Process.semaphore`."""
        return AsyncSemaphore(
            self, name, places, block, lease=lease, on_lost=on_lost, timeout=timeout
        )

    async def source(self, name: str, position: int | None = None) -> AsyncSource:
        """Claim an ordered source of messages; see `Process.source`."""
        check_position(position)
        flow = self.engine.sources.claim(check_name("name", name), position)
        return AsyncSource(self, await self.engine.run(flow))

    def collect(
        self,
        model: Callable[P, M],
        max_entries: int = 10_000,
        *,
        idle: float | None = None,
        longest: float | None = None,
        largest: int | None = None,
        ignore_unknown: bool = False,
        sink: Any = None,
    ) -> AsyncCollection[P, M]:
        """Return a collection, which merges messages into a model's records; see `Process.collect`.

        Args:
            model: A subclass of `Model`.
            max_entries: The number of keys to keep in this process at the most.
            idle: Seconds without a message after which this process leaves a key's session.
            longest: Seconds after which it ends the session although messages keep coming.
            largest: The number of messages from this process after which it ends the session.
            ignore_unknown: Whether to ignore a message's fields that the model does not have.
            sink: The sink to write records to, in place of the model's ``on_complete``.

        Raises:
            ConfigurationError: An argument is invalid, or the model never completes.
            ProcessStoppedError: The process was not started.
        """
        return AsyncCollection(
            self,
            model,
            max_entries,
            idle=idle,
            longest=longest,
            largest=largest,
            ignore_unknown=ignore_unknown,
            sink=sink,
        )

    @overload
    def batch(self, *, durable: bool = True) -> AsyncBatch: ...

    @overload
    def batch(
        self,
        messages: Iterable[M],
        *,
        dedupe: str,
        message_id: Callable[[M], Any] | None = None,
        window: float = WINDOW,
    ) -> AsyncMessages[M]: ...

    def batch(
        self,
        messages: Iterable[Any] = (),
        *,
        durable: bool = True,
        dedupe: str | None = None,
        message_id: Callable[[Any], Any] | None = None,
        window: float = WINDOW,
    ) -> AsyncBatch:
        """Collect the calls of this task and of the tasks that it starts, and send them together.

        They are sent when the ``async with`` block ends; see `Process.batch`. Tasks that are
        started in the block and outlive it send their later calls by themselves.

        Args:
            durable: Whether updates made with ``init_cache=False`` are stored as well.
            messages: With ``dedupe``: the messages, for ``async for``.
            dedupe: The scope of the messages' ids.
            message_id: Returns a message's id.
            window: Seconds for which ids are remembered on the server.
        """
        if (dedupe, messages, message_id, window) != (None, (), None, WINDOW):
            progress = unordered(self.engine, dedupe, window)
            mark = id_of if message_id is None else message_id
            return AsyncMessages(self.engine, progress, messages, mark)
        batch: AsyncBatch | None = self.engine.batch
        if batch is None:
            return AsyncBatch(self.engine, durable=check_flag("durable", durable))
        batch.durable |= check_flag("durable", durable)
        return batch

    async def flush(self) -> None:
        """See `Process.flush`."""
        raise_together("not everything could be stored", await self._errors(self._flush()))

    async def add_to_registry(self, resource: str, registry_key: str | None = None) -> int:
        """See `Process.add_to_registry`."""
        return int(await self.engine.run(self._track(resource, registry_key, there=True)))

    async def remove_from_registry(self, resource: str, registry_key: str | None = None) -> int:
        """See `Process.remove_from_registry`."""
        return int(await self.engine.run(self._track(resource, registry_key, there=False)))

    async def get_registry(self, registry_key: str | None = None) -> list[str]:
        """See `Process.get_registry`."""
        found: list[str] = await self.engine.run(self._registry(registry_key))
        return found

    async def parked(self) -> list[Parked]:
        """See `Process.parked`."""
        found: list[Parked] = await self.engine.run(self._dead_letters.find())
        return found

    async def look(self, resource: str, token: int) -> list["AsyncUpdate"]:
        """See `Process.look`."""
        found: list[AsyncUpdate] = await self.engine.run(self._look(resource, token))
        return found

    async def replay(self, resource: str, token: int) -> None:
        """See `Process.replay`."""
        errors = await self._errors(self._replay(resource, token))
        raise_together("the batch failed again", errors)

    async def discard(self, resource: str, token: int) -> None:
        """See `Process.discard`."""
        await self.engine.run(self._discard(resource, token))

    async def _errors(self, flow: Flow[Sequence[BaseException]]) -> list[Exception]:
        return errors_only(await self.engine.run(flow))
