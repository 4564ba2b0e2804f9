"""Runs flows in threads, without a thread of its own: callers send for each other.

The caller whose lane is idle becomes its *leader*: it sends all that queues there, and hands out
the answers (group commit). Behind its own answer it gives the lane up and wakes one of those that
wait.

A signal handler, a finalizer or a trace function may call in the middle of a call of the same
thread, and a signal handler may raise, at any bytecode. So nothing here is right only because one
thread does it: two leaders of one lane send the same bytes and hand out the same answers, which
changes nothing (see `phonon._protocol.lane`). To lead is a claim in a dictionary, which keeps
others from doing the same work. A claim of an outer frame of one's own thread, or of a frame that
an exception has ended, is taken over.
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
from phonon.errors import ConnectionLostError, ProcessStoppedError, ServerUnreachableError

log = logging.getLogger("phonon")

T = TypeVar("T")

#: Seconds after which a waiting thread looks whether its lane still has a leader.
LOOK_AGAIN = 0.1
#: Seconds of user code after which finished batches are completed before more are executed.
SLICE = 0.5
#: Seconds for which mail that nobody waits for yet is kept, and how much of it.
KEEP_MAIL = 10.0
MOST_MAIL = 1000
#: How often to try to keep a flow, if signals keep interrupting that.
ATTEMPTS = 100
#: Seconds between two questions where the thread's own outer frame reads the mail.
POLL = 0.05

_get_ident = threading.get_ident
_get_frame = sys._getframe  # noqa: SLF001 - documented, in spite of its name


class Bell:
    """Wakes one thread. It may ring before, and more than once.

    Unlike a `threading.Event` it has no lock that a signal handler could meet in the middle.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the thread that waits, now or as soon as it does."""
        try:  # noqa: SIM105 - on the way of each answer
            self._lock.release()
        except RuntimeError:
            pass  # it rings already

    def wait(self, seconds: float) -> bool:
        """Wait until it rings, which ends with that. Return whether it has."""
        return self._lock.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))


class _Ticket(Ticket):
    """A ticket that a thread waits for.

    Args:
        send: The effect.
        run: Whose.

    Attributes:
        bell: Wakes the thread, while it waits.
        driver: Told if all answers are there and no thread waits.
    """

    bell: Bell | None = None
    driver: "ThreadDriver"

    def tell(self) -> None:
        """Wake the thread, or tell that the flow can go on in the background."""
        bell = self.bell
        if bell is not None:
            if self.is_done:
                bell.set()
        elif self.run.caller_gone and self.is_done:
            self.driver.on_ready(self.run)


class _Leader:
    """A claim to something that one thread does for all, made by the frame that does it."""

    __slots__ = ("frame", "thread")

    def __init__(self) -> None:
        self.thread = _get_ident()
        self.frame: FrameType | None = _get_frame(1)

    def leads(self) -> bool:
        """Return whether the frame runs: an exception out of a signal handler may have ended it.

        `sys._current_frames` would tell too, but before Python 3.12.4 it deadlocks if the garbage
        collector runs inside it.
        """
        frame = self.frame
        if frame is None:
            return False
        try:
            frame.clear()  # refused to a frame that runs; nobody needs the variables of another
        except RuntimeError:
            return True
        return False


class _Claims:
    """The leaders: which thread sends for which lane. A claim is one atomic step."""

    def __init__(self) -> None:
        self._leaders: dict[Hashable, _Leader] = {}

    def claim(self, thing: Hashable, leader: _Leader) -> bool:
        """Try to become the leader. One's own thread's outer frame gives way."""
        other = self._leaders.setdefault(thing, leader)
        if other is leader:
            return True
        if other.thread == leader.thread:
            self._leaders[thing] = leader
            return True
        return False

    def claim_from_the_dead(self, thing: Hashable, leader: _Leader) -> bool:
        """Become the leader if the one that is does not run any more."""
        other = self._leaders.get(thing)
        if other is not None and other.leads():
            return False
        self._leaders[thing] = leader
        return True

    def is_free(self, thing: Hashable) -> bool:
        """Return whether nobody leads."""
        return thing not in self._leaders

    def leads_in_this_thread(self, thing: Hashable, leader: _Leader) -> bool:
        """Return whether an outer frame leads."""
        other = self._leaders.get(thing)
        return (
            other is not None
            and other is not leader
            and other.thread == leader.thread
            and other.leads()
        )

    def release(self, thing: Hashable, leader: _Leader) -> None:
        """Give up a claim, if there is one."""
        leader.frame = None  # its variables lead back to it
        if self._leaders.get(thing) is leader:
            self._leaders.pop(thing, None)

    def forget(self) -> None:
        """Forget all leaders: a forked child has none of their threads."""
        self._leaders = {}


class ThreadWorker:
    """A flow in a thread of the background.

    Args:
        thread: The thread.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def is_alive(self) -> bool:
        """Return whether it has not ended yet."""
        return self._thread.is_alive()

    def is_me(self) -> bool:
        """Return whether it is the one that asks."""
        return self._thread is threading.current_thread()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for so many seconds at the most."""
        self._thread.join(timeout)


class ThreadDriver:
    """Runs the flows of one process in the threads that call it.

    Args:
        server: Where calls go.
        library: Names the server's functions.
        identity: Whose lanes they go through.
        retry_timeout: Seconds after which a caller is told that there is no answer.
        explain: Turns an error of the server's into one that names the remedy.
        executor: Where the user's code runs, if not in the calling thread.
        slice: Seconds of user code after which an `Execute` returns with what is done.

    Attributes:
        on_detached: Told a flow whose caller has gone. `resume` goes on with it.
        on_ready: Told a detached flow that has its answers.
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
        self._claims = _Claims()
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
            BaseException: What the flow raises.
        """
        run = FlowRun(flow, name)
        try:
            run.advance(None)
            return cast("T", self._go_on(run))
        except BaseException as error:
            self._left(run, error)
            raise

    def resume(self, run: FlowRun) -> Any:
        """Go on with a flow whose caller has gone, in this thread.

        Raises:
            ConnectionLostError: There still is no answer; `on_detached` is told again.
            BaseException: What the flow raises.
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
        """Return whether a flow has what it waits for."""
        ticket = run.ticket
        if ticket is None or run.is_over or ticket.send is not run.effects[0]:
            return True
        # What was not put into a lane yet is sent when the flow goes on.
        placed = sum(len(operations) for _, _, _, operations in ticket.places)
        return ticket.is_done or placed < len(ticket.answers)

    def spawn(self, flow: Flow[Any], name: str) -> ThreadWorker:
        """Run a flow in the background.

        Raises:
            RuntimeError: It is too late for that: the interpreter is ending.
        """
        run = FlowRun(flow, name, background=True)
        thread = threading.Thread(target=self._work, args=(run,), name=name, daemon=True)
        try:
            thread.start()
        except KeyError as error:
            # With it the standard library hides what a signal handler raises inside `start`.
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
                return effect.value
            elif effect is CALLER_GONE:
                reply = run.caller_gone
            else:
                reply = self._perform(run, cast("AnyEffect", effect))
            run.advance(reply)

    def _left(self, run: FlowRun, error: BaseException) -> None:
        """The caller goes with an error: go on in the background with what has begun."""
        problem: BaseException | None = None
        for _ in range(ATTEMPTS):
            try:
                if run.is_over:
                    return
                ticket = run.ticket
                if not run.has_sent and not (ticket is not None and ticket.places):
                    # Nobody has seen anything of it: it ends, and may yet have something to undo.
                    run.caller_gone = True
                    self._break_off(run, error)
                    if run.is_over:
                        return
                run.caller_gone = True
                self.on_detached(run)
            except BaseException as another:  # noqa: BLE001 - a signal's: the first one is raised
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
        ticket = run.ticket
        if ticket is None or ticket.send is not send:
            ticket = _Ticket(send, run)
            ticket.driver = self
            run.ticket = ticket
        identity = self.identity
        deadline = time.monotonic() + self.retry_timeout
        if send.more is not None:
            self._stream(ticket, send.more)
        if len(operations) == 1 and not ticket.places and self.server.durability is None:
            # As `_await` does for many, without the bookkeeping: it costs a third of a round trip.
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
                return cast("list[Any]", ticket.answers)
        elif operations:
            ticket.enqueue(identity)
        self._await(ticket, deadline)
        return cast("list[Any]", ticket.answers)

    def _stream(self, ticket: _Ticket, more: Iterator[object]) -> None:
        """Send operations while others are made, once; `_await` sees to what is not answered."""
        leader = _Leader()
        flight: sync_io.Flight | None = None
        calls: list[tuple[Lane, Call]] = []
        led: dict[Lane, None] = {}
        # What is to be confirmed, or has several ways, goes in one exchange.
        alone = self.server.durability is not None or not self.server.colocated
        try:
            # What is made already goes with the first group of its lane, or behind all of them.
            ticket.enqueue(self.identity)
            for made in itertools.chain(zip(more), (None,)):
                known = len(ticket.places) if made is not None else 0
                ticket.enqueue(self.identity)
                fresh = dict.fromkeys(place[1] for place in ticket.places[known:])
                # A lane that has its call in this flight would send it again.
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
        """Lead lanes that nobody leads, and return their calls."""
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
            ConnectionLostError: They do not come in time.
        """
        bell = ticket.bell = Bell()
        self._waiting[ticket] = None
        lanes: Sequence[Lane] = ()
        pause = FIRST_PAUSE
        steal = False
        try:
            while not ticket.is_done:
                ticket.catch_up(self.identity)
                before, lanes = lanes, ticket.lanes()
                if len(before) > len(lanes):
                    # We do not come back to these, and may wait for one who waits for them.
                    for lane in set(before).difference(lanes):
                        self._pass_on(lane)
                left = deadline - time.monotonic()
                sent = left > 0 and self._lead(lanes, left, steal=steal)
                if ticket.is_done:
                    break
                if self._closed and not ticket.run.background:
                    # A signal handler has stopped the process before this was sent.
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
                    # The heartbeat's own flow must not wait for a rebirth, which is its to do.
                    raise self.lost()
                steal = not bell.wait(min(left, pause))
                pause = min(pause * 2, LOOK_AGAIN)
        finally:
            ticket.bell = None
            self._waiting.pop(ticket, None)
            for lane in lanes:
                self._pass_on(lane)

    def _lead(self, lanes: Sequence[Lane], patience: float, *, steal: bool = False) -> bool:
        """Send once what those of some lanes have that nobody leads.

        Args:
            lanes: The lanes.
            patience: Seconds in which to repeat what is not answered.
            steal: Whether to look if those who lead still run.

        Returns:
            Whether something was answered, so that it is worth looking again at once.
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
            # The lanes of nodes that answer do not wait for one that does not.
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
        """Wake one of those that wait for a lane without a leader."""
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
        """Hand the answer to an operation, which a rebirth has found, to the thread that waits."""
        self._receiver.deliver(((operation, answer),))

    def flush(self, patience: float = 0.0) -> None:
        """Send once what is queued in lanes that nobody leads."""
        lanes = [lane for lane in self.identity.lanes if lane.has_work]
        self._lead(lanes, patience, steal=True)
        for lane in lanes:
            self._pass_on(lane)

    def look_again(self) -> None:
        """Wake all that wait: their lanes or mailboxes are others now."""
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
        run = FlowRun(effect.flow)
        run.caller_gone = True
        try:
            run.advance(None)
            return Outcome(self._go_on(run))
        except Exception as error:  # noqa: BLE001 - it is the result
            self._left(run, error)
            return Outcome(error=error)
        except BaseException as error:
            self._left(run, error)
            raise

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
        """Have the executor run a job, if there is one that takes it."""
        if self.executor is None or job.is_callers:
            return False
        try:
            context = contextvars.copy_context()
            job.running = self.executor.submit(context.run, _run_job, job)
        except RuntimeError:  # it was shut down: what is to be done is done here
            return False
        return True

    # Mail

    def _await_mail(self, effect: AwaitMail) -> bool:
        """Wait for mail. One of those that wait reads it for all of them."""
        mail = self._mail
        deadline = time.monotonic() + effect.seconds
        generation = self.identity.lanes
        group = None if self.server.colocated else effect.partition
        bell = Bell()
        leader = _Leader()
        try:
            mail.waiting[effect.waiter] = bell
            mail.groups[bell] = group
            if mail.take(effect.waiter):
                return True
            while not mail.was_told(bell):
                left = deadline - time.monotonic()
                if self._closed or self.identity.lanes is not generation:
                    break  # who waits asks again
                if left <= 0:
                    return False
                if self._claims.leads_in_this_thread(("mail", group), leader):
                    # Our own outer frame may have our mail on its connection: ask again soon.
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
        """Read mail, and hand it to the threads that it is for."""
        lanes = self.identity.lanes
        chosen = lanes if group is None else [lanes[group]]
        keys = [mailbox(self.identity.partitions, lane) for lane in chosen]
        unread = self._mail.unread
        try:
            if not unread:
                unread += sync_io.run(self.server.wait(keys, seconds))
        except ServerUnreachableError:
            time.sleep(min(seconds, LOOK_AGAIN))
        # What an interrupt leaves in it, the next one that reads hands out.
        with contextlib.suppress(IndexError):
            while True:
                self._mail.hand_out(waiter_of(unread.popleft()))

    # The rest

    @staticmethod
    def signal() -> Bell:
        """Return something to wait for."""
        return Bell()

    @staticmethod
    def me() -> threading.Thread:
        """Return the thread that runs."""
        return threading.current_thread()

    @staticmethod
    def my_name() -> str:
        """Return the thread's name."""
        return threading.current_thread().name

    def check(self) -> None:
        """Any thread may call."""

    def close(self) -> None:
        """Wake all that wait for mail: the process stops."""
        self._closed = True
        self._mail.wake_all()

    def after_fork_in_child(self) -> None:
        """Forget what threads of the parent do: they do not exist here."""
        self._claims.forget()
        self._waiting = {}
        self._mail = _Mail()
        self._receiver.trouble = None


