"""Runs flows in the tasks of an event loop.

One *pump* a node sends for all tasks: as long as lanes have work, it collects one call of each,
exchanges them together, and hands out the answers. A thousand tasks cost about as many exchanges as
ten. A pump, like every background job, is a task that ends with `AsyncDriver.close`.

When a caller is cancelled, or has waited for longer than `retry_timeout`, its flow goes on in a
task of its own.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import Context, copy_context
from inspect import isawaitable, iscoroutinefunction
from typing import Any, TypeVar, cast

from redis.exceptions import ResponseError

from phonon._core.clock import clock
from phonon._core.flows import (
    CALLER_GONE,
    EXECUTING,
    FLUSH,
    AnyEffect,
    AwaitMail,
    Branch,
    Done,
    Execute,
    Flow,
    FlowRun,
    Job,
    Outcome,
    Read,
    Send,
    Sleep,
    Wait,
    has_begun,
)
from phonon._protocol.lane import Call, Lane, State
from phonon._protocol.library import Library
from phonon._protocol.operations import Operation
from phonon._transport import async_io
from phonon._transport.driving import (
    Explain,
    LaneOwner,
    Receiver,
    Ticket,
    check_result,
    exchange,
    is_nudge,
    mailbox,
    request_of,
    run_user_code,
    waiter_of,
)
from phonon._transport.server import FIRST_PAUSE, Server
from phonon._transport.steps import Node
from phonon.errors import ConfigurationError, ConnectionLostError, ForkedError, PhononError

log = logging.getLogger("phonon")

T = TypeVar("T")

#: Seconds of user code after which finished batches are completed before more are executed.
SLICE = 0.5
#: Seconds for which a stopping process waits for a task that it has cancelled.
LAST_PATIENCE = 5.0
#: Seconds for which one question for mail waits at the server.
READ_MAIL = 1.0
#: Seconds for which mail without a waiter is kept, and how much of it.
KEEP_MAIL = 10.0
MOST_MAIL = 1000

_Future = asyncio.Future[Any]


class AsyncSignal:
    """Wakes one task. Any thread may set it, before the task waits or while it does.

    Args:
        loop: The task's event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_set = False
        self._waiter: _Future | None = None

    def set(self) -> None:
        """Wake the task, now or as soon as it waits."""
        self._is_set = True
        waiter = self._waiter
        if waiter is None:
            return
        if _running_loop() is self._loop:
            async_io.settle(waiter, True)  # noqa: FBT003 - the value
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits
            self._loop.call_soon_threadsafe(async_io.settle, waiter, True)  # noqa: FBT003 - the value

    async def wait(self, seconds: float) -> bool:
        """Wait until the signal is set, and unset it. Return whether it was set."""
        waiter = self._waiter = self._loop.create_future()
        try:
            if not self._is_set and seconds > 0:
                await asyncio.wait([waiter], timeout=seconds)
            return self._is_set
        finally:
            self._waiter = None
            self._is_set = False


class _Ticket(Ticket):
    """A ticket that a task waits for.

    Args:
        send: The effect.
        run: The flow's run.
    """

    future: _Future | None = None
    deadline = 0.0

    def wake(self) -> None:
        """Wake the task, if all answers are there."""
        future = self.future
        if future is not None and self.is_done:
            async_io.settle(future)

    def fail(self, error: Exception) -> None:
        """Wake the task with an error: there are no answers yet."""
        if self.future is not None:
            with contextlib.suppress(asyncio.InvalidStateError):
                self.future.set_exception(error)


