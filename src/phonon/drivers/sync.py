"""The driver: runs flows over redis-py connections, many in lock step."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, Future
from typing import Any, Generic, NamedTuple, cast

from phonon.drivers.server import Server
from phonon.errors import ConnectionLostError, PhononError
from phonon.protocol.effects import Call, Effect, Execute, Flow, Outcome, T, Wait
from phonon.runtime import THREADS, Condition, Runtime

log = logging.getLogger("phonon")

#: Flows advanced together. Their calls travel in one pipeline, so this bounds the exchange and
#: the batches held in memory.
LOCK_STEP = 1000
#: Seconds of user code after which finished batches are completed before more are executed, so
#: that a crash repeats little.
EXECUTE_SLICE = 0.5


Outcomes = Sequence[Outcome]


class Portion(NamedTuple):
    """Some of many pieces of the user's code, which run one after the other, or together.

    Attributes:
        positions: Which they are.
        run: Runs them; returns what became of each.
    """

    positions: Sequence[int]
    run: Callable[[], Outcomes]


def run_user_code(function: Callable[[], Any]) -> Outcome:
    """Run the user's code, whatever it raises."""
    try:
        return Outcome(value=function())
    except BaseException as error:  # noqa: BLE001 - the flow keeps the batch, then it is raised
        return Outcome(error=error)


def one_by_one(effects: Sequence[Execute]) -> Iterator[Portion]:
    """Each piece of code by itself."""
    for i, effect in enumerate(effects):
        yield by_itself(i, effect)


def by_itself(i: int, effect: Execute) -> Portion:
    """One piece of code as a portion."""
    return Portion([i], lambda: [run_user_code(effect.function)])


