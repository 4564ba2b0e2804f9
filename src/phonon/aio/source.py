"""Sources of messages, for tasks."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from phonon._core.engine import errors_only
from phonon.aio.batch import AsyncBatch
from phonon.batch import raise_together
from phonon.source import BaseMessages, BaseSource, offset_of

if TYPE_CHECKING:
    from phonon.aio.process import AsyncProcess

M = TypeVar("M")


class AsyncMessages(BaseMessages[M], AsyncBatch):
    """A batch of messages, stored together with its offsets or ids; see `phonon.source.Messages`.

    Loop over it with ``async for``, inside of its ``async with`` block.
    """

    async def __aiter__(self) -> AsyncIterator[M]:
        for message in self._messages:
            if self._is_full:
                await self._store_piece()
            if self._begin(message):
                yield message

    async def _store_piece(self) -> None:
        try:
            errors = await self._engine.run(self._piece())  # type: ignore[attr-defined]  # of tasks
        except BaseException:
            self._progress.failed()
            raise
        for error in errors:
            raise error


class AsyncSource(BaseSource):
    """An ordered source of messages that this process reads; see `phonon.source.Source`.

    Made by `AsyncProcess.source`.
    """

    _process: "AsyncProcess"

    def batch(
        self, messages: Iterable[M], offset: Callable[[M], int] | None = None
    ) -> AsyncMessages[M]:
        """Collect the data of messages, and store it with the source's position.

        See `phonon.source.Source.batch`.
        """
        return AsyncMessages(self._process.engine, self._progress(), messages, offset or offset_of)

    async def claim(self, position: int | None = None) -> None:
        """Claim the source again; see `phonon.source.Source.claim`."""
        engine = self._process.engine
        self._claim = await engine.run(engine.sources.claim(self.name, position))

    async def settle(self) -> None:
        """Store the source's position in all partitions; see `phonon.source.Source.settle`."""
        self._check()
        if not self._claim.is_behind:
            return
        engine = self._process.engine
        try:
            errors = await engine.run(engine.sources.move_on(self._claim))
        except BaseException:
            self._claim.in_doubt = True
            raise
        raise_together("not everything was stored", errors_only(errors))

    async def forget(self) -> None:
        """Delete the source's position, so that it is a new source when it is claimed again."""
        engine = self._process.engine
        await engine.run(engine.sources.drop(self._claim))
