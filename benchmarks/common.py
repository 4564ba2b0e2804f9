"""Shared by the benchmarks: a server, and ratios of things measured in turns."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from phonon import ConflictFreeUpdate, Process, embedded

ROUNDS = 31


class Count(ConflictFreeUpdate, name="count"):
    """Adds up, and writes nowhere."""

    def execute(self) -> None:
        """Write nothing."""


def resident() -> int:
    """The bytes of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def on_server(process: Process) -> int:
    """The bytes of the server's memory."""
    return int(process.client.info("memory")["used_memory"])


@contextmanager
def processes(count: int = 1, **options: Any) -> Iterator[list[Process]]:
    """Processes on a server of their own."""
    with tempfile.TemporaryDirectory() as folder, embedded.start(folder) as server:
        url = f"unix://{server.socket_path}?db=1"
        made = [Process(url=url, **options) for _ in range(count)]
        # As a server is by default. An empty function writes nothing; ours would be measured
        # against it with one write to a disk in each.
        made[0].client.config_set("appendonly", "no")
        yield made
        for process in made:
            process.stop()


def plain_client(process: Process) -> "redis.Redis":
    """A redis-py client of its own on the same server, as its makers set it up."""
    path = process.client.connection_pool.connection_kwargs["path"]
    return redis.Redis(unix_socket_path=path, db=1)


def in_turns(ours: Callable[[], None], theirs: Callable[[], None]) -> tuple[float, float, float]:
    """Measure two things in turns, so that both meet the same noise.

    Returns:
        The medians of both, seconds, and the median of the rounds' ratios theirs / ours.
    """
    ours()
    theirs()
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        times.append((middle - start, time.perf_counter() - middle))
    mine, other = zip(*times, strict=True)
    ratio = statistics.median(b / a for a, b in times)
    return statistics.median(mine), statistics.median(other), ratio
