"""A lane: one process's ordered, idempotent stream of calls to one partition.

This is the state machine alone, as in h2: it never touches a socket, a clock or a thread. A driver
puts operations in, sends the calls that come out, and passes the answers back in. Threads, asyncio
and the simulation drive the same objects.

::

    IDLE --next_call--> IN_FLIGHT --receive--> IDLE
                        IN_FLIGHT --no_answer--> UNANSWERED --next_call--> IN_FLIGHT  (same bytes)
                        IN_FLIGHT --refuse--> REFUSED --next_call--> IN_FLIGHT  (empty, same number)
                        any --fence--> FENCED

A call that was refused as a whole (out of memory, no permission) uses up its number all the same:
an earlier copy of it may have been carried out already, or a delayed copy may be carried out later.
So an empty call with the same number follows, whose answer tells which.

Any thread may call any method at any time, also during another call of the same thread (from a
signal handler or a finalizer), and an exception may interrupt any method anywhere. So there is no
lock: a re-entrant call would never get it. A lane moves from one position to the next by
``dict.setdefault``, which is atomic: the second caller goes on with the call that the first one
made. If two threads send at the same time, they send the same bytes, which does no harm.
"""

import sys
import zlib
from collections import deque
from collections.abc import Sequence
from enum import Enum
from itertools import islice
from operator import call as call_function
from typing import Any

import msgpack

from phonon._protocol.answers import STARTS_BATCH, Reply
from phonon._protocol.operations import Code, Operation

#: Most operations in one call, and most bytes, so that a call never blocks the server for long.
MOST_OPERATIONS = 256
MOST_BYTES = 512 * 1024

_CLOSE = int(Code.CLOSE)
_EMPTY = msgpack.packb([])
# One C call that runs no Python, so that no signal handler finds the packer half used.
_pack = msgpack.Packer(use_bin_type=False, unicode_errors="surrogatepass", autoreset=True).pack


class State(Enum):
    """The states of a lane."""

    IDLE = "idle"
    IN_FLIGHT = "in flight"
    UNANSWERED = "unanswered"
    REFUSED = "refused"
    FENCED = "fenced"


class Call:
    """A call, byte for byte as it is sent and repeated.

    Attributes:
        operations: The operations that it carries.
        number: The number of the lane that it belongs to.
        sequence: Its number in the lane.
        digest: The digest of its operations.
        frees: Whether a server that is out of memory still has to run it.
        arguments: Process, stamp, number of the lane with sequence and digest, operations.
        error: The server's refusal of the call, if this is the empty one that asks about it.
        taken: Whether its operations have been removed from the lane's queue.
    """

    __slots__ = (
        "arguments",
        "digest",
        "error",
        "frees",
        "number",
        "operations",
        "sequence",
        "taken",
    )

    def __init__(
        self,
        lane: "Lane",
        sequence: int,
        stamp: bytes,
        operations: Sequence[Operation],
        error: Exception | None = None,
    ) -> None:
        self.operations = operations
        self.sequence = sequence
        self.error = error
        self.taken = error is not None
        if error is not None:
            body, self.frees = _EMPTY, True
        elif len(operations) == 1:
            body, self.frees = _pack(operations[0].words), operations[0].frees
        else:
            words: list[Any] = []
            frees = True
            for operation in operations:
                words += operation.words
                frees = frees and operation.frees
            body = _pack(words)
            self.frees = frees
        self.number = number = lane.number
        self.digest = digest = b"%d" % zlib.crc32(body)
        self.arguments = (
            lane.process,
            stamp or number,
            b"%b %d %b" % (number, sequence, digest),
            body,
        )

    @property
    def process(self) -> bytes:
        """The id of the process that made the call."""
        return self.arguments[0]


