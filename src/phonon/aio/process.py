"""A process of an event loop."""

import asyncio
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from phonon import backlog
from phonon.aio.batch import AsyncBatch
from phonon.aio.lock import AsyncLock, AsyncSemaphore
from phonon.aio.reference import AsyncReference
from phonon.aio.twin import call, twin
from phonon.drivers import aio
from phonon.drivers.server import Durability
from phonon.errors import AlreadyLockedError, ConfigurationError, ProcessStoppedError
from phonon.process import Process, check_times
from phonon.protocol.updates import RetryPolicy
from phonon.reference import Reference
from phonon.serializers import Serializer
from phonon.tasks import Places, Tasks, run

if TYPE_CHECKING:
    from phonon.engine import Engine

_started: "weakref.WeakSet[_Inner]" = weakref.WeakSet()


class _Inner(Process):
    """The process itself, whose code runs in the tasks that call its twin.

    Args:
        public: The twin.
        max_concurrent: How many ``execute`` run at the same time.
        options: As of a `Process`.
    """

    def __init__(
        self, public: "AsyncProcess", max_concurrent: int, options: dict[str, Any]
    ) -> None:
        self._public = weakref.ref(public)
        self._runtime: Tasks = Tasks()
        self._kit = aio.kit(self._runtime)
        # A subclass of the twin may set them.
        for name in ("TTL", "RETRY_SLEEP", "BLOCKING_TIMEOUT"):
            setattr(self, name, getattr(public, name))
        super().__init__(
            **options, executor=cast("Executor", Places(self._runtime, max_concurrent))
        )

    def __repr__(self) -> str:
        return super().__repr__().replace("<phonon.", "<phonon.aio.Async", 1)

    @property
    def public(self) -> Any:
        """The twin."""
        return self._public() or self

    def _enlist(self) -> None:
        _started.add(self)

    def begin_after_fork(self) -> None:
        """The child has no event loop to go on with: what is here is the parent's."""
        self.engine.lease.server.forget_connections()
        self._runtime.forked = True
        self.engine.abandon()


