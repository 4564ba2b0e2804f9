"""``python -m chaos.pipeline``: strikes every part of a pipeline from a broker to a table.

A producer, a broker, four workers and PostgreSQL. Workers are killed and paused until they are
believed dead, so partitions are rebalanced and messages delivered again; connections are cut on
both sides; PostgreSQL is shut down at once (``immediate``) and started again. In the end every
figure in the table has to equal that of a plain loop over the produced messages. With one of the
checks switched off (``--without``) some must differ, or the run would prove nothing.
"""

import contextlib
import json
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import redis
import sqlalchemy as sa

from chaos import journal
from chaos.pipeline_worker import PipelinePlan, work
from chaos.proxy import CuttingProxy, KafkaProxy
from chaos.servers import MockKafka, MortalServer, PostgreSQL, Producer, url_in
from chaos.strikes import Killer, Means, StruckPool
from phonon.admin import Admin
from phonon.cli.errors import one_line_errors
from phonon.sinks import SqlTable
from phonon_demo.demo import differences, end_on_signals, read_table, show
from phonon_demo.models import FLIGHTS, Message
from phonon_demo.pool import Stream
from phonon_demo.worker import GROUP

#: Seconds between two heartbeats, so that a death is noticed soon.
HEARTBEAT = 0.25
#: Keys in a worker's collection: fewer than in the data, so that sessions end all the time.
MAX_ENTRIES = 100
#: The rate of strikes, by source: a Kafka group needs four seconds to miss a member.
MEANS = {
    "kafka": Means(kill=5.0, pause=4.0, cut=2.0, restart=15.0),
    "streams": Means(kill=2.5, pause=4.0, cut=2.0, restart=15.0),
}
#: Messages produced in a second.
RATE = 1500
#: Messages that may be unstored when more are produced to the mock, which keeps some 10,000 of a
#: partition; and seconds in which consumers that are further behind have to come nearer.
MOST_BEHIND = 8000
PATIENCE = 120.0
#: Seconds between a write and the report of it.
LINGER = 0.05


class KafkaTopic:
    """A topic of a mock cluster.

    Args:
        kafka: The cluster.
        name: The name of the topic.
        admin: Knows Phonon's positions; None to take the offsets that clients have committed for
            the stored ones.
    """

    def __init__(self, kafka: MockKafka, name: str, admin: Admin | None) -> None:
        self._kafka = kafka
        self._name = name
        self._admin = admin
        self._count = 0
        self._positions: Counter[str] = Counter()

    def produce(self, messages: Sequence[Message]) -> None:
        """Send messages, when the consumers are not far behind: the mock deletes old messages."""
        give_up = time.monotonic() + PATIENCE
        while self._admin is not None and self._count - self._stored > MOST_BEHIND:
            if time.monotonic() > give_up:
                raise TimeoutError(f"{self._count - self._stored} messages are not stored")
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError):  # the server is started again
                self._look()
        self._kafka.produce(self._name, [(m.key, json.dumps(m.content).encode()) for m in messages])
        self._count += len(messages)

    def is_stored(self) -> bool:
        """Return whether all messages were stored."""
        if self._admin is None:
            return self._committed() >= self._count
        self._look()
        return self._stored >= self._count

    @property
    def _stored(self) -> int:
        return self._positions.total()

    def _look(self) -> None:
        """Take in what workers report; one that has lost a source reports an older position."""
        assert self._admin is not None
        for source in self._admin.sources():
            if source.position.isdigit():  # a new one has none
                known = self._positions[source.name]
                self._positions[source.name] = max(known, int(source.position))

    def _committed(self) -> int:
        from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415 - only for this broker

        consumer = Consumer(self._kafka.config(GROUP))
        partitions = [TopicPartition(self._name, p) for p in range(self._kafka.partitions)]
        try:
            return sum(max(0, p.offset) for p in consumer.committed(partitions, timeout=5))
        finally:
            consumer.close()


def run(
    source: str = "kafka", kills: int = 20, workers: int = 4, seed: int = 1, without: str = ""
) -> Counter[str]:
    """Run the pipeline under strikes, and compare.

    Args:
        source: ``"kafka"`` or ``"streams"``.
        kills: The number of kills after which to stop.
        workers: The number of workers.
        seed: Chooses messages and strikes.
        without: The check that is switched off.

    Returns:
        The strikes, and what came out.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="ph-")))
        notes = folder / "journals"
        notes.mkdir()
        server = enter(MortalServer(folder))
        postgres = enter(PostgreSQL())
        to_server = enter(CuttingProxy(folder / "p", server.socket))
        to_postgres = enter(CuttingProxy(folder / postgres.SOCKET, postgres.socket))
        proxies = {"cut: server": to_server, "cut: PostgreSQL": to_postgres}
        engine = sa.create_engine(postgres.url)
        stack.callback(engine.dispose)
        table = SqlTable(engine, FLIGHTS.table, FLIGHTS.model)
        table.create_table()
        engine.dispose()  # its connections would be cut
        name, namespace = f"flights-{uuid.uuid4().hex[:8]}", f"chaos-{uuid.uuid4().hex[:8]}"
        client = enter(redis.Redis.from_url(server.url))
        admin = enter(Admin(client=client, namespace=namespace))
        broker: Any = Stream(client, name)
        if source == "kafka":
            kafka = enter(contextlib.closing(MockKafka()))
            proxies["cut: Kafka"] = to_kafka = enter(KafkaProxy(kafka.servers))
            broker = KafkaTopic(kafka, name, admin if without != "offsets" else None)
        plan = PipelinePlan(
            url=f"unix://{to_server.path}?db=1",
            namespace=namespace,
            stream=name,
            database=url_in(folder),
            max_entries=MAX_ENTRIES,
            heartbeat=HEARTBEAT,
            journal=str(notes),
            kafka=to_kafka.servers if source == "kafka" else "",
            without=without,
            linger=LINGER,
        )
        producer = Producer(broker, seed, RATE)
        pool = enter(StruckPool(work, plan, workers))
        chance = random.Random(seed)  # noqa: S311 - a schedule, no secret
        killer = Killer(chance, pool, HEARTBEAT, MEANS[source], proxies, postgres)
        with producer:
            killer.strike_until(lambda: killer.strikes["kills"] >= kills)
        pool.wait(admin, broker.is_stored)
        pool.leave()
        expected, found = producer.expected, read_table(engine, table)
        handled = sum(journal.read(plan.journal)["handled"])
        killer.strikes.update({
            "messages": len(producer.sent),
            "handled again, at the least": max(0, handled - len(producer.sent)),
            "rows": len(expected),
            "rows that differ": len(differences(expected, found)),
            "flights too many": sum(row["flights"] for row in found.values()) - len(producer.sent),
            "batches parked": sum(1 for _ in admin.batches("parked")),
        })  # fmt: skip
        return killer.strikes


@click.command()
@click.option("--source", type=click.Choice(list(MEANS)), default="kafka", show_default=True)
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--without", type=click.Choice(["offsets", "ids", "token"]))
def main(without: str | None, **options: Any) -> None:
    """Strike a pipeline from a broker to a table, and compare."""
    end_on_signals()
    figures = run(without=without or "", **options)
    for name, number in figures.items():
        show(name, number)
    sys.exit(1 if figures["rows that differ"] or figures["batches parked"] else 0)


if __name__ == "__main__":
    with one_line_errors():
        main()
