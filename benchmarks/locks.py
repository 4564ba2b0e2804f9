"""Measures how fast, fair and silent locks are, against those of other packages.

    python benchmarks/locks.py            # about five minutes
    python benchmarks/locks.py --quick    # less than a minute, coarser

Pairs: acquire and release of a lock without contention, in turns with the peers, so that all
meet the same noise, with the default settings of redis-py. Contention: eight OS processes want one
lock all the time, and inside it read
a counter from a file and write it back one higher; what it says in the end shows that the lock
excluded. Waiting: the commands of eight processes while another one holds the lock. All locks get
redis-py clients of the same settings, on one server. Leases are a minute everywhere.

If the one that releases asks again at once, a lock without an order is rarely handed
over: one process gets it many times running while the others sleep. So hand-overs, grants to
another process than the last, are counted as well, and contention is measured twice, the second
time with contenders that do something else for a moment (``--pause``) between two turns. The
targets are those of the first. The first half second, in which connections are made, does not
count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import redis
from rich.console import Console
from rich.table import Table

from common import processes
from comparison.locks import Maker, phonon, pottery, python_redis_lock, redis_py
from phonon import Process
from round_trips import Counting, CountingSocket

CONTENDERS = 8
WARM_UP = 0.5

#: Makes a lock object, given what makes them (a `Process` or a client) and a name.
MAKERS: dict[str, Maker] = {
    "phonon": phonon(),
    "redis-py": redis_py(),
    "python-redis-lock": python_redis_lock(),
    "pottery": pottery(),
}
#: Without a peer.
MORE: dict[str, Maker] = {
    "phonon, shared": lambda process, name: process.lock(name, shared=True),
    "phonon, semaphore": lambda process, name: process.semaphore(name, 4),
}
#: redis-py 8 gives up on an answer after 5 s, which kills waiters of python-redis-lock.
PATIENT: dict[str, Any] = {"socket_timeout": None}
#: Pairs per second, against a peer's.
PAIRS_TARGETS = {"redis-py": 1.0, "python-redis-lock": 1.4}
#: Grants per second, against a peer's.
GRANTS_TARGETS = {"redis-py": 5.0, "python-redis-lock": 1.0}


@contextmanager
def source(kind: str, path: str, *, counts: bool = False, **options: Any) -> Iterator[Any]:
    """Makes locks of a kind.

    Args:
        kind: The kind.
        path: The server's socket.
        counts: Whether connections count their commands. Phonon lets the kernel watch the time on a
            plain socket; on another one each exchange costs it two more system calls.
        options: Of the connections.
    """
    connection = Counting if counts else redis.UnixDomainSocketConnection
    pool = redis.ConnectionPool(connection_class=connection, path=path, db=1, **options)
    with redis.Redis(connection_pool=pool) as client:
        if kind.startswith("phonon"):
            with Process(client=client, namespace="locks") as process:
                yield process
        else:
            yield client
    pool.disconnect()


def spread(values: Sequence[float]) -> str:
    """A median, and the quarters around it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


def verdict(ratio: float, target: float | None) -> str:
    """Return whether a target is met, and which."""
    if target is None:
        return ""
    return f">= {target:g}: {'met' if ratio >= target else 'MISSED'}"


# Pairs


def pair_times(path: str, rounds: int, calls: int, *, anew: bool) -> dict[str, list[float]]:
    """Seconds for one pair of each kind, a list of as many as there are rounds."""
    times: dict[str, list[float]] = {kind: [] for kind in MAKERS | MORE}

    def measure(kind: str, owner: Any) -> float:
        make = (MAKERS | MORE)[kind]
        lock = make(owner, f"pairs {kind}")
        start = time.perf_counter()
        for _ in range(calls):
            if anew:
                lock = make(owner, f"pairs {kind}")
            lock.acquire()
            lock.release()
        return (time.perf_counter() - start) / calls

    with source("phonon", path) as process, source("peers", path) as client:
        owners = {kind: process if kind.startswith("phonon") else client for kind in times}
        for kind, owner in owners.items():
            measure(kind, owner)  # the work of a first call is done now
        for _ in range(rounds):
            for kind, owner in owners.items():
                times[kind].append(measure(kind, owner))
    return times


def pairs(console: Console, path: str, rounds: int, calls: int) -> None:
    """Uncontended acquire and release."""
    for anew in (True, False):
        times = pair_times(path, rounds, calls, anew=anew)
        title = "a new object for each pair" if anew else "one object for all pairs"
        table = Table("kind", "pairs/s", "phonon is faster by", "target", title=f"Pairs, {title}")
        for kind, theirs in times.items():
            ratios = [b / a for a, b in zip(times["phonon"], theirs, strict=True)]
            table.add_row(
                kind,
                f"{1 / statistics.median(theirs):,.0f}",
                "" if kind == "phonon" else spread(ratios),
                verdict(statistics.median(ratios), PAIRS_TARGETS.get(kind)),
            )
        console.print(table)


