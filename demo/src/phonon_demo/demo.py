"""``phonon demo``: a stream of rows, many workers, one write a session, and the check of it all."""

import contextlib
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from phonon import Process
from phonon_demo import report, sink
from phonon_demo.broker import Broker
from phonon_demo.check import Check, FlightsCheck, SumsCheck, compare, read
from phonon_demo.deaths import INTERVAL, Watch, takers
from phonon_demo.errors import InputError
from phonon_demo.flights import Flights
from phonon_demo.jobs import Job, Message
from phonon_demo.pool import Pool, Worker
from phonon_demo.report import Display, Lost, Outcome
from phonon_demo.rows import Rows, open_rows
from phonon_demo.server import forgetting, onlooker, private_server
from phonon_demo.signals import interruptible
from phonon_demo.sums import Sums
from phonon_demo.wire import Setup

#: The worker that is killed, counted from 0, and after how many lists at the earliest.
VICTIM, KILL_AFTER = 1, 3

FLIGHTS = "flights-2013-01.csv.gz"


@dataclass(frozen=True)
class Options:
    """What the user wants; see ``phonon demo --help``."""

    workers: int
    url: str | None
    input: str | None
    key: str
    sums: tuple[str, ...]
    max_entries: int
    database: str | None
    kill: bool
    asyncio: bool = False
    updates: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        title: What the user reads.
        job: What to add up.
        rows: The messages.
        check: What ought to come out.
    """

    title: str
    job: Job
    rows: Rows[Message]
    check: Check


def run(options: Options) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 if every figure is right, else 1.

    Raises:
        InputError: The input or an option cannot be used.
        PhononError: The server cannot be used.
        WorkerError: A worker has given up, or none is left.
        Interrupted: By a signal.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        task = enter(_task(options))
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="phonon-demo-")))
        url = options.url or enter(private_server(folder))
        namespace = f"phonon-demo-{uuid.uuid4().hex[:12]}"
        # Before anything is begun: that a server is not there takes one line. It holds nothing.
        process = enter(onlooker(url, namespace))
        # Absolute, because SQLite has names that are no files.
        path = str(Path(options.database or folder / "demo.sqlite3").absolute())
        database = enter(sink.create(path, task.job.table))
        if options.url:
            enter(forgetting(process))
        setup = Setup(
            task.job,
            url,
            namespace,
            path,
            options.max_entries,
            asyncio=options.asyncio,
            updates=options.updates,
        )
        run = _Run(task, process, options)
        run.work(setup)
        outcome = run.outcome(database)
        report.show(outcome, list(task.job.table.figures))
        return 1 if outcome.differences else 0


class _Run:
    """The workers at their work."""

    def __init__(self, task: Task, process: Process, options: Options) -> None:
        self._task = task
        self._options = options
        self._watch = Watch(process)
        self._display = Display(task.rows, self._watch)
        self._victim: Worker | None = None
        self._seconds = 0.0

    def work(self, setup: Setup) -> None:
        """Deal out all messages, and let the workers write what has come together."""
        options = self._options
        server = "the server that you named" if options.url else "a server of their own"
        with self._display, Pool(setup, options.workers, self._display) as pool:
            self._pool = pool
            self._display.started(pool.workers, server)
            begun = time.monotonic()
            self._choose_victim()
            self._broker = Broker(pool)
            for message in self._task.rows:
                self._task.check.see(message)
                self._broker.deal(message)
                self._kill(KILL_AFTER)
            self._broker.deal_rest()
            self._broker.wait()
            self._kill(1)
            self._wait_for_takeover()
            self._display.ending()
            pool.finish()
            self._seconds = time.monotonic() - begun

    def _choose_victim(self) -> None:
        if not self._options.kill:
            return
        if len(self._pool.workers) > VICTIM:
            self._victim = self._pool.workers[VICTIM]
        else:
            self._display.log("a single worker is not killed: nobody would be left to take over")

    def _kill(self, after: int) -> None:
        """Kill the victim, once it has acknowledged so many lists.

        Everything that it was given is acknowledged then, so the totals must be exact. Of a list
        that it had in hand nobody would know whether it was stored.
        """
        victim = self._victim
        if victim is None or victim.progress.lists + len(victim.unacknowledged) < after:
            return
        self._victim = None
        while victim.unacknowledged:
            self._pool.listen()
        if not victim.fate:  # it may have died by itself
            self._pool.kill(victim)

    def _wait_for_takeover(self) -> None:
        """The last member of a key's session may be one that is dead."""
        if not self._watch.done:
            self._display.taking_over()
        while not self._watch.done:
            self._pool.listen(INTERVAL)
            self._display.look()
            self._broker.wait()

    def outcome(self, database: sqlite3.Connection) -> Outcome:
        """Compare what is in the database with what ought to be there."""
        task, workers = self._task, self._pool.workers
        rejections = task.rows.rejections
        if not self._broker.count:
            reasons = ", ".join(rejections.reasons)
            raise InputError(
                f"{task.rows.text.name}: none of its {rejections.total:,} rows can be used: "
                f"{reasons}"
            )
        expected, found = task.check.totals(), read(database, task.job)
        return Outcome(
            title=task.title,
            messages=self._broker.count,
            redealt=self._broker.redealt,
            rejections=rejections,
            sessions=sink.sessions(database, task.job.table),
            writes=sum(worker.progress.writes for worker in workers),
            repeats=sum(worker.progress.repeats for worker in workers),
            seconds=self._seconds,
            keys=len(expected.keys() | found.keys()),
            differences=compare(expected, found),
            lost=[Lost(death, takers(death, workers)) for death in self._watch.deaths],
        )


@contextlib.contextmanager
def _task(options: Options) -> Iterator[Task]:
    job: Job
    if options.input is not None:
        job = Sums(options.key, options.sums)
        with open_rows(options.input, job.columns, job.message) as rows:
            yield Task(f"{rows.text.name}, added up per {options.key!r}", job, rows, SumsCheck())
        return
    job = Flights()
    with (
        resources.as_file(resources.files("phonon_demo") / FLIGHTS) as path,
        open_rows(str(path), job.columns, job.message) as rows,
    ):
        title = "Flights out of New York in January 2013, added up per aircraft"
        yield Task(title, job, rows, FlightsCheck(path))
