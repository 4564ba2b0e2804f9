"""A program that counts, run by servers that fork: uWSGI, gunicorn, Celery and multiprocessing.

It makes its process and its cache when it is imported, which may be before a fork. What a message
brings stays in the cache until the program ends.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phonon import ConflictFreeUpdate, LruCache, Process


class Total(ConflictFreeUpdate, name="prefork-total"):
    """Writes to a file that all have in common."""

    def execute(self) -> None:
        line = json.dumps([self._id, self.doc["n"], os.getpid()]) + "\n"
        with Path(os.environ["PREFORK_SINK"]).open("a") as file:
            file.write(line)


process = Process(url=os.environ["PREFORK_URL"], namespace=os.environ["PREFORK_NAMESPACE"])
cache: LruCache[Total] = LruCache()
if os.environ.get("PREFORK_USE"):
    cache.set("before", Total(process, "before", doc={"n": 1}, init_cache=False))


def count(record: str) -> int:
    """Handle a message. Returns who has."""
    stored = record == "stored"
    cache.set(record, Total(process, record, doc={"n": 1}, init_cache=stored))
    return os.getpid()


def count_many(records: list[str]) -> int:
    """Handle some messages."""
    for record in records:
        count(record)
    return os.getpid()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    """Handle a request, for uWSGI and gunicorn."""
    who = count(environ["PATH_INFO"].strip("/"))
    time.sleep(0.02)  # the other worker gets the next request
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"%d" % who
