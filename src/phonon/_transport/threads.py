"""Runs flows in threads, without a thread of its own: callers send for each other.

The caller whose lane is idle becomes its *leader*: it sends all operations in the lane's queue, and
hands out the answers (group commit). When it has its own answer, it gives the lane up and wakes one
of the waiting callers.

A signal handler, a finalizer or a trace function may make a call during another call of the same
thread, and a signal handler may raise at any bytecode. So nothing here relies on being done by one
thread only: two leaders of one lane send the same bytes and hand out the same answers, which does
no harm (see `phonon._protocol.lane`). A leader enters a claim in a dictionary, which keeps others
from doing the same work. A call takes over the claim of an outer frame of its own thread, or of a
frame that an exception has ended.
"""

import contextlib
import contextvars
import itertools
import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from operator import call as call_function
from types import FrameType
from typing import Any, TypeVar, cast

from redis.exceptions import ResponseError

from phonon._core.clock import clock
from phonon._core.flows import (
    CALLER_GONE,
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
from phonon._protocol.library import Library, Request
from phonon._protocol.operations import Operation
from phonon._transport import sync_io
from phonon._transport.driving import (
    UNANSWERED,
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
from phonon.errors import (
    ConnectionLostError,
    PhononError,
    ProcessStoppedError,
    ServerUnreachableError,
)

log = logging.getLogger("phonon")

T = TypeVar("T")

#: Seconds after which a waiting thread checks that its lane still has a leader.
LOOK_AGAIN = 0.1
#: Seconds of user code after which finished batches are completed before more are executed.
SLICE = 0.5
#: Seconds for which mail without a waiter is kept, and how much of it.
KEEP_MAIL = 10.0
MOST_MAIL = 1000
#: The most attempts to keep a flow, if signals interrupt the attempts.
ATTEMPTS = 100
#: Seconds between two questions to the server while the thread's own outer frame reads the mail.
POLL = 0.05

_get_ident = threading.get_ident
_get_frame = sys._getframe  # noqa: SLF001 - documented, in spite of its name


class ThreadSignal:
    """Wakes one thread. It may ring before the thread waits, and more than once.

    Unlike a `threading.Event` it has no lock that a signal handler could find held.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the thread, now or as soon as it waits."""
        try:  # noqa: SIM105 - each answer comes this way, so speed counts
            self._lock.release()
        except RuntimeError:
            pass  # it is ringing already

    def wait(self, seconds: float) -> bool:
        """Wait until it rings, and silence it. Return whether it rang."""
        return self._lock.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))


class _Ticket(Ticket):
    """A ticket that a thread waits for.

    Args:
        send: The effect.
        run: The flow's run.

    Attributes:
        bell: Wakes the thread, while it waits.
        driver: Called when all answers are there and no thread waits.
    """

    bell: ThreadSignal | None = None
    driver: "ThreadDriver"

    def wake(self) -> None:
        """Wake the thread, or report that the flow can go on in the background."""
        bell = self.bell
        if bell is not None:
            if self.is_done:
                bell.set()
        elif self.run.caller_gone and self.is_done:
            self.driver.on_ready(self.run)


class _Leader:
    """A frame's claim to do something for all threads."""

    __slots__ = ("frame", "thread")

    def __init__(self) -> None:
        self.thread = _get_ident()
        self.frame: FrameType | None = _get_frame(1)

    def leads(self) -> bool:
        """Return whether the frame still runs: a signal handler's exception may have ended it.

        `sys._current_frames` would show it too, but before Python 3.12.4 it deadlocks if the
        garbage collector runs inside it.
        """
        frame = self.frame
        if frame is None:
            return False
        try:
            frame.clear()  # raises for a frame that runs; the variables of any other are not needed
        except RuntimeError:
            return True
        return False


