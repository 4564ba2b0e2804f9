"""The worker of `chaos.pipeline`: the demo's worker, with a pause after writes, and less checks."""

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa

from phonon import Process, RetryPolicy
from phonon.errors import ConnectionLostError, ServerUnreachableError
from phonon.sources.streams import StreamEntry, StreamSource
from phonon_demo.aggregations import AGGREGATIONS
from phonon_demo.plan import GROUP, Plan
from phonon_demo.worker import BATCH, CountedTable, Handle, kafka_config, main, read, say

#: Milliseconds between two automatic commits of a Kafka client.
COMMIT_INTERVAL = 1000


@dataclass(frozen=True)
class StruckPlan(Plan):
    """The settings of a worker.

    Attributes:
        without: A check that is switched off: ``"offsets"``, ``"ids"``, ``"token"`` or none.
        linger: Seconds between a write and the report of it, in which kills can come.
        handled: The folder where a worker notes the number of messages that it has handled.
    """

    without: str = ""
    linger: float = 0.0
    handled: str = ""


class LingeringTable(CountedTable):
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


class Handled:
    """Notes the number of handled messages in a file that outlives the worker."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._handled = 0

    def count(self) -> None:
        """Count one."""
        self._handled += 1
        # In place: a kill after truncating the file first would leave nothing.
        os.pwrite(self._file, b"%020d" % self._handled, 0)


class UncheckedStream(StreamSource):
    """Acknowledges stored entries, as other programs do, and checks no ids."""

    def _store(self, storing: Any, stream: str, raw: Sequence[Any]) -> None:
        with keeping_what_fails(), self._process.batch():
            for entry, fields in raw:
                if fields is not None:
                    content = fields
                    if not isinstance(fields, dict):
                        content = dict(zip(fields[::2], fields[1::2], strict=True))
                    storing.handle(StreamEntry(entry, content, stream))
        if raw:
            self._client.xack(stream, self._group, *[each for each, _ in raw])


def work(plan: StruckPlan) -> None:
    """Read, merge and write until a signal comes."""
    aggregation = AGGREGATIONS[plan.aggregation]
    engine = sa.create_engine(plan.database)
    sink = LingeringTable(engine, aggregation.table, aggregation.model)
    sink.linger, sink.checks = plan.linger, plan.without != "token"
    with _process(plan) as process:
        records: Any = process.collect(aggregation.model, plan.max_entries, sink=sink)
        handled = Handled(plan.handled)

        def handle(key: Any, value: Any) -> None:
            handled.count()
            records.add(key.decode(), *aggregation.values(json.loads(value)))

        say(process.id)
        if plan.without == "offsets":
            _read_without_offsets(plan, process, records, handle)
        elif plan.without == "ids":
            UncheckedStream(
                process, plan.topic, GROUP,
                batch_size=BATCH, poll_timeout=0.1, claim_idle=4 * plan.heartbeat, sessions=records,
            ).run(lambda entry: handle(entry.fields[b"key"], entry.fields[b"value"]))  # fmt: skip
        else:
            read(plan, process, records, handle)
    engine.dispose()
    say(json.dumps({"sessions": sink.written}))


def _read_without_offsets(plan: Plan, process: Process, records: Any, handle: Handle) -> None:
    """Read as other programs do: the client commits the stored offsets automatically."""
    from confluent_kafka import Consumer  # noqa: PLC0415 - an extra

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    more = {"auto.commit.interval.ms": COMMIT_INTERVAL, "enable.auto.offset.store": False}
    consumer: Any = Consumer(kafka_config(plan) | more)
    consumer.subscribe([plan.topic])
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


def _process(plan: Plan) -> Process:
    while True:
        with contextlib.suppress(ServerUnreachableError, redis.ConnectionError):
            return Process(
                url=plan.url,
                namespace=plan.namespace,
                heartbeat_interval=plan.heartbeat,
                # No batch may be parked because the database is away, or because workers die.
                retry=RetryPolicy(1_000_000, 0.05, longest_delay=0.5, crashes=1_000_000),
            )
        time.sleep(0.1)


if __name__ == "__main__":
    main(work, StruckPlan)
