"""``python -m chaos``: workers that are killed, paused and cut off all the time, and the check."""

import contextlib
import itertools
import random
import sqlite3
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from chaos import report as chaos_report
from chaos import sink
from chaos.jobs import Job, Message, Totals
from chaos.killer import Killer
from chaos.ledger import Ledger
from chaos.mortal import MortalServer
from chaos.pool import WINDOW, Pool, Worker
from chaos.proxy import CuttingProxy
from chaos.report import RunResult, Watcher
from chaos.wire import WorkerSettings
from phonon import Process
from phonon.settings import Durability
from phonon_demo.demo import flights
from phonon_demo.errors import WorkerError
from phonon_demo.server import keys_of, onlooker
from phonon_demo.signals import interruptible

#: Seconds between two looks, and after which no takeover is to be expected any more.
INTERVAL, TIMEOUT = 0.02, 60.0
#: Messages that a worker is sent, stores and acknowledges together.
LIST = 100
#: Keys in a worker's cache: far fewer than there are, so that sessions end all the time.
MAX_ENTRIES = 1000
#: Seconds between two heartbeats. A worker that is silent for four of them is taken over.
HEARTBEAT = 0.25
#: Seconds for which a new worker tries to reach a server that is being started again.
PATIENCE = 15.0
NAMESPACE = "phonon-chaos"


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


def run(options: Options, job: Job | None = None) -> int:
    """Let workers work and be struck, and audit what is left.

    Args:
        options: What the user wants.
        job: What the workers do, instead of the right thing; its messages end with a number.

    Returns:
        The exit status: 0 if nothing was lost, doubled or left behind, else 1.

    Raises:
        PhononError: The server cannot be started.
        WorkerError: A worker has given up, or there is something that nobody takes over.
        Interrupted: By a signal.
    """
    job = job or Job()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(interruptible())
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="phonon-chaos-")))
        server = enter(MortalServer(folder, sync=True))
        proxy = enter(CuttingProxy(folder / "p", server.socket))
        process = enter(onlooker(server.url, NAMESPACE))
        path = str(folder / "chaos.sqlite3")
        database = enter(sink.create(path, job.table))
        settings = WorkerSettings(
            job,
            f"unix://{proxy.path}?db=1",
            NAMESPACE,
            path,
            MAX_ENTRIES,
            HEARTBEAT,
            Durability() if options.restart_server else None,
            PATIENCE,
            options.asyncio,
        )
        chaos = _Chaos(options, process)
        chaos.work(settings, proxy if options.cut else None, server)
        result = chaos.result(database, job)
        chaos_report.show(result)
        return 0 if result.exact else 1


