"""The engine: builds the parts of a process, and starts, forks and stops them."""

import contextlib
import logging
import math
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from importlib import metadata
from inspect import isawaitable, iscoroutinefunction
from typing import Any, NamedTuple, Protocol

import msgpack

from phonon._core import classes, forks
from phonon._core.clock import clock
from phonon._core.executor import Executor
from phonon._core.flows import FLUSH, REBORN, Flow, Read, Send, Sleep, call, read
from phonon._core.forks import SAME
from phonon._core.heartbeat import DEAD_AFTER, Heartbeat
from phonon._core.identity import Identity
from phonon._core.leases import Leases
from phonon._core.members import Members
from phonon._core.outbox import Outbox, Overflow
from phonon._core.parcels import Ending
from phonon._core.rebirth import Rebirth
from phonon._core.reports import Event, Reports
from phonon._core.retry import RetryPolicy
from phonon._core.sessions import Sessions
from phonon._core.sources import Sources
from phonon._core.takeover import Takeover
from phonon._protocol import operations
from phonon._protocol.answers import Reply
from phonon._protocol.library import Library
from phonon._protocol.partitions import decode, is_semaphore
from phonon.errors import PhononError, ProcessStoppedError

log = logging.getLogger("phonon")

#: The number of locks that updates share; two updates with the same lock take turns.
STRIPES = 64
#: Seconds between two looks at a worker that is to end.
_LOOK = 0.002
#: Seconds between two attempts to bring unanswered calls to their end, in `stop`.
_PAUSE = 0.05
#: Seconds for which a stopping process waits for its lock waiters to leave, and for the takeover of
#: its former self.
_DISMISSAL = 5.0
#: The most names of classes and sources in a report, which travels with every heartbeat.
_MOST_NAMES = 500


class ProcessOptions(NamedTuple):
    """The options of a process; see `phonon.Process`."""

    namespace: str
    partitions: int | None
    heartbeat_interval: float
    recovers: bool
    retry: RetryPolicy
    max_backlog: int
    overflow: Overflow


class SessionCache(Protocol):
    """A cache that holds updates of a process."""

    def endings_for(self, engine: "Engine") -> list[tuple[Ending, Callable[[], object]]]:
        """Remove the updates of that process; return their endings, and a function for failures."""

    def forget_for(self, engine: "Engine") -> None:
        """Drop the updates of that process, because they belong to the parent."""

    @property
    def excess(self) -> int:
        """Return how many entries it holds beyond its limit, because they could not be sent."""


class _ThreadLocal(threading.local):
    """The attributes of each thread.

    Attributes:
        batch: The batch that the thread has opened last.
    """

    batch: Any = None