class Task(Generic[T]):
    """A flow under way.

    Args:
        base: The resource that the flow is about.
        flow: The flow.
        done: Told the result, also if the flow got there only after its caller had given up.
        failed: Told the error with which the flow ended after its caller had given up.

    Attributes:
        result: What the flow returned.
        error: What it raised instead.
        running: What executes its code in another thread, and where its outcome is in that.
        suspended: Whether its caller has given up on it: then only the error is told here, and the
            flow goes on in another task.
    """

    __slots__ = (
        "base", "done", "effect", "error", "failed", "flow", "result", "running", "suspended"
    )  # fmt: skip

    result: T

    def __init__(
        self,
        base: bytes,
        flow: Flow[T],
        done: Callable[[T], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
        *,
        effect: Effect | None = None,
    ) -> None:
        self.base = base
        self.flow = flow
        self.done = done
        self.failed = failed
        self.effect = effect
        self.error: BaseException | None = None
        self.suspended = False
        self.running: tuple[Future[Outcomes], int] | None = None

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

    def suspend(self, error: BaseException) -> "Task[T]":
        """Tell the caller the error; the flow goes on in the task returned."""
        rest = Task(self.base, self.flow, self.done, self.failed, effect=self.effect)
        rest.running = self.running
        self.effect, self.error, self.suspended = None, error, True
        return rest

    def outcome(self) -> T:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result


class Turn:
    """A place in the lines for some resources.

    Args:
        bases: The resources.
        changed: What is notified when the turn has come.

    Attributes:
        has_come: Whether it has: the resources are taken.
    """

    __slots__ = ("bases", "changed", "has_come")

    def __init__(self, bases: AbstractSet[bytes], changed: Condition) -> None:
        self.bases = bases
        self.changed = changed
        self.has_come = False


class Guard:
    """Lets one flow at a time talk about a resource, in order of arrival.

    A process's operations on one resource are numbered and must reach the server in that order;
    two under way at once, over two connections, could overtake each other, and the server would
    take the later-arriving one for a repeat.
    """

    __slots__ = ("_busy", "_lock", "_queues", "_runtime")

    def __init__(self, runtime: Runtime = THREADS) -> None:
        self._runtime = runtime
        self._busy: set[bytes] = set()
        self._lock = threading.Lock()
        #: Those that wait, for each resource that somebody waits for.
        self._queues: dict[bytes, deque[Turn]] = {}

    def acquire(self, bases: AbstractSet[bytes]) -> None:
        """Wait until all of these are free, and take them at once: nobody holds some and waits."""
        with self._lock:
            # Without an order, who wants many would wait for ever beside those that want one each.
            if self._busy.isdisjoint(bases) and self._queues.keys().isdisjoint(bases):
                self._busy |= bases
                return
            turn = Turn(bases, self._runtime.condition(self._lock))
            for base in bases:
                self._queues.setdefault(base, deque()).append(turn)
            try:
                while not turn.has_come:
                    turn.changed.wait()
            except BaseException:
                if turn.has_come:
                    self._busy -= bases
                else:
                    self._leave(turn)
                self._call_next(bases)
                raise

    def acquire_one(self, base: bytes) -> None:
        """`acquire` for a single resource."""
        with self._lock:
            if base not in self._busy and base not in self._queues:
                self._busy.add(base)
                return
        self.acquire({base})

    def release_one(self, base: bytes) -> None:
        """`release` for a single resource."""
        with self._lock:
            self._busy.discard(base)
            if self._queues:
                self._call_next((base,))

    def release(self, bases: AbstractSet[bytes]) -> None:
        """Let others go on."""
        with self._lock:
            self._busy -= bases
            if self._queues:
                self._call_next(bases)

    def _call_next(self, bases: Iterable[bytes]) -> None:
        """Wake those whose turn it is, now that these resources are free."""
        for base in bases:
            queue = self._queues.get(base)
            if not queue:
                continue
            turn = queue[0]
            if self._busy.isdisjoint(turn.bases) and all(
                self._queues[wanted][0] is turn for wanted in turn.bases
            ):
                self._leave(turn)
                self._busy |= turn.bases
                turn.has_come = True
                turn.changed.notify()

    def _leave(self, turn: Turn) -> None:
        for base in turn.bases:
            queue = self._queues[base]
            queue.remove(turn)
            if not queue:
                del self._queues[base]


class Kept:
    """Flows whose callers have given up, by resource, in the order in which they have to go on."""

    def __init__(self) -> None:
        self.queues: dict[bytes, deque[Task[Any]]] = {}
        self._count = 0  # also of those that were taken out and have not ended
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def put(self, task: Task[Any], *, first: bool) -> None:
        """Keep a flow, before or behind what is kept for the resource already."""
        with self._lock:
            self._count += 1
            queue = self.queues.setdefault(task.base, deque())
            if first:
                queue.appendleft(task)
            else:
                queue.append(task)

    def take(self, bases: Iterable[bytes]) -> list[Task[Any]]:
        """Take out the flow whose turn it is, for each of the resources that has one."""
        with self._lock:
            taken = []
            for base in bases:
                queue = self.queues.get(base)
                if queue is not None:
                    taken.append(queue.popleft())
                    if not queue:
                        del self.queues[base]
            return taken

    def ended(self, count: int) -> None:
        """So many that were taken out have ended, or were put back."""
        with self._lock:
            self._count -= count

    def bases(self) -> list[bytes]:
        """The resources for which there is something."""
        with self._lock:
            return list(self.queues)


class SyncDriver:
    """Runs the flows of one process.

    Args:
        server: Where calls go.
        together: Puts together what can be executed together.
        executor: Where the user's code runs, if not in the calling thread.
        runtime: How flows wait for each other.
    """

    def __init__(
        self,
        server: Server,
        together: Callable[[Sequence[Execute]], Iterable[Portion]] = one_by_one,
        executor: Executor | None = None,
        runtime: Runtime = THREADS,
    ) -> None:
        self.server = server
        self._together = together
        self._executor = executor
        self._runtime = runtime
        self._guard = Guard(runtime)
        self._numbers = itertools.count(1)
        self._kept = Kept()

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
            if base not in self._kept.queues:
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
        task = Task(base, flow, done, effect=effect)
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
                self._kept.put(Task(base, flow, done, effect=call), first=True)
            raise
        if not isinstance(reply, Exception):
            return flow.send(reply)
        if call.keep and isinstance(reply, ConnectionLostError):
            self._kept.put(Task(base, flow, done, effect=call), first=True)
            raise reply
        return flow.throw(reply)

    def run_all(self, tasks: Sequence[Task[T]]) -> None:
        """Run many flows, advancing them together; their outcomes are in the tasks."""
        waiting = list(tasks)
        lost: BaseException | None = None
        while waiting:
            # One flow per resource at a time: the second one starts when the first has ended.
            together: dict[bytes, Task[T]] = {}
            later: list[Task[T]] = []
            for task in waiting:
                if len(together) < LOCK_STEP and task.base not in together:
                    together[task.base] = task
                else:
                    later.append(task)
            self._run(list(together.values()), lost)
            for task in together.values():
                if isinstance(task.error, ConnectionLostError):
                    lost = task.error  # to wait for the server once is enough
            waiting = later

    def resume(self) -> BaseException | None:
        """Go on with the calls that were kept when the server did not answer.

        Returns:
            Why it still does not, if so.
        """
        bases = self._kept.bases()
        for i in range(0, len(bases), LOCK_STEP):
            owned = set(bases[i : i + LOCK_STEP])
            self._guard.acquire(owned)
            try:
                for lost in self._go_on(owned).values():
                    return lost  # to wait for the server once is enough
            finally:
                self._guard.release(owned)
        return None

    @property
    def suspended(self) -> int:
        """How many flows have been kept and have not ended yet."""
        return len(self._kept)

    def _run(self, tasks: Sequence[Task[Any]], lost: BaseException | None = None) -> None:
        """Run tasks about different resources, after what was kept for these.

        Args:
            tasks: They have not begun, or wait for something other than a call.
            lost: Why the server is known to be gone: nothing is called, only kept.
        """
        owned = {task.base for task in tasks}
        try:
            self._guard.acquire(owned)
            try:
                blocked = dict.fromkeys(owned, lost) if lost else self._go_on(owned)
                for task in tasks:
                    if task.effect is None:
                        task.advance()
                        if task.effect is None and task.error is None:
                            # It had nothing to ask for, but may have been meant to wait for that.
                            task.error = blocked.get(task.base)
                self._put_off(tasks, blocked)
                self._drive(tasks, owned)
            finally:
                self._guard.release(owned)
        except BaseException as error:
            self._put_off(tasks, dict.fromkeys((task.base for task in tasks), error))
            raise

    def _go_on(self, owned: set[bytes]) -> dict[bytes, BaseException]:
        """Go on with what was kept for resources, before the next operations: they count in order.

        Returns:
            The resources for which there still is no answer, and why.
        """
        lost: dict[bytes, BaseException] = {}
        while self._kept.queues and (kept := self._kept.take(owned - lost.keys())):
            try:
                self._drive(kept, owned)
            finally:
                self._kept.ended(len(kept))
            for task in kept:
                if task.suspended and task.error is not None:
                    lost[task.base] = task.error
                elif task.error is not None:
                    log.error("a call that had been kept has failed: %s", task.error)
                    if task.failed is not None:
                        task.failed(task.error)
        return lost

    def _drive(self, tasks: Sequence[Task[Any]], owned: set[bytes]) -> None:
        """Advance tasks that have begun until all have ended. Their resources are ``owned``."""
        active = [task for task in tasks if task.effect is not None]
        while active:
            calling = [task for task in active if isinstance(task.effect, Call)]
            try:
                if calling:
                    self._exchange(calling)
                else:
                    self._act(active, owned)
                    # Others had the resources meanwhile; what they got no answer to goes before.
                    self._put_off(active, self._go_on(owned))
            except BaseException as error:
                # Interrupted (Ctrl-C): what was called is as unknown as with a lost answer.
                for task in active:
                    self._give_up(task, error, first=bool(calling))
                raise
            active = [task for task in active if task.effect is not None]

    def _act(self, tasks: Sequence[Task[Any]], owned: set[bytes]) -> None:
        """Do what the flows want besides calls, until it has taken a while.

        Nobody waits for a resource while holding another one, nor while the user's code runs: all
        are let go here, and taken again together.
        """
        again = set(owned)
        self._guard.release(again)
        owned.clear()
        for task in tasks:
            if isinstance(task.effect, Wait):
                try:
                    woken = self.server.wait(task.effect.key, task.effect.timeout)
                except PhononError as error:
                    task.advance(error)
                else:
                    task.advance(woken)
        self._execute([task for task in tasks if isinstance(task.effect, Execute)])
        self._guard.acquire(again)
        owned.update(again)

    def _execute(self, tasks: Sequence[Task[Any]]) -> None:
        """Run the user's code, as much as comes to an end within a while."""
        enough = time.monotonic() + EXECUTE_SLICE
        new = [task for task in tasks if task.running is None]
        for portion in self._together([cast("Execute", task.effect) for task in new]):
            mine = [new[i] for i in portion.positions]
            running = self._submit(portion, mine)
            if running is not None:
                for i, task in enumerate(mine):
                    task.running = running, i
                continue
            for task, outcome in zip(mine, portion.run(), strict=True):
                task.advance(outcome)
            if time.monotonic() > enough:
                break
        self._collect([task for task in tasks if task.running is not None], enough)

    def _submit(self, portion: Portion, tasks: Sequence[Task[Any]]) -> "Future[Outcomes] | None":
        """Have the executor run it, if there is one and it is about batches."""
        if self._executor is None or cast("Execute", tasks[0].effect).batch is None:
            return None
        try:
            return self._executor.submit(portion.run)
        except RuntimeError:  # it was shut down: what is to be done is done here
            return None

    def _collect(self, tasks: Sequence[Task[Any]], until: float) -> None:
        """Wait for what the executor runs, for a while."""
        if not tasks:
            return
        futures = {task.running[0] for task in tasks if task.running}
        self._runtime.wait(futures, until - time.monotonic())
        for task in tasks:
            if task.running is not None and task.running[0].done():
                future, i = task.running
                task.running = None
                task.advance(future.result()[i])

    def _exchange(self, tasks: Sequence[Task[Any]]) -> None:
        calls: list[Call] = [task.effect for task in tasks]  # type: ignore[misc]  # _drive chose them
        for call in calls:
            if call.numbered and not call.number:
                call.number = next(self._numbers)
        replies = self.server.exchange(calls)
        for task, reply in zip(tasks, replies, strict=True):
            if isinstance(reply, ConnectionLostError):
                self._give_up(task, reply, first=True)
            else:
                task.advance(reply)

    def _put_off(self, tasks: Iterable[Task[Any]], lost: Mapping[bytes, BaseException]) -> None:
        """Give up on the tasks that would have to wait for an answer to an earlier operation."""
        for task in tasks:
            if task.base in lost:
                self._give_up(task, lost[task.base], first=False)

    def _give_up(self, task: Task[Any], error: BaseException, *, first: bool) -> None:
        """Tell a task's caller the error. What is to be kept goes on when the server is back."""
        effect = task.effect
        if isinstance(effect, Execute) or (isinstance(effect, Call) and effect.keep):
            self._kept.put(task.suspend(error), first=first)
        elif effect is not None:
            task.advance(error)
