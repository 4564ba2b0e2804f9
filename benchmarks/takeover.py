"""Measures the time until the work of a killed process is done.

Two questions: one of eight dies with 10,000 resources, how long after its death is each of them
executed, against the bound of five heartbeat intervals and one more; and how does the time of a
single survivor grow with the number of orphans. The processes are OS processes, killed by SIGKILL.

    python benchmarks/takeover.py            # about a minute and a half
"""

import json
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from phonon import Admin, LruCache, Process, Update, embedded
from phonon_demo.pool import Pool, Worker

INTERVAL = 2.0
BOUND = 6 * INTERVAL
SURVIVORS = 7
RESOURCES = 10_000
ORPHANS = (1_000, 10_000, 100_000)


class Row(Update, name="benchmark_takeover"):
    """A record; when it was executed is a line in this process's file."""

    def merge(self, other: "Row") -> None:
        """Add up."""
        self.doc = {"n": self.doc["n"] + other.doc["n"]}

    def execute(self) -> None:
        """Note the time."""
        DONE.append((self._id, time.time(), self.doc["n"]))


DONE: list[tuple[int, float, int]] = []


@dataclass(frozen=True)
class Plan:
    """The settings of a process: how many resources it holds, and where it notes the times."""

    url: str
    resources: int
    path: str


def work(plan: Plan) -> int:
    """Hold resources, or survive; leave the times behind when told to end."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with Process(url=plan.url, heartbeat_interval=INTERVAL) as process:
        cache: LruCache[Row] = LruCache(max_entries=max(plan.resources, 1))
        for first in range(0, plan.resources, 10_000):
            with process.batch():
                for i in range(first, min(first + 10_000, plan.resources)):
                    cache.set(i, Row(process, i, doc={"n": 1}))
        over.wait()
    Path(plan.path).write_text(json.dumps(DONE))
    return len(DONE)


def measure(survivors: int, resources: int) -> list[float]:
    """Kill the one that holds the resources; seconds after its death at which each was executed."""
    with tempfile.TemporaryDirectory() as folder, embedded.start(folder) as server:
        url = f"unix://{server.socket_path}?db=1"
        with redis.Redis(unix_socket_path=server.socket_path) as client:
            client.config_set("appendonly", "no")
        paths = [f"{folder}/times-{i}" for i in range(survivors)]
        victim = Worker(work, Plan(url, resources, ""))
        with Pool([victim, *(Worker(work, Plan(url, 0, path)) for path in paths)]) as pool:
            with Admin(url) as admin:
                pool.wait(admin, lambda: sum(p.memberships for p in admin.processes()) == resources)
            died = time.time()
            victim.kill()
            with redis.Redis(unix_socket_path=server.socket_path, db=1) as client:
                while client.zcard("{phonon}:processes") > survivors:
                    time.sleep(0.05)
            pool.leave()
        shares = [json.loads(Path(path).read_text()) for path in paths]
        done: list[Any] = [line for share in shares for line in share]
        assert sorted(record for record, _, _ in done) == list(range(resources)), len(done)
        assert all(n == 1 for _, _, n in done)
        if survivors > 1:
            print(f"executed by each survivor: {sorted(map(len, shares))}")
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