class _Mail:
    """The threads that wait for mail, and mail that came before its thread waited."""

    def __init__(self) -> None:
        self.waiting: dict[str, Bell] = {}
        self.groups: dict[Bell, int | None] = {}
        #: Threads that are woken by their mail, and not only to read.
        self.told: dict[Bell, None] = {}
        #: Mail that was taken from the server, and not handed out yet.
        self.unread: deque[bytes] = deque()
        self._early: OrderedDict[str, float] = OrderedDict()

    def hand_out(self, waiter: str) -> None:
        """Wake the thread that a mail is for."""
        bell = self.waiting.get(waiter)
        if bell is not None:
            self.told[bell] = None
            bell.set()
        elif is_nudge(waiter):
            for bell in _copy(self.groups):
                self.told[bell] = None
                bell.set()
        else:
            # It was asked for already, but its thread does not wait yet.
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

    def was_told(self, bell: Bell) -> bool:
        """Return whether there was mail for a thread."""
        return bell in self.told

    def wake_one(self, group: int | None) -> None:
        """Wake a thread that reads from now on."""
        for bell, its in _copy(self.groups.items()):
            if its == group:
                bell.set()
                return

    def wake_all(self) -> None:
        """Wake all threads: they look who they are, and ask again."""
        for bell in _copy(self.groups):
            self.told[bell] = None
            bell.set()


def _run_job(job: Job) -> None:
    job.outcome = _outcome_of(job)


def _outcome_of(job: Job) -> Outcome:
    return check_result(job.function, run_user_code(job.function), is_async=False)


def _copy(things: Any) -> list[Any]:
    while True:
        try:
            return list(things)
        except RuntimeError:
            continue  # they have changed meanwhile
