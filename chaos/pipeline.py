"""``python -m chaos.pipeline``: strikes every part of a pipeline from a broker to a table.

A producer, a broker, four workers and PostgreSQL. Workers are killed and paused until they are
believed dead, so partitions are rebalanced and messages delivered again; connections are cut on
both sides; PostgreSQL is shut down at once (``immediate``) and started again. In the end every
figure in the table has to equal that of a plain loop over the produced messages. With one of the
checks switched off (``--without``) some must differ, or the run would prove nothing.
"""

import contextlib
import functools
import itertools
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import sqlalchemy as sa

from chaos.killer import Schedule
from chaos.mortal import MortalPostgreSQL, MortalServer
from chaos.pipeline_worker import StruckPlan
from chaos.proxy import CuttingProxy, KafkaProxy
from phonon import Process
from phonon.sinks import SqlTable
from phonon_demo.aggregations import FLIGHTS, Message
from phonon_demo.brokers import Broker, KafkaBroker, StreamBroker
from phonon_demo.demo import Table, add_up, differences, flights, read_table
from phonon_demo.errors import WorkerError
from phonon_demo.plan import GROUP
from phonon_demo.pool import Pool, Worker, wait_until_stored
from phonon_demo.postgres import url_in
from phonon_demo.server import onlooker
from phonon_demo.signals import interruptible

#: Seconds between two heartbeats, so that a death is noticed soon.
HEARTBEAT = 0.25
#: Keys in a worker's collection: fewer than in the data, so that sessions end all the time.
MAX_ENTRIES = 100
#: Seconds between two strikes of a kind, on average.
PAUSES, CUTS, RESTARTS = 4.0, 2.0, 15.0
#: Seconds between two kills, by source: a Kafka group needs four seconds to miss a member.
KILLS = {"kafka": 5.0, "streams": 2.5}
#: Messages produced per second.
RATE = 1500
#: Seconds between a write and the report of it.
LINGER = 0.05
#: The length of a pause in seconds: longer than it takes to be declared dead.
SHORTEST_PAUSE, LONGEST_PAUSE = 5 * HEARTBEAT, 10 * HEARTBEAT


@dataclass
class Options:
    """The options of a run.

    Attributes:
        source: ``"kafka"`` or ``"streams"``.
        kills: The number of kills after which to stop.
        workers: The number of workers.
        seed: Chooses messages and strikes.
        without: The check that is switched off.
    """

    source: str = "kafka"
    kills: int = 20
    workers: int = 4
    seed: int = 1
    without: str = ""


class PipelineResult(NamedTuple):
    """The result of a run.

    Attributes:
        produced: Messages produced.
        handled: Messages handled, at the least: a killed worker could not note its last ones.
        kills: Workers killed.
        pauses: Workers paused until they were believed dead.
        cuts: Connections cut, on both sides.
        restarts: The number of times that PostgreSQL was shut down at once.
        keys: Rows.
        differing: Wrong rows.
        surplus: Flights in the table, less those produced.
        parked: Parked batches.
        seconds: The time of the run.
    """

    produced: int
    handled: int
    kills: int
    pauses: int
    cuts: tuple[int, int, int]
    restarts: int
    keys: int
    differing: int
    surplus: int
    parked: int
    seconds: float

    @property
    def exact(self) -> bool:
        """Return whether the table is right and no batch is parked."""
        return not (self.differing or self.parked)


class StruckWorker(Worker):
    """A worker that may be paused.

    Args:
        plan: The worker's settings.
    """

    def __init__(self, plan: StruckPlan) -> None:
        super().__init__(plan, "chaos.pipeline_worker")
        self.paused_until = 0.0
        self._handled = Path(plan.handled)

    @property
    def is_at_work(self) -> bool:
        """Return whether the worker lives and has handled messages."""
        return self.is_alive and any(self._handled.glob(f"{self.popen.pid}-*"))

    def pause(self, seconds: float) -> None:
        """Stop it for some time."""
        self.popen.send_signal(signal.SIGSTOP)
        self.paused_until = time.monotonic() + seconds

    def go_on(self) -> None:
        """Let it go on."""
        self.paused_until = 0.0
        self.popen.send_signal(signal.SIGCONT)