# Contention


def acquire_patiently(kind: str, lock: Any) -> None:
    """Wait until this process is killed."""
    if kind == "phonon":
        assert lock.acquire(timeout=-1)
    else:
        assert lock.acquire()


def contender(kind: str, path: str, seconds: float, pause: float, counter: str) -> None:
    """Want the lock all the time; then print the counts.

    That is how long each wait was, how many ended in time, to how many of these the lock came from
    another process, and how often it was taken in all.
    """
    file = Path(counter)
    with source(kind, path, **PATIENT) as owner:
        lock = MAKERS[kind](owner, f"contended {kind}")
        print("ready", flush=True)
        sys.stdin.readline()
        counted = time.monotonic() + WARM_UP
        end = counted + seconds
        waits: list[float] = []
        granted = handed = written = 0
        me = str(os.getpid())
        while time.monotonic() < end:
            begun = time.monotonic()
            acquire_patiently(kind, lock)
            got = time.monotonic()
            count, last = file.read_text().split()
            file.write_text(f"{int(count) + 1} {me}")
            lock.release()
            written += 1
            if begun >= counted:
                waits.append(got - begun)
            granted += counted <= got < end
            handed += counted <= got < end and last != me
            if pause:
                time.sleep(pause)
        print(json.dumps([waits, granted, handed, written]), flush=True)
        sys.stdin.readline()  # a process that ends takes time from those that still wait


def waiter(kind: str, path: str) -> None:
    """Wait for a lock that is held; report the number of sent commands on request."""
    with source(kind, path, counts=True, **PATIENT) as owner:
        lock = MAKERS[kind](owner, f"contended {kind}")
        print("ready", flush=True)
        sys.stdin.readline()

        def take() -> None:
            acquire_patiently(kind, lock)
            lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        for _ in range(2):  # once at the beginning, once at the end
            sys.stdin.readline()
            print(CountingSocket.sent, flush=True)
        thread.join()