class _Chaos:
    """One run.

    Args:
        options: What the user wants.
        process: One of the same namespace, to look with.
    """

    def __init__(self, options: Options, process: Process) -> None:
        self._options = options
        self._process = process
        self._ledger = Ledger()
        self._watcher = Watcher(self._ledger, verbose=options.verbose)
        self._messages = itertools.cycle(_flights())
        self._again: deque[list[Message]] = deque()
        self._redealt = 0
        self._seconds = 0.0

    def work(
        self, settings: WorkerSettings, proxy: CuttingProxy | None, server: MortalServer
    ) -> None:
        """Strike while the workers work; then let them finish."""
        options = self._options
        with self._watcher, Pool(settings, options.workers, self._watcher) as pool:
            self._pool = pool
            self._watcher.started(pool.workers)
            chance = random.Random(options.seed)  # noqa: S311 - a schedule, no secret
            mortal = server if options.restart_server else None
            self._killer = Killer(chance, pool, settings.heartbeat, proxy, mortal)
            self._watcher.strikes = self._killer.strikes
            begun = time.monotonic()
            try:
                while not self._is_over(time.monotonic() - begun):
                    self._replace()
                    self._killer.strike()
                    self._replace()
                    self._deal()
                    pool.listen(min(INTERVAL, self._killer.pause()))
            finally:
                self._killer.retire()  # a worker that is paused cannot leave
            self._finish()
            self._seconds = time.monotonic() - begun

    def _is_over(self, seconds: float) -> bool:
        options = self._options
        return (options.seconds is not None and seconds >= options.seconds) or (
            options.kills is not None and self._killer.strikes.kills >= options.kills
        )

    def _replace(self) -> None:
        """Start a new worker for each that has died."""
        living = sum(not worker.fate for worker in self._pool.workers)
        for _ in range(self._options.workers - living):
            self._pool.start()

    def _deal(self) -> None:
        """Give every worker what it has room for."""
        for worker in self._able():
            while len(worker.unacknowledged) < WINDOW and not worker.fate:
                self._take_back()
                if self._again:
                    messages = self._again.popleft()
                else:
                    fresh = itertools.islice(self._messages, LIST)
                    messages = [self._ledger.enter(message) for message in fresh]
                self._pool.send(worker, messages)

    def _able(self) -> list[Worker]:
        """Return the workers that take messages. A paused one would let the pipe fill up."""
        ready = [worker for worker in self._pool.workers if worker.process and not worker.fate]
        return [worker for worker in ready if not self._killer.is_paused(worker)]

    def _take_back(self) -> None:
        """Take what was not acknowledged, to deal it again under other numbers."""
        while self._pool.orphans:
            orphans = self._pool.orphans.popleft()
            self._redealt += len(orphans)
            self._again.append([self._ledger.again(message) for message in orphans])

    def _finish(self) -> None:
        """Have all acknowledged and all taken over, and end the workers."""
        pool = self._pool
        self._watcher.finishing()
        give_up = time.monotonic() + TIMEOUT
        while self._is_unfinished():
            if time.monotonic() > give_up:
                listed = self._process.client.zcard(self._process.heartbeat_hash_name)
                lists = sum(len(worker.unacknowledged) for worker in pool.alive)
                raise WorkerError(
                    f"{TIMEOUT:g} s after the last strike {lists + len(self._again)} lists are "
                    f"still not acknowledged, or not all of the dead taken over: {listed} "
                    f"processes are listed, and {len(pool.alive) + 1} live"
                )
            self._replace()
            for worker in self._able():
                self._take_back()
                if self._again and len(worker.unacknowledged) < WINDOW:
                    pool.send(worker, self._again.popleft())
            pool.listen(INTERVAL)
        pool.finish()

    def _is_unfinished(self) -> bool:
        pool, process = self._pool, self._process
        living = [worker for worker in pool.workers if not worker.fate]
        if pool.orphans or self._again or len(living) < self._options.workers:
            return True
        if any(worker.unacknowledged or not worker.process for worker in living):
            return True
        # The dead are listed until all of them is taken over. We are listed as well.
        try:
            listed = int(process.client.zcard(process.heartbeat_hash_name))
        except (redis.ConnectionError, redis.TimeoutError):  # a disk that is busy holds it up
            return True
        return listed != len(living) + 1

    def result(self, database: sqlite3.Connection, job: Job) -> RunResult:
        """Audit what is left in the database and on the server."""
        workers = self._pool.workers
        takeovers = [takeover for worker in workers for takeover in worker.takeovers]
        return RunResult(
            seconds=self._seconds,
            strikes=self._killer.strikes,
            died=self._watcher.deaths - self._killer.strikes.kills,
            dealt=len(self._ledger),
            redealt=self._redealt,
            verdict=self._ledger.audit(_read(database, job)),
            sessions=sink.sessions(database, job.table),
            taken_over=sum(takeover.sessions for takeover in takeovers),
            batches=sum(takeover.batches for takeover in takeovers),
            reborn=sum(worker.progress.reborn for worker in workers),
            repeats=sum(worker.progress.repeats for worker in workers),
            parked=len(self._process.parked()),
            leftovers=self._leftovers(),
        )

    def _leftovers(self) -> list[str]:
        """Keys that do not go by themselves, but for those of the process that looks."""
        process = self._process
        client = process.client
        me = process.id
        left = []
        for name in sorted(key.decode() for key in keys_of(process)):
            kind = name.partition("}:")[2]
            if kind in {"token", "epoch", "partitions", f"lane:{me}"} or client.ttl(name) >= 0:
                continue
            # Those that list processes list this one, and nobody else.
            if kind in {"processes", "listings", "cards", "reports", "lanes"}:
                others = _members(client, name) - {me}
                left += [f"{name}: process {other}" for other in sorted(others)]
            else:
                left.append(name)
        return left


def _members(client: Any, name: str) -> set[str]:
    """Return what a set, a sorted set or a hash has in it."""
    read = {b"set": client.smembers, b"zset": lambda key: client.zrange(key, 0, -1)}
    found = read.get(client.type(name), client.hkeys)(name)
    return {member.decode() for member in found}


def _flights() -> list[Message]:
    """Return the messages, as yet without numbers."""
    with flights() as rows:
        return [(key, *content) for key, content in rows]


def _read(database: sqlite3.Connection, job: Job) -> Totals:
    """Return what is in SQLite."""
    return {key: job.figures(stored) for key, *stored in database.execute(job.table.select)}
