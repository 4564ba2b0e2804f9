"""Locks and semaphores, for tasks."""

import functools
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from phonon.aio.leaving import leave
from phonon.lock import BaseLock, BaseSemaphore, LockHolder

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess

P = ParamSpec("P")
R = TypeVar("R")


class AsyncLock(BaseLock):
    """Exclusive or shared access to a resource, across processes, threads and tasks.

    Made by `AsyncProcess.lock` or `AsyncReference.lock`; use it in an ``async with`` block. It is
    like a `Lock`, but its holder is a task and not a thread.

    A task that is cancelled while it waits has neither the lock nor a place in the queue
    afterwards. `asyncio.wait_for` may run `acquire` in another task, which would then hold the
    lock: use `asyncio.timeout`, or the argument ``timeout``.

    Args:
        process: The process that wants the lock.
        lock_key: The resource, any text.
        block: Whether to wait if it is taken: `AsyncProcess.BLOCKING_TIMEOUT` seconds at the most.
        shared: Whether to share the lock with other shared holders.
        reentrant: Whether the task that has the lock may take it again.
        lease: Seconds that a grant lasts unless renewed. None: as long as the process's lease.
        on_lost: Called, and awaited if it returns something to await, with this lock, once it is
            found to be lost.
        timeout: Seconds to wait at the most, unless `acquire` is given another number.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> async with process.lock("report") as lock:
        ...     print("a fencing token:", lock.token > 0)
        a fencing token: True
    """

    _package = "phonon.aio"
    _is_async = True
    process: "AsyncProcess"

    def _check_process(self) -> None:
        # The process may not be started yet: a decorator is applied when the module is imported.
        if getattr(self.process, "_engine", self) is not None:
            super()._check_process()

    def __call__(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate a coroutine function: each call takes the lock, and releases it.

        The process may be started later.

        Raises:
            ConfigurationError: The function is not a coroutine function.
        """
        self._check_decorated(function)

        @functools.wraps(function)
        async def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            async with self:
                return await function(*args, **kwargs)

        return locked

    async def acquire(
        self,
        block: bool | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the locks of others have it
        *,
        blocking: bool | None = None,
        blocking_timeout: float | None = None,
    ) -> bool:
        """See `Lock.acquire`."""
        flow = self._acquire(block, timeout, blocking, blocking_timeout)
        return bool(await self._engine.run(flow))

    async def release(self) -> None:
        """See `Lock.release`."""
        await self._engine.run(self.releasing())

    async def extend(self, additional_time: float | None = None, replace_ttl: bool = False) -> bool:
        """See `Lock.extend`."""
        return bool(await self._engine.run(self._extend(additional_time, replace_ttl=replace_ttl)))

    async def reacquire(self) -> bool:
        """See `Lock.reacquire`."""
        return await self.extend()

    async def check(self) -> None:
        """See `Lock.check`."""
        await self._engine.run(self._check())

    async def locked(self) -> bool:
        """See `Lock.locked`."""
        return bool(await self._engine.run(self._locked()))

    async def holders(self) -> list[LockHolder]:
        """See `Lock.holders`."""
        found: list[LockHolder] = await self._engine.run(self._holders())
        return found

    async def waiters(self) -> list[LockHolder]:
        """See `Lock.waiters`."""
        found: list[LockHolder] = await self._engine.run(self._waiters())
        return found

    async def __aenter__(self) -> "HeldAsyncLock":
        await self._engine.run(self.entering())
        return cast("HeldAsyncLock", self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await leave(error, self.release())
        except Exception as lost:
            if error is None:
                raise
            # The body's own exception is the one to see.
            error.add_note(f"phonon: {lost}")


if TYPE_CHECKING:

    class HeldAsyncLock(AsyncLock):
        """The type of a lock inside its ``async with`` block, where its token is never None."""

        @property
        def token(self) -> int:
            """The fencing token of the grant."""


class AsyncSemaphore(BaseSemaphore, AsyncLock):
    """A number of places, across processes, threads and tasks.

    Made by `AsyncProcess.semaphore`; see `Semaphore`.

    Args:
        process: The process that wants a place.
        name: The semaphore's name, any text. A resource of the same name is independent of it.
        places: The number of places; all processes must name the same number.
        block: Whether to wait if all places are taken.
        lease: Seconds that a place lasts unless renewed. None: as long as the process's lease.
        on_lost: As for an `AsyncLock`.
        timeout: As for an `AsyncLock`.

    Example:
        >>> async with process.semaphore("connections", 10) as place:
        ...     print(place.owned())
        True
    """
