"""What makes a twin: a method of another class, to be awaited."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from phonon.tasks import PATIENCE, Tasks, run

if TYPE_CHECKING:
    from phonon.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")


async def call(engine: "Engine | None", function: Callable[P, R], *args: Any, **kwargs: Any) -> R:
    """Run code of the engine's in the task that calls.

    Args:
        engine: Whose event loop it has to be, and who goes on with what a cancellation leaves.
        function: The code.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if engine is not None:
        cast("Tasks", engine.runtime).check()
    try:
        return await run(function, *args, **kwargs)
    except asyncio.CancelledError:
        carry_on(engine)
        raise


def carry_on(engine: "Engine | None") -> None:
    """Have a process go on with what was under way in a call that was cancelled."""
    if engine is not None and not engine.stopped and engine.has_left_over:
        engine.upkeep.catch_up()


async def leave(error: BaseException | None, work: Awaitable[object]) -> None:
    """Await the end of a block. A task that was cancelled is not held up for long by that.

    Args:
        error: What the block raised.
        work: What is to be done.
    """
    if not isinstance(error, asyncio.CancelledError):
        await work
        return
    try:
        async with asyncio.timeout(PATIENCE):
            await work
    except TimeoutError:
        error.add_note("phonon: the server did not answer; the process goes on with it")


def twin(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """A method of the same name, arguments and documentation, to be awaited."""

    @functools.wraps(method)
    async def awaited(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return await call(self._engine, method, self._sync, *args, **kwargs)

    awaited.__qualname__ = f"Async{method.__qualname__}"
    return cast("Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]", awaited)
