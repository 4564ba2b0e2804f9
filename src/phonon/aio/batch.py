"""Many joins and partials in one exchange, for tasks."""

from typing import TYPE_CHECKING, Self

from phonon._core.blocks import BlockEnd
from phonon._core.engine import errors_only
from phonon.aio.leaving import leave
from phonon.batch import BaseBatch, raise_together

if TYPE_CHECKING:
    from types import TracebackType


class AsyncBatch(BaseBatch):
    """Collects the actions of a task, and of the tasks that it starts meanwhile, with a process.

    Made by `AsyncProcess.batch`.

    Args:
        engine: The process's.
        durable: Whether to store the data of updates that are made with ``init_cache=False``.

    Example:
        >>> async with process.batch():
        ...     reference = await process.create_reference("import-42")
        >>> print(await reference.count())
        1
    """

    async def close(self) -> list[BaseException]:
        """Send everything, and stop collecting. Return the errors."""
        closing = self._closing()
        if closing is None:
            return []
        try:
            return list(await self._engine.run(closing.flow))  # type: ignore[attr-defined]  # of tasks
        except BaseException:
            closing.interrupted()
            raise

    async def _close(self) -> None:
        raise_together("not everything in the batch went well", errors_only(await self.close()))

    async def __aenter__(self) -> Self:
        self._open()
        return self

    @BlockEnd
    async def __aexit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        traceback: "TracebackType | None",
        *,
        block: bool = False,
    ) -> None:
        if not self._leaves(error, outermost=block):
            return
        try:
            await leave(error, self._close())
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and ending sessions from before the block failed: {failure}")
