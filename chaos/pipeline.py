"""``python -m chaos.pipeline``: from a broker to a table, while everything is struck.

A producer, a broker, four workers and PostgreSQL. Workers are killed and paused until they are
believed dead, so partitions are rebalanced and messages delivered again; their connections to the
broker, to Phonon's server and to PostgreSQL are cut in the middle of whatever they say; PostgreSQL
is shut down at once (``immediate``) and started again. In the end every
figure in the table has to be that of a plain loop over the produced messages. With one of the
checks switched off (``--without``) it must not be, or the run shows nothing.
"""

import contextlib
import functools
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import sqlalchemy as sa

from chaos.proxy import KafkaProxy, Proxy
from phonon import Process
from phonon_demo import pipeline
from phonon_demo.pipeline import HEARTBEAT, Broker, KafkaBroker, Plan, Pool, StreamBroker
from phonon_demo.postgres import PostgreSQL
from phonon_demo.server import MortalServer
from phonon_demo.signals import interruptible

#: Seconds between two strikes of a kind, on average.
PAUSES, CUTS, RESTARTS = 4.0, 2.0, 15.0
#: Between two kills, by source: a group of Kafka's needs four seconds to miss a member.
KILLS = {"kafka": 5.0, "streams": 2.5}
#: Messages a second that are produced.
RATE = 1500
#: Seconds between a write and the report of it.
LINGER = 0.05
#: How long a pause is, in seconds: longer than it takes to be believed dead.
SHORTEST_PAUSE, LONGEST_PAUSE = 5 * HEARTBEAT, 10 * HEARTBEAT


@dataclass
class Options:
    """What to do.

    Attributes:
        source: ``"kafka"`` or ``"streams"``.
        kills: After how many kills to stop.
        workers: How many there are.
        seed: Chooses messages and strikes.
        without: The check that is switched off.
    """

    source: str = "kafka"
    kills: int = 20
    workers: int = 4
    seed: int = 1
    without: str = ""


class Outcome(NamedTuple):
    """What a run has come to.

    Attributes:
        produced: Messages.
        handled: How often a worker has handled one, at the least: those who were killed could not
            enter their last ones.
        kills: Workers killed.
        pauses: Workers paused until they were believed dead.
        cuts: Connections cut: to the broker, to Phonon's server, to PostgreSQL.
        restarts: How often PostgreSQL was shut down at once.
        keys: Rows.
        differing: Rows that are not what they ought to be.
        surplus: Views in the table, less those produced.
        parked: Batches that were given up on.
        failures: What workers have said that failed.
        seconds: How long it took.
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
    failures: list[str]
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether the table is right, and nothing else is wrong."""
        return not (self.differing or self.parked or self.failures)


