"""Shows that memory stays flat while the database is too slow, or down.

A producer makes updates of ever new keys as fast as it is let, into a cache of a thousand, once
with a database that takes 5 ms a record, once with one that refuses everything. Each line says
how many messages were taken in until then, how many sessions are left undone, and how much memory
the process has. The third column is the one that must not grow.

    python benchmarks/backpressure.py [--seconds 60]
"""

import argparse
import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from common import processes, resident
from phonon import LruCache, Process, RetryPolicy, Update
from phonon.errors import PhononError

ENTRIES = 1000
BACKLOG = 2000
LINES = 6
DELAY = 0.005


class Row(Update):
    """One that is written slowly, or not at all."""

    is_down: ClassVar[bool] = False
    written: ClassVar[int] = 0

    def merge(self, other: Any) -> None:
        """Add the other one."""
        self.doc["n"] += other.doc["n"]

    def execute(self) -> None:
        """Take a while, or fail.

        Raises:
            OSError: The database is down.
        """
        if self.is_down:
            raise OSError("the database is down")
        time.sleep(DELAY)
        Row.written += 1


def produce(process: Process, stop: threading.Event, taken: list[int]) -> None:
    """Take in as much as there is room for."""
    cache: LruCache[Row] = LruCache(ENTRIES)
    while not stop.is_set():
        key = taken[0]
        # A message of some size, so that it would be seen if they piled up.
        with contextlib.suppress(OSError, PhononError, ExceptionGroup):
            cache.set(key, Row(process, key, doc={"n": 1, "text": f"{key:04d}" * 250}))
        taken[0] += 1


def watch(name: str, process: Process, seconds: float) -> None:
    """Print what becomes of it."""
    print(f"{name}\n{'seconds':>9}{'taken in':>12}{'undone':>9}{'MB':>8}")
    stop, taken = threading.Event(), [0]
    thread = threading.Thread(target=produce, args=(process, stop, taken), daemon=True)
    thread.start()
    begun = time.monotonic()
    for _ in range(LINES):
        time.sleep(seconds / LINES)
        undone = process.engine.outbox.size
        now = time.monotonic() - begun
        print(f"{now:9.0f}{taken[0]:12,}{undone:9,}{resident() / 2**20:8.1f}", flush=True)
    stop.set()
    Row.is_down = False
    thread.join()


def main() -> None:
    """Watch both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the two")
    seconds = parser.parse_args().seconds
    logging.getLogger("phonon").setLevel(logging.CRITICAL)
    for name, is_down in ((f"a database that takes {DELAY * 1000:g} ms a record", False),
                          ("a database that is down", True)):  # fmt: skip
        retry = RetryPolicy(attempts=1_000_000, first_delay=1.0, longest_delay=2.0)
        Row.is_down = is_down
        with (
            ThreadPoolExecutor(4) as pool,
            processes(executor=pool, max_backlog=BACKLOG, retry=retry) as [process],
        ):
            watch(name, process, seconds)


if __name__ == "__main__":
    main()
