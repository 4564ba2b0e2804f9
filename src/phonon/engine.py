"""What makes a `Process` go: its identity, its driver, what it holds, and its upkeep.

The public objects are thin: they build a flow and hand it to the engine of their process. Nothing
here is public.
"""

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from phonon.batch import store
from phonon.drivers.connect import Lease
from phonon.drivers.sync import SyncDriver, Task
from phonon.errors import (
    LockLostError,
    PhononError,
    ProcessStoppedError,
)
from phonon.partials import run_batch
from phonon.protocol import processes, references, updates
from phonon.protocol.effects import Flow, Participant, T
from phonon.protocol.keys import Keys
from phonon.protocol.updates import Ended, Failure, RetryPolicy, Runner
from phonon.serializers import Serializer
from phonon.upkeep import Upkeep

if TYPE_CHECKING:
    from phonon.batch import Batch
    from phonon.lock import Lock
    from phonon.process import Process
    from phonon.update import Update

log = logging.getLogger("phonon")

#: A process counts as dead after this many heartbeat intervals without a heartbeat.
DEAD_AFTER = 5
#: Updates share this many locks; two updates that share one merely take turns.
STRIPES = 64


class SessionCache(Protocol):
    """A cache that holds updates of a process."""

    def end_for(self, engine: "Engine") -> list[Exception]:
        """End the sessions of that process's updates; return what went wrong."""

    def forget_for(self, engine: "Engine") -> None:
        """Drop them: they are the parent's."""


