"""Many joins and partials in one exchange, for tasks."""

from typing import TYPE_CHECKING, Self

from phonon.aio.twin import call, leave
from phonon.batch import Batch

if TYPE_CHECKING:
    from types import TracebackType

    from phonon.engine import Engine


class AsyncBatch:
    """Collects what a task does with a process, and the tasks that it starts meanwhile.

    Made by `AsyncProcess.batch`.

    Args:
        engine: The process's.
        batch: What collects.
    """

    def __init__(self, engine: "Engine", batch: Batch) -> None:
        self._engine = engine
        self._sync = batch

    async def __aenter__(self) -> Self:
        await call(self._engine, self._sync.__enter__)
        return self

    async def __aexit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        await leave(error, call(self._engine, self._sync.__exit__, kind, error, traceback))
