"""What makes a `Process` go: its identity, its driver, what it holds, and its upkeep.

The public objects are thin: they build a flow and hand it to the engine of their process. Nothing
here is public.
"""

import contextlib
import itertools
import logging
import math
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from phonon.backlog import Backlog, Overflow
from phonon.batch import store
from phonon.drivers.connect import Lease
from phonon.drivers.sync import SyncDriver, Task
from phonon.errors import (
    BatchLostError,
    DeclaredDeadError,
    PhononError,
    ProcessStoppedError,
    ServerStateLostError,
    UnknownClassError,
)
from phonon.execution import Execution, together
from phonon.lock import Grant, Grants
from phonon.partials import is_known
from phonon.protocol import compaction, locks, processes, recovery, references, updates
from phonon.protocol.effects import Flow, Participant, T
from phonon.protocol.keys import Keys
from phonon.protocol.processes import Beat
from phonon.protocol.recovery import Recovered
from phonon.protocol.updates import Ended, Failure, RetryPolicy
from phonon.runtime import THREADS, Runtime
from phonon.serializers import Serializer
from phonon.takeover import take_over
from phonon.upkeep import Upkeep

if TYPE_CHECKING:
    from phonon.batch import Batch
    from phonon.process import Process
    from phonon.update import Update

log = logging.getLogger("phonon")

