"""Models against a bare loop and against pipelined HINCRBY: ratios in one run.

Run it with ``python benchmarks/models.py [messages]``. Each round measures all contenders one after
the other, in the time of this process's CPU in memory, and in real time where a server takes part.
A ratio is of speeds: 2.0 is twice as fast as what it is compared with.
"""

import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar

import polars as pl
import redis

from phonon import Collection, Model, Process
from phonon.fields import ID, Max, SetAppend, Sum

ROUNDS = 5
KEYS = 1000
#: Messages that are stored together, by rows and as tables.
BATCH = 1000
TABLE = 100_000

Message = tuple[str, int, str, int]


class Tally(Model, name="benchmark_tally"):
    """Sum, union and maximum."""

    key: ID[str]
    count: Sum[int] = Sum()
    elements: SetAppend[str] = SetAppend()
    high: Max[int] = Max()

    completed: ClassVar[dict[str, int]] = {}

    def on_complete(self) -> None:
        """Keep the sum, to compare it."""
        self.completed[self.key] = self.completed.get(self.key, 0) + self.count


class Bare:
    """A loop as a person would write it: an object for each message."""

    def __init__(self, key: str, count: int, element: str, high: int) -> None:
        self.key = key
        self.count = count
        self.elements = {element}
        self.high = high

    def merge(self, other: "Bare") -> None:
        """Add another one."""
        self.count += other.count
        self.elements |= other.elements
        self.high = max(self.high, other.high)


class Workload:
    """A process, a client of the same server, and the messages in all their forms."""

    def __init__(self, process: Process, size: int) -> None:
        rng = random.Random(1)  # noqa: S311 - repeatable, no secret
        weights = [1 / (rank + 1) ** 1.1 for rank in range(KEYS)]
        keys = rng.choices([f"user{i}" for i in range(KEYS)], weights, k=size)
        self.process = process
        self.client: Any = process.client
        self.messages: list[Message] = [
            (key, rng.randrange(5), f"page{rng.randrange(50)}", rng.randrange(1_000_000))
            for key in keys
        ]
        names = ("key", "count", "elements", "high")
        self.rows = [dict(zip(names, message, strict=True)) for message in self.messages]
        frame = pl.DataFrame(self.rows)
        self.tables = [frame.slice(at, TABLE) for at in range(0, size, TABLE)]

    def collection(self) -> Collection[..., Tally]:
        """Return a collection for all keys."""
        return self.process.collect(Tally, max_entries=2 * KEYS)


def bare(workload: Workload) -> None:
    entries: OrderedDict[str, Bare] = OrderedDict()
    for message in workload.messages:
        entry = entries.get(message[0])
        if entry is None:
            entries[message[0]] = Bare(*message)
        else:
            entry.merge(Bare(*message))
            entries.move_to_end(message[0])


def add(workload: Workload, *, durable: bool = False) -> None:
    records, messages = workload.collection(), iter(workload.messages)
    while batch := list(islice(messages, BATCH)):
        with workload.process.batch(durable=durable):
            for key, count, element, high in batch:
                records.add(key, count=count, elements=element, high=high)


def add_many(workload: Workload, *, durable: bool = False) -> None:
    records, rows = workload.collection(), iter(workload.rows)
    while batch := list(islice(rows, BATCH)):
        with workload.process.batch(durable=durable):
            assert not records.add_many(batch)


def add_table(workload: Workload, *, durable: bool = False) -> None:
    records = workload.collection()
    for table in workload.tables:
        with workload.process.batch(durable=durable):
            assert not records.add_table(table)


def hincrby(workload: Workload) -> None:
    messages = iter(workload.messages)
    while batch := list(islice(messages, BATCH)):
        pipeline: redis.client.Pipeline = workload.client.pipeline(transaction=False)
        for key, count, _, _ in batch:
            pipeline.hincrby("benchmark:" + key, "n", count)
        pipeline.execute()


def measure(
    workload: Workload,
    clock: Callable[[], float],
    yardstick: Callable[[Workload], None],
    contenders: dict[str, Callable[[Workload], None]],
) -> None:
    """Print how much faster than the yardstick each contender is."""
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        begun = clock()
        yardstick(workload)
        base = clock() - begun
        for name, contender in contenders.items():
            begun = clock()
            contender(workload)
            ratios[name].append(base / (clock() - begun))
    for name, values in ratios.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:28} {statistics.median(values):6.2f} times {yardstick.__name__} ({spread})")


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with Process("embedded://", namespace=f"benchmark-{time.time_ns()}") as process:
        workload = Workload(process, size)
        print(f"{size:,} messages about {KEYS:,} keys; sum, union and maximum of each")
        contenders = {"add": add, "add_many": add_many, "add_table": add_table}
        measure(
            workload, time.process_time, bare, {f"{n}, in memory": c for n, c in contenders.items()}
        )
        durable = {
            "add, durable": lambda workload: add(workload, durable=True),
            "add_many, durable": lambda workload: add_many(workload, durable=True),
            "add_table, durable": lambda workload: add_table(workload, durable=True),
        }
        measure(workload, time.perf_counter, hincrby, durable)
        workload.client.delete(*(f"benchmark:user{i}" for i in range(KEYS)))


if __name__ == "__main__":
    main()