class StruckPool(Pool):
    """A pool that replaces each worker that has died.

    Args:
        plan: The workers' settings.
        count: The number of workers.
    """

    workers: list[StruckWorker]  # type: ignore[assignment]  # all of them are

    def __init__(self, plan: StruckPlan, count: int) -> None:
        self._plan = plan
        super().__init__([StruckWorker(plan) for _ in range(count)])

    @property
    def alive(self) -> list[Worker]:
        """The workers, after each that has died was replaced.

        Raises:
            WorkerError: One has failed.
        """
        for i, worker in enumerate(self.workers):
            if not worker.is_alive:
                if worker.popen.returncode > 0:
                    raise WorkerError(f"a worker {worker.fate}")
                worker.kill()
                self.workers[i] = StruckWorker(self._plan)
        return list(self.workers)


class Producer(threading.Thread):
    """Sends flights at a pace, over and over, and adds them up.

    Args:
        broker: Takes the messages.
        seed: Chooses the flight to begin with.

    Attributes:
        count: The number of messages sent.
        expected: The rows that the table should have.
    """

    PIECE = 50

    def __init__(self, broker: Broker, seed: int) -> None:
        super().__init__(daemon=True)
        self.count = 0
        self.expected: Table = {}
        self._broker = broker
        self._seed = seed
        self._error: BaseException | None = None
        self._is_over = threading.Event()

    def run(self) -> None:
        """Send messages until `finish` is called."""
        stream = _messages(self._seed)
        try:
            while not self._is_over.wait(self.PIECE / RATE):
                some = list(itertools.islice(stream, self.PIECE))
                self._broker.produce(some)
                add_up(FLIGHTS, self.expected, some)
                self.count += len(some)
        except BaseException as error:  # noqa: BLE001 - `finish` raises it
            self._error = error

    def finish(self) -> None:
        """Stop."""
        self._is_over.set()
        self.join()
        if self._error is not None:
            raise self._error


def _messages(seed: int) -> Iterator[Message]:
    with flights() as rows:
        every = list(rows)
    return itertools.islice(itertools.cycle(every), seed * 1000 % len(every), None)


class UncheckedKafkaBroker(KafkaBroker):
    """Takes the offsets that clients have committed for the stored ones."""

    def stored(self, process: Process) -> int:
        """Return how many messages were committed."""
        from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415 - an extra

        del process
        consumer = Consumer({"bootstrap.servers": self.address, "group.id": GROUP, "log_level": 2})
        partitions = [TopicPartition(self.topic, p) for p in range(self.PARTITIONS)]
        try:
            return sum(max(0, p.offset) for p in consumer.committed(partitions, timeout=5))
        finally:
            consumer.close()


def _broker(options: Options, process: Process, url: str, topic: str) -> Broker:
    if options.source == "streams":
        return StreamBroker(process.client, url, topic)
    return UncheckedKafkaBroker(topic) if options.without == "offsets" else KafkaBroker(topic)


