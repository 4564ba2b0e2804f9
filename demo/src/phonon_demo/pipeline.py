"""From a broker to a table: what the demo and the chaos run have in common.

A producer numbers nothing and marks nothing; workers read from Kafka or from a stream, merge, and
write to PostgreSQL or SQLite. What is in the table in the end has to be what a plain loop over the
produced messages comes to.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import sqlalchemy as sa

from phonon import Process
from phonon.errors import ConnectionLostError
from phonon.sinks import SqlTable

#: Seconds between two heartbeats, so that a dead worker is taken over from soon.
HEARTBEAT = 0.25
#: Keys, of which some are far more frequent than others, and pages.
KEYS, PAGES = 300, 20
#: The table.
TABLE = "views"
#: Seconds within which all that was produced is in the table.
TIMEOUT = 120.0
#: The consumer group.
GROUP = "pipeline"


@dataclass(frozen=True)
class Plan:
    """What a worker is told.

    Attributes:
        url: The server of Phonon.
        namespace: Phonon's.
        source: ``"kafka"`` or ``"streams"``.
        broker: Kafka's servers, or the URL of the stream's server.
        topic: The topic, or the stream.
        database: SQLAlchemy's URL.
        without: A check that is switched off: ``"offsets"``, ``"ids"`` or ``"token"``.
        linger: Seconds between a write and the report of it, for kills to come in between.
        handled: Where a worker enters how many messages it has handled.
    """

    url: str
    namespace: str
    source: str
    broker: str
    topic: str
    database: str
    without: str = ""
    linger: float = 0.0
    handled: str = ""


class Message(NamedTuple):
    """A message: somebody has seen a page for so many seconds."""

    key: str
    page: str
    seconds: int

    @property
    def value(self) -> bytes:
        """As it travels."""
        return f"{self.page} {self.seconds}".encode()


def messages(seed: int) -> Iterator[Message]:
    """Return messages without end, the keys by Zipf's law."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    weights = list(itertools.accumulate(1 / rank for rank in range(1, KEYS + 1)))
    while True:
        for key in chance.choices(range(KEYS), cum_weights=weights, k=1000):
            yield Message(f"user-{key}", f"/{chance.randrange(PAGES)}", chance.randrange(600))


class Totals:
    """A plain loop over the messages. It shares no code with what it checks."""

    def __init__(self) -> None:
        self.count = 0
        self.views: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.longest: Counter[str] = Counter()
        self.pages: dict[str, Counter[str]] = {}

    def add(self, message: Message) -> None:
        """Count a message."""
        key = message.key
        self.count += 1
        self.views[key] += 1
        self.seconds[key] += message.seconds
        self.longest[key] = max(self.longest[key], message.seconds)
        self.pages.setdefault(key, Counter())[message.page] += 1

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Return what ought to be in the table."""
        return {
            key: (self.views[key], self.seconds[key], self.longest[key], dict(self.pages[key]))
            for key in self.views
        }


def create_table(engine: sa.Engine) -> None:
    """Create the table that the workers write to."""
    from phonon_demo.pipeline_worker import PageViews  # noqa: PLC0415 - it imports this file

    SqlTable(engine, TABLE, PageViews).create_table()


def table_rows(engine: sa.Engine) -> dict[str, tuple[Any, ...]]:
    """Return what is in the table."""
    table = sa.Table(TABLE, sa.MetaData(), autoload_with=engine)
    columns = [table.c[name] for name in ("user", "views", "seconds", "longest", "pages")]
    with engine.connect() as connection:
        return {
            key: (views, seconds, longest, json.loads(pages) if type(pages) is str else pages)
            for key, views, seconds, longest, pages in connection.execute(sa.select(*columns))
        }


class Broker(Protocol):
    """Where messages come from."""

    servers: str

    def produce(self, some: Sequence[Message]) -> None:
        """Send messages."""

    def consumed(self, process: Process, plan: Plan) -> int:
        """Return how many were stored, or acknowledged."""

    def close(self) -> None:
        """End it."""


class KafkaBroker:
    """Librdkafka's mock cluster: the real protocol, without a JVM."""

    PARTITIONS = 4

    def __init__(self, topic: str) -> None:
        from confluent_kafka import Producer  # noqa: PLC0415 - an extra

        self._topic = topic
        self._cluster: Any = Producer(
            {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2}
        )
        brokers = self._cluster.list_topics(timeout=10).brokers.values()
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self._producer: Any = Producer({"bootstrap.servers": self.servers, "log_level": 2})

    def produce(self, some: Sequence[Message]) -> None:
        """Send messages."""
        for message in some:
            self._producer.produce(self._topic, message.value, message.key)
        self._producer.flush(10)

    def consumed(self, process: Process, plan: Plan) -> int:
        """Return how many were stored: by Phonon's positions, or by what was committed."""
        from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415 - an extra

        if plan.without != "offsets":
            sources = process.engine.sources
            names = [f"kafka/{GROUP}/{self._topic}/{p}" for p in range(self.PARTITIONS)]
            return sum(process.engine.run(sources.position(name)) or 0 for name in names)
        consumer = Consumer({"bootstrap.servers": self.servers, "group.id": GROUP, "log_level": 2})
        partitions = [TopicPartition(self._topic, p) for p in range(self.PARTITIONS)]
        try:
            return sum(max(0, p.offset) for p in consumer.committed(partitions, timeout=5))
        finally:
            consumer.close()

    def close(self) -> None:
        """End it."""
        del self._producer, self._cluster


