"""Measures the time until the work of a killed process is done.

Two questions: one of eight dies with 10,000 resources, how long after its death is each of them
executed, against the bound of five heartbeat intervals and one more; and how does the time of a
single survivor grow with the number of orphans. The processes are OS processes, killed by SIGKILL.

    python benchmarks/takeover.py            # about a minute and a half
    python benchmarks/takeover.py child ...  # as it starts itself
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import redis

from phonon import LruCache, Process, Update, embedded

INTERVAL = 2.0
BOUND = 6 * INTERVAL
SURVIVORS = 7
RESOURCES = 10_000
ORPHANS = (1_000, 10_000, 100_000)


class Row(Update):
    """A record; when it was executed is a line in this process's file."""

    def merge(self, other: "Row") -> None:
        """Add up."""
        self.doc = {"n": self.doc["n"] + other.doc["n"]}

    def execute(self) -> None:
        """Note the time."""
        DONE.append((self._id, time.time(), self.doc["n"]))


DONE: list[tuple[int, float, int]] = []


def child(url: str, resources: int, path: str) -> None:
    """Hold resources, or survive; say when ready; leave the times behind when told to end."""
    Row.__module__ = "takeover"
    with Process(url=url, heartbeat_interval=INTERVAL) as process:
        cache: LruCache[Row] = LruCache(max_entries=max(resources, 1))
        for first in range(0, resources, 10_000):
            with process.batch():
                for i in range(first, min(first + 10_000, resources)):
                    cache.set(i, Row(process, i, doc={"n": 1}))
        print("ready", flush=True)
        sys.stdin.readline()
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123 - one line of plain Python
        json.dump(DONE, file)


def start(url: str, resources: int, path: str) -> "subprocess.Popen[str]":
    """Start a child and wait until it is ready."""
    code = f"import takeover; takeover.child({url!r}, {resources}, {path!r})"
    popen = subprocess.Popen(  # noqa: S603 - our own script
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))},  # noqa: PTH100, PTH120
    )
    assert popen.stdout is not None
    assert popen.stdout.readline() == "ready\n"
    return popen


def measure(survivors: int, resources: int) -> list[float]:
    """Kill the one that holds the resources; seconds after its death at which each was executed."""
    with tempfile.TemporaryDirectory() as folder, embedded.start(folder) as server:
        url = f"unix://{server.socket_path}?db=1"
        with redis.Redis(unix_socket_path=server.socket_path) as client:
            client.config_set("appendonly", "no")
        paths = [f"{folder}/times-{i}" for i in range(survivors)]
        others = [start(url, 0, path) for path in paths]
        victim = start(url, resources, f"{folder}/victim")
        with redis.Redis(unix_socket_path=server.socket_path, db=1) as client:
            victim.send_signal(signal.SIGKILL)
            died = time.time()
            victim.wait()
            give_up = died + 120
            while client.zcard("{phonon}:processes") > survivors and time.time() < give_up:
                time.sleep(0.05)
        done: list[Any] = []
        shares = []
        for popen, path in zip(others, paths, strict=True):
            popen.communicate("end\n")
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - one line of plain Python
                share = json.load(file)
            shares.append(len(share))
            done += share
        assert sorted(record for record, _, _ in done) == list(range(resources)), len(done)
        assert all(n == 1 for _, _, n in done)
        if survivors > 1:
            print(f"executed by each survivor: {sorted(shares)}")
        return sorted(at - died for _, at, _ in done)


def main() -> None:
    """Measure and print."""
    print(f"heartbeat_interval {INTERVAL:g} s, so the bound is {BOUND:g} s after the death")
    times = measure(SURVIVORS, RESOURCES)
    tenths = statistics.quantiles(times, n=100)
    print(
        f"1 of {SURVIVORS + 1} killed with {RESOURCES:,} resources; executed after: first "
        f"{times[0]:.2f} s, p50 {tenths[49]:.2f} s, p99 {tenths[98]:.2f} s, last {times[-1]:.2f} s "
        f"(bound {BOUND:g} s)"
    )
    for orphans in ORPHANS:
        times = measure(1, orphans)
        working = times[-1] - times[0]
        print(
            f"{orphans:>7,} orphans, one survivor: first after {times[0]:.2f} s, last after "
            f"{times[-1]:.2f} s; {working:.2f} s of work, "
            f"{working / orphans * 1e6:.0f} us each"
        )


if __name__ == "__main__":
    main()