class AsyncProcess:
    """One participant, for programs with an event loop; see `Process`.

    Use it in an ``async with`` block, or await `start` and `stop`. It belongs to the event loop in
    which it was started: its heartbeat, and all else that it does in the background, are tasks of
    that loop, which end with `stop`. Other processes, of this program or others, with or without
    an event loop, may use the same resources.

    A call that is cancelled is as safe as one whose answer was lost: what has to be carried on is
    carried on in the background. After ``os.fork`` the child cannot use it.

    Args:
        session_length: As of a `Process`, as are the next ones.
        host: The server's host.
        port: The server's port.
        db: The server's database.
        heartbeat_interval: Seconds between two heartbeats. Code that keeps the event loop from
            running for four of them makes others believe that this process is dead.
        recover_failed_processes: Whether this process takes over what dead ones have left.
        hosts: Nodes of a cluster, ``"host:port"`` each, instead of ``host`` and ``port``.
        url: Where the server is, instead of those.
        client: A ``redis.asyncio.Redis`` or ``redis.asyncio.RedisCluster`` of the same event loop
            to use, instead of those.
        namespace: Processes of different namespaces do not see each other. Any text.
        serializer: How partials are encoded; the same in all processes.
        retry: What happens to a batch whose ``execute`` fails.
        retry_timeout: Seconds to go on repeating a call that is not answered, 30 at the most.
        durability: What a server must have done with data before a call that stores it returns.
        on_error: Called with every error that there is no caller to raise it to, and awaited if
            it returns something to await.
        max_concurrent: How many ``execute`` run at the same time, each in a task of its own. A
            resource's batches stay in order.
        max_backlog: How much may be left undone, because ``execute`` fails or the server does not
            answer, before no new updates are taken in.
        overflow: Whether `AsyncLruCache.set` then waits for room, for `BLOCKING_TIMEOUT` at the
            most (``"block"``), or raises a `BacklogFullError` at once (``"raise"``).

    Raises:
        ConfigurationError: An argument cannot be meant.
    """

    AlreadyLocked: ClassVar = AlreadyLockedError
    Lock: ClassVar = AsyncLock
    #: How long a lock lasts unless renewed, seconds. The heartbeat renews it.
    TTL: ClassVar[float] = Process.TTL
    #: Seconds between two attempts to reach a server that does not answer, at the most.
    RETRY_SLEEP: ClassVar[float] = Process.RETRY_SLEEP
    #: Seconds to wait at the most, for a lock or for room in the backlog.
    BLOCKING_TIMEOUT: ClassVar[float] = Process.BLOCKING_TIMEOUT

    def __init__(
        self,
        session_length: float = 900,
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
        serializer: Serializer | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
        retry_timeout: float = 15.0,
        durability: Durability | None = None,
        on_error: Callable[[Exception], object] | None = None,
        max_concurrent: int = 10,
        max_backlog: int = 100_000,
        overflow: backlog.Overflow = "block",
    ) -> None:
        check_times(session_length, heartbeat_interval, retry_timeout, self.TTL)
        backlog.check(max_backlog, overflow)
        if max_concurrent < 1:
            raise ConfigurationError(f"max_concurrent is 1 at the least, not {max_concurrent!r}")
        self.session_length = session_length
        self.heartbeat_interval = heartbeat_interval
        self.recover_failed_processes = recover_failed_processes
        self.max_concurrent = max_concurrent
        self.namespace = namespace
        self._options: dict[str, Any] = {
            "session_length": session_length,
            "host": host,
            "port": port,
            "db": db,
            "heartbeat_interval": heartbeat_interval,
            "recover_failed_processes": recover_failed_processes,
            "hosts": hosts,
            "url": url,
            "client": client,
            "namespace": namespace,
            "serializer": serializer,
            "retry": retry,
            "retry_timeout": retry_timeout,
            "durability": durability,
            "on_error": on_error,
            "max_backlog": max_backlog,
            "overflow": overflow,
        }
        self._starting = asyncio.Lock()
        self._inner: _Inner | None = None

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """A process that uses the server of a URL.

        Args:
            url: See the constructor.
            options: The constructor's other arguments.
        """
        return cls(url=url, **options)

    def __repr__(self) -> str:
        if self._inner is None:
            return "<phonon.aio.AsyncProcess, not started>"
        return repr(self._inner)

    async def start(self) -> Self:
        """Connect, and begin to beat. A second call does nothing.

        Raises:
            ConfigurationError: An argument cannot be meant.
            ServerUnreachableError: There is no server. Phonon never looks for another one.
            ServerError: The server cannot be used: too old, wrong password.
        """
        async with self._starting:
            if self._inner is None:
                self._inner = await run(_Inner, self, self.max_concurrent, self._options)
        return self

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
    def sync(self) -> Process:
        """What runs the code; its methods cannot be called by anybody but the twins.

        Raises:
            ProcessStoppedError: The process was not started.
        """
        if self._inner is None:
            raise ProcessStoppedError(
                "this AsyncProcess was not started: use it in an async with block, or await start()"
            )
        return self._inner

    @functools.cached_property  # it is asked for with every update
    def engine(self) -> "Engine":
        """Its machinery."""
        return self.sync.engine

    @property
    def _sync(self) -> Process:
        return self.sync

    @property
    def _engine(self) -> "Engine":
        return self.engine

    @property
    def id(self) -> str:
        """The process's identity, unique for ever."""
        return self.sync.id

    @property
    def client(self) -> Any:
        """The client of redis.asyncio whose connections are used."""
        return self.sync.client.real

    @property
    def registry_key(self) -> str:
        """The key of the sorted set of resources that this process may be responsible for."""
        return self.sync.registry_key

    @property
    def heartbeat_hash_name(self) -> str:
        """The key of the sorted set of all processes, by the end of their lives unless renewed."""
        return self.sync.heartbeat_hash_name

    async def create_reference(
        self, resource: str, block: bool = True, parties: int | None = None
    ) -> AsyncReference:
        """Become a member of a resource; see `Process.create_reference`."""
        reference: Reference = await call(
            self.engine, self.sync.create_reference, resource, block, parties
        )
        return AsyncReference.to(self, reference)

    def lock(
        self,
        lock_key: str,
        block: bool = True,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
    ) -> AsyncLock:
        """A lock on a resource, for an ``async with`` block; see `Process.lock`."""
        return AsyncLock(
            self,
            lock_key,
            block,
            shared=shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
        )

    def semaphore(
        self,
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
    ) -> AsyncSemaphore:
        """A semaphore, for an ``async with`` block; see `Process.semaphore`."""
        return AsyncSemaphore(self, name, places, block, lease=lease, on_lost=on_lost)

    def batch(self, *, durable: bool = True) -> AsyncBatch:
        """Collect what this task does, and the tasks that it starts, and send it together.

        It is sent when the ``async with`` block ends; see `Process.batch`. Tasks that are started
        in the block and outlive it send by themselves what they do afterwards.

        Args:
            durable: Whether updates made with ``init_cache=False`` are stored as well.
        """
        return AsyncBatch(self.engine, self.sync.batch(durable=durable))

    flush = twin(Process.flush)
    add_to_registry = twin(Process.add_to_registry)
    remove_from_registry = twin(Process.remove_from_registry)
    get_registry = twin(Process.get_registry)
    parked = twin(Process.parked)
    look = twin(Process.look)
    replay = twin(Process.replay)
    discard = twin(Process.discard)
    stop = twin(Process.stop)


def _after_fork_in_child() -> None:
    for process in list(_started):
        process.begin_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