class Engine:
    """The parts of one process.

    Args:
        options: The options of the process.
        public: Returns the public object, or None if it was garbage-collected.
        library: Knows the names of the server's functions.
        make_driver: Makes the driver, given the identity whose lanes it sends.
        make_codec: Makes the codec, given the engine.
        on_error: The user's function for background errors.
        address: The server's address, for messages.
        client: The redis-py client.

    Attributes:
        stopped: Whether the process has ended.
        caches: The caches that hold updates of this process.
        prefixes: The beginnings of resource names, by database and collection.
        batches: The open batches; each thread or task has its own in ``local``.
        durable_batches: The open batches that store the data of every merge.
        is_async: Whether its calls are awaited.
        most_bytes: The longest partial, which the server has to take in one piece.
        messages: Counts the updates that are made.
        stripes: Locks of updates. They are never held across I/O, so they serve asyncio as well.
    """

    #: Whether it belongs to an event loop.
    is_async: bool

    def __init__(
        self,
        options: ProcessOptions,
        public: Callable[[], Any],
        library: Library,
        make_driver: Callable[[Identity], Any],
        make_codec: Callable[["Engine"], Any],
        *,
        on_error: Callable[[Exception], object] | None,
        address: str,
        client: Any,
    ) -> None:
        self.options = options
        self.public = public
        self.address = address
        self.client = client
        self.identity = Identity(
            namespace=options.namespace,
            partitions=options.partitions,
            lease=DEAD_AFTER * options.heartbeat_interval,
            describe=lambda: _description(options.heartbeat_interval),
            library=library,
            clock=clock,
            new_id=lambda: uuid.uuid4().hex,
        )
        self.driver = make_driver(self.identity)
        server = getattr(self.driver, "server", None)  # a simulation has none
        self.most_bytes: int = sys.maxsize if server is None else server.most_bytes
        self.reports = Reports(on_error, self.tell)
        self.members = Members(self.identity)
        self.leases = Leases(self.identity, self.in_background)
        self.outbox = Outbox(
            self.identity,
            self.members,
            self.reports,
            most=options.max_backlog,
            overflow=options.overflow,
            clock=clock,
        )
        self.codec = make_codec(self)
        self.executor = Executor(
            self.identity, self.codec, options.retry, self.reports, self.outbox.schedule
        )
        self.sources = Sources(self.identity, self.members, self.executor, self.reports)
        self.takeover = Takeover(
            self.identity,
            self.outbox,
            recovers=options.recovers,
            can_execute=self.codec.can_execute,
        )
        self.rebirth = Rebirth(
            self.identity,
            self.members,
            self.leases,
            self.takeover,
            self.reports,
            deliver=self.driver.deliver,
            address=address,
        )
        self.heartbeat = Heartbeat(
            self.identity,
            self.rebirth,
            self.takeover,
            self.outbox,
            self.leases,
            interval=options.heartbeat_interval,
            recovers=options.recovers,
            is_referenced=lambda: public() is not None,
            report=self._report,
        )
        self.sessions = Sessions(self.outbox, self.reports, lambda: public() is not None)
        self.sessions.start_worker = lambda: self._ensure("sessions", self.sessions.work)
        self.takeover.ask_for_more = self.heartbeat.wake
        self.outbox.executor = self.executor
        self.outbox.excess = lambda: sum(cache.excess for cache in list(self.caches))
        self.outbox.start_worker = lambda: self._ensure("outbox", self.outbox.work)
        self.takeover.start_worker = lambda: self._ensure(
            "takeover",
            self.takeover.work,
            replace=True,  # the caller knows that the one before has ended, or is about to
        )
        self.takeover.on_taken = lambda text, dead: self.reports.emit(
            Event("takeover", text, process=dead)
        )
        self.leases.start_worker = lambda: self._ensure(
            "leases", self.leases.work, replace=not self.leases.is_working
        )
        self.identity.caller = getattr(self.driver, "caller", object)  # a simulation has none
        self.outbox.resume = self.driver.resume
        self.outbox.is_ready = self.driver.detached_ready
        self.driver.on_detached = self.outbox.detach
        self.driver.on_ready = self.outbox.is_answered
        self.caches: weakref.WeakSet[SessionCache] = weakref.WeakSet()
        self.prefixes: dict[tuple[str, str], str] = {}
        self.stopped = False
        self._begin()

    def _begin(self) -> None:
        """Start without workers and batches: at first, and in a forked child."""
        self._started = False
        self._starting = threading.RLock()
        self._spawning = threading.RLock()
        self._workers: dict[str, Any] = {}
        #: Workers that were replaced by others and may not have ended yet.
        self._former_workers: dict[str, list[Any]] = {}
        self.outbox.signal = self.driver.signal()
        self.leases.signal = self.driver.signal()
        self.sessions.signal = self.driver.signal()
        self.heartbeat.signal = self.identity.signal = self.driver.signal()
        self.local = self.make_local()
        self.messages = self.identity.measures.messages
        #: Updates that were merged into others here; counted as `Measures.folded` is.
        self.merged = 0
        #: Called with each new update, if messages are traced; a forked child traces none.
        self.trace: Callable[[Any], object] | None = None
        self.batches: set[Any] = set()
        self.durable_batches: set[Any] = set()
        self.stripes = [threading.RLock() for _ in range(STRIPES)]

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Run the user's ``on_error`` or ``on_lost``.

        Raises:
            TypeError: It is a coroutine function, which this process cannot run.
        """
        if iscoroutinefunction(function):
            raise TypeError(f"{function!r} is a coroutine function: use phonon.aio.AsyncProcess")
        function(*arguments)

    def _report(self) -> bytes:
        """Return the facts about this process that operators see; each heartbeat publishes them."""
        try:
            executable = [name for name in classes.names() if self.codec.can_execute(name)]
            report: bytes = msgpack.packb(
                {
                    "executes": self.options.recovers,
                    "classes": sorted(executable)[:_MOST_NAMES],
                    "backlog": self.outbox.size,
                    "counters": self.identity.measures.figures(),
                    "sources": self.sources.listed()[:_MOST_NAMES],
                },
                unicode_errors="surrogatepass",
            )
        except Exception:  # noqa: BLE001 - a heartbeat must not fail because of its report
            return b""
        return report

    @staticmethod
    def make_local() -> Any:
        """Return an object whose attributes are separate for each thread or task."""
        return _ThreadLocal()

    # Life

    def starting(self) -> Flow[None]:
        """Register the process on the server."""
        if not self.identity.lanes:
            yield from self.identity.start()

    def start_heartbeat(self) -> None:
        """Start the heartbeat."""
        self._started = True
        # A heartbeat that failed by a bug may still be about to end.
        self._ensure("heartbeat", self._beating, replace=True)

    def _beating(self) -> Flow[None]:
        pid = os.getpid()
        try:
            yield from self.heartbeat.work()
        finally:
            # It may have failed by a bug, or its task was cancelled: the next call starts another.
            # A forked child drops its copy of the parent's heartbeat, which goes on there.
            if os.getpid() == pid:
                self._started = self.heartbeat.stopping
                if not self._started and self.public() is not None:
                    log.error("the heartbeat thread of process %s has died", self.name)

    def _ensure(self, name: str, work: Callable[[], Flow[Any]], *, replace: bool = False) -> None:
        """Start a worker, unless it runs; with ``replace`` even if the old one is about to end."""
        # A worker that has just been started may call this itself, before it is registered.
        with self._spawning:
            worker = self._workers.get(name)
            if worker is not None and worker.is_alive():
                if not replace:
                    return
                others = self._former_workers.get(name, ())
                self._former_workers[name] = [o for o in (*others, worker) if o.is_alive()]
            worker = self._spawn(name, work())
            if worker is not None:
                self._workers[name] = worker

    @property
    def is_worker(self) -> bool:
        """Return whether the caller is one of the workers, which `stopping` waits for."""
        former = [worker for workers in list(self._former_workers.values()) for worker in workers]
        return any(worker.is_current() for worker in (*self._workers.values(), *former))

    def in_background(self, function: Callable[[], object]) -> None:
        """Run a function of the user's in a thread or task of its own."""

        def flow() -> Flow[None]:
            self.reports.call(function)
            return
            yield  # a flow without effects

        self._spawn("tell", flow())

    def _spawn(self, name: str, flow: Flow[Any]) -> Any:
        # The interpreter starts no threads while it ends; `stop` does that work then.
        with contextlib.suppress(RuntimeError):
            return self.driver.spawn(flow, f"phonon-{name}-{self.identity.name[:8]}")

    def after_fork_in_child(self) -> None:
        """Become another process without memberships: the child's copy."""
        for cache in list(self.caches):
            cache.forget_for(self)
        for part in (
            self.identity,
            self.members,
            self.leases,
            self.outbox,
            self.executor,
            self.takeover,
            self.heartbeat,
            self.sessions,
        ):
            part.begin()
        self.driver.after_fork_in_child()
        self._begin()

    def check(self) -> None:
        """Refuse work after the process was stopped, and notice a fork that ran no hooks.

        Raises:
            ProcessStoppedError: `stop` was called.
        """
        forks.notice()
        if self.stopped:
            raise ProcessStoppedError(f"process {self.name} was stopped: make a new Process")

    @property
    def is_started(self) -> bool:
        """Return whether the process is listed and beats."""
        return self._started

    @property
    def generation(self) -> object:
        """An object that differs in a forked child, to recognize the parent's objects."""
        return self.identity.generation

    @property
    def name(self) -> str:
        """The process's id."""
        return self.identity.name

    @property
    def batch(self) -> Any:
        """The batch that this thread or task is in, or None."""
        if not self.batches:
            return None
        batch: Any = getattr(self.local, "batch", None)
        while batch in self.batches and not batch.lives():
            batch = self.local.batch
        return batch if batch in self.batches else None

    def open_batch(self, batch: Any) -> None:
        """Make this thread or task collect in a batch."""
        self.local.batch = batch
        self.batches.add(batch)
        if batch.durable:
            self.durable_batches.add(batch)

    def close_batch(self, batch: Any, outer: Any) -> None:
        """Stop collecting in a batch, and go on in the enclosing one, if there is one."""
        self.local.batch = outer
        self.batches.discard(batch)
        self.durable_batches.discard(batch)

    # The end

    def stopping(self) -> Flow[list[BaseException]]:
        """End all sessions, release all locks, execute due batches, and deregister.

        Returns:
            The errors.
        """
        errors: list[BaseException] = []
        if not self._started:
            return errors
        try:
            yield from self._stop_workers("sessions", "takeover", "outbox", "leases")
            yield from self._dismiss_waiters()
            begun = self.outbox.mark()
            cached = [out for cache in list(self.caches) for out in cache.endings_for(self)]
            results = yield from self.outbox.end([ending for ending, _ in cached])
            for (_, failed), result in zip(cached, results, strict=True):
                errors += result.errors
                if result.errors:
                    failed()
            yield from self.takeover.work()
            # The heartbeat may have started a takeover since, whose batches are to be executed.
            yield from self._await_workers("takeover")
            yield from self._settle()
            errors += yield from self.leases.release_all()
            errors += yield from self._leave_all()
            # A batch that has just failed is not retried here: survivors take it over.
            errors += yield from self.outbox.retry(math.inf, begun)
            yield from self._close_lanes(begun)
        except PhononError as error:
            errors.append(error)
        return errors

    def _stop_workers(self, *names: str) -> Flow[None]:
        self._end_work()
        if "heartbeat" in names:
            self.heartbeat.stopping = True
        yield from self._await_workers(*names)

    def _end_work(self) -> None:
        self.leases.stopping = self.members.stopping = True
        self.takeover.leaving = True
        self.sessions.stopping = self.outbox.stopping = True
        self.identity.reborn()  # wakes the lock waiters, which find that the process stops

    def _await_workers(self, *names: str, until: float = math.inf) -> Flow[None]:
        for name in names:
            worker = self._workers.get(name)
            latest = () if worker is None else (worker,)
            for each in (*self._former_workers.get(name, ()), *latest):
                while each.is_alive() and not each.is_current() and self.identity.clock() < until:
                    # In each round: after an interrupt a part may have two workers, and its signal
                    # wakes only one.
                    for part in (self.sessions, self.outbox, self.leases, self.heartbeat):
                        if part.stopping and part.signal is not None:
                            part.signal.set()
                    # If a signal handler stops the process, the worker may wait for a lane whose
                    # leader is an outer frame of this thread: only this flush sends for it.
                    yield FLUSH
                    yield Sleep(_LOOK)

    def _dismiss_waiters(self) -> Flow[None]:
        """Make lock waiters leave their queues before the lanes are closed.

        A waiter in whose frame a signal handler calls `stop` cannot leave: it is removed.
        """
        identity = self.identity
        give_up = clock() + _DISMISSAL
        caller = identity.caller()
        own_waiters = [
            (name, each) for name, each in list(identity.waiters.items()) if each.owner is caller
        ]
        if own_waiters:
            yield Read(identity.nudges(identity.id))  # the waiter notices once `stop` has returned
            for waiter, _ in own_waiters:
                identity.waiters.pop(waiter, None)
            yield Send(
                [each.leave(each.partition, each.name, waiter) for waiter, each in own_waiters]
            )
        while identity.waiters and clock() < give_up:
            yield Read(identity.nudges(identity.id))
            yield Sleep(_LOOK)

    def _settle(self) -> Flow[None]:
        """Finish the flows whose callers have gone, for as long as a caller would wait."""
        give_up = clock() + getattr(self.driver, "retry_timeout", 0.0)
        yield from self.outbox.catch_up()
        while self.outbox.detached and clock() < give_up:
            yield Sleep(_PAUSE)
            yield from self.outbox.catch_up()

    def _leave_all(self) -> Flow[list[BaseException]]:
        # Ask the server: its registry names all resources that this process may have to answer for.
        names = yield from self.members.registered()
        resources = dict.fromkeys(decode(name) for name in names if not is_semaphore(name))
        resources.update(dict.fromkeys(self.members.held))
        endings = []
        for resource in resources:
            opener = self.members.held.get(resource)
            update = opener() if opener is not None else None
            endings.append(Ending(resource, update, update is not None and update.forced))
        results = yield from self.outbox.end(endings)
        return [error for result in results for error in result.errors]

    def _close_lanes(self, begun: int) -> Flow[None]:
        """Close the lanes, then deregister. The heartbeat goes on until they are closed.

        Args:
            begun: The `Outbox.mark` of the stop's beginning: later failures are left to survivors.
        """
        compared = False  # an interrupt may have left locks on the server that are unknown here
        identity = self.identity
        partitions = range(identity.partitions.count)
        answers: list[Any] = [REBORN]
        while any(answer is REBORN for answer in answers):
            self.heartbeat.closing = True
            answers = yield Send([operations.close(p) for p in partitions])
            left = [p for p, answer in enumerate(answers) if isinstance(answer, list)]
            if left and not compared:
                compared = True
                yield from self.heartbeat.compare()
                yield from self.leases.release_all()
                yield from self._leave_all()  # another task or thread may have joined meanwhile
                yield from self.outbox.retry(math.inf, begun)
                for p, answer in zip(
                    left, (yield Send(list(map(operations.close, left)))), strict=True
                ):
                    answers[p] = answer
            if any(answer is REBORN for answer in answers):
                # Declared dead at the last moment: the new identity has lanes to close as well.
                self.heartbeat.closing = False
                yield from self.takeover.work()
                yield from self._await_workers("takeover")
                yield from self._leave_all()
                yield from self.outbox.retry(math.inf)
        # A heartbeat after the end would renew a process that is gone.
        yield from self._stop_workers("heartbeat")
        # If it was reborn meanwhile, the takeover has yet to unlist its former self. It never can
        # if this one was declared dead as well.
        yield from self._await_workers("takeover", until=identity.clock() + _DISMISSAL)
        # If anything is left, survivors take it.
        closed = all(answer == int(Reply.CLOSED) for answer in answers)
        yield from read(identity.in_namespace("unlist" if closed else "expire", identity.id))

    def close(self) -> None:
        """Close the driver. A second call does nothing."""
        self.stopped = self.heartbeat.stopping = True
        self.outbox.open()
        self._end_work()
        for signal in (self.outbox.signal, self.heartbeat.signal, self.sessions.signal):
            if signal is not None:
                signal.set()