class _Position:
    """A place between two calls.

    Attributes:
        sequence: The number of the last call that was answered.
        stamp: The stamp of that answer.
        again: Operations of a refused call that the next one carries.
        operations: The number of changes that were answered before.
        once: The next call, and the position after it, as soon as they exist.
    """

    __slots__ = ("again", "once", "operations", "sequence", "stamp")

    def __init__(
        self,
        sequence: int,
        stamp: bytes,
        again: Sequence[Operation] = (),
        operations: int = 0,
    ) -> None:
        self.sequence = sequence
        self.stamp = stamp
        self.again = again
        self.operations = operations
        self.once: dict[str, Any] = {}


class Lane:
    """One process's lane in one partition.

    Args:
        partition: The partition's number.
        process: The process's id.
        number: The lane's number, from the server's answer to ``open``.

    Attributes:
        queue: Operations that no call carries yet.
        deferred: Operations that wait until the process's former self is reaped here; None if
            nothing does.
    """

    __slots__ = (
        "_fenced",
        "_position",
        "_progress",
        "deferred",
        "number",
        "partition",
        "process",
        "queue",
    )

    def __init__(self, partition: int, process: bytes, number: bytes) -> None:
        self.partition = partition
        self.process = process
        self.number = number
        self.queue: deque[Operation] = deque()
        self.deferred: deque[Operation] | None = None
        self._fenced = False
        self._position = _Position(0, b"")
        self._progress = State.IN_FLIGHT

    # State

    @property
    def state(self) -> State:
        """Return the lane's state."""
        if self._fenced:
            return State.FENCED
        return State.IDLE if self.call is None else self._progress

    @property
    def answered(self) -> int:
        """The number of the last call that was answered."""
        return self._at().sequence

    @property
    def answered_operations(self) -> int:
        """The number of changes in all calls that were answered."""
        return self._at().operations

    @property
    def sequence(self) -> int:
        """The number of the last call that was made."""
        position = self._at()
        return position.sequence + 1 if position.once.get("call") else position.sequence

    @property
    def stamp(self) -> bytes:
        """The stamp of the last answer; the next call names it."""
        return self._at().stamp

    @property
    def call(self) -> Call | None:
        """The call that is under way."""
        return self._at().once.get("call") or None

    @call.setter
    def call(self, call: None) -> None:
        # A fenced lane gives up its call, and makes no other one.
        self._at().once["call"] = call or _NONE

    def _at(self) -> _Position:
        position = self._position
        while "next" in position.once:
            position = self._position = position.once["next"]
        return position

    @property
    def has_work(self) -> bool:
        """Return whether there is something to send."""
        if self._fenced:
            return False
        position = self._at()
        return bool(self.queue or position.once.get("call") or position.again)

    # Operations come in

    def enqueue(self, operation: Operation, *, first: bool = False) -> None:
        """Queue an operation.

        Args:
            operation: The operation to send.
            first: Whether it goes before the operations that wait for the former self's reap.
        """
        place = self.place(first=first)
        place.append(operation)
        self.catch_up(place, (operation,))

    def place(self, *, first: bool = False) -> deque[Operation]:
        """Return the queue for an operation. The caller puts it there, and calls `catch_up`."""
        deferred = self.deferred
        return self.queue if first or deferred is None else deferred

    def catch_up(self, place: deque[Operation], operations: Sequence[Operation]) -> None:
        """Move operations on that were put into a queue that is not used any more."""
        if place is not self.queue and place is not self.deferred:
            for operation in operations:
                move(operation, place, self.queue)

    def defer(self) -> None:
        """Hold operations back: the answer to a leave would count the process's former self."""
        if self.deferred is None:
            self.deferred = deque()

    def release(self) -> None:
        """Stop holding operations back."""
        deferred, self.deferred = self.deferred, None
        if deferred is not None:
            self.catch_up(deferred, _first(deferred, sys.maxsize))

    # Calls go out

    def next_call(self) -> Call | None:
        """Return the call to send now: the one that is not answered yet, or a new one.

        Returns:
            None if there is nothing to send, or the lane is fenced.
        """
        if self._fenced:
            return None
        position = self._position
        if "next" in position.once:
            position = self._at()
        once = position.once
        call: Call | None = once.get("call")
        if call is None:
            operations = self._choose(position.again)
            if operations:
                made = Call(self, position.sequence + 1, position.stamp, operations)
                call = once.setdefault("call", made)
            else:
                call = once.get("call")  # another thread's call has taken them all
        if not call:
            return None
        if not call.taken:
            self._take(call)
        self._progress = State.IN_FLIGHT
        return call

    def _choose(self, again: Sequence[Operation]) -> list[Operation]:
        """Return the operations of the next call. They stay in the queue until it is made."""
        queued = _first(self.queue, MOST_OPERATIONS - len(again))
        if len(queued) <= 1 and not again:
            return queued
        operations = list(again)
        size = sum([operation.size for operation in again])
        for operation in queued:
            size += operation.size
            if operations and (size > MOST_BYTES or operation.words[0] == _CLOSE):
                break
            operations.append(operation)
            if operation.words[0] == _CLOSE:
                break
        return operations

    def _take(self, call: Call) -> None:
        """Remove the operations of a call from the queue. This may be repeated."""
        remove = self.queue.remove
        place = 0
        for operation in call.operations:
            sent = operation.sent
            if sent is None or sent[0] is not call:
                operation.sent = (call, place, sent)
            place += operation.count
            try:  # noqa: SIM105 - the alternative costs as much as all the rest
                remove(operation)  # usually the first one in the queue
            except ValueError:
                pass  # removed already, or sent again after the whole call was refused
        call.taken = True

    # Answers come in

    def no_answer(self) -> None:
        """Note that the call under way was not answered: it is repeated, byte for byte."""
        if self._progress is State.IN_FLIGHT:
            self._progress = State.UNANSWERED

    def is_under_way(self, call: Call) -> bool:
        """Return whether a call is not answered yet; another sender may have been faster."""
        once = self._position.once
        return (self._at().once if "next" in once else once).get("call") is call

    def refuse(self, error: Exception, call: Call | None = None) -> None:
        """Note that the server refused the whole call: ask about it under the same number.

        Args:
            error: The refusal.
            call: The call, if another one may be under way by now.
        """
        position = self._at()
        refused: Call | None = position.once.get("call")
        if not refused or self._fenced or (call is not None and call is not refused):
            return
        if refused.error is None:
            position.once["call"] = Call(
                self, refused.sequence, position.stamp, refused.operations, error
            )
        self._progress = State.REFUSED

    def read(
        self, call: Call, reply: Sequence[bytes]
    ) -> tuple[list[tuple[Operation, Any]], list[Operation]]:
        """Decode an answer, and change nothing.

        The caller hands the answers out before it calls `advance`, or an exception between the two
        would lose them.

        Returns:
            Each operation of the call with its answer: what the server packed, a batch's content
            appended to it, or the error with which the server refused the call; a list of answers
            for many changes. Then the operations that have to be sent again, because a full server
            would have run them by themselves.
        """
        answers: list[Any] = msgpack.unpackb(reply[0], raw=True, strict_map_key=False)
        if call.error is not None and not answers:
            return _refused(call, call.error)
        if len(reply) > 2 or call.error is not None:  # noqa: PLR2004 - the third part: a batch starts
            add_contents(answers, reply[2] if len(reply) > 2 else None)  # noqa: PLR2004 - as above
        if len(answers) == 1:
            return [(call.operations[0], answers[0])], []
        if len(answers) == len(call.operations):
            return list(zip(call.operations, answers, strict=True)), []
        told: list[tuple[Operation, Any]] = []
        at = 0
        for operation in call.operations:
            behind = at + operation.count
            told.append((operation, answers[at:behind] if operation.count > 1 else answers[at]))
            at = behind
        return told, []

    def advance(self, call: Call, stamp: bytes, again: Sequence[Operation] = ()) -> None:
        """Go on to the next call, unless that has happened already.

        Args:
            call: The call that was answered.
            stamp: The stamp of the answer.
            again: The operations that `read` has returned as to be sent again.
        """
        position = self._position
        if "next" in position.once:
            position = self._at()
        if position.sequence + 1 == call.sequence:
            carried = call.operations
            count = carried[0].count if len(carried) == 1 else sum([o.count for o in carried])
            answered = position.operations + count
            if again:
                answered -= sum([operation.count for operation in again])
            self._position = position.once.setdefault(
                "next", _Position(call.sequence, stamp, again, answered)
            )
            if not again:
                # Their fate is not asked for any more. With this they refer to each other no
                # more, and are not left to the garbage collector.
                for operation in carried:
                    operation.sent = None

    def receive(self, reply: Sequence[bytes]) -> list[tuple[Operation, Any]]:
        """Take in the answer to the call that is under way: `read` and `advance`."""
        call = self.call
        if call is None:
            return []
        told, again = self.read(call, reply)
        self.advance(call, reply[1], again)
        return told

    def closed(self, call: Call) -> list[tuple[Operation, Any]]:
        """Return the answers to a call on a lane that is gone, if the call was its `close`."""
        if call.operations[0].words[0] != _CLOSE:
            return []
        return [(operation, int(Reply.CLOSED)) for operation in call.operations]

    def close(self) -> list[tuple[Operation, Any]]:
        """Note that the lane is gone. If its own `close` was under way, return its answer."""
        call = self.call
        told = [] if call is None else self.closed(call)
        if call is not None and told:
            self.advance(call, b"")
        return told

    def fence(self) -> None:
        """Stop sending: the process goes on under another identity.

        Afterwards each operation is either in the queue or in a call, never in both.
        """
        self._fenced = True
        position = self._at()
        call = position.once.setdefault("call", _NONE)
        if call and not call.taken:
            self._take(call)
        if not call and position.again:
            again, position.again = position.again, ()
            self.queue.extendleft(reversed(again))


