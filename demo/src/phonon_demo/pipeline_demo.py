"""``phonon demo --source --sink``: from a broker to a table, while a worker is killed."""

import contextlib
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import click
import sqlalchemy as sa

from phonon import Process
from phonon_demo import pipeline
from phonon_demo.pipeline import Broker, KafkaBroker, Plan, Pool, StreamBroker
from phonon_demo.postgres import PostgreSQL
from phonon_demo.server import MortalServer
from phonon_demo.signals import interruptible

#: Messages in all, and a second.
MESSAGES, RATE = 20_000, 4000


@dataclass(frozen=True)
class Options:
    """What the user wants; see ``phonon demo --help``."""

    workers: int
    source: str
    sink: str
    kill: bool
    messages: int = MESSAGES


def run(options: Options) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 if every figure is right, else 1.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="ph-")))
        handled = folder / "handled"
        handled.mkdir()
        server = enter(MortalServer(folder))
        url = f"unix://{server.socket}?db=1"
        database = f"sqlite:///{folder}/demo.sqlite3"
        if options.sink == "postgresql":
            database = enter(PostgreSQL()).url
        engine = sa.create_engine(database)
        stack.callback(engine.dispose)
        namespace, topic = f"demo-{uuid.uuid4().hex[:8]}", "views"
        process = enter(Process(url=url, namespace=namespace, recover_failed_processes=False))
        broker: Broker = (
            KafkaBroker(topic) if options.source == "kafka" else StreamBroker(process, url, topic)
        )
        stack.callback(broker.close)
        plan = Plan(
            url, namespace, options.source, broker.servers, topic, database, handled=str(handled)
        )
        pipeline.create_table(engine)
        click.echo(f"{options.workers} workers read from {options.source}, write to {options.sink}")
        producer = pipeline.Producer(broker, 1, RATE, options.messages)
        begun = time.monotonic()
        with Pool(plan, options.workers) as pool:
            producer.start()
            if options.kill and options.workers > 1:
                _kill_one(pool)
            producer.join()
            totals = producer.finish()
            pipeline.wait_until_consumed(broker, process, plan, pool, totals.count)
            failures = pool.leave()
        seconds = time.monotonic() - begun
        expected, found = totals.rows(), pipeline.table_rows(engine)
        wrong = pipeline.compare(expected, found)
        times = pipeline.handled_by_all(handled)
        click.echo(f"{totals.count:,} messages produced, handled about {times:,} times")
        click.echo(f"{len(found)} rows after {seconds:.1f} s, of which {len(wrong)} are wrong")
        for text in failures:
            click.echo(text)
        click.echo("EXACT: every message counts once" if not wrong else "WRONG")
        return int(bool(wrong or failures))


def _kill_one(pool: Pool) -> None:
    """Kill a worker with SIGKILL once it is at work. Another one is started in its place."""
    give_up = time.monotonic() + pipeline.TIMEOUT
    while time.monotonic() < give_up:
        for worker in pool.workers:
            if worker.is_at_work:
                time.sleep(0.5)
                worker.kill()
                click.echo("one of them was killed with SIGKILL; its messages are delivered again")
                return
        time.sleep(0.05)
