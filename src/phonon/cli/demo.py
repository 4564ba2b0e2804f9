"""``phonon demo``: a stream of rows, many workers, one write a session, and the check of it all."""

import contextlib
import signal
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType

from phonon import Process
from phonon.cli import report, sink
from phonon.cli.check import Check, FlightsCheck, SumsCheck, compare, read
from phonon.cli.errors import InputError
from phonon.cli.flights import Flights
from phonon.cli.jobs import Job, Message
from phonon.cli.pool import Pool
from phonon.cli.report import Display, Outcome
from phonon.cli.rows import Rows, open_rows
from phonon.cli.server import forgetting, private_server
from phonon.cli.sums import Sums
from phonon.cli.wire import Setup

#: Messages that a worker is sent, stores and acknowledges together.
LIST = 500

FLIGHTS = "data/flights-2013-01.csv.gz"


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


class Interrupted(BaseException):
    """The user, or the system, wants the demo to end.

    Attributes:
        status: The exit status that says so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; the workers have left")
        self.status = 128 + number


def run(options: Options) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 if every figure is right, else 1.

    Raises:
        InputError: The input or an option cannot be used.
        PhononError: The server cannot be used.
        WorkerError: A worker has ended before its time.
        Interrupted: By a signal.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_interruptible())
        task = enter(_task(options))
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="phonon-demo-")))
        url = options.url or enter(private_server(folder))
        namespace = f"phonon-demo-{uuid.uuid4().hex[:12]}"
        # Before anything is begun: that a server is not there takes one line. It holds nothing.
        process = enter(Process(url=url, namespace=namespace, recover_failed_processes=False))
        # Absolute, because SQLite has names that are no files.
        path = str(Path(options.database or folder / "demo.sqlite3").absolute())
        database = enter(sink.create(path, task.job.table))
        if options.url:
            enter(forgetting(process))
        setup = Setup(task.job, url, namespace, path, options.max_entries)
        outcome = _check(task, database, *_work(task, setup, options))
        report.show(outcome, list(task.job.table.figures))
        return 1 if outcome.differences else 0


def _work(task: Task, setup: Setup, options: Options) -> tuple[Pool, int, float]:
    """Let the workers work. Returns them, the number of messages, and the seconds it took."""
    server = "the server that you named" if options.url else "a server of their own"
    with Display(task.rows) as display, Pool(setup, options.workers, display) as pool:
        display.started(pool.workers, server)
        begun = time.monotonic()
        messages = _deal(task, pool)
        display.ending()
        pool.finish()
        return pool, messages, time.monotonic() - begun


def _deal(task: Task, pool: Pool) -> int:
    """Deal the messages out, one to each worker in turn, as a broker would."""
    count = 0
    lists: list[list[Message]] = [[] for _ in pool.workers]
    for message in task.rows:
        task.check.see(message)
        turn = count % len(lists)
        count += 1
        lists[turn].append(message)
        if len(lists[turn]) == LIST:
            pool.send(pool.workers[turn], lists[turn])
            lists[turn] = []
    for worker, rest in zip(pool.workers, lists, strict=True):
        if rest:
            pool.send(worker, rest)
    return count


def _check(
    task: Task, database: sqlite3.Connection, pool: Pool, messages: int, seconds: float
) -> Outcome:
    rejections = task.rows.rejections
    if not messages:
        reasons = ", ".join(rejections.reasons)
        raise InputError(
            f"{task.rows.text.name}: none of its {rejections.total:,} rows can be used: {reasons}"
        )
    expected, found = task.check.totals(), read(database, task.job)
    return Outcome(
        title=task.title,
        messages=messages,
        rejections=rejections,
        sessions=sink.sessions(database, task.job.table),
        writes=sum(worker.progress.writes for worker in pool.workers),
        repeats=sum(worker.progress.repeats for worker in pool.workers),
        seconds=seconds,
        keys=len(expected.keys() | found.keys()),
        differences=compare(expected, found),
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
        resources.as_file(resources.files("phonon") / FLIGHTS) as path,
        open_rows(str(path), job.columns, job.message) as rows,
    ):
        title = "Flights out of New York in January 2013, added up per aircraft"
        yield Task(title, job, rows, FlightsCheck(path))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the first signal into `Interrupted`. Further ones do not disturb the tidying up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        for ours in before:
            signal.signal(ours, signal.SIG_IGN)
        raise Interrupted(number)

    # nohup, say, has reasons to ignore one.
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
