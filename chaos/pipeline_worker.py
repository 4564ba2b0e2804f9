"""The worker of `chaos.pipeline`: the demo's worker, with a pause after writes, and less checks."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chaos.journal import Journal
from chaos.servers import kafka_config
from chaos.worker import PlainStream, connected
from phonon import RetryPolicy
from phonon.errors import ConnectionLostError
from phonon.sinks import SqlTable
from phonon.sources.kafka import KafkaSource
from phonon.sources.streams import StreamSource
from phonon_demo.models import FLIGHTS
from phonon_demo.worker import BATCH, GROUP, Plan

#: Milliseconds between two commits of a Kafka client that commits automatically.
COMMIT_INTERVAL = 1000
#: Tried again until the database is there again: no batch may be parked because it is away, or
#: because workers die.
RETRY = RetryPolicy(1_000_000, 0.05, longest_delay=0.5, crashes=1_000_000)

#: With this a group notices a dead member soon.
KAFKA: dict[str, Any] = {"auto.offset.reset": "earliest", "session.timeout.ms": 4000}

#: A function that handles a message, given its key and its value.
Handle = Callable[[Any, Any], object]


@dataclass(frozen=True)
class PipelinePlan(Plan):
    """The settings of a worker.

    Attributes:
        journal: The folder of the workers' journals.
        kafka: The addresses of Kafka's servers; empty to read a stream.
        without: A check that is switched off: ``"offsets"``, ``"ids"``, ``"token"`` or none.
        linger: Seconds between a write and the report of it, in which kills can come.
    """

    journal: str = ""
    kafka: str = ""
    without: str = ""
    linger: float = 0.0


class LingeringTable(SqlTable):
    """A table whose writer pauses before it reports back, so that it may die in between.

    Attributes:
        linger: Seconds.
        checks: Whether the token is checked.
    """

    linger = 0.0
    checks = True

    def write(self, records: Sequence[Any]) -> None:
        """Write records."""
        if not self.checks:
            for record in records:
                record.__dict__["token"] = time.time_ns()  # greater than any before
        super().write(records)
        time.sleep(self.linger)


@contextlib.contextmanager
def keeping_what_fails() -> Iterator[None]:
    """Ignore errors of an unreachable database or server: Phonon keeps the data and retries."""
    try:
        yield
    except* (sa.exc.DBAPIError, ConnectionLostError):
        pass


class UncheckedStream(PlainStream):
    """Acknowledges entries whose sessions could not be written: Phonon has them."""

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Store the updates of the block."""
        with keeping_what_fails(), super().storing():
            yield


def work(plan: PipelinePlan) -> int:
    """Read, merge and write until a signal comes."""
    engine = sa.create_engine(plan.database)
    table = LingeringTable(engine, FLIGHTS.table, FLIGHTS.model)
    table.linger, table.checks = plan.linger, plan.without != "token"
    with connected({
        "url": plan.url, "namespace": plan.namespace, "heartbeat_interval": plan.heartbeat,
        "retry": RETRY,
    }) as process:  # fmt: skip
        records: Any = process.collect(FLIGHTS.model, plan.max_entries, sink=table)
        journal = Journal(plan.journal)

        def handle(key: Any, value: Any) -> None:
            journal.note("handled")
            records.add(key.decode(), *json.loads(value)[:-1])

        options: Any = {"batch_size": BATCH, "poll_timeout": 0.1, "sessions": records}
        if plan.without == "offsets":
            _read_without_offsets(plan, process, records, handle)
        elif plan.kafka:
            KafkaSource(
                process, kafka_config(plan.kafka, GROUP, **KAFKA), plan.stream, **options
            ).run(lambda message: handle(message.key(), message.value()))
        else:
            kind = UncheckedStream if plan.without == "ids" else StreamSource
            options |= {"claim_idle": 4 * plan.heartbeat}
            kind(process, plan.stream, GROUP, **options).run(
                lambda entry: handle(entry.fields[b"key"], entry.fields[b"value"])
            )
    engine.dispose()
    return 0


def _read_without_offsets(plan: PipelinePlan, process: Any, records: Any, handle: Handle) -> None:
    """Read as other programs do: the client commits the stored offsets automatically."""
    from confluent_kafka import Consumer  # noqa: PLC0415 - only for this broker

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    more: Any = {"auto.commit.interval.ms": COMMIT_INTERVAL, "enable.auto.offset.store": False}
    consumer: Any = Consumer(kafka_config(plan.kafka, GROUP, **KAFKA, **more))
    consumer.subscribe([plan.stream])
    while not stop.is_set():
        messages = [m for m in consumer.consume(BATCH, 0.1) if m.error() is None]
        with keeping_what_fails(), process.batch():
            for message in messages:
                handle(message.key(), message.value())
        for message in messages:
            try:
                consumer.store_offsets(message)
            except Exception:  # noqa: BLE001, S112 - another consumer has the partition now
                continue
    consumer.close()
    with keeping_what_fails():
        records.expire_all()
