"""The logic that both drivers share: tickets, answers, the user's code."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from inspect import isasyncgen, isawaitable, iscoroutine, isgenerator
from operator import call as call_function
from typing import Any, Protocol, TypeAlias

from redis.exceptions import ResponseError

from phonon._core.flows import EXECUTING, FlowRun, Job, Outcome, Send
from phonon._protocol.answers import Reply
from phonon._protocol.lane import Call, Lane, State, move
from phonon._protocol.library import Library, Request
from phonon._protocol.operations import Code, Operation
from phonon._protocol.partitions import ENCODING, ERRORS, Partitions
from phonon._transport.server import Reply as Answer
from phonon._transport.server import Server
from phonon._transport.steps import Steps
from phonon.errors import ConnectionLostError

#: Errors that end a lane, unless it was closing.
REFUSALS = frozenset({"PHONONFENCED", "PHONONLOST", "PHONONSTALE"})
#: Stands in for an answer that has not come yet.
UNANSWERED: Any = object()

_FAILED = int(Reply.FAILED)
_LEAVE = int(Code.LEAVE)
_STORING = frozenset(map(int, (Code.APPEND, Code.INGEST, Code.INGEST_NEW)))

Explain = Callable[[ResponseError], Exception]


class LaneOwner(Protocol):
    """The part of the process's identity that a driver uses."""

    partitions: Partitions
    lanes: list[Lane]

    def suspect(self, lane: Lane, kind: str, last: int) -> None:
        """Fence a lane, because a call of it was refused. This never blocks."""

    def on_rebirth(self, callback: Callable[[], object]) -> None:
        """Have a function called after each rebirth."""


# Sending


def exchange(
    server: Server, requests: Sequence[Request], calls: Sequence[Call], patience: float
) -> Steps[list[Answer]]:
    """Send calls of lanes, and wait for the confirmation of those that need one.

    Confirmed are data that was stored, and the start of a batch before it is executed: if a
    failover undid the start, the batch's contents would come again under a higher token.
    """
    most = server.most_bytes
    if any([len(call.arguments[-1]) > most for call in calls]):  # noqa: C419 - it is faster
        return (yield from _without_large(server, requests, calls, patience))
    durability = server.durability
    confirm = durability is not None and any(map(_stores, calls))
    replies = yield from server.exchange(requests, patience, confirm=confirm)
    if durability is None or confirm:
        return replies
    # An answer with a third part starts batches. A repeat writes too, so it can be confirmed.
    starts = [i for i, reply in enumerate(replies) if isinstance(reply, list) and len(reply) > 2]  # noqa: PLR2004
    if starts:
        again = yield from server.exchange([requests[i] for i in starts], patience, confirm=True)
        for i, reply in zip(starts, again, strict=True):
            replies[i] = reply
    return replies


def _without_large(
    server: Server, requests: Sequence[Request], calls: Sequence[Call], patience: float
) -> Steps[list[Answer]]:
    """Send the calls that the server takes; answer larger ones here: it would only hang up."""
    most = server.most_bytes
    replies: list[Answer] = []
    for call in calls:
        size = len(call.arguments[-1])
        text = f"a call of {size:,} bytes, and it takes {most:,}: see its proto-max-bulk-len"
        replies.append(ResponseError(text) if size > most else UNANSWERED)
    small = [i for i, reply in enumerate(replies) if reply is UNANSWERED]
    sent = [requests[i] for i in small]
    if sent:
        told = yield from exchange(server, sent, [calls[i] for i in small], patience)
        for i, reply in zip(small, told, strict=True):
            replies[i] = reply
    return replies


def _stores(call: Call) -> bool:
    for operation in call.operations:
        words = operation.words
        if words[0] in _STORING or (words[0] == _LEAVE and any(words[3::4])):
            return True
    return False


#: Operations that were put into a lane: the lanes of the identity at that time, the lane, its
#: queue, and the operations.
Place: TypeAlias = tuple[list[Lane], Lane, deque[Operation], Sequence[Operation]]