class _Leaders:
    """The leaders: which thread sends for which lane. A claim is one atomic step."""

    def __init__(self) -> None:
        self._leaders: dict[Hashable, _Leader] = {}

    def claim(self, thing: Hashable, leader: _Leader) -> bool:
        """Try to become the leader. An outer frame of the same thread gives way."""
        other = self._leaders.setdefault(thing, leader)
        if other is leader:
            return True
        if other.thread == leader.thread:
            self._leaders[thing] = leader
            return True
        return False

    def claim_from_the_dead(self, thing: Hashable, leader: _Leader) -> bool:
        """Become the leader if the present leader does not run any more."""
        other = self._leaders.get(thing)
        if other is not None and other.leads():
            return False
        self._leaders[thing] = leader
        return True

    def is_free(self, thing: Hashable) -> bool:
        """Return whether there is no leader."""
        return thing not in self._leaders

    def leads_in_this_thread(self, thing: Hashable, leader: _Leader) -> bool:
        """Return whether an outer frame of this thread is the leader."""
        other = self._leaders.get(thing)
        return (
            other is not None
            and other is not leader
            and other.thread == leader.thread
            and other.leads()
        )

    def release(self, thing: Hashable, leader: _Leader) -> None:
        """Give up a claim, if there is one."""
        leader.frame = None  # breaks a reference cycle: the frame's variables refer to the leader
        if self._leaders.get(thing) is leader:
            self._leaders.pop(thing, None)

    def forget(self) -> None:
        """Forget all leaders: a forked child has none of their threads."""
        self._leaders = {}


class ThreadWorker:
    """A flow that runs in a background thread.

    Args:
        thread: The thread.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def is_alive(self) -> bool:
        """Return whether the thread has not ended yet."""
        return self._thread.is_alive()

    def is_current(self) -> bool:
        """Return whether the calling thread is this one."""
        return self._thread is threading.current_thread()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, for so many seconds at the most."""
        self._thread.join(timeout)