def _description(interval: float) -> dict[str, str | int | float]:
    """Return where this process runs, for operators."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": f"{time.time():.3f}",
        "version": metadata.version("phonon"),
        "interval": interval,
    }


def errors_only(errors: Iterable[BaseException]) -> list[Exception]:
    """Return errors. Raise an interrupt if there is one among them."""
    for error in errors:
        if not isinstance(error, Exception):
            raise error
    return [error for error in errors if isinstance(error, Exception)]


class ThreadEngine(Engine):
    """The engine of a `phonon.Process`."""

    is_async = False

    def start(self) -> None:
        """Register the process, and start its heartbeat."""
        with self._starting:
            if not self._started:
                self.driver.run(self.starting())
                self.start_heartbeat()

    def ensure_alive(self) -> None:
        """Start the workers again that a fork or a bug has ended.

        Raises:
            ProcessStoppedError: `stop` was called.
        """
        if self.stopped or not self._started or not SAME[0]:
            self.check()
            self.start()

    def run(self, flow: Flow[Any]) -> Any:
        """Run a flow for a caller."""
        self.ensure_alive()
        return self.driver.run(flow)

    def close(self) -> None:
        """Close the driver. A second call does nothing."""
        super().close()
        self.driver.close()

    def stop(self) -> list[BaseException]:
        """End everything. Return the errors.

        A signal handler may call this while its thread holds one of Phonon's locks. The workers,
        for which it waits, may need that lock; so it is released meanwhile.
        """
        if self.stopped:
            return []
        held = [lock for lock in self._locks() if lock._is_owned()]  # noqa: SLF001 - as `threading.Condition` does
        states = [lock._release_save() for lock in held]  # noqa: SLF001 - as above
        try:
            return list(self.driver.run(self.stopping()))
        finally:
            self.close()
            for lock, state in zip(held, states, strict=True):
                lock._acquire_restore(state)  # noqa: SLF001 - as above

    def _locks(self) -> list[Any]:
        """Return the locks that a caller's thread may hold while a worker wants them."""
        parts: list[Any] = [self.leases, self.identity.measures]
        return [
            self._starting,
            self._spawning,
            self.outbox._room,  # noqa: SLF001 - of our own parts, as are the following
            *(part._lock for part in (self.sessions, *parts, *self.caches)),  # noqa: SLF001
            *self.stripes,
        ]