class Children:
    """Eight OS processes that do the same."""

    def __init__(self, role: str, *arguments: object) -> None:
        here = str(Path(__file__).parent)
        paths = [here, os.environ.get("PYTHONPATH", "")]
        code = f"import locks; locks.{role}{arguments!r}"
        self.popens = [
            subprocess.Popen(  # noqa: S603 - our own script
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
            for _ in range(CONTENDERS)
        ]
        assert self.read() == ["ready"] * CONTENDERS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for popen in self.popens:  # all have ended, unless something failed
            popen.kill()
            popen.wait()

    def tell(self) -> None:
        """Let them go on."""
        for popen in self.popens:
            assert popen.stdin is not None
            popen.stdin.write("go\n")
            popen.stdin.flush()

    def read(self) -> list[str]:
        """A line of each."""
        lines = []
        for popen in self.popens:
            assert popen.stdout is not None
            lines.append(popen.stdout.readline().strip())
        return lines

    def join(self) -> None:
        """Wait until they have ended."""
        for popen in self.popens:
            popen.communicate()
            assert popen.returncode == 0


class Run(NamedTuple):
    """The shares that eight contenders got.

    Attributes:
        waits: Seconds, sorted.
        grants: Of each.
        handed: The number of these that came from another process.
    """

    waits: list[float]
    grants: list[int]
    handed: int


def contend(kind: str, path: str, seconds: float, pause: float) -> Run:
    """Let eight want a lock."""
    with tempfile.TemporaryDirectory() as folder:
        counter = Path(folder, "counter")
        counter.write_text("0 nobody")
        with Children("contender", kind, path, seconds, pause, str(counter)) as children:
            children.tell()
            found = [json.loads(line) for line in children.read()]
            children.join()
        count = int(counter.read_text().split()[0])
        assert count == sum(written for *_, written in found), f"{kind} did not exclude"
    waits = sorted(wait for waits, *_ in found for wait in waits)
    return Run(waits, [granted for _, granted, *_ in found], sum(each[2] for each in found))


def contention(console: Console, path: str, rounds: int, seconds: float, pause: float) -> None:
    """Grants per second, and how long one waits."""
    found: dict[str, list[Run]] = {kind: [] for kind in MAKERS}
    for _ in range(rounds):
        for kind, results in found.items():
            results.append(contend(kind, path, seconds, pause))
    table = Table(
        *("kind", "grants/s", "phonon grants more by", "target"),
        *("hand-overs/s", "phonon hands over more by", "wait p50", "p99", "longest"),
        *("longest / p50", "least and most grants of one"),
        title=f"{CONTENDERS} processes want one lock, {rounds} x {seconds:g} s"
        + f", pausing for {pause * 1e3:g} ms" * bool(pause),
    )
    grants = {kind: [sum(run.grants) / seconds for run in runs] for kind, runs in found.items()}
    handed = {kind: [run.handed / seconds for run in runs] for kind, runs in found.items()}
    for kind, runs in found.items():
        ratios = [a / max(b, 1e-9) for a, b in zip(grants["phonon"], grants[kind], strict=True)]
        more = [a / max(b, 1e-9) for a, b in zip(handed["phonon"], handed[kind], strict=True)]
        medians = [statistics.median(run.waits) for run in runs]
        longest = [run.waits[-1] for run in runs]
        p99 = [run.waits[len(run.waits) * 99 // 100] for run in runs]
        tails = [a / b for a, b in zip(longest, medians, strict=True)]
        tail = statistics.median(tails)
        # Each run's figure; of these the median.
        table.add_row(
            kind,
            f"{statistics.median(grants[kind]):,.0f}",
            "" if kind == "phonon" else spread(ratios),
            verdict(statistics.median(ratios), None if pause else GRANTS_TARGETS.get(kind)),
            f"{statistics.median(handed[kind]):,.0f}",
            "" if kind == "phonon" else spread(more),
            *(f"{statistics.median(each) * 1e3:.2f} ms" for each in (medians, p99, longest)),
            f"{spread(tails)}"
            + (
                f", <= 5: {'met' if tail <= 5 else 'MISSED'}"
                if kind == "phonon" and not pause
                else ""
            ),
            " ".join(f"{min(run.grants)}..{max(run.grants)}" for run in runs),
        )
    console.print(table)


# Sent commands


def trips(path: str, kind: str, server: Any) -> tuple[int, int]:
    """Exchanges of one pair, and the commands in them, with those that scripts call."""
    with source(kind, path, counts=True) as owner:
        lock = (MAKERS | MORE)[kind](owner, f"trips {kind}")
        for _ in range(2):
            lock.acquire()
            lock.release()
        server.config_resetstat()
        before = CountingSocket.sent
        lock.acquire()
        lock.release()
        sent = CountingSocket.sent - before
        stats = server.info("commandstats").items()
    ours = ("cmdstat_config", "cmdstat_info")
    return sent, sum(stat["calls"] for name, stat in stats if not name.startswith(ours))


def idle(path: str, kind: str, seconds: float) -> int:
    """Count what eight waiters send while another holds the lock."""
    with source(kind, path, **PATIENT) as owner:
        lock = MAKERS[kind](owner, f"contended {kind}")
        assert lock.acquire()
        with Children("waiter", kind, path) as children:
            children.tell()
            time.sleep(1)  # all are in line
            children.tell()
            before = sum(map(int, children.read()))
            time.sleep(seconds)
            children.tell()
            after = sum(map(int, children.read()))
            lock.release()
            children.join()
    return after - before


def sending(console: Console, path: str, seconds: float) -> None:
    """Exchanges of a pair, and of those that wait."""
    table = Table(
        *("kind", "exchanges of a pair", "target", "commands, with those in scripts"),
        f"sent by {CONTENDERS} waiters in {seconds:g} s",
        title="What is sent",
    )
    with redis.Redis(unix_socket_path=path) as server:
        for kind in MAKERS | MORE:
            sent, commands = trips(path, kind, server)
            target = f"2: {'met' if sent == 2 else 'MISSED'}" if kind.startswith("phonon") else ""
            waiting = f"{idle(path, kind, seconds):,}" if kind in MAKERS else ""
            table.add_row(kind, str(sent), target, str(commands), waiting)
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Locks against their peers.")
    parser.add_argument("--seconds", type=float, help="of each contention run (5)")
    parser.add_argument("--pause", type=float, default=0.01, help="between two turns (0.01 s)")
    parser.add_argument("--idle", type=float, help="seconds for which waiters are watched (10)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    options = parser.parse_args()
    quick = options.quick
    console = Console(width=None if sys.stdout.isatty() else 200)
    with processes() as (process,):
        path = process.client.connection_pool.connection_kwargs["path"]
        pairs(console, path, rounds=5 if quick else 21, calls=50 if quick else 200)
        seconds = options.seconds or (1.0 if quick else 5.0)
        for pause in (0.0, options.pause):
            contention(console, path, 1 if quick else 3, seconds, pause)
        sending(console, path, options.idle or (2.0 if quick else 10.0))


if __name__ == "__main__":
    main()
