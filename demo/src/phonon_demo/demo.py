"""``phonon demo``: messages, many workers, one write for each key and session, and the check."""

import contextlib
import itertools
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa

from phonon import Process
from phonon.sinks import SqlTable, tokens_table
from phonon_demo.aggregations import FLIGHTS, Aggregation, Message, sums_of
from phonon_demo.brokers import Broker, KafkaBroker, StreamBroker
from phonon_demo.errors import InputError
from phonon_demo.plan import Plan
from phonon_demo.pool import Pool, Worker, wait_until_stored
from phonon_demo.postgres import PostgreSQL
from phonon_demo.rows import Rows, open_rows
from phonon_demo.server import forgetting, onlooker, private_server
from phonon_demo.signals import interruptible

FILE = "flights-2013-01.csv.gz"
TITLE = "Flights out of New York in January 2013, added up per aircraft"
#: Messages that are sent together.
PIECE = 500
#: The worker that is killed, counted from 0, and how many sessions it should have open then.
VICTIM, SESSIONS = 1, 100
#: The most keys that are listed because their rows are wrong.
LISTED = 20

#: Rows of the table, by key.
Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """The options of a run; see ``phonon demo --help``."""

    workers: int
    url: str | None
    input: str | None
    key: str | None
    sums: tuple[str, ...]
    max_entries: int
    database: str | None
    kill: bool
    source: str
    sink: str
    asyncio: bool
    updates: bool


@dataclass
class Lost:
    """A worker that was killed.

    Attributes:
        name: What messages call it.
        at: When it was killed, by the monotonic clock.
        sessions: The number of sessions that it had open.
    """

    name: str
    at: float
    sessions: int


def run(options: Options) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 if every row is right, else 1.

    Raises:
        InputError: The input or an option cannot be used.
        PhononError: The server cannot be used.
        WorkerError: A worker has failed, or none is left.
        Interrupted: By a signal.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        aggregation, rows = enter(_input(options))
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="ph-")))
        url = options.url or enter(private_server(folder))
        process = enter(onlooker(url, f"phonon-demo-{uuid.uuid4().hex[:12]}"))
        enter(forgetting(process))
        broker = _broker(options, process, url)
        stack.callback(broker.close)
        with _database(options, folder) as database:
            plan = Plan(
                aggregation="sums" if options.input else "flights",
                url=url,
                namespace=process.namespace,
                source=options.source,
                broker=broker.address,
                topic=broker.topic,
                database=database,
                max_entries=options.max_entries,
                updates=options.updates,
            )
            engine = sa.create_engine(database)
            stack.callback(engine.dispose)
            sink = SqlTable(engine, aggregation.table, aggregation.model)
            sink.create_table()
            tokens_table().create(engine)  # for --updates
            expected = _work(options, plan, rows, aggregation, broker, process)
            return _compare(expected, read_table(engine, sink))