class AsyncWorker:
    """A flow that runs in a background task.

    Args:
        task: The task.
    """

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self._task = task

    def is_alive(self) -> bool:
        """Return whether the task has not ended yet."""
        return not self._task.done()

    def is_current(self) -> bool:
        """Return whether the calling task is this one."""
        return _running_loop() is self._task.get_loop() and self._task is asyncio.current_task()

    async def join(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as a thread's
        """Wait for its end, for so many seconds at the most.

        Raises:
            RuntimeError: The calling task is this one.
        """
        if self._task is asyncio.current_task():
            raise RuntimeError("a task does not wait for itself")
        if not self._task.done():
            await asyncio.wait([self._task], timeout=timeout)


class AsyncDriver:
    """Runs the flows of one process in the event loop in which it was made.

    Args:
        server: The server that gets the calls.
        library: Knows the names of the server's functions.
        identity: The identity of the process, which has the lanes.
        retry_timeout: Seconds after which a caller without an answer gets an error.
        explain: Turns a server's error into one that names the remedy.
        max_concurrent: The most calls of the user's code that run at the same time.
        slice: Seconds of user code after which an `Execute` returns with the results so far.

    Attributes:
        on_detached: Called with a flow whose caller has gone, and which goes on without it.
        on_ready: Called with such a flow when it has ended.
        leave_context: Called in the context of the user's code before that begins.
    """

    is_async = True
    clock = staticmethod(clock)

    def __init__(
        self,
        server: Server,
        library: Library,
        identity: LaneOwner,
        *,
        retry_timeout: float,
        explain: Explain | None = None,
        max_concurrent: int = 1,
        slice: float = SLICE,  # noqa: A002 - the setting's name
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = server
        self.library = library
        self.identity = identity
        self.retry_timeout = retry_timeout
        self.explain = explain or server.explain
        self.slice = slice
        #: Whether this is the copy of the driver in a forked child.
        self.forked = False
        self.on_detached: Callable[[FlowRun], object] = lambda _: None
        self.on_ready: Callable[[FlowRun], object] = lambda _: None
        self.leave_context: Callable[[], object] = lambda: None
        self._places = asyncio.Semaphore(max_concurrent)
        self._receiver = Receiver(identity, self.explain)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        # Lanes that may have work, and the pumps of their nodes.
        self._busy: dict[Lane, None] = {}
        self._pumps: dict[Node, asyncio.Task[None]] = {}
        # Tickets in the order of their deadlines, and the timer for the first.
        self._waiting: dict[_Ticket, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._mail = _Mail()
        self._readers: dict[int | None, asyncio.Task[None]] = {}
        identity.on_rebirth(self.look_again)

    # Flows

    async def run(self, flow: Flow[T], name: str = "") -> T:
        """Run a flow to its end.

        Raises:
            ConnectionLostError: The server has not answered for `retry_timeout` seconds. The flow
                goes on in the background.
            ConfigurationError: Another event loop runs.
            ForkedError: This is a forked child.
            BaseException: The error of the flow.
        """
        run = FlowRun(flow, name)
        try:
            self.check()
            run.advance(None)
            return cast("T", await self._go_on(run))
        except BaseException as error:
            self._left(run, error)
            raise

    def resume(self, run: FlowRun) -> Any:
        """Return the result of a flow whose caller had gone.

        The flow goes on without a caller. If it has not ended yet, the task is returned.

        Raises:
            BaseException: The error of the flow, if it has raised one.
        """
        task: asyncio.Task[Any] | None = run.running
        if task is None:
            if run.is_over:
                return None
            run.caller_gone = True
            task = run.running = self._start(self._finish(run), run.name or None)
        return task.result() if task.done() else task

    def detached_ready(self, run: FlowRun) -> bool:
        """Return whether a flow whose caller had gone has ended."""
        return run.running is None or run.running.done()

    def spawn(self, flow: Flow[Any], name: str) -> AsyncWorker:
        """Run a flow in the background, in an empty context.

        Raises:
            RuntimeError: It is too late: the driver or the event loop is closed.
        """
        run = FlowRun(flow, name, background=True)
        return AsyncWorker(self._start(self._work(run), name, Context()))

    async def _work(self, run: FlowRun) -> None:
        try:
            run.advance(None)
            await self._go_on(run)
        except Exception:
            log.exception("the task %s has failed", run.name)
        finally:
            # The user may keep a cancelled task, and with it the flow, which has to end now.
            run.flow.close()

    async def _go_on(self, run: FlowRun) -> Any:
        effects = run.effects
        while True:
            effect = effects[0]
            if effect.__class__ is Send:
                try:
                    reply: Any = await self._send(run, effect)
                except ConnectionLostError as error:
                    if not run.background:
                        raise
                    run.throw(error)
                    continue
                run.has_sent = True
            elif effect.__class__ is Done:
                run.ticket = None  # the two refer to each other
                return effect.value
            elif effect is CALLER_GONE:
                reply = run.caller_gone
            else:
                reply = await self._perform(run, cast("AnyEffect", effect))
            run.advance(reply)

    def _left(self, run: FlowRun, error: BaseException) -> None:
        """Let the flow of a caller that leaves with an error go on in the background."""
        if run.is_over or self.forked:
            return
        ticket = run.ticket
        run.caller_gone = True
        if not run.has_sent and not (ticket is not None and ticket.places):
            # The flow has sent nothing: it ends, and may have something to undo first.
            with contextlib.suppress(BaseException):
                if run.effects:
                    run.throw(error)
                else:
                    run.flow.close()
            if run.is_over:
                return
        try:
            run.running = self._start(self._finish(run), run.name or None)
        except RuntimeError:
            return  # the process has stopped
        self.on_detached(run)

    async def _finish(self, run: FlowRun) -> Any:
        try:
            return await self._go_on(run)
        except asyncio.CancelledError:
            raise
        except PhononError as error:
            log.warning("a call that went on in the background failed: %s", error)
            raise
        finally:
            self.loop.call_soon(self.on_ready, run)

    # Sending

    async def _send(self, run: FlowRun, send: Send) -> list[Any]:
        send.make_all()
        if not send.operations:
            return []
        ticket = run.ticket
        if ticket is None or ticket.send is not send:
            ticket = run.ticket = _Ticket(send, run)
            ticket.enqueue(self.identity)
            for _, lane, _, _ in ticket.places:
                self._kick(lane)
        if ticket.is_done:
            return cast("list[Any]", ticket.collect())
        future = ticket.future = self.loop.create_future()
        if run.running is None:
            # In a task of its own a flow waits without a limit.
            self._set_deadline(ticket)
        if run.background and send.first:
            self._fail_if_fenced(ticket)
        try:
            await future
        finally:
            ticket.future = None
            self._waiting.pop(ticket, None)
        return cast("list[Any]", ticket.collect())

    def _kick(self, lane: Lane) -> None:
        """Wake the pump of a lane's node, so that it sends the lane's calls."""
        self._busy[lane] = None
        node = self._node_of(lane)
        if node not in self._pumps:
            self._pump_at(node)

    def _node_of(self, lane: Lane) -> Node:
        return self.server.node_of(self.identity.partitions.prefixes[lane.partition])

    def _pump_at(self, node: Node) -> None:
        try:
            pump = self._start(self._pump(node), "phonon-pump", Context())
        except RuntimeError:
            return  # the process has stopped
        self._pumps[node] = pump

    async def _pump(self, node: Node) -> None:
        """Send the calls of a node's lanes, until there are none left."""
        pause = FIRST_PAUSE
        try:
            while calls := self._collect(node):
                if await self._exchange(calls):
                    pause = FIRST_PAUSE
                    continue
                await asyncio.sleep(pause)
                pause = min(pause * 2, self.server.longest_pause)
        except Exception:
            log.exception("sending has failed, and is tried again")
            await asyncio.sleep(self.server.longest_pause)
        finally:
            self._pumps.pop(node, None)
            # Slots may have moved to another node, and lanes may have new work.
            for lane in list(self._busy):
                if lane.has_work:
                    self._kick(lane)

    def _collect(self, node: Node) -> list[tuple[Lane, Call]]:
        calls = []
        for lane in list(self._busy):
            if not lane.has_work:
                del self._busy[lane]
            elif self._node_of(lane) is node:
                call = lane.next_call()
                if call is not None:
                    calls.append((lane, call))
        return calls

    async def _exchange(self, calls: Sequence[tuple[Lane, Call]]) -> bool:
        """Send calls, and hand out their answers. Return whether to go on at once."""
        partitions = self.identity.partitions
        requests = [request_of(self.library, partitions, lane, call) for lane, call in calls]
        patience = self.retry_timeout
        until = self.loop.time() + patience
        steps = exchange(self.server, requests, [call for _, call in calls], patience)
        replies = await async_io.run(steps)
        early = self.loop.time() < until
        moved, hopeless = self._receiver.take_all(calls, replies, early=early)
        if hopeless:
            self._fail({lane for lane, _ in calls})
        if self._receiver.trouble is not None and any(
            lane.state is State.FENCED for lane, _ in calls
        ):
            for ticket in list(self._waiting):
                if ticket.run.background and ticket.send.first:
                    self._fail_if_fenced(ticket)
        return moved

    # Deadlines

    def _set_deadline(self, ticket: _Ticket) -> None:
        ticket.deadline = self.loop.time() + self.retry_timeout
        self._waiting[ticket] = None
        timer = self._timer
        if timer is not None and timer.when() > ticket.deadline:
            timer.cancel()  # it was set for a ticket with a later deadline
            timer = None
        if timer is None:
            self._timer = self.loop.call_at(ticket.deadline, self._overdue)

    def _overdue(self) -> None:
        """Fail the tickets whose deadlines have passed."""
        self._timer = None
        now = self.loop.time()
        for ticket in list(self._waiting):
            if ticket.deadline <= now:
                self._waiting.pop(ticket)
                ticket.fail(self.lost())
        if self._waiting:
            earliest = min(ticket.deadline for ticket in self._waiting)
            self._timer = self.loop.call_at(earliest, self._overdue)

    def _fail(self, lanes: Iterable[Lane]) -> None:
        lanes = set(lanes)
        for ticket in list(self._waiting):
            if not lanes.isdisjoint(ticket.lanes()):
                ticket.fail(self.lost())

    def _fail_if_fenced(self, ticket: _Ticket) -> None:
        """Fail the heartbeat's own ticket, which would wait for a rebirth of its own."""
        if any(lane.state is State.FENCED for lane in ticket.lanes()):
            ticket.fail(self.lost())

    def lost(self) -> ConnectionLostError:
        """Return the error for a caller whose call is not answered, with the reason if known."""
        return self.server.lost(self._receiver.trouble)

    def deliver(self, operation: Operation, answer: Any) -> None:
        """Hand an answer that a rebirth has found to the task that waits for it."""
        self._receiver.deliver(((operation, answer),))

    def flush(self) -> None:
        """Send the calls of all lanes."""
        for lane in self.identity.lanes:
            if lane.has_work:
                self._kick(lane)

    def look_again(self) -> None:
        """Go on after a rebirth, which has changed lanes and mailboxes."""
        for ticket in list(self._waiting):
            ticket.catch_up(self.identity)
        self.flush()
        self._mail.wake_all()

    # Everything else

    async def _perform(self, run: FlowRun, effect: AnyEffect) -> Any:  # noqa: PLR0911 - one an effect
        if isinstance(effect, Read):
            return await self._read(effect)
        if isinstance(effect, Execute):
            return await self._execute(effect.jobs)
        if isinstance(effect, Branch):
            return await self._branch(effect)
        if effect is FLUSH:
            return self.flush()
        if isinstance(effect, Sleep):
            return None if run.caller_gone else await asyncio.sleep(effect.seconds)
        if isinstance(effect, Wait):
            return await effect.signal.wait(0.0 if run.caller_gone else effect.seconds)
        if isinstance(effect, AwaitMail):
            return not run.caller_gone and await self._await_mail(effect)
        raise TypeError(f"a flow has yielded {effect!r}, which is no effect")

    async def _branch(self, effect: Branch) -> Outcome:
        if has_begun(effect.flow):  # an interrupt has ended the wait for it, and it goes on alone
            return Outcome(error=self.lost())
        run = FlowRun(effect.flow)
        run.caller_gone = True
        try:
            run.advance(None)
            return Outcome(await self._go_on(run))
        except Exception as error:  # noqa: BLE001 - the error is the result
            self._left(run, error)
            return Outcome(error=error)
        except BaseException as error:
            self._left(run, error)
            raise

    async def _read(self, effect: Read) -> list[Any]:
        patience = self.retry_timeout if effect.patience is None else effect.patience
        replies = await async_io.run(self.server.exchange(effect.requests, patience))
        for i, reply in enumerate(replies):
            if isinstance(reply, ResponseError):
                replies[i] = self.explain(reply)
        return replies

    # Executing

    async def _execute(self, jobs: Sequence[Job]) -> None:
        running = []
        for job in jobs:
            if job.outcome is not None:
                continue
            if job.running is None:
                context = copy_context()
                context.run(self.leave_context)
                try:
                    job.running = self._start(self._run_job(job), None, context)
                except RuntimeError as error:
                    job.outcome = Outcome(error=error)
                    continue
            elif job.running.done():  # an exception out of a signal handler has ended it
                cancelled = job.running.cancelled()
                ended = asyncio.CancelledError() if cancelled else job.running.exception()
                job.outcome = Outcome(error=ended)
                continue
            running.append(job.running)
        if running:
            done, _ = await asyncio.wait(running, timeout=self.slice)
            if not done and all(job.outcome is None for job in jobs):
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def _run_job(self, job: Job) -> None:
        try:
            if EXECUTING.get():
                # It is part of a job that runs already and has a place: it could wait for itself.
                job.outcome = await _outcome_of(job)
            else:
                async with self._places:
                    if job.outcome is None:
                        EXECUTING.set(True)
                        job.outcome = await _outcome_of(job)
        except asyncio.CancelledError as error:
            job.outcome = job.outcome or Outcome(error=error)
            raise

    # Mail

    async def _await_mail(self, effect: AwaitMail) -> bool:
        """Wait for mail, which one task reads for all waiting tasks."""
        mail = self._mail
        if mail.take(effect.waiter):
            return True
        group = None if self.server.colocated else effect.partition
        future = self.loop.create_future()
        mail.waiting[effect.waiter] = future
        mail.groups[future] = group
        if group not in self._readers:
            self._readers[group] = self._start(self._read_mail(group), "phonon-mail", Context())
        timer = self.loop.call_later(effect.seconds, async_io.settle, future, False)  # noqa: FBT003 - the value
        try:
            return bool(await future)
        finally:
            timer.cancel()
            if mail.waiting.get(effect.waiter) is future:
                del mail.waiting[effect.waiter]
            del mail.groups[future]

    async def _read_mail(self, group: int | None) -> None:
        """Read mail as long as a task waits for some."""
        try:
            while group in self._mail.groups.values():
                lanes = self.identity.lanes
                chosen = lanes if group is None else [lanes[group]]
                keys = [mailbox(self.identity.partitions, lane) for lane in chosen]
                try:
                    found = await async_io.run(self.server.wait(keys, READ_MAIL))
                except PhononError as error:
                    log.warning("mail cannot be read: %s", error)
                    await asyncio.sleep(READ_MAIL)
                    continue
                for element in found:
                    self._mail.hand_out(waiter_of(element))
        finally:
            self._readers.pop(group, None)

    # The rest

    def signal(self) -> AsyncSignal:
        """Return an object to wait for."""
        return AsyncSignal(self.loop)

    @staticmethod
    def caller() -> "asyncio.Task[Any] | None":
        """Return the running task, if there is one."""
        return asyncio.current_task() if _running_loop() is not None else None

    def my_name(self) -> str:
        """Return the task's name."""
        task = self.caller()
        return task.get_name() if task is not None else ""

    def check(self) -> None:
        """Refuse to work for another event loop.

        Raises:
            ConfigurationError: Another event loop runs.
            ForkedError: The driver belongs to the parent process.
        """
        if self.forked:
            raise ForkedError(
                "this AsyncProcess belongs to the parent process, as does its event loop: make one "
                "in the child, in a loop of its own"
            )
        if _running_loop() is not self.loop:
            raise ConfigurationError(
                "this AsyncProcess belongs to another event loop: make one in each loop"
            )

    def _start(
        self, work: Coroutine[Any, Any, T], name: str | None, context: Context | None = None
    ) -> "asyncio.Task[T]":
        """Start a task that does not outlive the process.

        Raises:
            RuntimeError: The driver or the event loop is closed.
        """
        if self._closed or self.loop.is_closed():
            work.close()
            raise RuntimeError("the process was stopped, or its event loop is closed")
        task = self.loop.create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: `resume` raises it

    async def close(self) -> None:
        """Cancel the tasks that still run, and wait for their end."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for ticket in list(self._waiting):
            ticket.fail(self.lost())
        self._mail.wake_all()
        left = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        if left:
            _, stubborn = await asyncio.wait(left, timeout=LAST_PATIENCE)
            for task in stubborn:
                log.error("%r was cancelled, and goes on", task)

    def after_fork_in_child(self) -> None:
        """An event loop does not survive a fork: disable this copy."""
        self.forked = True


class _Mail:
    """The tasks that wait for mail, and mail that came before its task waited."""

    def __init__(self) -> None:
        self.waiting: dict[str, _Future] = {}
        self.groups: dict[_Future, int | None] = {}
        self._early: OrderedDict[str, float] = OrderedDict()

    def hand_out(self, waiter: str) -> None:
        """Wake the task of a mail."""
        future = self.waiting.get(waiter)
        if future is not None:
            async_io.settle(future, True)  # noqa: FBT003 - the value
        elif is_nudge(waiter):
            self.wake_all()
        else:
            # The task has asked for the mail, but does not wait yet.
            self._early[waiter] = time.monotonic()
            while len(self._early) > MOST_MAIL:
                self._early.popitem(last=False)

    def take(self, waiter: str) -> bool:
        """Return whether a waiter's mail has arrived."""
        came = self._early.pop(waiter, None)
        return came is not None and time.monotonic() - came < KEEP_MAIL

    def wake_all(self) -> None:
        """Wake all tasks: they ask again."""
        for future in list(self.groups):
            async_io.settle(future, True)  # noqa: FBT003 - the value


async def _outcome_of(job: Job) -> Outcome:
    """Run the user's code; a thread runs functions that are not ``async``."""
    job.begun = True
    function = job.function
    if iscoroutinefunction(function):
        outcome = Outcome(function())
    else:
        outcome = await asyncio.to_thread(run_user_code, job)
    if isawaitable(outcome.value):
        try:
            outcome = Outcome(await outcome.value)
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            return Outcome(error=error)
    return check_result(function, outcome, is_async=True)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
