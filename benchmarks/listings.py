"""Measures an operator's listing of a million open sessions: time, memory, the longest call.

How long a call blocks the server is measured by the processor time of the server's main thread
from before an exchange until after it (``schedstat`` of the kernel, in nanoseconds), so other work
on the machine plays no part. An exchange has up to two calls, so this is an upper bound of one.

Run it with a server of its own::

    python benchmarks/listings.py --sessions 1000000
"""

import argparse
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Count
from phonon import Admin, Process
from phonon._admin.namespace import Namespace
from phonon.embedded import start

ROUNDS = 5
CHUNK = 20_000


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
    """Return the measurements, by name."""

    def count(entries: Any) -> int:
        return sum(1 for _ in entries)

    def everything() -> int:
        found = count(admin.sessions())
        assert found == sessions, f"{found} of {sessions}"
        return found

    return {
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


@contextmanager
def watched(pid: int, spent: list[int]) -> Iterator[None]:
    """Note the server's processor time of each exchange, in nanoseconds."""
    place = Path(f"/proc/{pid}/task/{pid}/schedstat")

    def used() -> int:
        return int(place.read_text(encoding="ascii").split()[0])

    ask: Any = Namespace.ask

    def watching(self: Namespace, requests: Sequence[Any]) -> Any:
        begun = used()
        replies = yield from ask(self, requests)
        spent.append(used() - begun)
        return replies

    Namespace.ask = watching  # type: ignore[method-assign]
    try:
        yield
    finally:
        Namespace.ask = ask  # type: ignore[method-assign]


def measure(url: str, sessions: int) -> dict[str, Any]:
    """Time each listing, in a process of its own, so that its memory is its own."""
    results: dict[str, Any] = {}
    with Admin(url) as admin:
        admin.processes()
        server = admin._connection.client  # noqa: SLF001 - the server's own view of the calls
        pid = int(server.info("server")["process_id"])
        for name, run in listings(admin, sessions).items():
            rounds = 1 if name == "all sessions" else ROUNDS
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory = server.info("memory")["used_memory"]
            times: list[tuple[float, float]] = []
            spent: list[int] = []
            with watched(pid, spent):
                for _ in range(rounds):
                    begun, cpu = time.perf_counter(), time.process_time()
                    run()
                    times.append((time.perf_counter() - begun, time.process_time() - cpu))
            clock, ours = zip(*times, strict=True)
            results[name] = {
                "seconds": round(statistics.median(clock), 4),
                "spread": [round(min(clock), 4), round(max(clock), 4)],
                "client_cpu_seconds": round(statistics.median(ours), 4),
                "server_cpu_seconds": round(sum(spent) / 1e9 / rounds, 4),
                "client_mib": round(
                    (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1
                ),
                "server_mib": round((server.info("memory")["used_memory"] - memory) / 2**20, 1),
                "exchanges": len(spent),
                "longest_exchange_cpu_ms": round(max(spent) / 1e6, 3),
                "median_exchange_cpu_ms": round(statistics.median(spent) / 1e6, 3),
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
    # In a folder of its own: others on this machine may use, and end, the one that all share.
    folder = tempfile.mkdtemp(prefix="ph-")
    server = start(folder)
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
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
