"""The end of an ``async with`` block."""

import asyncio
from collections.abc import Awaitable

#: Seconds for which a cancelled task waits for a block's end, which then goes on in the background.
PATIENCE = 0.5


async def leave(error: BaseException | None, work: Awaitable[object]) -> None:
    """Await the end of a block. A cancelled task does not wait for long.

    Args:
        error: The error of the block.
        work: The work to be done.
    """
    if not isinstance(error, asyncio.CancelledError):
        await work
        return
    try:
        async with asyncio.timeout(PATIENCE):
            await work
    except TimeoutError:
        error.add_note("phonon: the server did not answer; the process goes on with it")
