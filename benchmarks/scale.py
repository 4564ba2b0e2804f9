"""Measures a session's memory, and whether a message costs more with many keys.

Three questions: how much memory a million cached sessions take in the process and on the server,
and how much more ending them all takes; how fast messages for sessions that are held already are
taken in, from ten thousand messages to ten million; and the same stored a thousand at a time.

    python benchmarks/scale.py [--keys 1000000] [--messages 10000000]
"""

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import on_server, processes, resident
from phonon import LruCache, Update

BATCH = 1000
HELD = 1000


class Sum(Update):
    """A number."""

    def merge(self, other: Any) -> None:
        """Add the other one."""
        self.doc += other.doc

    def execute(self) -> None:
        """Write nothing."""


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Measure the highest memory of the block."""
    highest, ended = [resident()], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        ended.set()
        thread.join()


def many_keys(keys: int) -> None:
    """Hold so many sessions, and end them."""
    with processes() as [process]:
        names = [f"user{i}" for i in range(keys)]
        cache: LruCache[Sum] = LruCache(keys)
        here, there = resident(), on_server(process)
        begun = time.perf_counter()
        for first in range(0, keys, BATCH):
            with process.batch():
                for name in names[first : first + BATCH]:
                    cache.set(name, Sum(process, name, doc=1))
        seconds = time.perf_counter() - begun
        held = resident()
        print(f"{keys:,} sessions of a small number, stored at {keys / seconds:,.0f} a second")
        print(f"  in the process {(held - here) / keys:,.0f} bytes each,", end=" ")
        print(f"on the server {(on_server(process) - there) / keys:,.0f} bytes each")
        begun = time.perf_counter()
        with peak() as highest:
            cache.expire_all()
        seconds = time.perf_counter() - begun
        print(f"  all ended at {keys / seconds:,.0f} a second,", end=" ")
        print(f"with {max(0, highest() - held) / 1e6:,.1f} MB on top of what they took")
        left = on_server(process) - there
        print(f"  on the server {left / keys:,.0f} bytes each are left, for 70 seconds")


def many_messages(most: int) -> None:
    """Take in messages for sessions that are held."""
    names = [f"user{i}" for i in range(HELD)]
    with processes() as [process]:
        held: LruCache[Sum] = LruCache(HELD)
        stored: LruCache[Sum] = LruCache(HELD)
        with process.batch(durable=False):
            for name in names:
                held.set(name, Sum(process, name, doc=0, init_cache=False))
                stored.set(name, Sum(process, name, doc=0, init_cache=False))

        def keep(count: int) -> None:
            for name in itertools.islice(itertools.cycle(names), count):
                held.set(name, Sum(process, name, doc=1, init_cache=False))

        def store(count: int) -> None:
            for _ in range(count // BATCH):
                with process.batch():
                    for name in names:
                        stored.set(name, Sum(process, name, doc=1))

        # Ten million stored messages would take most of ten minutes, and tell the same.
        for form, work, end in (("merged in memory", keep, most), ("stored", store, most // 10)):
            print(f"messages/s for {HELD:,} sessions that are held, {form}")
            count = 10_000
            while count <= end:
                before, rates = resident(), []
                for _ in range(5 if count < 1_000_000 else 1):
                    begun = time.perf_counter()
                    work(count)
                    rates.append(count / (time.perf_counter() - begun))
                rate, grown = statistics.median(rates), (resident() - before) / 1e6
                print(f"  {count:>12,}{rate:>12,.0f}   {grown:+.1f} MB", flush=True)
                count *= 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--messages", type=int, default=10_000_000)
    options = parser.parse_args()
    many_keys(options.keys)
    many_messages(options.messages)


if __name__ == "__main__":
    main()