def _work(
    options: Options,
    plan: Plan,
    rows: Rows[Message],
    aggregation: Aggregation,
    broker: Broker,
    process: Process,
) -> Table:
    """Send all messages, kill a worker meanwhile, and wait until all of them are in the table.

    Returns:
        The rows that the table should have.
    """
    module = "phonon_demo.async_worker" if options.asyncio else "phonon_demo.worker"
    with Pool([Worker(plan, module) for _ in range(options.workers)]) as pool:
        pids = ", ".join(str(worker.popen.pid) for worker in pool.workers if worker.process)
        where = "the server that you named" if options.url else "a server of their own"
        say(f"{len(pool.alive)} worker processes on {where}, their pids: {pids}")
        victim = pool.workers[VICTIM] if options.kill and options.workers > VICTIM else None
        if options.kill and victim is None:
            say("a single worker is not killed: no other would be left to take over")
        enough = min(SESSIONS, options.max_entries // 2)
        begun, count, lost = time.monotonic(), 0, None
        expected: Table = {}
        for some in _pieces(rows):
            broker.produce(some)
            add_up(aggregation, expected, some)
            count += len(some)
            if victim and lost is None and _sessions(process, victim.process) >= enough:
                lost = _kill(victim, process)
        if victim and lost is None:  # with less input than that, it is killed when all is stored
            wait_until_stored(broker, process, pool, count)
            lost = _kill(victim, process)
        wait_until_stored(broker, process, pool, count)
        if lost is not None:
            took = time.monotonic() - lost.at
            say(f"all of {lost.name} is taken over, {took:.1f} s after its death")
        written = pool.leave()
    if not count:
        rejected = ", ".join(f"{n:,} x {reason}" for reason, n in rows.rejected.items())
        raise InputError(f"{rows.name}: none of its rows can be used: {rejected}")
    seconds = time.monotonic() - begun
    click.echo(TITLE if options.input is None else f"{rows.name}, added up per {options.key!r}")
    _line("messages", count)
    _line("rejected rows", rows.rejected.total())
    for reason, number in rows.rejected.items():
        _line(f"  {reason}, first in line {rows.first[reason]:,}", number)
    _line("sessions written by workers that live", written)
    if lost is not None:
        _line("open sessions of the worker that was killed", lost.sessions)
    _line("messages per second", round(count / seconds))
    return expected


def _kill(victim: Worker, process: Process) -> Lost:
    """Kill a worker with SIGKILL, in the middle of its work."""
    victim.kill()
    name = f"worker {VICTIM + 1} (pid {victim.popen.pid})"
    lost = Lost(name, time.monotonic(), _sessions(process, victim.process))
    say(f"{name} was killed with SIGKILL; it held {lost.sessions:,} open sessions")
    return lost


def _sessions(process: Process, other: str) -> int:
    """Return how many sessions another process has open."""
    registry = process.registry_key.removesuffix(process.id) + other
    return len(process.get_registry(registry))


def add_up(aggregation: Aggregation, rows: Table, messages: Sequence[Message]) -> None:
    """Add messages to the rows that the table should have: the plain loop."""
    for key, content in messages:
        rows[key] = aggregation.expected(rows.get(key), content)


def read_table(engine: sa.Engine, sink: SqlTable) -> Table:
    """Return the rows of the table."""
    key, *others = [each for each in sink.table.c if each.name not in ("token", "phonon_state")]
    with engine.connect() as connection:
        found = connection.execute(sa.select(key, *others)).mappings()
        return {row[key.name]: {c.name: row[c.name] for c in others} for row in found}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the keys whose rows differ."""
    return [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]


def _compare(expected: Table, found: Table) -> int:
    wrong = differences(expected, found)
    for key in wrong[:LISTED]:
        click.echo(f"{key!r} should be {expected.get(key)} and is {found.get(key)}")
    keys = len(expected.keys() | found.keys())
    equal = f"{keys - len(wrong):,} of {keys:,} keys equal"
    click.echo(f"the table against a plain loop in one process: {equal}")
    return 1 if wrong else 0


def _pieces(rows: Rows[Message]) -> Iterator[list[Message]]:
    every = iter(rows)
    while some := list(itertools.islice(every, PIECE)):
        yield some


@contextlib.contextmanager
def _input(options: Options) -> Iterator[tuple[Aggregation, Rows[Message]]]:
    if options.input is not None:
        aggregation = sums_of(options.key or "", list(dict.fromkeys(options.sums)))
        with open_rows(options.input, aggregation.columns, aggregation.message) as rows:
            yield aggregation, rows
        return
    with flights() as rows:
        yield FLIGHTS, rows


@contextlib.contextmanager
def flights() -> Iterator[Rows[Message]]:
    """Open the flights."""
    with (
        resources.as_file(resources.files("phonon_demo") / FILE) as path,
        open_rows(str(path), FLIGHTS.columns, FLIGHTS.message) as rows,
    ):
        yield rows


def _broker(options: Options, process: Process, url: str) -> Broker:
    if options.source == "kafka":
        return KafkaBroker(process.namespace)
    # The stream is one of the namespace's keys, which are removed in the end.
    return StreamBroker(process.client, url, f"{{{process.namespace}}}:messages")


@contextlib.contextmanager
def _database(options: Options, folder: Path) -> Iterator[str]:
    """Yield the URL of a new database."""
    if options.sink == "postgresql":
        with PostgreSQL() as postgres:
            yield postgres.url
        return
    path = Path(options.database or folder / "demo.sqlite3").absolute()
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise InputError(
            f"{str(path)!r} is there already, and the demo adds to no file but its own: delete it, "
            "or name another with --database"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(
            f"{str(path)!r} cannot be made: {error}; name a file in another folder with --database"
        ) from error
    try:
        yield f"sqlite:///{path}?timeout=60"
    except BaseException:
        path.unlink(missing_ok=True)  # it would be in the way of the next run
        raise


def _line(name: str, number: int) -> None:
    click.echo(f"  {name:50}{number:>10,}")


def say(line: str) -> None:
    """Say how it goes."""
    click.echo(line, err=True)
