"""Models against a bare loop and against pipelined HINCRBY: ratios in one run.

Run it with ``python benchmarks/models.py [messages]``. Each round measures all contenders one after
the other, in the time of this process's CPU in memory, and in real time where a server takes part.
A ratio is of speeds: 2.0 is twice as fast as what it is compared with. Bytewax and Quix Streams do
the same where they are installed; Quix reads from the mock cluster that librdkafka has in itself.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from operator import itemgetter
from typing import Any, ClassVar

import pyarrow as pa
import redis

from phonon import Collection, Model, Process
from phonon.fields import ID, Max, SetAppend, Sum

ROUNDS = 5
KEYS = 1000
#: Messages that are stored together, by rows and as tables.
BATCH = 1000
TABLE = 100_000
#: So many messages go through Quix Streams, which takes longest.
QUIX = 20_000

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
        self.tables = [
            pa.Table.from_pylist(self.rows[at : at + TABLE]) for at in range(0, size, TABLE)
        ]

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
    records.get("user0")  # tables are reduced when a record is read


def bytewax(workload: Workload) -> None:
    """Do the same as a dataflow of one worker."""
    from bytewax import operators  # noqa: PLC0415 - a peer, which need not be installed
    from bytewax.dataflow import Dataflow  # noqa: PLC0415 - as above
    from bytewax.testing import TestingSink, TestingSource, run_main  # noqa: PLC0415 - as above

    def fold(state: Bare | None, message: Message) -> Bare:
        if state is None:
            return Bare(*message)
        state.merge(Bare(*message))
        return state

    found: list[Any] = []
    flow = Dataflow("benchmark")
    source = operators.input("in", flow, TestingSource(workload.messages, batch_size=BATCH))
    keyed = operators.key_on("key", source, itemgetter(0))
    folded = operators.fold_final("fold", keyed, lambda: None, fold)
    operators.output("out", folded, TestingSink(found))
    run_main(flow)
    assert len(found) == len({key for key, *_ in workload.messages})


def quix(workload: Workload) -> float:
    """Do the same with some of the messages. Returns the seconds that all would have taken."""
    from confluent_kafka import Producer  # noqa: PLC0415 - comes with the peer
    from quixstreams import Application  # noqa: PLC0415 - a peer, which need not be installed
    from quixstreams.models.topics import TopicAdmin, TopicConfig  # noqa: PLC0415 - as above

    # The mock cluster makes topics when they are used, and tells nothing of their configuration.
    config = TopicConfig(1, 1, {"retention.ms": "604800000"})
    TopicAdmin.inspect_topics = lambda _, names, **__: dict.fromkeys(names, config)
    cluster: Any = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
    (broker,) = cluster.list_topics(timeout=10).brokers.values()
    some = workload.messages[:QUIX]
    for key, count, element, high in some:
        row = {"count": count, "element": element, "high": high}
        cluster.produce("messages", json.dumps(row), key)
        cluster.poll(0)
    cluster.flush()
    begun: list[float] = []

    def fold(message: dict[str, Any], state: Any) -> None:
        if not begun:  # joining the group takes seconds
            begun.append(time.perf_counter())
        state.set("count", state.get("count", 0) + message["count"])
        state.set("elements", sorted({*state.get("elements", []), message["element"]}))
        state.set("high", max(state.get("high", 0), message["high"]))

    with tempfile.TemporaryDirectory() as folder:
        application = Application(
            broker_address=f"{broker.host}:{broker.port}",
            consumer_group="benchmark",
            auto_offset_reset="earliest",
            auto_create_topics=False,
            use_changelog_topics=False,
            commit_every=BATCH,
            state_dir=folder,
            loglevel="ERROR",
        )
        topic = application.topic("messages", key_deserializer="str", value_deserializer="json")
        application.dataframe(topic).update(fold, stateful=True)
        application.run(count=len(some))
    return (time.perf_counter() - begun[0]) / len(some) * len(workload.messages)


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
    contenders: dict[str, Callable[[Workload], float | None]],
) -> None:
    """Print how much faster than the yardstick each contender is.

    Args:
        workload: The messages.
        clock: Tells the time.
        yardstick: The contender with which the others are compared.
        contenders: They are measured with the clock, unless they return their time themselves.
    """
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        begun = clock()
        yardstick(workload)
        base = clock() - begun
        for name, contender in contenders.items():
            begun = clock()
            seconds = contender(workload)
            ratios[name].append(base / (seconds or clock() - begun))
    for name, values in ratios.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:28} {statistics.median(values):6.2f} times {yardstick.__name__} ({spread})")


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with Process("embedded://", namespace=f"benchmark-{time.time_ns()}") as process:
        workload = Workload(process, size)
        print(f"{size:,} messages about {KEYS:,} keys; sum, union and maximum of each")
        contenders: dict[str, Callable[[Workload], float | None]] = {
            "add, in memory": add,
            "add_many, in memory": add_many,
            "add_table, in memory": add_table,
        }
        if find_spec("bytewax"):
            contenders["Bytewax, in memory"] = bytewax
        measure(workload, time.process_time, bare, contenders)
        durable: dict[str, Callable[[Workload], float | None]] = {
            "add, durable": lambda workload: add(workload, durable=True),
            "add_many, durable": lambda workload: add_many(workload, durable=True),
            "add_table, durable": lambda workload: add_table(workload, durable=True),
        }
        measure(workload, time.perf_counter, hincrby, durable)
        if find_spec("quixstreams"):
            measure(workload, time.perf_counter, hincrby, {"Quix Streams": quix})
        workload.client.delete(*(f"benchmark:user{i}" for i in range(KEYS)))


if __name__ == "__main__":
    main()