class Engine:
    """The machinery of one process.

    Args:
        process: The public object.
        lease: Its share in the connections.
        keys: The keys of its namespace.
        serializer: Encodes partials.
        policy: What to do when ``execute`` fails.
        session_length: How long a membership lasts unless renewed, seconds.
        heartbeat_interval: Seconds between heartbeats.
    """

    def __init__(
        self,
        process: "Process",
        lease: Lease,
        keys: Keys,
        serializer: Serializer,
        policy: RetryPolicy,
        *,
        session_length: float,
        heartbeat_interval: float,
    ) -> None:
        self._process = weakref.ref(process)
        self.lease = lease
        self.keys = keys
        self.serializer = serializer
        self.policy = policy
        self.session_length = session_length
        self.heartbeat_interval = heartbeat_interval
        self.caches: weakref.WeakSet[SessionCache] = weakref.WeakSet()
        self.stopped = False
        self.prefixes: dict[tuple[str, str], str] = {}
        self._begin()

    def _begin(self) -> None:
        """A new identity, that holds nothing."""
        self.me = Participant(
            uuid.uuid4().hex,
            self.keys,
            int(self.session_length * 1000),
            colocated=self.lease.server.colocated,
        )
        self.driver = SyncDriver(self.lease.server)
        #: The resources this process is a member of, each with the update that opened it.
        self.held: dict[str, weakref.ref[Update] | None] = {}
        self.locks: dict[str, Lock] = {}
        self.stripes = [threading.RLock() for _ in range(STRIPES)]
        self.local = threading.local()
        #: Updates that a batch could not store because the server was gone.
        self.unstored: list[Update] = []
        #: Updates whose session could not be ended although its end had been kept.
        self._unended: list[Update] = []
        #: Memberships that are to be renewed because they have expired.
        self._expired: set[str] = set()
        #: Resources that a leave which went on by itself was the last to let go of.
        self.untold: set[str] = set()
        self.upkeep = Upkeep(self)
        self._holders = itertools.count(1)
        self._renew_at = time.monotonic() + self.session_length / 3
        self._starting = threading.Lock()
        self._started = False

    # Life

    def start(self) -> None:
        """Appear among the processes, and begin to beat."""
        with self._starting:
            if self._started:
                return
            card: dict[str, str | int] = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": f"{time.time():.3f}",
                "version": metadata.version("phonon"),
            }
            self.driver.run(b"", processes.enrol(self.me, card, self._ttl_ms))
            self.upkeep.start()
            self._started = True

    @property
    def _ttl_ms(self) -> int:
        return int(DEAD_AFTER * self.heartbeat_interval * 1000)

    def after_fork_in_child(self) -> None:
        """The child is another process: it has an identity of its own, and holds nothing."""
        for cache in list(self.caches):
            cache.forget_for(self)
        self._begin()

    def ensure_alive(self) -> None:
        """Start what a fork, or a bug in a thread, has ended.

        Raises:
            ProcessStoppedError: `stop` was called.
        """
        if self.stopped:
            raise ProcessStoppedError(
                f"process {self.me.id.decode()} was stopped: make a new Process"
            )
        if not self._started:
            self.start()

    def heart_stopped(self) -> None:
        """The heartbeat thread has ended unbidden: the next call starts another."""
        log.error("the heartbeat thread of process %s has died", self.name)
        self._started = False

    @property
    def process(self) -> "Process":
        """The public object. Whoever calls has it, so it is there."""
        process = self._process()
        assert process is not None  # noqa: S101 - for the type checker
        return process

    @property
    def name(self) -> str:
        """The process's id."""
        return self.me.id.decode()

    def stop(self) -> list[Exception]:
        """End all sessions, release all locks, disappear. Returns what went wrong."""
        if self.stopped:
            return []
        errors: list[Exception] = []
        try:
            if self._started:
                errors = self._end_everything()
        finally:
            self.stopped = True
            self.upkeep.stop()
            self.lease.close()
        return errors

    def _end_everything(self) -> list[Exception]:
        errors: list[Exception] = []
        for cache in list(self.caches):
            errors += cache.end_for(self)
        try:
            self.upkeep.join()
            lost = self.driver.resume()
            if lost is not None:
                raise lost
            errors += self._end_unended()
            try:
                self._store_unstored()
            except ExceptionGroup as group:
                errors += group.exceptions
            for lock in list(self.locks.values()):
                with contextlib.suppress(LockLostError):
                    lock.release()
            # The server's word, not our memory: it names all that we may be responsible for.
            held = set(self.driver.run(b"", processes.registry(self.me)))
            held.update(self.keys.base(resource) for resource in list(self.held))
            errors += self._leave_all([self.keys.resource(base) for base in held])
            errors += self.upkeep.retry_now()
            # A heartbeat after this would bring the process back to life.
            self.upkeep.stop()
            if not self.driver.run(b"", processes.registry(self.me)):
                self.driver.run(b"", processes.resign(self.me))
            else:
                # Batches that will not execute are for those who come after us: be seen to be dead.
                self.driver.run(b"", processes.beat(self.me, 0))
        except PhononError as error:
            errors.append(error)
        return errors

    def _leave_all(self, resources: Sequence[str]) -> list[Exception]:
        tasks: list[Task[Ended]] = []
        for resource in resources:
            opener = self.held.get(resource)
            tasks.append(self.ending(resource, opener() if opener is not None else None))
        self.driver.run_all(tasks)
        return [error for task in tasks for error in self.errors_of(task)]

    # Conversations

    def run(self, base: bytes, flow: Flow[T], done: Callable[[T], None] | None = None) -> T:
        """Run one flow; for ``done`` see `Task`."""
        self.ensure_alive()
        return self.driver.run(base, flow, done)

    def run_all(self, tasks: Sequence[Task[Any]]) -> None:
        """Run many flows together."""
        self.ensure_alive()
        self.driver.run_all(tasks)

    def join(self, resource: str, base: bytes, update: "Update | None" = None) -> None:
        """Become a member of a resource."""
        self.run(base, self.joining(resource, base, update))

    def joining(self, resource: str, base: bytes, update: "Update | None" = None) -> Flow[None]:
        """The flow of `join`."""
        yield from references.join(self.me, base)
        self.holds(resource, update)

    def holds(self, resource: str, update: "Update | None" = None) -> None:
        """Note a membership, and which update `stop` has to end it with."""
        if self.held.get(resource) is None:
            self.held[resource] = weakref.ref(update) if update is not None else None

    def storing(self, update: "Update", *, keep: bool = True) -> Flow[bool]:
        """Store what an update has unsent; it makes this process a member."""
        stored = yield from updates.append(
            self.me, self.keys.base(update.resource_id), update, keep=keep
        )
        if stored:
            self.holds(update.resource_id, update)
        return stored

    def leaving(
        self, resource: str, base: bytes, update: "Update | None", *, force: bool = False
    ) -> Flow[Ended]:
        """Leave a resource, with an update's last data if there is one."""
        opener = self.held.pop(resource, None)
        try:
            return (
                yield from updates.leave(
                    self.me, base, self.runner(resource, update), self.policy, update, force=force
                )
            )
        except PhononError:
            self.held.setdefault(resource, opener)
            raise

    def ending(self, resource: str, update: "Update | None") -> Task[Ended]:
        """The task of `leaving`. Should its caller give up on it, it reports to the log."""
        force = update is not None and update.forced
        base = self.keys.base(resource)

        def failed(_: BaseException) -> None:
            # Its data is local again, and maybe nobody else holds it any more.
            if update is not None:
                self._unended.append(update)

        return Task(
            base,
            self.leaving(resource, base, update, force=force),
            lambda ended: self.report(base, ended, update),
            failed,
        )

    def runner(self, resource: str, update: "Update | None") -> Runner:
        """What runs ``execute`` on a batch of that resource."""
        return lambda batch: run_batch(self, resource, batch, update)

    def report(self, base: bytes, ended: Ended, update: "Update | None") -> None:
        """See to what went wrong at the end of a session."""
        if ended.failures or ended.lost:
            self._after(base, ended.failures, ended.lost, update)

    def _after(
        self,
        base: bytes,
        failures: Sequence[Failure],
        lost: Sequence[int],
        update: "Update | None",
    ) -> None:
        resource = self.keys.resource(base)
        for token in lost:
            log.error(
                "batch %d of %r was executed here, but another process has taken it over: this "
                "one was believed dead; a sink that checks the token has it once",
                token,
                resource,
            )
        for token, error, retry_in, fate in failures:
            if retry_in is not None:
                self.upkeep.retry_in(retry_in, base, token, update)
            then = {
                "retry": f"is tried again in {retry_in or 0:.1f} s",
                "parked": "is parked",
                "lost": "is another process's now",
            }[fate]
            text = f"batch {token} of {resource!r} failed and {then}"
            error.add_note(f"phonon: {text}; its data is kept")
            log.warning("%s: %s: %s", text, type(error).__name__, error)

    @staticmethod
    def errors_of(task: Task[Ended]) -> list[Exception]:
        """What a finished end of a session has to raise. Interrupts are raised here and now."""
        if task.error is not None:
            raised: list[BaseException] = [task.error]
        else:
            raised = [failure.error for failure in task.result.failures]
        for error in raised:
            if not isinstance(error, Exception):
                raise error
        return [error for error in raised if isinstance(error, Exception)]

    def retrying(self, base: bytes, token: int, update: "Update | None") -> Task[Any]:
        """Take up a batch again that failed."""
        run = self.runner(self.keys.resource(base), update)
        task: Task[Any] = Task(base, updates.retry(self.me, base, token, run, self.policy))
        task.done = lambda result: self._after(base, result[1], result[2], update)
        return task

    def new_holder(self) -> tuple[Participant, str]:
        """Name an acquisition of a lock."""
        return self.me, f"{self.name}/{next(self._holders)}"

    def stays(self, process_ids: Sequence[str], base: bytes) -> list[processes.Stay]:
        """Where processes run, and since when they hold a resource."""
        # They are nobody's operations on the resource: nothing to take turns about.
        tasks = [
            Task(b"%d" % i, processes.stay(self.me, process_id, base))
            for i, process_id in enumerate(process_ids)
        ]
        self.run_all(tasks)
        return [task.outcome() for task in tasks]

    # Batches

    @property
    def batch(self) -> "Batch | None":
        """The batch that this thread is in."""
        batch: Batch | None = getattr(self.local, "batch", None)
        return batch

    def _store_unstored(self) -> None:
        left, self.unstored = self.unstored, []
        store(self, left)

    def _end_unended(self) -> list[Exception]:
        unended, self._unended = self._unended, []
        tasks = [self.ending(update.resource_id, update) for update in unended]
        self.driver.run_all(tasks)
        for update, task in zip(unended, tasks, strict=True):
            if task.error is not None and not task.suspended:
                self._unended.append(update)
        return [error for task in tasks for error in self.errors_of(task)]

    # Upkeep

    def beat(self) -> None:
        """One heartbeat: say that we live, and renew what is ours."""
        known = self.driver.run(b"", processes.beat(self.me, self._ttl_ms)).known
        if not known:
            log.warning(
                "process %s had not been heard of for %g s and counted as dead; it goes on",
                self.name,
                DEAD_AFTER * self.heartbeat_interval,
            )
            self._renew_at = 0.0  # a server that has lost us may have lost what we hold
        try:
            self._renew()
        finally:
            if self.driver.suspended or self.unstored or self._unended or self._expired:
                self.upkeep.catch_up()

    def catch_up(self) -> None:
        """Go on with what could not be done while the server was gone. Batches may execute."""
        if self.driver.resume() is not None:
            return
        for error in self._end_unended():
            log.error("a session could still not be ended: %s", error)
        if self.unstored:
            self._store_unstored()
        expired, self._expired = self._expired, set()
        tasks = [Task(self.keys.base(resource), self._rejoining(resource)) for resource in expired]
        self.driver.run_all(tasks)
        for task, resource in zip(tasks, expired, strict=True):
            if task.error is not None:
                log.error("the membership in %r could not be renewed: %s", resource, task.error)
                self._expired.add(resource)

    def _renew(self) -> None:
        by_base = self._to_renew()
        lease_ms = max((lock.lease_ms for lock in list(self.locks.values())), default=0)
        # Renewing changes nothing that counts in order, so it waits for nobody's turn: the heart
        # must neither starve beside busy threads nor go on with their kept flows.
        tasks = [
            Task(b"renew " + base, references.renew(self.me, base, lease_ms, holders))
            for base, holders in by_base.items()
        ]
        self.driver.run_all(tasks)
        for task, (base, holders) in zip(tasks, by_base.items(), strict=True):
            if task.error is None:
                self._renewed(base, holders, *task.result)
        for task in tasks:
            if task.error is not None:
                self._renew_at = 0.0
                raise task.error

    def _to_renew(self) -> dict[bytes, list[str]]:
        """The locks that are held, by resource, and now and then all memberships."""
        by_base: dict[bytes, list[str]] = {}
        for holder, lock in list(self.locks.items()):
            by_base.setdefault(lock.base, []).append(holder)
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + self.session_length / 3
            for resource in list(self.held):
                by_base.setdefault(self.keys.base(resource), [])
        return by_base

    def _renewed(self, base: bytes, holders: Sequence[str], member: bool, *owned: bool) -> None:
        for holder, mine in zip(holders, owned, strict=True):
            lock = self.locks.get(holder)
            if lock is not None and not mine:
                lock.lose()
        resource = self.keys.resource(base)
        if not member and resource in self.held:
            log.warning("the membership in %r had expired; it is renewed", resource)
            self._expired.add(resource)

    def _rejoining(self, resource: str) -> Flow[None]:
        # Left meanwhile, by another thread? Then it stays left.
        if resource in self.held:
            yield from self.joining(resource, self.keys.base(resource))