class StreamBroker:
    """A stream on Phonon's own server."""

    def __init__(self, process: Process, url: str, topic: str) -> None:
        self.servers = url
        self._client: Any = process.client
        self._topic = topic
        self._count = 0

    def produce(self, some: Sequence[Message]) -> None:
        """Add entries."""
        pipeline = self._client.pipeline(transaction=False)
        for message in some:
            pipeline.xadd(self._topic, {"key": message.key, "value": message.value})
        pipeline.execute()
        self._count += len(some)

    def consumed(self, process: Process, plan: Plan) -> int:
        """Return how many were acknowledged."""
        del process, plan
        groups = self._client.xinfo_groups(self._topic)
        if not groups:
            return 0
        return self._count - int(groups[0]["pending"]) - int(groups[0]["lag"] or 0)

    def close(self) -> None:
        """Delete the stream."""
        self._client.delete(self._topic)


class Producer(threading.Thread):
    """Sends messages at a pace, and keeps the totals.

    Args:
        broker: Where to.
        seed: Chooses the messages.
        rate: Messages a second.
        most: Stop by itself after so many.
    """

    PIECE = 50

    def __init__(self, broker: Broker, seed: int, rate: float, most: int | None = None) -> None:
        super().__init__(daemon=True)
        self.totals = Totals()
        self.error: BaseException | None = None
        self._broker = broker
        self._seed = seed
        self._pause = self.PIECE / rate
        self._most = most
        self._stop_ = threading.Event()

    def run(self) -> None:
        """Send messages until `finish` is called."""
        stream = messages(self._seed)
        try:
            while not self._stop_.wait(self._pause):
                some = list(itertools.islice(stream, self.PIECE))
                self._broker.produce(some)
                for message in some:
                    self.totals.add(message)
                if self._most is not None and self.totals.count >= self._most:
                    return
        except BaseException as error:  # noqa: BLE001 - for whoever waits for it
            self.error = error

    def finish(self) -> Totals:
        """Stop, and return the totals."""
        self._stop_.set()
        self.join()
        if self.error is not None:
            raise self.error
        return self.totals


class Worker:
    """A worker, an OS process of its own.

    Args:
        plan: What it is told.
    """

    def __init__(self, plan: Plan) -> None:
        command = [sys.executable, "-m", "phonon_demo.pipeline_worker", json.dumps(asdict(plan))]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE)  # noqa: S603 - our own
        self.paused_until = 0.0
        self._handled = Path(plan.handled)

    @property
    def is_at_work(self) -> bool:
        """Whether it lives, and has handled messages."""
        return self.is_alive and any(self._handled.glob(f"{self.popen.pid}-*"))

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.popen.kill()
        self.popen.wait()
        self._close()

    def pause(self, seconds: float) -> None:
        """Stop it for some time."""
        self.popen.send_signal(signal.SIGSTOP)
        self.paused_until = time.monotonic() + seconds

    def go_on(self) -> None:
        """Let it go on."""
        self.paused_until = 0.0
        self.popen.send_signal(signal.SIGCONT)

    def leave(self) -> str:
        """Let it end its sessions and leave. Returns what it has said if it failed."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            _, text = self.popen.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            return "a worker does not leave"
        return "" if self.popen.returncode == 0 else text.decode()

    def _close(self) -> None:
        if self.popen.stderr is not None:
            self.popen.stderr.close()


class Pool:
    """Workers, of which each that has died is replaced.

    Args:
        plan: What they are told.
        count: How many there are.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self._plan = plan
        self._count = count
        self.workers = [Worker(plan) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            if worker.is_alive:
                worker.kill()

    def replace(self) -> None:
        """Start a worker for each that has died.

        Raises:
            RuntimeError: One has given up by itself.
        """
        for i, worker in enumerate(self.workers):
            if not worker.is_alive:
                if worker.popen.returncode > 0:
                    _, text = worker.popen.communicate()
                    raise RuntimeError(f"a worker has given up: {text.decode()}")
                self.workers[i] = Worker(self._plan)

    def leave(self) -> list[str]:
        """Let all leave. Returns what those have written that failed."""
        failed = [worker.leave() for worker in self.workers]
        return [text for text in failed if text]


def wait_until_consumed(
    broker: Broker, process: Process, plan: Plan, pool: Pool, most: int
) -> None:
    """Wait until all was stored, and all of the dead was taken over.

    Raises:
        TimeoutError: It takes too long.
    """
    give_up = time.monotonic() + TIMEOUT
    while True:
        pool.replace()
        with contextlib.suppress(ConnectionError):
            consumed = broker.consumed(process, plan)
            listed = int(process.client.zcard(process.heartbeat_hash_name))
            if consumed >= most and listed == len(pool.workers) + 1:
                return
            if time.monotonic() > give_up:
                raise TimeoutError(
                    f"{consumed:,} of {most:,} messages were stored after {TIMEOUT:g} s, and "
                    f"{listed} processes are listed"
                )
        time.sleep(0.1)


def compare(expected: dict[str, tuple[Any, ...]], found: dict[str, tuple[Any, ...]]) -> list[str]:
    """Return the keys whose rows differ."""
    return [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]


def handled_by_all(folder: Path) -> int:
    """Return how many messages the workers have handled, repeated ones included."""
    return sum(int(file.read_text() or 0) for file in folder.iterdir())


def handled_file(folder: str) -> Path:
    """Return where this worker enters how many messages it has handled."""
    return Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex}"


@contextlib.contextmanager
def keeping_what_fails() -> Iterator[None]:
    """Go on when a database or the server is away: Phonon keeps the data, and tries it again."""
    try:
        yield
    except* (sa.exc.DBAPIError, ConnectionLostError):
        pass
