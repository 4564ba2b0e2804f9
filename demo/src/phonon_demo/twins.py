"""The updates of jobs for workers with an event loop: the same, but for how they are written."""

import asyncio
from typing import Any

from chaos.numbered import NumberedUpdate
from phonon import Update
from phonon.aio import AsyncUpdate
from phonon_demo.flights import FlightUpdate
from phonon_demo.sums import SumUpdate


class _Threaded(AsyncUpdate):
    """SQLite has no calls to await, so another thread makes them."""

    async def execute(self) -> None:
        """Write the session to the database."""
        execute: Any = super().execute
        await asyncio.to_thread(execute)


class AsyncFlightUpdate(_Threaded, FlightUpdate, AsyncUpdate):  # type: ignore[misc]  # of both kinds
    """What is known about one aircraft."""


class AsyncNumberedUpdate(_Threaded, NumberedUpdate, FlightUpdate, AsyncUpdate):  # type: ignore[misc]  # as above
    """What is known about one aircraft, and by which messages."""


class AsyncSumUpdate(_Threaded, SumUpdate, AsyncUpdate):  # type: ignore[misc]  # as above
    """Rows and sums of one key."""


#: By the class whose twin it is.
TWINS: dict[type[Update], type[AsyncUpdate]] = {
    FlightUpdate: AsyncFlightUpdate,
    NumberedUpdate: AsyncNumberedUpdate,
    SumUpdate: AsyncSumUpdate,
}
