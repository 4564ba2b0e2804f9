"""Locks and semaphores, for tasks."""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from phonon.aio.twin import call, leave, twin
from phonon.lock import Lock, Semaphore

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess


class AsyncLock:
    """Exclusive or shared access to a resource, across processes, threads and tasks.

    Made by `AsyncProcess.lock` or `AsyncReference.lock`; use it in an ``async with`` block. It is
    a `Lock` that belongs to a task where that one belongs to a thread.

    A task that is cancelled while it waits neither has the lock afterwards nor a place in line.
    `asyncio.wait_for` may run `acquire` in a task of its own, which then has the lock: use
    `asyncio.timeout`, or the argument ``timeout``.

    Args:
        process: Who wants it.
        lock_key: The resource, any text.
        block: Whether to wait if it is taken: `AsyncProcess.BLOCKING_TIMEOUT` seconds at the most.
        shared: Whether to share it with others who do.
        reentrant: Whether the task that has the lock may take it again.
        lease: Seconds that a grant lasts unless renewed. None: `AsyncProcess.TTL`.
        on_lost: Called, and awaited if it returns something to await, with this lock, once it is
            found to be lost.

    Raises:
        ConfigurationError: ``lease`` is not above 0.
    """

    def __init__(
        self,
        process: "AsyncProcess",
        lock_key: str,
        block: bool = True,
        *,
        shared: bool = False,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: "Callable[[AsyncLock], object] | None" = None,
    ) -> None:
        self._become(
            process,
            Lock(
                process.sync,
                lock_key,
                block,
                shared=shared,
                reentrant=reentrant,
                lease=lease,
                on_lost=self._telling(on_lost),
            ),
        )
        self.on_lost = on_lost

    def _become(self, process: "AsyncProcess", lock: Lock) -> None:
        self.process = process
        self._engine = process.engine
        self._sync = lock

    def _telling(
        self, on_lost: "Callable[[AsyncLock], object] | None"
    ) -> Callable[[Lock], object] | None:
        return None if on_lost is None else lambda _: on_lost(self)

    def __repr__(self) -> str:
        return repr(self._sync).replace("<phonon.", "<phonon.aio.Async", 1)

    @property
    def lock_key(self) -> str:
        """The resource."""
        return self._sync.lock_key

    @property
    def name(self) -> str:
        """The resource."""
        return self._sync.name

    @property
    def block(self) -> bool:
        """Whether to wait if it is taken."""
        return self._sync.block

    @property
    def shared(self) -> bool:
        """Whether to share it with others who do."""
        return self._sync.shared

    @property
    def reentrant(self) -> bool:
        """Whether the task that has the lock may take it again."""
        return self._sync.reentrant

    @property
    def lease(self) -> float:
        """Seconds that a grant lasts unless renewed."""
        return self._sync.lease

    @property
    def token(self) -> int | None:
        """The fencing token of the grant; see `Lock.token`."""
        return self._sync.token

    acquire = twin(Lock.acquire)
    release = twin(Lock.release)
    extend = twin(Lock.extend)
    reacquire = twin(Lock.reacquire)
    check = twin(Lock.check)
    locked = twin(Lock.locked)
    holders = twin(Lock.holders)
    waiters = twin(Lock.waiters)

    def owned(self) -> bool:
        """Whether this object holds the lock, without asking; see `Lock.owned`."""
        return self._sync.owned()

    async def __aenter__(self) -> Self:
        await call(self._engine, self._sync.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        releasing: Awaitable[Any] = call(self._engine, self._sync.__exit__, kind, error, traceback)
        await leave(error, releasing)


class AsyncSemaphore(AsyncLock):
    """A number of places, across processes, threads and tasks.

    Made by `AsyncProcess.semaphore`; see `Semaphore`.

    Args:
        process: Who wants a place.
        name: The semaphore's name, any text. It has nothing to do with a resource of that name.
        places: How many may hold it at the same time; the same for all who use it.
        block: Whether to wait if all places are taken.
        lease: Seconds that a place lasts unless renewed. None: `AsyncProcess.TTL`.
        on_lost: As of an `AsyncLock`.
    """

    def __init__(
        self,
        process: "AsyncProcess",
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: "Callable[[AsyncLock], object] | None" = None,
    ) -> None:
        telling = self._telling(on_lost)
        self._become(
            process, Semaphore(process.sync, name, places, block, lease=lease, on_lost=telling)
        )
        self.on_lost = on_lost
