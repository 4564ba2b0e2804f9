"""Celery: tasks count page views into one row per page, and each task counts once.

sqlite3 "$DATABASE" "CREATE TABLE views (page TEXT PRIMARY KEY, n INTEGER, token INTEGER)"
celery --app celery_views worker
python -c "from celery_views import viewed; viewed.delay('/home')"
"""

import os
import sqlite3
from contextlib import closing

from celery import Celery

from phonon import ConflictFreeUpdate
from phonon.contrib.celery import setup

ADD = """INSERT INTO views VALUES (?, ?, ?) ON CONFLICT (page) DO UPDATE
         SET n = n + excluded.n, token = excluded.token WHERE excluded.token > token"""

app = Celery("shop", broker=os.environ["BROKER_URL"])
phonon = setup(app)


class Views(ConflictFreeUpdate, name="views"):
    """The views of a page."""

    def execute(self) -> None:
        """Add the views to the page's row."""
        with closing(sqlite3.connect(os.environ["DATABASE"], timeout=30)) as database, database:
            database.execute(ADD, (self._id, self.doc["n"], self.token))


@app.task(acks_late=True, reject_on_worker_lost=True)
@phonon.exactly_once
def viewed(page: str) -> None:
    """Count a view once, however often the broker delivers the task."""
    phonon.add(Views, page, doc={"n": 1})
