"""Rebirth: a process that was declared dead, or whose server lost data, takes a new identity.

1. Register the new identity and open its lanes.
2. Fence the old lanes that have an unanswered call. Only reading their state is not enough, because
   a delayed copy may be carried out later. The answers tell for each operation whether it was
   carried out, under any identity. If so, its remembered answer is the result. If not, it never
   will be.
3. Under the new identity: join the held resources; reap the old self; and then send the remaining
   operations. Sent earlier, a leave would find its own former self among the members.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgpack

from phonon._core.flows import REBORN, Flow, Read, read_all
from phonon._core.identity import REMEMBERED, Identity
from phonon._core.leases import Leases
from phonon._core.members import Members
from phonon._core.reports import Reports
from phonon._core.takeover import Takeover
from phonon._protocol.lane import Lane, add_contents
from phonon._protocol.operations import Code, Operation
from phonon.errors import (
    ConnectionLostError,
    DeclaredDeadError,
    PhononError,
    ServerStateLostError,
)

log = logging.getLogger("phonon")

#: Operations for one identity, which are not repeated under another one.
_PERSONAL = frozenset(map(int, (Code.LOCK, Code.UNLOCK, Code.RENEW, Code.AWAIT, Code.FORGET)))

_REAP, _CLOSE = int(Code.REAP), int(Code.CLOSE)


class _LastCall(NamedTuple):
    """The last call that a fenced lane carried out."""

    sequence: int
    answers: bytes
    digest: bytes
    number: bytes


class Rebirth:
    """Gives a process a new identity. Local data is kept.

    Args:
        identity: The identity of this process.
        members: Its memberships.
        leases: Its locks, which are lost.
        takeover: Reaps the former self.
        reports: Told the reason.
        deliver: Gives an operation its answer.
        address: The server's address, for messages.
    """

    def __init__(
        self,
        identity: Identity,
        members: Members,
        leases: Leases,
        takeover: Takeover,
        reports: Reports,
        *,
        deliver: Callable[[Operation, Any], None],
        address: str,
    ) -> None:
        self._identity = identity
        self._members = members
        self._leases = leases
        self._takeover = takeover
        self._reports = reports
        self._deliver = deliver
        self._address = address
        self._next_id = b""

    def run(self, *, forgotten: bool = False) -> Flow[None]:
        """Take a new identity.

        After a failure the old identity stays, fenced. The next attempt goes on with the same new
        identity.

        Args:
            forgotten: Whether the server does not know this process.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        identity = self._identity
        identity.suspected = True
        old, lanes = identity.id, identity.lanes
        for lane in lanes:
            lane.fence()
        lost_calls = dict(identity.lost_calls)
        self._next_id = self._next_id or identity.new_id().encode()
        begun = identity.clock()
        epoch, listing, opened = yield from identity.register(self._next_id, exact=True)
        silence = begun - identity.beaten_at
        # A process that was declared dead is not registered any more, and its unused lanes are
        # gone. That may be a loss of data, so all lanes are fenced again, but it proves none.
        suspicious = forgotten or bool(lost_calls) or epoch != identity.epoch
        records = yield from self._fence(lanes, old, lost_data=suspicious)
        for lane in lanes if suspicious else ():
            if not lane.stamp:
                continue  # never used, or closed and gone
            record = records[lane.partition, old]
            gone = lane.answered - (record.sequence if record.number == lane.number else 0)
            if gone > lost_calls.get(lane.partition, 0):
                lost_calls[lane.partition] = gone
        # After a week of silence the server may have expired the lanes.
        lost_data = any(lost_calls.values()) and silence <= REMEMBERED
        identity.former.append(old)
        for lane in opened:
            lane.defer()
        identity.switch_to(self._next_id, epoch, listing, opened, begun)
        self._next_id = b""
        # No operation enters the old lanes from now on.
        answers: list[tuple[Operation, Any]] = []
        resources: list[bytes] = []

        for lane, new in zip(lanes, opened, strict=True):
            for operation in _take_all(lane):
                answer = _fate(operation, records, silence, lost_data=lost_data)
                if answer is not _NOT_CARRIED_OUT:
                    answers.append((operation, answer))
                elif operation.words[0] in _PERSONAL or operation.words[0] == _CLOSE:
                    answers.append((operation, REBORN))
                else:
                    resources += operation.held
                    new.enqueue(operation, first=operation.ahead or operation.words[0] == _REAP)
        reaped = identity.former if suspicious else [old]
        self._takeover.add_former(reaped, self._members.joins(resources))
        error = self._error(old, lost_calls, lost_data=lost_data)
        for operation, answer in answers:
            self._deliver(operation, answer)
        self._reports.report_error(error)  # the cause is reported before the lost locks
        self._leases.lose_former()
        identity.reborn()
        nudges = identity.nudges(old)
        if nudges:  # the readers still read the former self's mail
            yield Read(nudges, 1.0)

    def _fence(
        self, lanes: Iterable[Lane], old: bytes, *, lost_data: bool
    ) -> Flow[dict[tuple[int, bytes], _LastCall]]:
        """Fence all identities that may have unanswered calls."""
        wanted: dict[tuple[int, bytes], None] = {}
        for lane in lanes:
            if lane.call is not None:
                wanted[lane.partition, old] = None
            for operation in _all_of(lane):
                sent = operation.sent
                while sent is not None:
                    call, _, sent = sent
                    wanted[lane.partition, call.process] = None
            if lost_data:  # the server may have lost their fences
                for process in (*self._identity.former, old):
                    wanted[lane.partition, process] = None
        if not wanted:
            return {}
        replies = yield from read_all(
            [self._identity.in_partition(p, "fence", process) for p, process in wanted]
        )
        return {key: _LastCall(*reply) for key, reply in zip(wanted, replies, strict=True)}

    def _error(self, old: bytes, lost_calls: dict[int, int], *, lost_data: bool) -> PhononError:
        process, seconds = old.decode(), self._identity.lease
        if not lost_data:
            return DeclaredDeadError(
                f"process {process} was silent for more than {seconds:g} s and was declared dead: "
                f"others take over its batches and locks. It goes on as {self._identity.name} with "
                "all that is local"
            )
        lost = sum(lost_calls.values())
        lost_part = f"the last {lost} calls" if lost else "data"
        return ServerStateLostError(
            f"{self._address} has lost {lost_part} of process {process}. Data that was stored "
            "there and not yet written to the database is lost, unless it is restored from a "
            "backup; batches executed since may be executed again. The process goes on as "
            f"{self._identity.name}, renews its {len(self._members.held)} memberships, and has "
            f"lost its {len(self._leases)} locks. A server with appendonly yes, or "
            "Process(durability=...), keeps its data",
            lost,
        )


