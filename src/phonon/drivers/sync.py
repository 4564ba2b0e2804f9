"""The driver for threads: runs flows over redis-py connections, many in lock step."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Generic

from phonon.drivers.server import Server
from phonon.errors import ConnectionLostError, PhononError
from phonon.protocol.effects import Call, Effect, Execute, Flow, Outcome, T

log = logging.getLogger("phonon")

#: Flows advanced together. Their calls travel in one pipeline, so this bounds the exchange and
#: the batches held in memory.
LOCK_STEP = 1000
#: Seconds of user code after which finished batches are completed before more are executed, so
#: that a crash repeats little.
EXECUTE_SLICE = 0.5


class Task(Generic[T]):
    """A flow under way.

    Args:
        base: The resource that the flow is about.
        flow: The flow.
        done: Told the result, also if the flow got there only after its caller had given up.

    Attributes:
        result: What the flow returned.
        error: What it raised instead.
    """

    __slots__ = ("base", "done", "effect", "error", "flow", "result")

    result: T

    def __init__(self, base: bytes, flow: Flow[T], done: Callable[[T], None] | None = None) -> None:
        self.base = base
        self.flow = flow
        self.done = done
        self.effect: Effect | None = None
        self.error: BaseException | None = None

    def advance(self, reply: Any = None) -> None:
        """Hand the flow the result of its last effect, and take its next one."""
        try:
            if isinstance(reply, BaseException):
                self.effect = self.flow.throw(reply)
            else:
                self.effect = self.flow.send(reply)
        except StopIteration as stop:
            self.effect = None
            self.result = stop.value
            if self.done is not None:
                self.done(stop.value)
        except BaseException as error:  # noqa: BLE001 - handed to whoever wants the outcome
            self.effect = None
            self.error = error

    @classmethod
    def suspended(
        cls, base: bytes, flow: Flow[T], done: Callable[[T], None] | None, effect: Effect | None
    ) -> "Task[T]":
        """A task whose flow waits for an effect."""
        task = cls(base, flow, done)
        task.effect = effect
        return task

    def outcome(self) -> T:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result


class Guard:
    """Lets one flow at a time talk about a resource.

    A process's operations on one resource are numbered and must reach the server in that order;
    two under way at once, over two connections, could overtake each other, and the server would
    take the later-arriving one for a repeat.
    """

    __slots__ = ("_busy", "_freed", "_lock", "_waiting")

    def __init__(self) -> None:
        self._busy: set[bytes] = set()
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._waiting = 0

    def acquire(self, bases: AbstractSet[bytes]) -> None:
        """Wait until all of these are free, and take them at once: nobody holds some and waits."""
        with self._lock:
            while not self._busy.isdisjoint(bases):
                self._waiting += 1
                try:
                    self._freed.wait()
                finally:
                    self._waiting -= 1
            self._busy |= bases

    def acquire_one(self, base: bytes) -> None:
        """`acquire` for a single resource."""
        with self._lock:
            if base not in self._busy:
                self._busy.add(base)
                return
        self.acquire({base})

    def release_one(self, base: bytes) -> None:
        """`release` for a single resource."""
        with self._lock:
            self._busy.discard(base)
            if self._waiting:
                self._freed.notify_all()

    def release(self, bases: AbstractSet[bytes]) -> None:
        """Let others go on."""
        with self._lock:
            self._busy -= bases
            if self._waiting:
                self._freed.notify_all()


class SyncDriver:
    """Runs the flows of one process.

    Args:
        server: Where calls go.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._guard = Guard()
        self._numbers = itertools.count(1)
        self._suspended: dict[bytes, Task[Any]] = {}

    def run(self, base: bytes, flow: Flow[T], done: Callable[[T], None] | None = None) -> T:
        """Run one flow to its end. For ``done`` see `Task`.

        Raises:
            ConnectionLostError: The server did not answer. A call that is kept stays with the
                process, which repeats it before it does anything else with the resource.
            PhononError: The server answered with an error.
        """
        # What _run does for many, without its bookkeeping, which would cost half a round trip.
        self._guard.acquire_one(base)
        effect: Effect | None = None
        try:
            if base not in self._suspended:
                effect = flow.send(None)
                while effect.__class__ is Call:
                    effect = self._answer(base, flow, effect, done)
        except StopIteration as stop:
            if done is not None:
                done(stop.value)
            result: T = stop.value
            return result
        finally:
            self._guard.release_one(base)
        # It wants more than calls, or something is to be done before.
        task = Task.suspended(base, flow, done, effect)
        self._run([task])
        return task.outcome()

    def _answer(
        self, base: bytes, flow: Flow[T], call: Call, done: Callable[[T], None] | None
    ) -> Effect:
        """Send a call, and the answer to the flow. Returns what that wants next."""
        if call.numbered and not call.number:
            call.number = next(self._numbers)
        try:
            reply = self.server.call(call)
        except BaseException:
            # Interrupted (Ctrl-C): as unknown as a lost answer.
            if call.keep:
                self._suspended[base] = Task.suspended(base, flow, done, call)
            raise
        if not isinstance(reply, Exception):
            return flow.send(reply)
        if call.keep and isinstance(reply, ConnectionLostError):
            self._suspended[base] = Task.suspended(base, flow, done, call)
            raise reply
        return flow.throw(reply)

    def run_all(self, tasks: Sequence[Task[T]]) -> None:
        """Run many flows, advancing them together; their outcomes are in the tasks."""
        waiting = list(tasks)
        while waiting:
            # One flow per resource at a time: the second one starts when the first has ended.
            together: dict[bytes, Task[T]] = {}
            later: list[Task[T]] = []
            for task in waiting:
                if len(together) < LOCK_STEP and task.base not in together:
                    together[task.base] = task
                else:
                    later.append(task)
            self._run(list(together.values()))
            lost = [t.error for t in together.values() if isinstance(t.error, ConnectionLostError)]
            if lost:
                for task in later:
                    task.error = lost[0]  # not begun: to wait for the server once is enough
                return
            waiting = later

    def resume(self) -> None:
        """Go on with the calls that were kept when the server did not answer."""
        if self._suspended:
            self._run((), kept=list(self._suspended))

    @property
    def suspended(self) -> int:
        """How many calls wait for the server to come back."""
        return len(self._suspended)

    def _run(self, tasks: Sequence[Task[Any]], *, kept: Iterable[bytes] = ()) -> None:
        """Run tasks about different resources, after what was kept for these and ``kept``."""
        owned = {task.base for task in tasks}.union(kept)
        self._guard.acquire(owned)
        try:
            if self._suspended:
                tasks = self._run_kept(tasks, owned)
            for task in tasks:
                if task.effect is None:
                    task.advance()
            self._drive(tasks, owned)
        finally:
            self._guard.release(owned)

    def _run_kept(self, tasks: Sequence[Task[Any]], owned: set[bytes]) -> Sequence[Task[Any]]:
        """Repeat the calls that got no answer, before the next operations, which count in order.

        Returns:
            The tasks that may go on.
        """
        kept = [self._suspended.pop(base) for base in owned & self._suspended.keys()]
        self._drive(kept, owned)
        lost = {task.base: task.error for task in kept if task.base in self._suspended}
        for task in kept:
            if task.error is not None and task.base not in lost:
                log.error("a call that had been kept has failed: %s", task.error)
        for task in tasks:
            task.error = lost.get(task.base)
        return [task for task in tasks if task.error is None]

    def _drive(self, tasks: Sequence[Task[Any]], owned: set[bytes]) -> None:
        """Advance tasks that have begun until all have ended. Their resources are ``owned``."""
        active = [task for task in tasks if task.effect is not None]
        while active:
            calling = [task for task in active if isinstance(task.effect, Call)]
            if calling:
                self._exchange(calling)
            else:
                # Nobody waits for a resource while holding another one: all are let go here, and
                # taken again together.
                again = set(owned)
                self._guard.release(again)
                owned.clear()
                ready = self._act(active)
                self._guard.acquire(again)
                owned.update(again)
                for task, reply in ready:
                    task.advance(reply)
            active = [task for task in active if task.effect is not None]

    def _act(self, tasks: Sequence[Task[Any]]) -> list[tuple[Task[Any], Any]]:
        """Do what the flows want besides calls, until it has taken a while."""
        enough = time.monotonic() + EXECUTE_SLICE
        ready: list[tuple[Task[Any], Any]] = []
        for task in tasks:
            effect = task.effect
            if isinstance(effect, Execute):
                ready.append((task, self._execute(effect)))
            elif not isinstance(effect, Call) and effect is not None:
                try:
                    ready.append((task, self.server.wait(effect.key, effect.timeout)))
                except PhononError as error:
                    ready.append((task, error))
            if time.monotonic() > enough:
                break
        return ready

    @staticmethod
    def _execute(effect: Execute) -> Outcome:
        try:
            return Outcome(value=effect.function())
        except BaseException as error:  # noqa: BLE001 - the flow keeps the batch, then it is raised
            return Outcome(error=error)

    def _exchange(self, tasks: Sequence[Task[Any]]) -> None:
        calls: list[Call] = [task.effect for task in tasks]  # type: ignore[misc]  # _drive chose them
        for call in calls:
            if call.numbered and not call.number:
                call.number = next(self._numbers)
        try:
            replies = self.server.exchange(calls)
        except BaseException as error:
            # Interrupted (Ctrl-C) in mid-exchange: as unknown as a lost answer.
            for task, call in zip(tasks, calls, strict=True):
                self._unanswered(task, call, error)
            raise
        for task, call, reply in zip(tasks, calls, replies, strict=True):
            if isinstance(reply, ConnectionLostError):
                self._unanswered(task, call, reply)
            else:
                task.advance(reply)

    def _unanswered(self, task: Task[Any], call: Call, error: BaseException) -> None:
        if call.keep:
            # The flow goes on in another task; this one has only the error to tell.
            self._suspended[task.base] = Task.suspended(task.base, task.flow, task.done, call)
            task.effect, task.error = None, error
        else:
            task.advance(error)
