"""References, for tasks."""

from collections.abc import Callable, Mapping, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from phonon.aio.lock import AsyncLock
from phonon.reference import BaseReference, Holder
from phonon.settings import check_arguments, check_callable

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess


class AsyncReference(BaseReference):
    """A process's membership in a resource; see `Reference`.

    Made by `AsyncProcess.create_reference`. To count tasks separately, give each task an
    `AsyncProcess`.

    Args:
        process: The process that is a member.
        resource: The name of the resource, any text.
        block: Whether `lock` waits by default.
        parties: The number of different processes that the session will have, if known. No process
            is the last one before so many have joined.

    Raises:
        ConfigurationError: An argument is invalid.
        ProcessStoppedError: The process was not started.

    Example:
        >>> reference = await process.create_reference("import-42")
        >>> await reference.dereference(callback=lambda: print("the last one publishes"))
        the last one publishes
        True
    """

    _package = "phonon.aio"
    _is_async = True
    _process: "AsyncProcess"

    def lock(
        self,
        block: bool | None = None,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncLock:
        """Return a lock on the resource, for an ``async with`` block; see `Reference.lock`."""
        return self._process.lock(
            self.resource_key,
            self.block if block is None else block,
            shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
            timeout=timeout,
        )

    async def count(self) -> int:
        """See `Reference.count`."""
        return int(await self._engine.run(self._count()))

    async def refresh_session(self) -> None:
        """See `Reference.refresh_session`."""
        await self._engine.run(self.joining())

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as `Reference`
        """See `Reference.wait`."""
        return bool(await self._engine.run(self._wait(timeout)))

    async def increment_times_modified(self) -> None:
        """See `Reference.increment_times_modified`."""
        await self._engine.run(self._increment())

    async def get_times_modified(self) -> int:
        """See `Reference.get_times_modified`."""
        return int(await self._engine.run(self._times_modified()))

    async def modified_by(self) -> dict[str, int]:
        """See `Reference.modified_by`."""
        found: dict[str, int] = await self._engine.run(self._modified_by())
        return found

    async def holders(self) -> list[Holder]:
        """See `Reference.holders`."""
        found: list[Holder] = await self._engine.run(self._holders())
        return found

    async def dereference(
        self,
        callback: Callable[..., Any] | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        block: bool | None = None,
    ) -> bool:
        """Leave the resource; see `Reference.dereference`.

        Args:
            callback: Called if this process is the last to leave. If it returns an awaitable, that
                is awaited.
            args: Positional arguments of the callback.
            kwargs: Keyword arguments of the callback.
            block: Whether to wait for the resource's lock. None: as given to the reference.
        """
        check_callable("callback", callback, is_async=True)
        given = check_arguments(args, kwargs)
        run = None if callback is None else _in_the_loop(callback, *given)
        return bool(await self._engine.run(self._dereference(run, block)))


def _in_the_loop(
    callback: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[], Any]:
    """Return a coroutine function that calls the callback, so that no thread runs it."""

    async def run() -> Any:
        result = callback(*args, **kwargs)
        return await result if isawaitable(result) else result

    run.__qualname__ = getattr(callback, "__qualname__", repr(callback))
    return run