class _TaskLocal:
    """The state of a task, which it shares with the tasks that it starts."""

    def __init__(self) -> None:
        self._batch: ContextVar[Any] = ContextVar("phonon_batch", default=None)

    @property
    def batch(self) -> Any:
        """The batch that the task has opened last."""
        return self._batch.get()

    @batch.setter
    def batch(self, batch: Any) -> None:
        self._batch.set(batch)


class TaskEngine(Engine):
    """The engine of a `phonon.aio.AsyncProcess`."""

    is_async = True

    @staticmethod
    def make_local() -> Any:
        """Return an object whose attributes are separate for each task."""
        return _TaskLocal()

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Run the user's ``on_error`` or ``on_lost``, and await its result in the background."""
        result = function(*arguments)
        if isawaitable(result):

            def flow() -> Flow[None]:
                outcome = yield from call(lambda: result)
                if outcome.error is not None:
                    log.error("%r has raised", function, exc_info=outcome.error)

            self._spawn("tell", flow())

    async def start(self) -> None:
        """Register the process, and start its heartbeat."""
        await self.driver.run(self.starting())
        self.start_heartbeat()

    def ensure_alive(self) -> None:
        """Refuse work after a stop or in another loop, and restart a heartbeat that died.

        Raises:
            ProcessStoppedError: `stop` was called.
            ConfigurationError: Another event loop runs.
            ForkedError: The process belongs to the parent.
        """
        if not SAME[0]:
            forks.notice()
        self.driver.check()
        if self.stopped:
            raise ProcessStoppedError(f"process {self.name} was stopped: make a new AsyncProcess")
        if not self._started:
            self.start_heartbeat()

    async def run(self, flow: Flow[Any]) -> Any:
        """Run a flow for a caller."""
        self.ensure_alive()
        return await self.driver.run(flow)

    async def stop(self) -> list[BaseException]:
        """End everything. Return the errors."""
        if self.stopped:
            return []
        try:
            return list(await self.driver.run(self.stopping()))
        finally:
            self.close()
            await self.driver.close()