#: A process counts as dead after this many heartbeat intervals without a heartbeat. It is to be
#: taken over from within five, and one more.
DEAD_AFTER = 4
#: Seconds after another process's deadline at which to look after it.
DEATH_GRACE = 0.01
#: Updates share this many locks; two updates that share one merely take turns.
STRIPES = 64
#: How often a lock is renewed within its lease.
RENEWALS = 4
#: Goes on while the machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SessionCache(Protocol):
    """A cache that holds updates of a process."""

    def end_for(self, engine: "Engine") -> list[Exception]:
        """End the sessions of that process's updates; return what went wrong."""

    def forget_for(self, engine: "Engine") -> None:
        """Drop them: they are the parent's."""

    @property
    def surplus(self) -> int:
        """How many more it holds than it should, because they could not be sent."""


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
        recovers: Whether it takes over from dead processes.
        on_error: Is told what there is no caller to raise it to.
        executor: Runs the user's ``execute``, if not the calling thread.
        max_backlog: How much may be left undone.
        overflow: What new updates are met with then.
        runtime: How it waits.
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
        recovers: bool,
        on_error: Callable[[Exception], object] | None,
        executor: Executor | None = None,
        max_backlog: int,
        overflow: Overflow,
        runtime: Runtime = THREADS,
    ) -> None:
        self._process = weakref.ref(process)
        self.lease = lease
        self.keys = keys
        self.serializer = serializer
        self.policy = policy
        self.session_length = session_length
        self.heartbeat_interval = heartbeat_interval
        self.recovers = recovers
        self.on_error = on_error
        self.executor = executor
        self.max_backlog = max_backlog
        self.overflow = overflow
        self.runtime = runtime
        self.caches: weakref.WeakSet[SessionCache] = weakref.WeakSet()
        self.stopped = False
        self.prefixes: dict[tuple[str, str], str] = {}
        self._begin()

    def _begin(self) -> None:
        """A process of its own, that holds nothing."""
        #: Updates and locks belong to it. A forked child has another one.
        self.home = object()
        #: The identity; another one when this one was declared dead.
        self.me = self._new_identity()
        self._changing = threading.Lock()
        #: Ids under which this process was declared dead.
        self._former: list[str] = []
        #: Classes that others are left to execute, as far as it was said.
        self._unknown: set[str] = set()
        self._epoch = b""
        self._lives_until = 0.0
        self._troubles = 0
        self.driver = SyncDriver(self.lease.server, together, self.executor, self.runtime)
        #: The resources this process is a member of, each with the update that opened it.
        self.held: dict[str, weakref.ref[Update] | None] = {}
        #: What its threads have locked, by holder.
        self.grants = Grants()
        #: Nobody waits while he has one of them, so they are the same for tasks.
        self.stripes = [threading.RLock() for _ in range(STRIPES)]
        self.local = self.runtime.local()
        self.backlog = Backlog(
            self._undone, self.max_backlog, self.overflow, self.local, self.runtime.condition()
        )
        #: The open batches; each thread or task has its own in ``local``.
        self.batches: set[Batch] = set()
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
        self._starting = self.runtime.lock()
        self._started = False

    # Life

    def start(self) -> None:
        """Appear among the processes, and begin to beat."""
        with self._starting:
            if self._started:
                return
            begun = self.clock()
            beat = self.driver.run(b"", processes.enrol(self.me, self._card(), self._ttl_ms))
            self._lives_until = begun + self._ttl_ms / 1000
            self._epoch = beat.epoch
            self._troubles = self.driver.server.troubles
            self.upkeep.start()
            self._started = True
            if self.recovers:
                self.upkeep.recover(beat.dead)

    @property
    def claim_ms(self) -> int:
        """How long what a survivor has in hand is left to it: until it would be dead itself."""
        return min(recovery.CLAIM_MS, self._ttl_ms)

    def _new_identity(self) -> Participant:
        lease_ms = int(self.session_length * 1000)
        colocated = self.lease.server.colocated
        return Participant(uuid.uuid4().hex, self.keys, lease_ms, colocated=colocated)

    @staticmethod
    def _card() -> dict[str, str | int]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": f"{time.time():.3f}",
            "version": metadata.version("phonon"),
        }

    @property
    def _ttl_ms(self) -> int:
        return int(DEAD_AFTER * self.heartbeat_interval * 1000)

    def after_fork_in_child(self) -> None:
        """The child is another process: it has an identity of its own, and holds nothing."""
        for cache in list(self.caches):
            cache.forget_for(self)
        self.executor = None  # its threads are the parent's
        self._begin()

    def abandon(self) -> None:
        """The child is another process, and cannot be this one's likeness: it holds nothing."""
        self.stopped = True
        self.home = object()
        self._lives_until = 0.0

    def ensure_alive(self) -> None:
        """Start what a fork, or a bug in a thread, has ended.

        Raises:
            ProcessStoppedError: `stop` was called.
            ConfigurationError: The caller cannot wait here. What he wants must not be kept either.
        """
        if self.stopped:
            raise ProcessStoppedError(
                f"process {self.me.id.decode()} was stopped: make a new Process"
            )
        self.runtime.admit()
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
    def surely_lives(self) -> bool:
        """Whether it is sure, without asking, that nobody can have declared this process dead.

        Counted from before the last heartbeat, so this ends earlier than on the server.
        """
        return self.clock() < self._lives_until

    @staticmethod
    def clock() -> float:
        """Seconds, from a clock that is never set."""
        return time.clock_gettime(_CLOCK)

    @property
    def wanted_by(self) -> "Process | None":
        """The public object, if anybody still has it."""
        return self._process()

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
            self.close()
        return errors

    def close(self) -> None:
        """Do no more. A second call does nothing."""
        if not self.stopped:
            self.stopped = True
            self.backlog.open()
            try:
                self.upkeep.stop()
            finally:
                self.runtime.close()
                self.lease.close()

    def _end_everything(self) -> list[Exception]:
        errors: list[Exception] = []
        self.upkeep.wind_down()
        for cache in list(self.caches):
            errors += cache.end_for(self)
        try:
            self.upkeep.join()
            take_over(self, self._former, lambda: False)
            lost = self.driver.resume()
            if lost is not None:
                raise lost
            errors += self._end_unended()
            try:
                self._store_unstored()
            except ExceptionGroup as group:
                errors += group.exceptions
            self._release_all()
            # The server's word, not our memory: it names all that we may be responsible for.
            held = set(self.driver.run(b"", self.living(processes.registry)))
            held.update(self.keys.base(resource) for resource in list(self.held))
            errors += self._leave_all([self.keys.resource(base) for base in held])
            errors += self.upkeep.retry_now()
            # A heartbeat after this would bring the process back to life.
            self.upkeep.stop()
            if not self.driver.run(b"", processes.registry(self.me)):
                self.driver.run(b"", processes.resign(self.me))
            else:
                # Batches that will not execute are for those who come after us: be seen to be dead.
                self.driver.run(b"", processes.beat(self.me, 0, self._epoch))
        except PhononError as error:
            errors.append(error)
        return errors

    def _release_all(self) -> None:
        grants = self.grants.everywhere()
        self.grants = Grants()
        tasks = [
            Task(grant.lock.base, locks.release(grant.me, grant.lock.base, grant.wish.holder))
            for grant in grants
        ]
        self.driver.run_all(tasks)
        for grant, task in zip(grants, tasks, strict=True):
            if task.error is not None:
                raise task.error
            grant.lost = True

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
        try:
            return self.driver.run(base, flow, done)
        except BaseException:
            self.backlog.look()
            raise

    def run_all(self, tasks: Sequence[Task[Any]]) -> None:
        """Run many flows together."""
        self.ensure_alive()
        try:
            self.driver.run_all(tasks)
        finally:
            self.backlog.look()

    def join(self, resource: str, base: bytes, update: "Update | None" = None) -> None:
        """Become a member of a resource."""
        self.run(base, self.joining(resource, base, update))

    def joining(self, resource: str, base: bytes, update: "Update | None" = None) -> Flow[None]:
        """The flow of `join`."""
        yield from self.living(lambda me: references.join(me, base))
        self.holds(resource, update)

    def meeting(self, resource: str, base: bytes, parties: int) -> Flow[None]:
        """Join a session of known parties."""
        yield from self.living(lambda me: references.meet(me, base, parties))
        self.holds(resource)

    def holds(self, resource: str, update: "Update | None" = None) -> None:
        """Note a membership, and which update `stop` has to end it with."""
        if update is None:
            self.held.setdefault(resource)
        elif self.held.get(resource) is None:
            update.opens(self)

    def storing(self, update: "Update", *, keep: bool = True) -> Flow[bool]:
        """Store what an update has unsent; it makes this process a member."""
        base = self.keys.base(update.resource_id)
        count = yield from self.living(lambda me: updates.append(me, base, update, keep=keep))
        if count is None:
            return False
        self.holds(update.resource_id, update)
        if count:
            merge = self.runner(update.resource_id, None).merge
            yield from compaction.compact(self.me, base, count, merge)
        return True

    def leaving(
        self, resource: str, base: bytes, update: "Update | None", *, force: bool = False
    ) -> Flow[Ended]:
        """Leave a resource, with an update's last data if there is one."""
        opener = self.held.pop(resource, None)
        run, policy = self.runner(resource, update), self.policy
        try:
            return (
                yield from self.living(
                    lambda me: updates.leave(me, base, run, policy, update, force=force)
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

    def runner(self, resource: str, update: "Update | None") -> Execution:
        """What runs ``execute`` on a batch of that resource, and merges its partials."""
        return Execution(self, resource, update)

    def report(self, base: bytes, ended: Ended, update: "Update | None") -> None:
        """See to what went wrong at the end of a session."""
        if ended.failures or ended.lost:
            self.after(base, ended.failures, ended.lost, update)

    def after(
        self,
        base: bytes,
        failures: Iterable[Failure],
        lost: Iterable[int],
        update: "Update | None" = None,
        *,
        background: bool = False,
    ) -> None:
        """See to batches that failed, or were executed in vain.

        Args:
            base: Whose.
            failures: Those that failed.
            lost: The tokens of those that were taken over.
            update: The update whose session ended here.
            background: Whether there is no caller to raise the errors to.
        """
        resource = self.keys.resource(base)
        for token in lost:
            text = (
                f"batch {token} of {resource!r} was executed here, but another process has taken "
                "it over: this one was believed dead; a database that checks the token has it once"
            )
            self.tell(BatchLostError(text, resource, token))
        for token, error, retry_in, fate in failures:
            if fate == "entrusted":
                self._entrusted(error)
                continue
            if retry_in is not None:
                self.upkeep.retry_in(retry_in, base, token, update)
            then = {
                "retry": f"is tried again in {retry_in or 0:.1f} s",
                "parked": "is parked: see Process.parked()",
                "lost": "is another process's now",
            }[fate]
            text = f"batch {token} of {resource!r} failed and {then}"
            error.add_note(f"phonon: {text}; its data is kept")
            log.warning("%s: %s: %s", text, type(error).__name__, error)
            if background and isinstance(error, Exception):
                self._hook(error)

    def _entrusted(self, error: BaseException) -> None:
        """A batch was left to others. There may be very many of that kind: say so once."""
        if isinstance(error, UnknownClassError) and error.class_name not in self._unknown:
            self._unknown.add(error.class_name)
            whom = "an AsyncProcess" if is_known(error.class_name) else "a process"
            text = f"batches of {error.class_name} are left to {whom} that has imported it"
            error.add_note(f"phonon: {text}; their data is kept")
            log.warning("%s: %s", text, error)
            self._hook(error)

    def tell(self, error: Exception) -> None:
        """Say what there is no caller to raise it to."""
        log.error("%s", error)
        self._hook(error)

    def _hook(self, error: Exception) -> None:
        if self.on_error is not None:
            try:
                self.runtime.tell(self.on_error, error)
            except Exception:
                log.exception("on_error has raised")

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
        task.done = lambda result: self.after(base, result[1], result[2], update, background=True)
        return task

    def recovering(self, base: bytes, dead: str) -> Task[Recovered]:
        """Take over what a dead process has left of a resource."""
        run, policy = self.runner(self.keys.resource(base), None), self.policy

        def done(recovered: Recovered) -> None:
            if recovered.retry_in is not None and recovered.token is not None:
                self.upkeep.retry_in(recovered.retry_in, base, recovered.token, None)
            self.after(base, recovered.failures, recovered.lost, background=True)

        flow = self.living(lambda me: recovery.recover(me, base, dead, run, policy))
        return Task(base, flow, done)

    def new_holder(self, *, shared: bool = False, places: int = 0) -> tuple[Participant, str]:
        """Name an acquisition of a lock; see `locks.name_of`."""
        me, number = self.me, next(self._holders)
        return me, locks.name_of(me.id.decode(), number, shared=shared, places=places)

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
        if not self.batches:
            return None
        batch: Batch | None = getattr(self.local, "batch", None)
        return batch if batch in self.batches else None

    def _undone(self) -> int:
        """How much is left to do, because it did not work the first time."""
        undone = self.driver.suspended + len(self.unstored) + len(self._unended)
        return undone + self.upkeep.failed + sum(cache.surplus for cache in list(self.caches))

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

    def living(self, flow: Callable[[Participant], Flow[T]]) -> Flow[T]:
        """A flow that begins again under a new id when it is refused as a dead process's."""
        while True:
            me = self.me
            try:
                return (yield from flow(me))
            except DeclaredDeadError:
                yield from self.be_reborn(me)

    def be_reborn(self, old: Participant) -> Flow[None]:
        """Take a new identity, unless another thread has done so. What is local is kept."""
        if self.me is not old:
            return
        new = self._new_identity()
        begun = self.clock()
        beat = yield from processes.enrol(new, self._card(), self._ttl_ms)
        with self._changing:
            changed = self.me is old
            if changed:
                self.me = new
                self._former.append(old.id.decode())
                self._lives_until = begun + self._ttl_ms / 1000
        if not changed:
            yield from processes.resign(new)
            return
        error = DeclaredDeadError(
            f"process {old.id.decode()} was silent for more than "
            f"{DEAD_AFTER * self.heartbeat_interval:g} s and was declared dead: others take "
            f"over its batches and locks. It goes on as {self.name} with all that is local"
        )
        # Those of the new identity, which other threads may have taken already, are not lost.
        self._lose([grant for grant in self.grants.everywhere() if grant.me is old], error)
        self._epoch = beat.epoch
        self._expired.update(self.held)
        self.upkeep.drop_retries()
        self.upkeep.catch_up()
        if self.recovers:
            self.upkeep.recover([old.id.decode(), *beat.dead])

    def beat(self) -> float:
        """One heartbeat: say that we live, renew what is ours, and look after the dead.

        Returns:
            Seconds until the next one, at the most.
        """
        me = self.me
        begun = self.clock()
        beat = self._beat(me, outage=self._troubles != self.driver.server.troubles)
        if beat.kind == "dead" and self._troubles != self.driver.server.troubles:
            # It was not we who were silent: the server was not to be reached.
            beat = self._beat(me, outage=True)
        self._troubles = self.driver.server.troubles
        if beat.kind == "forgotten" and self.driver.run(b"", processes.is_buried(me)):
            # Nothing is lost: whoever took over from us has gone, and with the last one the epoch.
            beat = beat._replace(kind="dead")
        if beat.kind == "dead":
            self.driver.run(b"", self.be_reborn(me))
        else:
            self._lives_until = begun + self._ttl_ms / 1000
        if beat.kind == "forgotten":
            self._start_over(beat)
        try:
            self._renew()
        finally:
            if self.has_left_over:
                self.upkeep.catch_up()
            if self.recovers:
                self.upkeep.recover(beat.dead)
        if beat.next_death is None:
            return self.heartbeat_interval
        return beat.next_death + DEATH_GRACE

    def soonest(self) -> float:
        """Seconds until locks have to be renewed, whether or not the last beat went well."""
        leases = [grant.wish.lease_ms for grant in self.grants.everywhere()]
        return min(leases, default=math.inf) / 1000 / RENEWALS

    def holds_lock(self, grant: Grant) -> None:
        """Renew a lock from now on."""
        self.grants.add(grant)
        self.upkeep.beat_in(grant.lock.lease / RENEWALS)

    def _beat(self, me: Participant, *, outage: bool) -> Beat:
        begun = time.monotonic()
        try:
            beat = processes.beat(me, self._ttl_ms, self._epoch, outage=outage)
            return self.driver.run(b"", beat)
        finally:
            if time.monotonic() - begun > self.heartbeat_interval:
                self._troubles = -1  # it stood still, if it did not refuse

    def _start_over(self, beat: Beat) -> None:
        """The server has come back without its data."""
        self._epoch = beat.epoch
        self.driver.run(b"", processes.enrol(self.me, self._card(), self._ttl_ms))
        self._renew_at = 0.0
        self.tell(
            ServerStateLostError(
                f"{self.driver.server.address} has lost its data. What was stored there and not "
                "yet written to the database is lost, unless it is restored from a backup; "
                f"process {self.name} registers again, renews its {len(self.held)} memberships, "
                f"and has lost its {len(self.grants)} locks. A server with appendonly yes, or "
                "Process(durability=...), keeps its data"
            )
        )

    @property
    def has_left_over(self) -> bool:
        """Whether something could not be brought to its end yet."""
        return bool(self.driver.suspended or self.unstored or self._unended or self._expired)

    def catch_up(self) -> None:
        """Go on with what could not be done while the server was gone. Batches may execute."""
        try:
            self._catch_up()
        finally:
            self.backlog.look()

    def _catch_up(self) -> None:
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
        # Renewing changes nothing that counts in order, so it waits for nobody's turn: the heart
        # must neither starve beside busy threads nor go on with their kept flows.
        tasks = [
            Task(b"renew " + base, self._renewing(base, grants)) for base, grants in by_base.items()
        ]
        self.driver.run_all(tasks)
        lost: list[Grant] = []
        for task, (base, grants) in zip(tasks, by_base.items(), strict=True):
            if task.error is None:
                member, *owned = task.result
                lost += [grant for grant, mine in zip(grants, owned, strict=True) if not mine]
                self._renewed(base, member=member)
        self._lose(lost)
        for task in tasks:
            if task.error is not None:
                self._renew_at = 0.0
                raise task.error

    def _to_renew(self) -> dict[bytes, list[Grant]]:
        """The locks that are held, by resource, and now and then all memberships."""
        by_base: dict[bytes, list[Grant]] = {}
        for grant in self.grants.everywhere():
            by_base.setdefault(grant.lock.base, []).append(grant)
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + self.session_length / 3
            for resource in list(self.held):
                by_base.setdefault(self.keys.base(resource), [])
        return by_base

    def _renewing(self, base: bytes, grants: Sequence[Grant]) -> Flow[list[bool]]:
        now = self.clock()
        wanted = [(grant.wish.holder, grant.lease_ms(now)) for grant in grants]
        renewed = yield from references.renew(self.me, base, wanted)
        for grant, mine in zip(grants, renewed[1:], strict=True):
            if mine:
                grant.until = max(grant.until, now + grant.wish.lease_ms / 1000)
        return renewed

    def _lose(self, grants: Sequence[Grant], *errors: Exception) -> None:
        """These locks are not ours any more, because of those errors.

        The user's code that is told may take its time, and use this process: not in the heart's
        thread, nor in the middle of a flow.
        """
        if not grants and not errors:
            return
        for grant in grants:
            grant.lost = True

        def tell() -> None:
            for error in errors:
                self.tell(error)
            for grant in grants:
                grant.lock.lose(grant)  # does nothing if it was released meanwhile

        # The interpreter starts no threads while it ends.
        with contextlib.suppress(RuntimeError):
            self.runtime.spawn(tell, f"phonon-lost-{self.name[:8]}")

    def _renewed(self, base: bytes, *, member: bool) -> None:
        resource = self.keys.resource(base)
        if not member and resource in self.held:
            log.warning("the membership in %r had expired; it is renewed", resource)
            self._expired.add(resource)

    def _rejoining(self, resource: str) -> Flow[None]:
        # Left meanwhile, by another thread? Then it stays left.
        if resource in self.held:
            yield from self.joining(resource, self.keys.base(resource))