def _all_of(lane: Lane) -> list[Operation]:
    call = lane.call.operations if lane.call is not None else ()
    return [*call, *lane.queue, *(lane.deferred or ())]


def _take_all(lane: Lane) -> list[Operation]:
    """Remove and return a lane's operations, in order."""
    found = list(lane.call.operations) if lane.call is not None else []
    lane.call = None
    for queue in (lane.queue, lane.deferred):
        while queue:
            found.append(queue.popleft())
    return found


_NOT_CARRIED_OUT = object()


def _fate(
    operation: Operation,
    records: dict[tuple[int, bytes], _LastCall],
    silent: float,
    *,
    lost_data: bool,
) -> Any:
    """Return the remembered answer to an operation, or the mark that it was not carried out."""
    sent = operation.sent
    unknown = False
    while sent is not None:
        call, place, sent = sent
        record = records.get((operation.partition, call.process))
        if record is None:  # it was sent, and answered, in a partition's lane of long ago
            continue
        if record.number != call.number:
            unknown = unknown or (silent > REMEMBERED and not lost_data)
        elif record.sequence == call.sequence and record.digest == call.digest:
            answers = msgpack.unpackb(record.answers, raw=True, strict_map_key=False)
            if place < len(answers):
                add_contents(answers, None)
                found = [_without_content(a) for a in answers[place : place + operation.count]]
                return found if operation.count > 1 else found[0]
    if unknown:
        return ConnectionLostError(
            f"{operation!r} was not answered for more than a week, and the server does not "
            "remember it any more: it may have been carried out, and is not repeated"
        )
    return _NOT_CARRIED_OUT


def _without_content(answer: Any) -> Any:
    """Return a batch's answer without its content: the takeover reads the batch's owner anew."""
    if isinstance(answer, list) and len(answer) == 9:  # noqa: PLR2004 - a Run
        answer[-1] = False
    return answer
