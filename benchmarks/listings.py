"""What it costs an operator to list a million open sessions: time, memory, the longest call.

Run it with a server of its own::

    python benchmarks/listings.py --sessions 1000000
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phonon import Admin, ConflictFreeUpdate, Process
from phonon.embedded import start

ROUNDS = 5
#: Microseconds above which the server notes a call.
SLOW_US = 500
CHUNK = 20_000


class Count(ConflictFreeUpdate, name="count"):
    """Adds up, and writes nowhere."""

    def execute(self) -> None:
        """Write nothing."""


def fill(process: Process, other: Process, sessions: int) -> None:
    """Open sessions; every tenth one has two members."""
    for first in range(0, sessions, CHUNK):
        with process.batch():
            for i in range(first, min(first + CHUNK, sessions)):
                Count(process, f"user:{i}", doc={"n": 1})
        with other.batch():
            for i in range(first, min(first + CHUNK, sessions), 10):
                Count(other, f"user:{i}", doc={"n": 1})


def listings(admin: Admin, sessions: int) -> dict[str, Callable[[], int]]:
    """Return what is measured, by name."""

    def count(entries: Any) -> int:
        return sum(1 for _ in entries)

    def everything() -> int:
        found = count(admin.sessions())
        assert found == sessions, f"{found} of {sessions}"
        return found

    return {
        # What other work on the machine does to a call that costs the server microseconds.
        "a free lock, 5,000 times": lambda: sum(
            admin.lock("nothing") is None for _ in range(5_000)
        ),
        "all sessions": everything,
        "the oldest 50 sessions": lambda: len(admin.oldest_sessions(50)),
        "the first 50 of a prefix": lambda: count(
            itertools.islice(admin.sessions(prefix="test.test.user:99"), 50)
        ),
        "processes": lambda: len(admin.processes()),
        "locks": lambda: count(admin.locks()),
        "batches": lambda: count(admin.batches()),
        "one resource": lambda: len(admin.resource("test.test.user:10").members),
    }


def measure(url: str, sessions: int) -> dict[str, Any]:
    """Time each listing, in a process of its own, so that its memory is its own."""
    results: dict[str, Any] = {}
    with Admin(url) as admin:
        admin.processes()
        server = admin._connection.client  # noqa: SLF001 - the server's own view of the calls
        server.config_set("slowlog-log-slower-than", SLOW_US)
        server.config_set("slowlog-max-len", 100_000)
        for name, run in listings(admin, sessions).items():
            rounds = 1 if name in ("all sessions", "a free lock, 5,000 times") else ROUNDS
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory = server.info("memory")["used_memory"]
            server.slowlog_reset()
            server.config_resetstat()
            used = server.info("cpu")["used_cpu_user"] + server.info("cpu")["used_cpu_sys"]
            times = []
            for _ in range(rounds):
                begun = time.perf_counter()
                run()
                times.append(time.perf_counter() - begun)
            used = server.info("cpu")["used_cpu_user"] + server.info("cpu")["used_cpu_sys"] - used
            done = server.info("commandstats").get("cmdstat_fcall_ro", {}).get("calls", 1)
            calls = [e["duration"] for e in server.slowlog_get(100_000)]
            results[name] = {
                "seconds": round(statistics.median(times), 4),
                "spread": [round(min(times), 4), round(max(times), 4)],
                "client_mib": round(
                    (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1
                ),
                "server_mib": round((server.info("memory")["used_memory"] - memory) / 2**20, 1),
                "calls": done,
                "server_cpu_ms_a_call": round(used * 1000 / done, 3),
                "longest_call_ms": max(calls, default=SLOW_US) / 1000,
                "median_of_those_ms": statistics.median(calls or [SLOW_US]) / 1000,
                "calls_over_10_ms": sum(call > 10_000 for call in calls),
                "calls_over_half_a_ms": len(calls),
            }
    return results


def main() -> None:
    """Fill a server, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.url:
        print(json.dumps(measure(options.url, options.sessions)))
        return
    server = start(None)
    try:
        url = f"unix://{server.socket_path}"
        process, other = Process(url=url), Process(url=url)
        begun = time.perf_counter()
        fill(process, other, options.sessions)
        print(f"{options.sessions:,} sessions opened in {time.perf_counter() - begun:.0f} s")
        command = [sys.executable, __file__, "--url", url, "--sessions", str(options.sessions)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        results = json.loads(answer.stdout)
        for name, row in results.items():
            print(f"{name:28} {row}")
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    finally:
        server.close()


if __name__ == "__main__":
    main()