class ThreadDriver:
    """Runs the flows of one process in the threads that call it.

    Args:
        server: The server that gets the calls.
        library: Knows the names of the server's functions.
        identity: The identity of the process, which has the lanes.
        retry_timeout: Seconds after which a caller without an answer gets an error.
        explain: Turns a server's error into one that names the remedy.
        executor: Runs the user's code, if that does not run in the calling thread.
        slice: Seconds of user code after which an `Execute` returns with the results so far.

    Attributes:
        on_detached: Called with a flow whose caller has gone. `resume` goes on with it.
        on_ready: Called with a detached flow that has its answers.
    """

    is_async = False
    clock = staticmethod(clock)

    def __init__(
        self,
        server: Server,
        library: Library,
        identity: LaneOwner,
        *,
        retry_timeout: float,
        explain: Explain | None = None,
        executor: Executor | None = None,
        slice: float = SLICE,  # noqa: A002 - the setting's name
    ) -> None:
        self.server = server
        self.library = library
        self.identity = identity
        self.retry_timeout = retry_timeout
        self.explain = explain or server.explain
        self.executor = executor
        self.slice = slice
        self.on_detached: Callable[[FlowRun], object] = lambda _: None
        self.on_ready: Callable[[FlowRun], object] = lambda _: None
        self._receiver = Receiver(identity, self.explain)
        self._claims = _Leaders()
        self._waiting: dict[_Ticket, None] = {}
        self._mail = _Mail()
        self._closed = False
        identity.on_rebirth(self.look_again)

    # Flows

    def run(self, flow: Flow[T], name: str = "") -> T:
        """Run a flow to its end.

        Raises:
            ConnectionLostError: The server has not answered for `retry_timeout` seconds. The flow
                goes on in the background.
            BaseException: The error of the flow.
        """
        run = FlowRun(flow, name)
        try:
            run.advance(None)
            result: T = self._go_on(run)
        except BaseException as error:
            self._left(run, error)
            raise
        return result

    def resume(self, run: FlowRun) -> Any:
        """Go on with a flow whose caller has gone, in this thread.

        Raises:
            ConnectionLostError: There still is no answer; `on_detached` is called again.
            BaseException: The error of the flow.
        """
        run.caller_gone = True
        if run.is_over:
            return None
        try:
            return self._go_on(run)
        except BaseException:
            if not run.is_over:
                self.on_detached(run)
            raise

    def detached_ready(self, run: FlowRun) -> bool:
        """Return whether a flow has the answers that it waits for."""
        ticket = run.ticket
        if ticket is None or run.is_over or ticket.send is not run.effects[0]:
            return True
        # Operations that are in no lane yet are sent when the flow goes on.
        placed = sum(len(operations) for _, _, _, operations in ticket.places)
        return ticket.is_done or placed < len(ticket.answers)

    def spawn(self, flow: Flow[Any], name: str) -> ThreadWorker:
        """Run a flow in the background.

        Raises:
            RuntimeError: It is too late: the interpreter is ending.
        """
        run = FlowRun(flow, name, background=True)
        thread = threading.Thread(target=self._work, args=(run,), name=name, daemon=True)
        try:
            thread.start()
        except KeyError as error:
            # The standard library raises it in place of a signal handler's exception in `start`.
            raise error.__context__ or error from None
        return ThreadWorker(thread)

    def _work(self, run: FlowRun) -> None:
        try:
            run.advance(None)
            self._go_on(run)
        except Exception:
            log.exception("%s has failed", run.name)

    def _go_on(self, run: FlowRun) -> Any:
        effects = run.effects
        while True:
            effect = effects[0]
            if effect.__class__ is Send:
                try:
                    reply: Any = self._send(run, effect)
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
                reply = self._perform(run, cast("AnyEffect", effect))
            run.advance(reply)

    def _left(self, run: FlowRun, error: BaseException) -> None:
        """Let the flow of a caller that leaves with an error go on in the background."""
        problem: BaseException | None = None
        for _ in range(ATTEMPTS):
            try:
                if run.is_over:
                    return
                ticket = run.ticket
                if not run.has_sent and not (ticket is not None and ticket.places):
                    # The flow has sent nothing: it ends, and may have something to undo first.
                    run.caller_gone = True
                    self._break_off(run, error)
                    if run.is_over:
                        return
                run.caller_gone = True
                self.on_detached(run)
            except BaseException as another:  # noqa: BLE001 - of a signal: the caller gets the first
                problem = another
            else:
                return
        log.error("%r cannot go on in the background", run, exc_info=problem)

    @staticmethod
    def _break_off(run: FlowRun, error: BaseException) -> None:
        try:
            if run.effects:
                run.throw(error)
            else:
                run.flow.close()
        except BaseException as other:
            if other is not error and not run.is_over:
                raise

    # Sending

    def _send(self, run: FlowRun, send: Any) -> list[Any]:
        operations = send.operations
        ticket: _Ticket | None = run.ticket
        if ticket is None or ticket.send is not send:
            ticket = _Ticket(send, run)
            ticket.driver = self
            run.ticket = ticket
        identity = self.identity
        deadline = time.monotonic() + self.retry_timeout
        if send.more is not None:
            self._stream(ticket, send.more)
        if len(operations) == 1 and not ticket.places and self.server.durability is None:
            # The same as `_await`, without its bookkeeping, which costs a third of a round trip.
            operation = operations[0]
            lanes = identity.lanes
            lane = lanes[operation.partition]
            queue = lane.place(first=send.first)
            operation.owner = ticket
            operation.index = 0
            place = (lanes, lane, queue, operations)
            steps = map(call_function, (queue.append, ticket.places.append), (operation, place))
            deque(steps, 0)
            leader = _Leader()
            try:
                if queue is lane.queue and self._claims.claim(lane, leader):
                    call = lane.next_call()
                    if call is not None:
                        request = request_of(self.library, identity.partitions, lane, call)
                        reply = sync_io.exchange_now(self.server, request)
                        if reply is not None:
                            self._receiver.take(lane, call, reply)
            finally:
                self._claims.release(lane, leader)
            if ticket.answers[0] is not UNANSWERED:
                if lane.queue:
                    self._pass_on(lane)
                return ticket.collect()
        elif operations:
            ticket.enqueue(identity)
        self._await(ticket, deadline)
        return ticket.collect()

    def _stream(self, ticket: _Ticket, more: Iterator[object]) -> None:
        """Send operations once, while others are made; `_await` handles those without an answer."""
        leader = _Leader()
        flight: sync_io.Flight | None = None
        calls: list[tuple[Lane, Call]] = []
        led: dict[Lane, None] = {}
        # Calls that need a confirmation, or go to several nodes, go in one exchange.
        alone = self.server.durability is not None or not self.server.colocated
        try:
            # Operations that exist already go with the first group of their lane, or after all
            # groups.
            ticket.enqueue(self.identity)
            for made in itertools.chain(zip(more), (None,)):
                known = len(ticket.places) if made is not None else 0
                ticket.enqueue(self.identity)
                fresh = dict.fromkeys(place[1] for place in ticket.places[known:])
                # A lane with a call in this flight would send that call again.
                lanes = [lane for lane in fresh if lane not in led and not alone]
                led.update(dict.fromkeys(lanes))
                group = self._claim_calls(lanes, leader)
                if group and flight is None:
                    node = self.server.node_of(self.identity.partitions.prefix)
                    flight = sync_io.take_off(node)
                if group and flight is not None and flight.send(self._requests(group)):
                    calls += group
            self.server.round_trips += bool(calls)
            for (lane, call), reply in zip(calls, flight.land() if flight else (), strict=False):
                if not isinstance(reply, ResponseError):
                    self._receiver.take(lane, call, reply)
        finally:
            if flight is not None:
                flight.abort()
            for lane in led:
                self._claims.release(lane, leader)
                self._pass_on(lane)

    def _claim_calls(
        self, lanes: Sequence[Lane], leader: _Leader, *, steal: bool = False
    ) -> list[tuple[Lane, Call]]:
        """Become the leader of lanes without one, and return their calls."""
        claims = self._claims
        calls = []
        for lane in lanes:
            if claims.claim(lane, leader) or (steal and claims.claim_from_the_dead(lane, leader)):
                call = lane.next_call()
                if call is not None:
                    calls.append((lane, call))
        return calls

    def _requests(self, calls: Sequence[tuple[Lane, Call]]) -> list[Request]:
        partitions = self.identity.partitions
        return [request_of(self.library, partitions, lane, call) for lane, call in calls]

    def _await(self, ticket: _Ticket, deadline: float) -> None:
        """Lead or wait until all answers are there.

        Raises:
            ConnectionLostError: The answers do not come in time.
        """
        bell = ticket.bell = ThreadSignal()
        self._waiting[ticket] = None
        lanes: Sequence[Lane] = ()
        pause = FIRST_PAUSE
        steal = False
        try:
            while not ticket.is_done:
                ticket.catch_up(self.identity)
                before, lanes = lanes, ticket.lanes()
                if len(before) > len(lanes):
                    # This call does not return to these lanes, and may have to wait for a thread
                    # that waits for them.
                    for lane in set(before).difference(lanes):
                        self._pass_on(lane)
                left = deadline - time.monotonic()
                sent = left > 0 and self._lead(lanes, left, steal=steal)
                if ticket.is_done:
                    break
                if self._closed and not ticket.run.background:
                    # A signal handler stopped the process before this was sent.
                    raise ProcessStoppedError("the process was stopped: make a new Process")
                if sent:
                    pause = FIRST_PAUSE
                    steal = False
                    continue
                left = deadline - time.monotonic()
                if left <= 0 or (
                    ticket.run.background
                    and ticket.send.first
                    and any(lane.state is State.FENCED for lane in lanes)
                ):
                    # The heartbeat's own flow must not wait for a rebirth, which it has to do
                    # itself.
                    raise self.lost()
                steal = not bell.wait(min(left, pause))
                pause = min(pause * 2, LOOK_AGAIN)
        finally:
            ticket.bell = None
            self._waiting.pop(ticket, None)
            for lane in lanes:
                self._pass_on(lane)

    def _lead(self, lanes: Sequence[Lane], patience: float, *, steal: bool = False) -> bool:
        """Send the calls of those lanes that have no leader, once.

        Args:
            lanes: The lanes.
            patience: Seconds for which to repeat calls that are not answered.
            steal: Whether to check that the present leaders still run.

        Returns:
            Whether there was an answer, so that it is worth looking again at once.
        """
        leader = _Leader()
        try:
            calls = self._claim_calls(lanes, leader, steal=steal)
            return bool(calls) and self._exchange(calls, patience)
        finally:
            for lane in lanes:
                self._claims.release(lane, leader)

    def _exchange(self, calls: Sequence[tuple[Lane, Call]], patience: float) -> bool:
        requests = self._requests(calls)
        server = self.server
        is_awaited = patience > 0
        if not server.colocated:
            # The lanes of nodes that answer must not wait for a node that does not.
            patience = 0
        until = time.monotonic() + patience
        sent = [call for _, call in calls]
        replies = sync_io.run(exchange(server, requests, sent, patience))
        early = time.monotonic() < until
        moved, hopeless = self._receiver.take_all(calls, replies, early=early)
        if hopeless and is_awaited:
            raise self.lost()
        return moved

    def _pass_on(self, lane: Lane) -> None:
        """Wake a thread that waits for a lane without a leader."""
        if not lane.has_work or not self._claims.is_free(lane):
            return
        call = lane.call
        queued = itertools.chain(call.operations if call is not None else (), _copy(lane.queue))
        for operation in queued:
            bell = getattr(operation.owner, "bell", None)
            if bell is not None:
                bell.set()
                return

    def lost(self) -> ConnectionLostError:
        """Return the error for a caller whose call is not answered, with the reason if known."""
        return self.server.lost(self._receiver.trouble)

    def deliver(self, operation: Operation, answer: Any) -> None:
        """Hand an answer that a rebirth has found to the thread that waits for it."""
        self._receiver.deliver(((operation, answer),))

    def flush(self, patience: float = 0.0) -> None:
        """Send the calls of all lanes without a leader, once."""
        lanes = [lane for lane in self.identity.lanes if lane.has_work]
        self._lead(lanes, patience, steal=True)
        for lane in lanes:
            self._pass_on(lane)

    def look_again(self) -> None:
        """Wake all waiting threads, because their lanes or mailboxes have changed."""
        for ticket in _copy(self._waiting):
            bell = ticket.bell
            if bell is not None:
                bell.set()
        self._mail.wake_all()

    # Everything else

    def _perform(self, run: FlowRun, effect: AnyEffect) -> Any:  # noqa: PLR0911 - one an effect
        if isinstance(effect, Read):
            return self._read(effect)
        if isinstance(effect, Execute):
            return self._execute(effect.jobs)
        if isinstance(effect, Wait):
            return effect.signal.wait(effect.seconds)
        if isinstance(effect, AwaitMail):
            return not run.caller_gone and self._await_mail(effect)
        if isinstance(effect, Sleep):
            return None if run.caller_gone else time.sleep(effect.seconds)
        if isinstance(effect, Branch):
            return self._branch(effect)
        if effect is FLUSH:
            return self.flush()
        raise TypeError(f"a flow has yielded {effect!r}, which is no effect")

    def _branch(self, effect: Branch) -> Outcome:
        if has_begun(effect.flow):  # an interrupt has ended the wait for it, and it goes on alone
            return Outcome(error=self.lost())
        run = FlowRun(effect.flow)
        run.caller_gone = True
        try:
            run.advance(None)
            return Outcome(self._go_on(run))
        except BaseException as error:
            is_result = isinstance(error, PhononError) or (
                run.is_over and isinstance(error, Exception)
            )
            self._left(run, error)
            if not is_result:
                raise  # of a signal handler
            return Outcome(error=error)

    def _read(self, effect: Read) -> list[Any]:
        patience = self.retry_timeout if effect.patience is None else effect.patience
        replies = sync_io.run(self.server.exchange(effect.requests, patience))
        for i, reply in enumerate(replies):
            if isinstance(reply, ResponseError):
                replies[i] = self.explain(reply)
        return replies

    def _execute(self, jobs: Sequence[Job]) -> None:
        enough = time.monotonic() + self.slice
        for job in jobs:
            if job.outcome is None and job.running is None and not self._submit(job):
                job.outcome = _outcome_of(job)
                if time.monotonic() > enough:
                    return
        running = [job.running for job in jobs if job.outcome is None]
        if running:
            done, _ = wait(running, max(0.0, enough - time.monotonic()))
            if not done and all(job.outcome is None for job in jobs):
                wait(running, return_when=FIRST_COMPLETED)

    def _submit(self, job: Job) -> bool:
        """Have the executor run a job. Return whether there is one and it took the job."""
        if self.executor is None or job.is_callers:
            return False
        try:
            context = contextvars.copy_context()
            job.running = self.executor.submit(context.run, _run_job, job)
        except RuntimeError:  # it was shut down: the caller runs the job
            return False
        return True

    # Mail

    def _await_mail(self, effect: AwaitMail) -> bool:
        """Wait for mail, which one of the waiting threads reads for all of them."""
        mail = self._mail
        deadline = time.monotonic() + effect.seconds
        generation = self.identity.lanes
        group = None if self.server.colocated else effect.partition
        bell = ThreadSignal()
        leader = _Leader()
        try:
            mail.waiting[effect.waiter] = bell
            mail.groups[bell] = group
            if mail.take(effect.waiter):
                return True
            while not mail.was_told(bell):
                left = deadline - time.monotonic()
                if self._closed or self.identity.lanes is not generation:
                    break  # the waiter asks again
                if left <= 0:
                    return False
                if self._claims.leads_in_this_thread(("mail", group), leader):
                    # This thread's outer frame may have the mail on its connection: ask again soon.
                    bell.wait(min(left, POLL))
                    break
                if self._claims.claim(("mail", group), leader):
                    self._read_mail(group, left)
                elif not bell.wait(min(left, 2 * LOOK_AGAIN)):
                    self._claims.claim_from_the_dead(("mail", group), leader)
            return True
        finally:
            if mail.waiting.get(effect.waiter) is bell:
                mail.waiting.pop(effect.waiter, None)
            mail.groups.pop(bell, None)
            mail.told.pop(bell, None)
            self._claims.release(("mail", group), leader)
            mail.wake_one(group)

    def _read_mail(self, group: int | None, seconds: float) -> None:
        """Read mail, and hand it to its threads."""
        lanes = self.identity.lanes
        chosen = lanes if group is None else [lanes[group]]
        keys = [mailbox(self.identity.partitions, lane) for lane in chosen]
        unread = self._mail.unread
        try:
            if not unread:
                unread += sync_io.run(self.server.wait(keys, seconds))
        except ServerUnreachableError:
            time.sleep(min(seconds, LOOK_AGAIN))
        # If an interrupt leaves mail there, the next reader hands it out.
        with contextlib.suppress(IndexError):
            while True:
                self._mail.hand_out(waiter_of(unread.popleft()))

    # The rest

    @staticmethod
    def signal() -> ThreadSignal:
        """Return an object to wait for."""
        return ThreadSignal()

    @staticmethod
    def caller() -> threading.Thread:
        """Return the calling thread."""
        return threading.current_thread()

    @staticmethod
    def my_name() -> str:
        """Return the thread's name."""
        return threading.current_thread().name

    def check(self) -> None:
        """Do nothing: any thread may call."""

    def close(self) -> None:
        """Wake all threads that wait for mail: the process stops."""
        self._closed = True
        self._mail.wake_all()

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, which do not exist here."""
        self._claims.forget()
        self._waiting = {}
        self._mail = _Mail()
        self._receiver.trouble = None


class _Mail:
    """The threads that wait for mail, and mail that came before its thread waited."""

    def __init__(self) -> None:
        self.waiting: dict[str, ThreadSignal] = {}
        self.groups: dict[ThreadSignal, int | None] = {}
        #: Threads that are woken because they have mail, and not only to read.
        self.told: dict[ThreadSignal, None] = {}
        #: Mail that was taken from the server, and not handed out yet.
        self.unread: deque[bytes] = deque()
        self._early: OrderedDict[str, float] = OrderedDict()

    def hand_out(self, waiter: str) -> None:
        """Wake the thread of a mail."""
        bell = self.waiting.get(waiter)
        if bell is not None:
            self.told[bell] = None
            bell.set()
        elif is_nudge(waiter):
            for bell in _copy(self.groups):
                self.told[bell] = None
                bell.set()
        else:
            # The thread has asked for the mail, but does not wait yet.
            self._early[waiter] = time.monotonic()
            while len(self._early) > MOST_MAIL:
                try:
                    self._early.popitem(last=False)
                except KeyError:
                    break

    def take(self, waiter: str) -> bool:
        """Return whether a waiter's mail has come already."""
        came = self._early.pop(waiter, None)
        return came is not None and time.monotonic() - came < KEEP_MAIL

    def was_told(self, bell: ThreadSignal) -> bool:
        """Return whether there was mail for a thread."""
        return bell in self.told

    def wake_one(self, group: int | None) -> None:
        """Wake a thread, so that it becomes the reader."""
        for bell, its in _copy(self.groups.items()):
            if its == group:
                bell.set()
                return

    def wake_all(self) -> None:
        """Wake all threads: they look up their identity, and ask again."""
        for bell in _copy(self.groups):
            self.told[bell] = None
            bell.set()


def _run_job(job: Job) -> None:
    if job.outcome is None:
        job.outcome = _outcome_of(job)


def _outcome_of(job: Job) -> Outcome:
    return check_result(job.function, run_user_code(job), is_async=False)


def _copy(things: Any) -> list[Any]:
    while True:
        try:
            return list(things)
        except RuntimeError:
            continue  # the dictionary has changed meanwhile