def run(options: Options) -> PipelineResult:
    """Run the pipeline under strikes, and compare."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="ph-")))
        handled = folder / "handled"
        handled.mkdir()
        server = enter(MortalServer(folder))
        proxy = enter(CuttingProxy(folder / "p", server.socket))
        postgres = enter(MortalPostgreSQL())
        database = enter(CuttingProxy(folder / postgres.SOCKET, postgres.socket))
        engine = sa.create_engine(postgres.url)
        stack.callback(engine.dispose)
        sink = SqlTable(engine, FLIGHTS.table, FLIGHTS.model)
        sink.create_table()
        engine.dispose()  # its connections would be cut
        topic = f"flights-{uuid.uuid4().hex[:8]}"
        process = enter(onlooker(server.url, f"chaos-{uuid.uuid4().hex[:8]}"))
        broker = _broker(options, process, server.url, topic)
        stack.callback(broker.close)
        front: CuttingProxy | None = None
        if options.source == "kafka":
            front = kafka = enter(KafkaProxy(broker.address))
        plan = StruckPlan(
            aggregation="flights",
            url=f"unix://{proxy.path}?db=1",
            namespace=process.namespace,
            source=options.source,
            broker=kafka.servers if front else broker.address,
            topic=topic,
            database=url_in(folder),
            max_entries=MAX_ENTRIES,
            heartbeat=HEARTBEAT,
            without=options.without,
            linger=LINGER,
            handled=str(handled),
        )
        producer = Producer(broker, options.seed)
        begun = time.monotonic()
        with StruckPool(plan, options.workers) as pool:
            producer.start()
            chaos = _Chaos(options, pool, (front, proxy, database), postgres)
            chaos.strike_until_done()
            producer.finish()
            wait_until_stored(broker, process, pool, producer.count)
            pool.leave()
        expected, found = producer.expected, read_table(engine, sink)
        return PipelineResult(
            produced=producer.count,
            handled=sum(int(file.read_text() or 0) for file in handled.iterdir()),
            kills=chaos.kills,
            pauses=chaos.pauses,
            cuts=(chaos.cuts[0], chaos.cuts[1], chaos.cuts[2]),
            restarts=chaos.restarts,
            keys=len(expected),
            differing=len(differences(expected, found)),
            surplus=sum(row["flights"] for row in found.values()) - producer.count,
            parked=len(process.parked()),
            seconds=time.monotonic() - begun,
        )


class _Chaos:
    def __init__(
        self,
        options: Options,
        pool: StruckPool,
        proxies: Sequence[CuttingProxy | None],
        postgres: MortalPostgreSQL,
    ) -> None:
        self._options = options
        self._pool = pool
        self._postgres = postgres
        self._chance = random.Random(options.seed)  # noqa: S311 - a schedule, no secret
        self.kills = self.pauses = self.restarts = 0
        self.cuts = [0] * len(proxies)
        kinds: list[tuple[float, Callable[[], None]]] = [
            (KILLS[options.source], self._kill),
            (PAUSES, self._pause),
            *(
                (CUTS, functools.partial(self._cut, which, proxy))
                for which, proxy in enumerate(proxies)
                if proxy is not None
            ),
            (RESTARTS, self._restart),
        ]
        self._schedule = Schedule(self._chance, kinds, delay=2.0)

    def strike_until_done(self) -> None:
        """Strike at random moments, until there were enough kills."""
        while self.kills < self._options.kills:
            _ = self._pool.alive  # replaces the dead
            now = time.monotonic()
            if any(worker.is_at_work for worker in self._pool.workers):
                self._schedule.strike()
            for worker in self._pool.workers:
                if worker.paused_until and now >= worker.paused_until:
                    worker.go_on()
            time.sleep(0.02)
        for worker in self._pool.workers:
            if worker.paused_until and worker.is_alive:
                worker.go_on()

    def _kill(self) -> None:
        # A worker that has handled messages, not one that is still starting.
        running = [w for w in self._pool.workers if w.is_at_work and not w.paused_until]
        if running:
            self._chance.choice(running).kill()
            self.kills += 1

    def _pause(self) -> None:
        running = [w for w in self._pool.workers if w.is_at_work and not w.paused_until]
        if len(running) > 1:
            self._chance.choice(running).pause(self._chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE))
            self.pauses += 1

    def _cut(self, which: int, proxy: CuttingProxy) -> None:
        self.cuts[which] += proxy.cut()

    def _restart(self) -> None:
        self._postgres.restart()
        self.restarts += 1


def report(options: Options, result: PipelineResult) -> str:
    """Return the result of a run as text."""
    repeated = result.handled - result.produced
    o = result
    lines = [
        f"{o.produced:,} messages through {options.source}, {o.seconds:.0f} s",
        f"handled at least {o.handled:,} times, so {max(repeated, 0):,} again",
        f"{o.kills} workers killed, {o.pauses} paused until believed dead",
        "connections cut: {:,} to Kafka, {:,} to Phonon's server (and its streams), {:,} to "
        "PostgreSQL".format(*o.cuts),
        f"PostgreSQL restarted {o.restarts} times",
        f"{o.differing} of {o.keys} rows differ from a plain loop, {o.parked} batches parked",
        f"flights in the table less those produced: {o.surplus:+,}",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--source", type=click.Choice(["kafka", "streams"]), default="kafka")
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--without", type=click.Choice(["offsets", "ids", "token"]), default=None)
def main(source: str, kills: int, workers: int, seed: int, without: str | None) -> None:
    """Strike a pipeline from a broker to a table, and compare."""
    options = Options(source, kills, workers, seed, without or "")
    result = run(options)
    click.echo(report(options, result))
    sys.exit(not result.exact)


if __name__ == "__main__":
    main()
