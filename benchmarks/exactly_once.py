"""Measures the costs and the savings of exactness: the figures of docs/exactly-once.md.

* Ingest of a Zipf stream with a source's offsets, and with message ids, to ingest without.
* A table behind Phonon to one upsert a message, in the same PostgreSQL.
* The memory of an id.

Usage: ``PYTHONPATH=. python benchmarks/exactly_once.py [--messages N] [--rounds N]``
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from chaos.servers import PostgreSQL
from phonon import Model, Process
from phonon.fields import ID, Max, Sum
from phonon.sinks import SqlTable

KEYS = 10_000
BATCH = 1000
#: Rounds with a database at the most: each takes some ten seconds.
SINK_ROUNDS = 5


class Message(NamedTuple):
    """A message."""

    offset: int
    key: str
    value: int


class Views(Model, name="benchmark_views"):
    """Data about a key."""

    key: ID[str]
    views: Sum[int] = Sum()
    seconds: Sum[int] = Sum()
    longest: Max[int] = Max()

    def on_complete(self) -> None:
        """Write nowhere."""


class Stored(Model, name="benchmark_stored"):
    """The same, in a table."""

    key: ID[str]
    views: Sum[int] = Sum()
    seconds: Sum[int] = Sum()
    longest: Max[int] = Max()


def stream(count: int) -> list[Message]:
    """Return messages, their keys by Zipf's law."""
    chance = random.Random(1)  # noqa: S311 - the same stream each time
    weights = list(itertools.accumulate(1 / rank for rank in range(1, KEYS + 1)))
    keys = chance.choices(range(KEYS), cum_weights=weights, k=count)
    return [Message(n, f"user-{key}", chance.randrange(600)) for n, key in enumerate(keys)]


def batches(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """Return messages as a broker hands them out."""
    return [messages[i : i + BATCH] for i in range(0, len(messages), BATCH)]


def plain(process: Process, some: Sequence[Sequence[Message]]) -> None:
    """Without any check."""
    views = process.collect(Views, 2 * KEYS)
    for batch in some:
        with process.batch():
            for message in batch:
                views.add(message.key, 1, message.value, message.value)


def with_offsets(process: Process, some: Sequence[Sequence[Message]]) -> None:
    """With the offsets of a source."""
    views = process.collect(Views, 2 * KEYS)
    source = process.source(uuid.uuid4().hex)
    for messages in some:
        with source.batch(messages) as batch:
            for message in batch:
                views.add(message.key, 1, message.value, message.value)


def with_ids(process: Process, some: Sequence[Sequence[Message]]) -> None:
    """With an id for each message."""
    views = process.collect(Views, 2 * KEYS)
    scope = uuid.uuid4().hex
    for messages in some:
        with process.batch(messages, dedupe=scope, message_id=lambda m: m.offset) as batch:
            for message in batch:
                views.add(message.key, 1, message.value, message.value)


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def spread(ratios: Sequence[float]) -> str:
    """Return the median, the least and the greatest, and of how many rounds."""
    some = f"{min(ratios):.2f}-{max(ratios):.2f}, {len(ratios)} rounds"
    return f"{statistics.median(ratios):.2f} ({some})"


class Cost(NamedTuple):
    """The cost of a way: seconds by the clock, and of the client's and the server's processor."""

    wall: float
    processor: float


def cost(way: Callable[..., object], process: Process, some: Any) -> Cost:
    """Measure the cost of a way."""

    def used() -> float:
        found = process.client.info("cpu")
        server = float(found["used_cpu_user"]) + float(found["used_cpu_sys"])
        return time.process_time() + server

    before = used()
    wall = seconds(way, process, some)
    return Cost(wall, used() - before)


def ingest(count: int, rounds: int) -> None:
    """Compare ingest with and without."""
    some = batches(stream(count))
    ways = (plain, with_offsets, with_ids)
    costs: dict[Any, list[Cost]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="ph-") as folder:
        url = f"embedded://{folder}"
        with Process(url):  # the server stays
            for _ in range(rounds):
                for way in ways:
                    with Process(url, namespace=uuid.uuid4().hex) as process:
                        costs[way].append(cost(way, process, some))
            memory(url)
    print(
        f"ingest without: {count / statistics.median(c.wall for c in costs[plain]):,.0f} a second"
    )
    for name, way in (("offsets", with_offsets), ("ids", with_ids)):
        pairs = list(zip(costs[plain], costs[way], strict=True))
        walls = [one.wall / other.wall for one, other in pairs]
        processors = [one.processor / other.processor for one, other in pairs]
        print(f"ingest with {name} to ingest without: {spread(walls)}")
        print(f"  the same by processor time of client and server: {spread(processors)}")


def memory(url: str) -> None:
    """Measure the cost of an id."""
    with Process(url, namespace=uuid.uuid4().hex, partitions=1) as process:
        ids = [f"{n:016x}" for n in range(100_000)]
        views = process.collect(Views, 10)
        for i in range(0, len(ids), BATCH):
            some = ids[i : i + BATCH]
            with process.batch(some, dedupe="queue", message_id=lambda each: each) as batch_:
                for _ in batch_:
                    views.add("a", 1, 1, 1)
        client = process.client
        keys = list(client.scan_iter(match="*:ids:*queue", count=1000))
        size = sum(client.memory_usage(key, samples=0) for key in keys)
        print(f"an id of 16 bytes takes {size / len(ids):.0f} bytes on the server")


def sinks(count: int, rounds: int) -> None:
    """Compare a table behind Phonon with one upsert a message."""
    messages = stream(count)
    ratios = []
    with PostgreSQL(sync=True) as server, tempfile.TemporaryDirectory(prefix="ph-") as folder:
        engine = sa.create_engine(server.url)
        direct = SqlTable(engine, "direct", Stored)
        direct.create_table()
        behind = SqlTable(engine, "behind", Stored)
        behind.create_table()
        for _ in range(rounds):
            upserts = count // 100
            one = seconds(upsert_each, engine, direct, messages[:upserts]) / upserts
            with Process(f"embedded://{folder}", namespace=uuid.uuid4().hex) as process:
                begun = time.perf_counter()
                views = process.collect(Stored, 2 * KEYS, sink=behind)
                source = process.source("stream")
                for some in batches(messages):
                    with source.batch(some) as batch:
                        for message in batch:
                            views.add(message.key, 1, message.value, message.value)
                views.expire_all()
                other = (time.perf_counter() - begun) / count
            ratios.append(one / other)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(sa.func.count()).select_from(behind.table))
            keys = rows.scalar_one()
        engine.dispose()
    print(f"one upsert a message: {1 / one:,.0f} messages, and as many rows, a second")
    print(
        f"behind Phonon: {1 / other:,.0f} messages a second, "
        f"{keys / (other * count):,.0f} rows a second ({keys:,} rows)"
    )
    print(f"messages a second to one upsert a message: {spread(ratios)}")


def upsert_each(engine: sa.Engine, sink: SqlTable, messages: Sequence[Message]) -> None:
    """Write each message in a transaction of its own."""
    statement = sink.statement("postgresql")
    for message in messages:
        row = {"key": message.key, "views": 1, "seconds": message.value, "longest": message.value}
        with engine.begin() as connection:
            connection.execute(statement.values([{**row, "token": time.time_ns()}]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    ingest(options.messages, options.rounds)
    sinks(options.messages, min(SINK_ROUNDS, options.rounds))


if __name__ == "__main__":
    main()