def run(options: Options) -> Outcome:
    """Let the pipeline work and be struck, and compare."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="ph-")))
        handled = folder / "handled"
        handled.mkdir()
        server = enter(MortalServer(folder))
        proxy = enter(Proxy(folder / "p", server.socket))
        postgres = enter(PostgreSQL())
        database = enter(Proxy(folder / postgres.SOCKET, postgres.socket))
        engine = sa.create_engine(postgres.url)
        stack.callback(engine.dispose)
        namespace, topic = f"chaos-{uuid.uuid4().hex[:8]}", f"views-{uuid.uuid4().hex[:8]}"
        url = f"unix://{server.socket}?db=1"
        process = enter(Process(url=url, namespace=namespace, recover_failed_processes=False))
        broker: Broker = (
            KafkaBroker(topic)
            if options.source == "kafka"
            else StreamBroker(process, f"unix://{server.socket}?db=1", topic)
        )
        stack.callback(broker.close)
        # Both speak to the same server, over connections that are cut at other times.
        if options.source == "kafka":
            kafka = enter(KafkaProxy(broker.servers))
            front: Proxy = kafka
            servers = kafka.servers
        else:
            front = enter(Proxy(folder / "b", server.socket))
            servers = f"unix://{front.path}?db=1"
        plan = Plan(
            url=f"unix://{proxy.path}?db=1",
            namespace=namespace,
            source=options.source,
            broker=servers,
            topic=topic,
            database=postgres.url_in(folder),
            without=options.without,
            linger=LINGER,
            handled=str(handled),
        )
        pipeline.create_table(engine)
        engine.dispose()  # its connections will not survive
        producer = pipeline.Producer(broker, options.seed, RATE)
        begun = time.monotonic()
        with Pool(plan, options.workers) as pool:
            producer.start()
            chaos = _Chaos(options, pool, (front, proxy, database), postgres)
            chaos.strike_until_done()
            totals = producer.finish()
            pipeline.wait_until_consumed(broker, process, plan, pool, totals.count)
            failures = pool.leave()
        expected, found = totals.rows(), pipeline.table_rows(engine)
        return Outcome(
            produced=totals.count,
            handled=pipeline.handled_by_all(handled),
            kills=chaos.kills,
            pauses=chaos.pauses,
            cuts=(chaos.cuts[0], chaos.cuts[1], chaos.cuts[2]),
            restarts=chaos.restarts,
            keys=len(expected),
            differing=len(pipeline.compare(expected, found)),
            surplus=sum(row[0] for row in found.values()) - totals.count,
            parked=len(process.parked()),
            failures=failures,
            seconds=time.monotonic() - begun,
        )


class _Chaos:
    def __init__(
        self, options: Options, pool: Pool, proxies: Sequence[Proxy], postgres: PostgreSQL
    ) -> None:
        self._options = options
        self._pool = pool
        self._proxies = proxies
        self._postgres = postgres
        self._chance = random.Random(options.seed)  # noqa: S311 - a schedule, no secret
        self.kills = self.pauses = self.restarts = 0
        self.cuts = [0] * len(proxies)
        self._kinds: list[tuple[float, Any]] = [
            (KILLS[options.source], self._kill),
            (PAUSES, self._pause),
            *((CUTS, functools.partial(self._cut, which)) for which in range(len(proxies))),
            (RESTARTS, self._restart),
        ]
        now = time.monotonic() + 2.0
        self._due = [now + mean / 2 for mean, _ in self._kinds]

    def strike_until_done(self) -> None:
        """Strike at random moments, until there were enough kills."""
        while self.kills < self._options.kills:
            self._pool.replace()
            now = time.monotonic()
            for i, (mean, strike) in enumerate(self._kinds):
                if now >= self._due[i] and any(w.is_at_work for w in self._pool.workers):
                    strike()
                    self._due[i] = time.monotonic() + self._chance.expovariate(1 / mean)
            for worker in self._pool.workers:
                if worker.paused_until and now >= worker.paused_until:
                    worker.go_on()
            time.sleep(0.02)
        for worker in self._pool.workers:
            if worker.paused_until and worker.is_alive:
                worker.go_on()

    def _kill(self) -> None:
        # One that is at work, and has not only begun to start.
        running = [w for w in self._pool.workers if w.is_at_work and not w.paused_until]
        if running:
            self._chance.choice(running).kill()
            self.kills += 1

    def _pause(self) -> None:
        running = [w for w in self._pool.workers if w.is_at_work and not w.paused_until]
        if len(running) > 1:
            self._chance.choice(running).pause(self._chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE))
            self.pauses += 1

    def _cut(self, which: int) -> None:
        self.cuts[which] += self._proxies[which].cut()

    def _restart(self) -> None:
        self._postgres.restart()
        self.restarts += 1


def report(options: Options, outcome: Outcome) -> str:
    """Return what a run has come to, for people."""
    repeated = outcome.handled - outcome.produced
    o = outcome
    lines = [
        f"{o.produced:,} messages through {options.source}, {o.seconds:.0f} s",
        f"handled at least {o.handled:,} times, so {max(repeated, 0):,} again",
        f"{o.kills} workers killed, {o.pauses} paused until believed dead",
        "connections cut: {:,} to the broker, {:,} to Phonon's server, {:,} to PostgreSQL".format(
            *o.cuts
        ),
        f"PostgreSQL restarted {o.restarts} times",
        f"{o.differing} of {o.keys} rows differ from a plain loop, {o.parked} batches parked",
        f"views in the table less those produced: {o.surplus:+,}",
    ]
    return "\n".join([*lines, *outcome.failures])


@click.command()
@click.option("--source", type=click.Choice(["kafka", "streams"]), default="kafka")
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--without", type=click.Choice(["offsets", "ids", "token"]), default=None)
def main(source: str, kills: int, workers: int, seed: int, without: str | None) -> None:
    """Strike a pipeline from a broker to a table, and compare."""
    options = Options(source, kills, workers, seed, without or "")
    outcome = run(options)
    click.echo(report(options, outcome))
    sys.exit(not outcome.exact)


if __name__ == "__main__":
    main()