class Ticket:
    """Collects the answers to the operations of one `Send`; it is the owner of each of them.

    Args:
        send: The effect.
        run: The flow's run.

    Attributes:
        answers: By position; `UNANSWERED` where there is none yet.
        places: The lanes with the operations; empty until the first one is in a lane.
    """

    _answered = 0
    _placed = 0

    def __init__(self, send: Send, run: FlowRun) -> None:
        self.send = send
        self.run = run
        self.answers: list[Any] = [UNANSWERED] * len(send.operations)
        self.places: list[Place] = []

    @property
    def is_done(self) -> bool:
        """Return whether all answers are there."""
        answers = self.answers
        at, end = self._answered, len(answers)
        while at < end and answers[at] is not UNANSWERED:
            at += 1
        self._answered = at
        return at == end

    def collect(self) -> list[Any]:
        """Return the answers, all of which are there.

        The operations do not refer to the ticket any more, which refers to them: the answers of
        thousands of sessions would be left to the garbage collector.
        """
        for operation in self.send.operations:
            operation.owner = None
        return self.answers

    def answer(self, index: int, answer: Any) -> None:
        """Take in the answer to one operation. A second answer to it is ignored."""
        if self.answers[index] is UNANSWERED:
            self.answers[index] = answer
        self.wake()

    def wake(self) -> None:
        """Wake the waiter, if all answers are there."""
        raise NotImplementedError

    # Into the lanes

    def enqueue(self, identity: LaneOwner) -> None:
        """Put the operations that are in no lane yet into their lanes."""
        operations, answers = self.send.operations, self.answers
        if len(operations) == 1 and not self._placed and not self.places:
            (operation,) = operations
            operation.owner, operation.index = self, 0
            lanes = identity.lanes
            self.put(lanes, lanes[operation.partition], operations)
            self._placed = 1
            self.catch_up(identity)
            return
        answers.extend([UNANSWERED] * (len(operations) - len(answers)))  # it may have grown
        first, self._placed = self._placed, 0
        # All operations before the first are in lanes, unless an exception has come in between.
        there = () if first else {id(o) for place in self.places for o in place[3]}
        groups: dict[int, list[Operation]] = {}
        for i in range(first, len(operations)):
            operation = operations[i]
            if there and id(operation) in there:
                continue
            operation.owner = self
            operation.index = i
            group = groups.get(operation.partition)
            if group is None:
                groups[operation.partition] = [operation]
            else:
                group.append(operation)
        lanes = identity.lanes
        for partition, group in groups.items():
            self.put(lanes, lanes[partition], group)
        self._placed = len(operations)
        self.catch_up(identity)

    def put(self, lanes: list[Lane], lane: Lane, operations: Sequence[Operation]) -> None:
        """Put operations into a lane. The caller has to call `catch_up` afterwards.

        Queueing them and noting it here is one step that no signal handler can interrupt:
        otherwise they could be sent twice, or never.
        """
        queue = lane.place(first=self.send.first)
        place = (lanes, lane, queue, operations)
        both: tuple[Callable[..., None], ...] = (queue.extend, self.places.append)
        deque(map(call_function, both, (operations, place)), 0)

    def catch_up(self, identity: LaneOwner) -> None:
        """Move operations on that were queued while a rebirth began or ended."""
        lanes = identity.lanes
        for i, (known, lane, queue, operations) in enumerate(self.places):
            if known is not lanes:
                new = lanes[lane.partition]
                target = new.place(first=self.send.first)
                for operation in operations:
                    # An operation that is not there is in a call, or the rebirth has moved it.
                    move(operation, queue, target)
                new.catch_up(target, operations)
                self.places[i] = (lanes, new, target, operations)
            elif queue is not lane.queue:
                lane.catch_up(queue, operations)

    def lanes(self) -> list[Lane]:
        """Return the lanes with unanswered operations, each once."""
        answers = self.answers
        unanswered = (
            lane
            for _, lane, _, operations in self.places
            if any(answers[operation.index] is UNANSWERED for operation in operations)
        )
        return list(dict.fromkeys(unanswered))  # a lane may have operations of several steps


def request_of(library: Library, partitions: Partitions, lane: Lane, call: Call) -> Request:
    """Return the request that carries a call."""
    prefix = partitions.prefixes[lane.partition]
    name = library.function("apply_free" if call.frees else "apply")
    return Request(prefix, (b"FCALL", name, b"1", prefix, *call.arguments))


