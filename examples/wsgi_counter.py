"""gunicorn or uWSGI, which fork their workers: each request adds to its page's row.

sqlite3 "$DATABASE" "CREATE TABLE views (page TEXT PRIMARY KEY, n INTEGER, token INTEGER)"
gunicorn wsgi_counter:application --workers 4 --config python:gunicorn_conf
uwsgi --http :8000 --module wsgi_counter --master --processes 4 --enable-threads
"""

import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from phonon import ConflictFreeUpdate
from phonon.contrib.worker import Worker

ADD = """INSERT INTO views VALUES (?, ?, ?) ON CONFLICT (page) DO UPDATE
         SET n = n + excluded.n, token = excluded.token WHERE excluded.token > token"""

worker = Worker()  # made before the fork; each child connects by itself


class Views(ConflictFreeUpdate, name="views"):
    """The views of a page."""

    def execute(self) -> None:
        """Add the views to the page's row."""
        with closing(sqlite3.connect(os.environ["DATABASE"], timeout=30)) as database, database:
            database.execute(ADD, (self._id, self.doc["n"], self.token))


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Count a request, and answer it."""
    worker.add(Views, environ["PATH_INFO"], doc={"n": 1})
    start("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
