"""``python -m chaos``: workers that are killed, paused and cut off all the time, and the check."""

import contextlib
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import redis

from chaos import jobs, journal
from chaos.jobs import NumberedUpdate
from chaos.ledger import audit
from chaos.proxy import CuttingProxy
from chaos.servers import MortalServer, Producer
from chaos.strikes import Killer, Means, StruckPool
from chaos.worker import StruckPlan, async_work, work
from phonon.admin import Admin
from phonon.settings import Durability
from phonon_demo.demo import keys_of, show
from phonon_demo.pool import Stream

#: Keys in a worker's cache: far fewer than there are, so that sessions end all the time.
MAX_ENTRIES = 1000
#: Seconds between two heartbeats. A worker that is silent for four of them is taken over.
HEARTBEAT = 0.25
#: Messages in a second.
RATE = 3000
NAMESPACE, STREAM = "phonon-chaos", "messages"
#: The most leftovers that are listed.
LISTED = 10


@dataclass(frozen=True)
class Options:
    """The options of a run; see ``python -m chaos --help``."""

    workers: int
    seconds: float | None
    kills: int | None
    seed: int
    cut: bool
    restart_server: bool
    verbose: bool = False
    asyncio: bool = False


def run(
    options: Options, update: type[NumberedUpdate] = NumberedUpdate, *, checks: bool = True
) -> int:
    """Run workers under strikes, and audit the result.

    Args:
        options: The options.
        update: Another class of updates, for tests.
        checks: Whether the database checks the token.

    Returns:
        The exit status: 0 if nothing was lost, doubled or left behind, else 1.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="phonon-chaos-")))
        notes = folder / "journals"
        notes.mkdir()
        server = enter(MortalServer(folder, sync=True))
        proxy = enter(CuttingProxy(folder / "p", server.socket))
        database = enter(jobs.create(str(folder / "chaos.sqlite3")))
        admin = enter(Admin(server.url, namespace=NAMESPACE))
        client = enter(redis.Redis.from_url(server.url))
        stream = Stream(client, STREAM)
        plan = StruckPlan(
            url=f"unix://{proxy.path}?db=1",
            namespace=NAMESPACE,
            stream=STREAM,
            database=str(folder / "chaos.sqlite3"),
            max_entries=MAX_ENTRIES,
            heartbeat=HEARTBEAT,
            journal=str(notes),
            update=update,
            checks=checks,
            durability=Durability() if options.restart_server else None,
            verbose=options.verbose,
        )
        producer = Producer(stream, options.seed, RATE)
        pool = enter(StruckPool(async_work if options.asyncio else work, plan, options.workers))
        killer = Killer(
            random.Random(options.seed),  # noqa: S311 - a schedule, no secret
            pool,
            HEARTBEAT,
            Means(kill=0.35, pause=1.5, cut=0.8, restart=6.0),
            {"connections cut": proxy} if options.cut else {},
            server if options.restart_server else None,
        )
        begun = time.monotonic()

        def is_over() -> bool:
            return (
                options.seconds is not None and time.monotonic() - begun >= options.seconds
            ) or (options.kills is not None and killer.strikes["kills"] >= options.kills)

        with producer:
            killer.strike_until(is_over)
        pool.wait(admin, stream.is_stored)
        pool.leave()
        seconds = time.monotonic() - begun
        said = journal.read(plan.journal)
        acknowledged = [number for some in said["acknowledged"] for number in some]
        verdict = audit(producer.sent, acknowledged, jobs.read(database))
        parked = sum(1 for _ in admin.batches("parked"))
        left = leftovers(client)
        counts = {
            "workers killed with SIGKILL": killer.strikes["kills"],
            "workers paused until believed dead": killer.strikes["pauses"],
            "connections cut": killer.strikes["connections cut"],
            "server killed and started again": killer.strikes["restarts"],
            "workers that died by themselves": pool.died - killer.strikes["kills"],
            "messages sent": len(producer.sent),
            "deliveries acknowledged": verdict.acknowledged,
            "  lost": verdict.lost,
            "deliveries unacknowledged, but stored": verdict.unacknowledged,
            "deliveries doubled": verdict.doubled,
            "deliveries in the wrong row": verdict.foreign,
            "sessions written": sum(said["written"]),
            "sessions taken over": sum(said["sessions"]),
            "  batches executed in doing so": sum(said["batches"]),
            "zombies that went on under a new id": sum(said["reborn"]),
            "repeats skipped by token": sum(said["repeated"]),
            "batches parked": parked,
            "leftovers on the server": len(left),
            "seconds": round(seconds),
        }
        for name, count in counts.items():
            show(name, count)
        equal = f"{verdict.keys - verdict.differing:,} of {verdict.keys:,} keys equal"
        click.echo(f"SQLite against a plain loop over the messages there: {equal}")
        for name in left[:LISTED]:
            click.echo(f"left on the server: {name}")
        exact = verdict.exact and not parked and not left
        click.echo(
            "EXACT: nothing acknowledged was lost, nothing doubled" if exact else "NOT EXACT"
        )
        return 0 if exact else 1


def leftovers(client: "redis.Redis") -> list[str]:
    """Return keys without an expiry, and processes that are still listed."""
    left = []
    for key in keys_of(client, NAMESPACE):
        name = key.decode()
        kind = name.partition("}:")[2]
        if kind not in ("token", "epoch", "partitions") and client.ttl(name) == -1:
            left.append(name)
    return sorted(left)
