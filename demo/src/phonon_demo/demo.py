"""``phonon demo``: messages, many workers, one write for each key and session, and the check."""

import contextlib
import itertools
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click
import redis
import sqlalchemy as sa

from phonon import embedded
from phonon.admin import Admin
from phonon.cli.errors import CommandInterrupt
from phonon.sinks import SqlTable
from phonon_demo import async_worker, worker
from phonon_demo.models import FLIGHTS, Job, Table
from phonon_demo.pool import Pool, Stream, Worker
from phonon_demo.rows import InputError, Rows, lines_of
from phonon_demo.worker import Plan

#: Messages that are sent together.
PIECE = 500
#: The worker that is killed, counted from 0, and how many sessions it should have open then.
VICTIM, SESSIONS = 1, 100
#: The most keys that are listed because their rows are wrong.
LISTED = 20


def run(
    job: Job,
    path: str | None,
    workers: int,
    url: str | None,
    max_entries: int,
    database: str | None,
    *,
    kill: bool,
    is_async: bool,
) -> int:
    """Run the demo; see ``phonon demo --help``. Return the exit status."""
    end_on_signals()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        rows = flights() if path is None else Rows(job, path, lines_of(path))
        file = enter(_new_database(database, enter(tempfile.TemporaryDirectory(prefix="ph-"))))
        if url is None or url.startswith("embedded://"):
            folder = (url or "").removeprefix("embedded://") or None
            url = f"unix://{enter(embedded.start(folder)).socket_path}?db=1"
        client = enter(_client(url))
        namespace = f"phonon-demo-{uuid.uuid4().hex[:12]}"
        stack.callback(remove_namespace, client, namespace)
        admin = enter(Admin(client=client, namespace=namespace))
        stream = Stream(client, f"{{{namespace}}}:messages")
        engine = sa.create_engine(file)
        stack.callback(engine.dispose)
        table = SqlTable(engine, job.table, job.model)
        table.create_table()
        plan = Plan(url, namespace, stream.name, file, job.table, max_entries)
        program = async_worker.work if is_async else worker.work
        with Pool([Worker(program, plan) for _ in range(workers)]) as pool:
            expected = work(pool, rows, stream, admin, min(SESSIONS, max_entries // 2), kill=kill)
        return compare(expected, read_table(engine, table))


def end_on_signals() -> None:
    """Raise an error at the first signal, and ignore further ones during the cleanup."""
    # A signal that is ignored, by nohup for example, stays ignored.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ours = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]

    def end(number: int, _: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise CommandInterrupt(number)

    for number in ours:
        signal.signal(number, end)


def work(pool: Pool, rows: Rows, stream: Stream, admin: Admin, most: int, *, kill: bool) -> Table:
    """Send all messages, kill a worker meanwhile, and wait until all of them are in the table.

    Returns:
        The rows that the table should have.
    """
    pool.wait(admin)
    say(f"{len(pool.alive)} workers, their pids: {', '.join(str(w.pid) for w in pool.alive)}")
    victim = pool.workers[VICTIM] if kill and len(pool.workers) > VICTIM else None
    if kill and victim is None:
        say("a single worker is not killed: no other would be left to take over")
    expected: Table = {}
    begun, count, killed = time.monotonic(), 0, 0.0
    messages = iter(rows)
    while some := list(itertools.islice(messages, PIECE)):
        stream.produce(some)
        rows.job.add_up(expected, some)
        count += len(some)
        if victim and not killed and open_sessions(admin, victim) >= most:
            killed = kill_worker(victim, admin)
    if victim and not killed:  # with less input than that, it is killed when all is stored
        pool.wait(admin, stream.is_stored)
        killed = kill_worker(victim, admin)
    pool.wait(admin, stream.is_stored)
    if killed:
        say(f"all of it is taken over, {time.monotonic() - killed:.1f} s after its death")
    written, seconds = pool.leave(), time.monotonic() - begun
    if not count:
        reasons = ", ".join(f"{n:,} x {reason}" for reason, n in rows.rejected.items())
        raise InputError(f"{rows.name}: none of its rows can be used: {reasons or 'it has none'}")
    click.echo(f"{rows.name}, added up per {rows.job.columns[0]}")
    show("messages", count)
    show("rejected rows", rows.rejected.total())
    for reason, number in rows.rejected.items():
        show(f"  {reason}", number)
    show("sessions written by workers that live", written)
    show("messages per second", round(count / seconds))
    return expected


def kill_worker(victim: Worker, admin: Admin) -> float:
    """Kill a worker with SIGKILL, in the middle of its work. Return when that was."""
    victim.kill()
    held = open_sessions(admin, victim)
    say(f"worker {victim.pid} was killed with SIGKILL; it held {held:,} open sessions")
    return time.monotonic()


def open_sessions(admin: Admin, one: Worker) -> int:
    """Return how many sessions a worker has open."""
    return sum(each.memberships for each in admin.processes() if each.pid == one.pid)


def read_table(engine: sa.Engine, table: SqlTable) -> Table:
    """Return the rows of the table."""
    key, *others = [each for each in table.table.c if each.name not in ("token", "phonon_state")]
    with engine.connect() as connection:
        found = connection.execute(sa.select(key, *others)).mappings()
        return {row[key.name]: {c.name: row[c.name] for c in others} for row in found}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the keys whose rows differ."""
    return [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]


def compare(expected: Table, found: Table) -> int:
    """Show the rows that differ. Return the exit status: 0 if none does, else 1."""
    wrong = differences(expected, found)
    for key in wrong[:LISTED]:
        click.echo(f"{key!r} should be {expected.get(key)} and is {found.get(key)}")
    keys = len(expected.keys() | found.keys())
    equal = f"{keys - len(wrong):,} of {keys:,} keys equal"
    click.echo(f"the table against a plain loop in one process: {equal}")
    return 1 if wrong else 0


def flights() -> Rows:
    """Return the flights."""
    path = resources.files("phonon_demo") / "flights-2013-01.csv.gz"
    return Rows(FLIGHTS, "Flights out of New York in January 2013", lines_of(str(path)))


@contextlib.contextmanager
def _new_database(path: str | None, folder: str) -> Iterator[str]:
    """Yield the URL of a new database."""
    file = Path(path or f"{folder}/demo.sqlite3").absolute()
    try:
        file.touch(exist_ok=False)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(
            f"{str(file)!r} cannot be made: {error}; name a new file with --database"
        ) from error
    try:
        yield f"sqlite:///{file}?timeout=60"
    except BaseException:
        file.unlink(missing_ok=True)  # it would be in the way of the next run
        raise


def _client(url: str) -> "redis.Redis":
    try:
        return redis.Redis.from_url(url)
    except ValueError as error:
        raise InputError(f"the URL {url!r} cannot be used: {error}") from error


def remove_namespace(client: "redis.Redis", namespace: str) -> None:
    """Remove all keys of a namespace."""
    with contextlib.suppress(redis.RedisError):
        for key in keys_of(client, namespace):
            client.unlink(key)


def keys_of(client: "redis.Redis", namespace: str) -> Iterator[bytes]:
    """Yield all keys of a namespace, whose name has no special characters."""
    # The keys of the namespace itself begin with {name}, those of its partitions with {name/
    found: Iterator[bytes] = client.scan_iter(match=f"{{{namespace}[}}/]*", count=1000)
    return found


def show(name: str, number: int) -> None:
    """Print a figure."""
    click.echo(f"  {name:50}{number:>10,}")


def say(line: str) -> None:
    """Show a line of progress."""
    click.echo(line, err=True)
