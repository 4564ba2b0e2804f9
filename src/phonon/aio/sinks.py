"""Sinks for tasks: tables of SQL databases with an asynchronous engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from phonon.errors import ConfigurationError
from phonon.sinks.sql import ATTEMPTS, TOKENS, BaseSqlTable, is_fresh, is_lost_race, pause

__all__ = ["AsyncSqlTable", "once"]


class AsyncSqlTable(BaseSqlTable):
    """A table with one row for each key of a model; see `phonon.sinks.SqlTable`.

    Its engine is an ``AsyncEngine``.
    """

    @staticmethod
    def _check_engine(engine: Any) -> None:
        if not isinstance(engine, AsyncEngine):
            raise ConfigurationError(
                f"engine is an AsyncEngine of SQLAlchemy's, not {engine!r}: write "
                "sqlalchemy.ext.asyncio.create_async_engine(...); phonon.sinks.SqlTable takes an "
                "Engine"
            )

    async def create_table(self) -> None:
        """Create the table and its child tables, unless they exist."""
        async with self._engine.begin() as connection:
            await connection.run_sync(self._create)

    async def write(self, records: Sequence[Any]) -> None:
        """Add records to their rows, in one transaction; see `phonon.sinks.SqlTable.write`."""
        for attempt in range(ATTEMPTS):
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(self._write, records)
            except sa.exc.DBAPIError as error:
                if attempt == ATTEMPTS - 1 or not is_lost_race(error):
                    raise
                await asyncio.sleep(pause(attempt))
            else:
                return


@contextlib.asynccontextmanager
async def once(connection: Any, update: Any, *, name: str = TOKENS) -> AsyncIterator[bool]:
    """Yield whether a batch is new to the database; see `phonon.sinks.once`."""
    yield await connection.run_sync(is_fresh, update.resource_id, update.token, name)
