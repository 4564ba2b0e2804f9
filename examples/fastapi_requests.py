"""FastAPI: count requests into a table, by route and status, over all workers.

sqlite3 "$DATABASE" "CREATE TABLE requests (route TEXT PRIMARY KEY, n INTEGER, token INTEGER)"
uvicorn fastapi_requests:app --workers 4
"""

import asyncio
import os
import sqlite3
from contextlib import closing
from typing import Annotated

from fastapi import Depends, FastAPI

from phonon.aio import AsyncConflictFreeUpdate, AsyncProcess
from phonon.contrib.fastapi import CountRequests, Phonon

ADD = """INSERT INTO requests VALUES (?, ?, ?) ON CONFLICT (route) DO UPDATE
         SET n = n + excluded.n, token = excluded.token WHERE excluded.token > token"""

phonon = Phonon()
app = FastAPI(lifespan=phonon.lifespan)


class Requests(AsyncConflictFreeUpdate, name="requests"):
    """The requests of a route."""

    async def execute(self) -> None:
        """Add the requests to the route's row."""
        await asyncio.to_thread(write, self._id, self.doc["requests"], self.token)


def write(*row: object) -> None:
    """Write a row."""
    with closing(sqlite3.connect(os.environ["DATABASE"], timeout=30)) as database, database:
        database.execute(ADD, row)


Worker = Annotated[AsyncProcess, Depends(phonon.process)]

app.add_middleware(CountRequests, phonon=phonon, update=Requests)


@app.get("/users/{user}")
async def page(user: str, process: Worker) -> dict[str, str]:
    """Show a user's page."""
    return {"user": user, "worker": process.id}