#: Stands in for a call where there will be none.
_NONE = False


def move(operation: Operation, source: deque[Operation], target: deque[Operation]) -> bool:
    """Move an operation between queues, unless it has left the first one already.

    Removing and adding are one step that no signal handler can interrupt; otherwise the operation
    could be lost or doubled.

    Returns:
        Whether it was moved.
    """
    steps = map(call_function, (source.remove, target.append), (operation, operation))
    try:
        deque(steps, 0)
    except ValueError:
        return False
    return True


def _first(queue: deque[Operation], count: int) -> list[Operation]:
    while True:
        try:
            return list(islice(queue, count))
        except RuntimeError:
            continue  # the queue has changed meanwhile


def _refused(call: Call, error: Exception) -> tuple[list[tuple[Operation, Any]], list[Operation]]:
    """Split a refused call: errors for some operations, and those that a full server would run."""
    told: list[tuple[Operation, Any]] = []
    again: list[Operation] = []
    mixed = any(not operation.frees for operation in call.operations)
    for operation in call.operations:
        if mixed and operation.frees:
            again.append(operation)
        else:
            told.append((operation, error))
    return told, again


def add_contents(answers: list[Any], packed: bytes | None) -> None:
    """Append its content to each answer that starts a batch, so that it can be read as a `Run`.

    Args:
        answers: The answers of one call.
        packed: The contents of its batches, or None if they are to be fetched.
    """
    contents = iter(()) if packed is None else iter(msgpack.unpackb(packed, raw=True))
    for answer in answers:
        if type(answer) is list and answer[0] in STARTS_BATCH:
            if len(answer) == 7:  # noqa: PLR2004 - without modifications
                answer.append(None)
            answer.append(next(contents, []))