class Receiver:
    """Takes in the server's answers to the calls of lanes, and hands them to the tickets.

    Args:
        identity: The identity of the process.
        explain: Turns a server's error into one that names the remedy.
    """

    def __init__(self, identity: LaneOwner, explain: Explain) -> None:
        self.identity = identity
        self.explain = explain
        #: The last reply that was an error.
        self.trouble: Exception | None = None

    def take_all(
        self, calls: Sequence[tuple[Lane, Call]], replies: Sequence[Any], *, early: bool
    ) -> tuple[bool, bool]:
        """Take in the replies to calls.

        Args:
            calls: The calls.
            replies: Their replies.
            early: Whether a call without an answer was given up before its time.

        Returns:
            Whether a lane can go on at once; and whether waiting is no use, because the server does
            not let us in, or refuses even to say what became of a call that it has refused.
        """
        moved = hopeless = False
        for (lane, call), reply in zip(calls, replies, strict=True):
            moved = self.take(lane, call, reply) or moved
            if isinstance(reply, Exception):
                self.trouble = reply
                if isinstance(reply, ConnectionLostError):
                    hopeless = hopeless or early
                elif call.error is not None and lane.state is State.REFUSED:
                    hopeless = True
        return moved, hopeless

    def take(self, lane: Lane, call: Call, reply: Any) -> bool:
        """Take in the reply to a call, or the error in place of a reply.

        Returns:
            Whether the lane can go on at once.
        """
        if not lane.is_under_way(call):
            return True  # another frame or thread has sent the same call, and was faster
        if reply.__class__ is list:
            told, again = lane.read(call, reply)
            # Before the lane goes on: an exception in between only makes it send the call again.
            self.deliver(told)
            lane.advance(call, reply[1], again)
            return True
        if isinstance(reply, ResponseError):
            return self._refused(lane, call, reply)
        lane.no_answer()
        return False

    def _refused(self, lane: Lane, call: Call, error: ResponseError) -> bool:
        kind, _, last = str(error).partition(" ")
        if kind in REFUSALS:
            told = lane.closed(call) if kind == "PHONONLOST" else []
            if told:
                self.deliver(told)
                lane.advance(call, b"")
                return True
            self.identity.suspect(lane, kind, int(last or 0))
            return False
        again = call.error is not None
        lane.refuse(self.explain(error), call)
        return not again

    def deliver(self, told: Iterable[tuple[Operation, Any]]) -> None:
        """Hand answers to the tickets that wait for them."""
        touched: list[Ticket] = []
        ticket: Any = None
        for operation, answer in told:
            owner = operation.owner
            if owner is None:
                continue
            if answer.__class__ is list:
                if operation.count == 1:
                    answer = self._explained(answer)  # noqa: PLW2901 - the same answer, in the form that callers get
                else:
                    for place, each in enumerate(answer):
                        if each.__class__ is list:
                            answer[place] = self._explained(each)
            answers = owner.answers
            if answers[operation.index] is UNANSWERED:
                answers[operation.index] = answer
            if owner is not ticket:
                ticket = owner
                touched.append(ticket)
        for ticket in touched:
            ticket.wake()

    def _explained(self, answer: list[Any]) -> Any:
        """Return an answer, or the error if the operation has failed."""
        if answer[0] != _FAILED:
            return answer
        return self.explain(ResponseError(answer[1].decode(ENCODING, "replace")))


def mailbox(partitions: Partitions, lane: Lane) -> bytes:
    """Return the key of the list with the mail for a process's waiters in a partition."""
    return b"%bmailbox:%b" % (partitions.prefixes[lane.partition], lane.process)


def waiter_of(mail: bytes) -> str:
    """Return the name of the waiter that a mail is for."""
    return mail.decode(ENCODING, ERRORS)


def is_nudge(waiter: str) -> bool:
    """Return whether a mail asks the reader itself to look at the mailboxes again."""
    return waiter.endswith("/")


# Executing


def run_user_code(job: Job) -> Outcome:
    """Run the user's code, unless it has run, and return its value or its error.

    The job notes both in steps that no signal handler can come between: an interrupt right after
    the code's end must not make it run again.

    Raises:
        BaseException: A signal handler raised it, after the code had ended.
    """
    returned = job.returned
    if not returned and job.raised is None:
        job.begun = True
        token = EXECUTING.set(True)
        try:
            returned.extend(map(call_function, (job.function,)))
            if not returned:
                job.raised = RuntimeError(f"{name_of(job.function)} raised StopIteration")
        except BaseException as error:
            if returned:
                raise
            job.raised = error
        finally:
            EXECUTING.reset(token)
    if job.raised is not None:
        return Outcome(error=job.raised)
    return Outcome(returned[0])


def check_result(function: Callable[[], Any], outcome: Outcome, *, is_async: bool) -> Outcome:
    """Return the outcome, or an error if the result shows that the user's code never ran."""
    value = outcome.value
    if isgenerator(value) or isasyncgen(value):
        if isgenerator(value):
            value.close()
        return Outcome(
            error=TypeError(
                f"{name_of(function)} never ran: it has a yield in it, so calling it only makes a "
                "generator"
            )
        )
    if not is_async and isawaitable(value):
        if iscoroutine(value):
            value.close()
        return Outcome(
            error=TypeError(
                f"{name_of(function)} is a coroutine function, and this process has no event loop: "
                "use phonon.aio, with AsyncProcess and AsyncUpdate"
            )
        )
    return outcome


def name_of(function: Any) -> str:
    """Return the name of a function, for people."""
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__qualname__", function))
