"""The outbox: all work of this process that is unfinished, with one bound on it.

Unfinished are updates that could not be stored, sessions that could not be ended, batches that
failed and are to be tried again, batches that were taken over, and flows whose callers have gone.
One worker in the background sees to all of it, in this order: what is on its way, what was not
sent, what is due.
"""

import functools
import heapq
import itertools
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from phonon._core.executor import Executor, RunningBatch
from phonon._core.expected import Expectation
from phonon._core.flows import EXECUTING, FLUSH, REBORN, Branch, Flow, Send, Signal, Sleep, Wait
from phonon._core.identity import Identity
from phonon._core.members import ABSENT, Entry, Members, modifications_of
from phonon._core.reports import Reports
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Run
from phonon._protocol.operations import Operation
from phonon.errors import BacklogFullError, ConnectionLostError, PhononError

log = logging.getLogger("phonon")

#: What happens to those that would add to an outbox that is full.
Overflow = Literal["block", "raise"]
#: Sessions ended, or batches executed, together: a bound on what is held in memory.
CHUNK = 1000
#: Operations that are sent while others are made.
GROUP = 128
#: Seconds after which the worker looks by itself.
IDLE = 60.0
#: Seconds between two attempts to send what was not answered.
AGAIN = 0.25
#: Seconds that a call waits for those before it to take in their answers, and between two looks.
SETTLING = 0.5
LOOK = 0.005

T = TypeVar("T")

_HELD, _RUN, _STORED = int(Reply.HELD), int(Reply.RUN), int(Reply.STORED)


class Parcel(Protocol):
    """Local data on its way to the server: all that the core knows of an update."""

    #: The resource.
    resource_id: str

    @property
    def forced(self) -> bool:
        """Return whether the session ends without waiting for other processes."""

    def take(self) -> bytes | None:
        """Move out what is unsent, as one partial; None if there is nothing."""

    def take_last(self) -> tuple[bytes | None, Any]:
        """Do what `take` does; return its content as well, if that need not be decoded."""

    def put_back(self, partial: bytes) -> None:
        """Take a partial back that the server refused: it is unsent again."""


class Ending(NamedTuple):
    """A session to be ended here.

    Attributes:
        resource: Which.
        parcel: The last data, and what executes the batch if it falls to us.
        force: Execute what has come together so far although others hold the resource.
        modifications: Whether the session's modifications are wanted.
    """

    resource: str
    parcel: Any = None
    force: bool = False
    modifications: bool = False


class SessionResult:
    """The result of ending a session.

    Attributes:
        last: Whether this process was the last member.
        left: How many members are left.
        modifications: By process id, if they were asked for.
        errors: What went wrong: the data was not sent, or ``execute`` raised.
        sent: Whether the data is on the server.
    """

    __slots__ = ("errors", "last", "left", "modifications", "sent")

    def __init__(self) -> None:
        self.last = False
        self.left = 0
        self.modifications: dict[str, int] = {}
        self.errors: list[BaseException] = []
        self.sent = False


#: A leave that is sent: its ending, the data with it, that undecoded, what was held before, and
#: its result.
_Leaving = tuple[Operation, Ending, bytes | None, Any, Any, SessionResult]
_NOTHING = (None, None)


class Due(NamedTuple):
    """A batch of ours that is to be executed.

    Attributes:
        at: When, by the clock.
        order: Which of those at the same time comes first.
        partition: Where it is.
        name: The server's name of its resource.
        token: The partition's token.
        local: The update whose session ended with it, if it is still here.
        failed: Whether its execution has failed here: it counts towards the bound.
    """

    at: float
    order: int
    partition: int
    name: bytes
    token: int
    local: Any
    failed: bool


class Outbox:
    """All unfinished work of a process.

    Args:
        identity: Who it is.
        members: What it holds.
        reports: Told about errors in the background.
        most: How much may be unfinished.
        overflow: What new updates are met with then.
        changed: A condition on which those wait that are kept out.

    Attributes:
        full: Whether new updates are kept out, as of the last look.
        unstored: Updates with data that could not be stored.
        signal: Wakes the worker.
    """

    def __init__(
        self,
        identity: Identity,
        members: Members,
        reports: Reports,
        *,
        most: int,
        overflow: Overflow,
        clock: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._members = members
        self._reports = reports
        self._most = most
        self._overflow = overflow
        self._clock = clock
        self.executor: Executor | None = None
        self.signal: Signal | None = None
        #: Goes on with a flow whose caller has gone; the driver's.
        self.resume: Callable[[Any], Any] = lambda _: None
        self.is_ready: Callable[[Any], bool] = lambda _: False
        self.surplus: Callable[[], int] = lambda: 0
        self.start_worker: Callable[[], None] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Have nothing to do: at first, and in a forked child."""
        self.full = False
        self.unstored: list[Any] = []
        self.unended: list[Ending] = []
        self.detached: dict[Any, object] = {}
        self._continued: dict[Any, object] = {}
        self._catching_up: set[object] = set()
        self._due: dict[tuple[bytes, int], Due] = {}
        self._heap: list[Due] = []
        # Taken from those that are due, and not executed yet: their answers may be under way.
        self._resuming: set[tuple[bytes, int]] = set()
        self._retrying = 0
        self._order = itertools.count()
        self._room = threading.Condition()
        self.stopping = False

    # The bound

    @property
    def size(self) -> int:
        """Return the number of unfinished entries."""
        failed = sum(due.failed for due in list(self._due.values()))
        undone = (
            failed + self._retrying + len(self.unstored) + len(self.unended) + len(self.detached)
        )
        return undone + self.surplus()

    @property
    def is_unfinished(self) -> bool:
        """Return whether an entry is still to be stored or ended, or is being worked on.

        Code of the user's that runs for that does not wait for itself.
        """
        if EXECUTING.get():
            return bool(
                self.unstored or self.unended or self.detached.keys() - self._continued.keys()
            )
        return bool(self.unstored or self.unended or self.detached or self._catching_up)

    @property
    def has_work(self) -> bool:
        """Return whether anything is unfinished, apart from batches that are not due."""
        return bool(self.unstored or self.unended or self.detached) or any(
            lane.has_work for lane in self._identity.lanes
        )

    def look(self) -> None:
        """Something has been left undone, or done after all: is there room?"""
        full = self.size >= self._most
        if full or self.full:
            with self._room:
                self.full = full
                if not full:
                    self._room.notify_all()

    def open(self) -> None:
        """Keep nobody out any more: the process has stopped."""
        with self._room:
            self.full = False
            self._room.notify_all()

    def wait_for_room(self, timeout: float) -> None:
        """Wait until there is room, in a thread.

        Raises:
            BacklogFullError: There is none, and waiting was not wanted or took too long.
        """
        if EXECUTING.get():
            return
        if self._overflow == "block":
            with self._room:
                if self._room.wait_for(lambda: not self.full, timeout):
                    return
        if self.full:
            raise self.refusal()

    @property
    def blocks(self) -> bool:
        """Return whether new updates wait for room."""
        return self._overflow == "block"

    def refusal(self) -> BacklogFullError:
        """Return the error that new updates are met with."""
        return BacklogFullError(
            f"{self.size:,} sessions could not be written to the database, or sent to the "
            "server, and are tried again; until then no new messages are taken in, and this "
            "one was not: give it back to the broker. The log says what is wrong; "
            "Process(max_backlog=...) is the bound"
        )

    # Storing and ending

    def store(
        self, parcels: Sequence[Parcel], joins: Sequence[str] = ()
    ) -> Flow[list[BaseException]]:
        """Store what updates have unsent, and join resources, in one exchange.

        Args:
            parcels: The updates; several of one resource are stored one after the other.
            joins: Resources to become a member of.

        Returns:
            What went wrong. The data is back in its update then, unless it may have been stored.
        """
        members = self._members
        errors: list[BaseException] = []
        sent: list[Operation] = []
        stored: list[tuple[str, Entry | None, Parcel, bytes]] = []
        joined = [resource for resource in joins if not members.is_sure(resource)]
        entries: list[Entry | None] = []

        def make() -> Iterator[None]:
            for group in _groups(
                parcels, [parcel.resource_id for parcel in parcels], members.place
            ):
                self._appends(group, sent, stored, errors)
                yield
            for resource in joined:
                entries.append(members.enter(resource))
                sent.append(operations.join(*members.place(resource)))

        making = _while_sending(make(), len(parcels) + len(joined))
        if not (sent or making):
            return errors
        answers = yield Send(sent, more=making)
        many: list[tuple[Operation, int]] = []
        for (resource, entry, parcel, partial), operation, answer in zip(
            stored, sent, answers, strict=False
        ):
            if answer == _STORED:
                if entry is not None:
                    members.entered(resource, entry, failed=False)
            elif isinstance(answer, Exception):
                if not self._is_unknown(answer):
                    parcel.put_back(partial)
                    self.unstored.append(parcel)
                errors.append(answer)
                members.entered(resource, entry, failed=True)
            else:
                many.append((operation, answer))
                members.entered(resource, entry, failed=False)
        for resource, entry, answer in zip(joined, entries, answers[len(stored) :], strict=False):
            failed = isinstance(answer, Exception)
            members.entered(resource, entry, failed=failed)
            if failed:
                errors.append(answer)
        if errors:
            self.look()
        size = sum([len(partial) for *_, partial in stored])
        self._identity.measures.add_stored(max(0, len(stored) - len(errors)), size)
        if many:
            yield from self._compact(many)
        return errors

    def _appends(
        self,
        group: Sequence[tuple[Parcel, str, int, bytes]],
        sent: list[Operation],
        stored: list[tuple[str, Entry | None, Parcel, bytes]],
        errors: list[BaseException],
    ) -> None:
        """Take what updates have unsent, and make the operations that store it."""
        held, enter = self._members.held, self._members.enter
        for parcel, resource, partition, name in group:
            try:
                partial = parcel.take()
            except Exception as error:  # noqa: BLE001 - what cannot be stored stays with its update
                errors.append(error)
                continue
            if partial is None:
                continue
            entry = enter(resource)
            if held[resource] is None:
                held[resource] = weakref.ref(parcel)
            stored.append((resource, entry, parcel, partial))
            sent.append(operations.append(partition, name, partial))

    def _compact(self, many: Sequence[tuple[Operation, int]]) -> Flow[None]:
        """Merge some partials of sessions that go on. The data is stored: it fails no call."""
        executor = self.executor
        for operation, count in many if executor is not None else ():
            assert executor is not None  # noqa: S101 - for the type checker
            yield Branch(executor.compact(operation.partition, operation.resource, count))

    def end(self, endings: Sequence[Ending]) -> Flow[list[SessionResult]]:
        """End sessions: store the last data, leave, and execute the batches that fall to us.

        Many are ended in pieces; the leaves of the next piece go with the completions of this one.

        Args:
            endings: Of different resources.

        Returns:
            What each came to. Data that could not be sent is back in its update.
        """
        executor = self.executor
        assert executor is not None  # noqa: S101 - for the type checker
        if len(endings) == 1:
            return [(yield from self._end_one(endings[0], executor))]
        results: list[SessionResult] = []
        batches: list[RunningBatch] = []
        many: list[tuple[Operation, int]] = []
        for first in range(0, len(endings), CHUNK):
            about: list[_Leaving] = []
            some = endings[first : first + CHUNK]
            fresh = [SessionResult() for _ in some]
            results += fresh
            resources = [ending.resource for ending in some]
            pairs = list(zip(some, fresh, strict=True))
            groups = list(_groups(pairs, resources, self._members.place))
            # They are made when they are sent, not before batches are executed: a join in between
            # would be held here, and undone there.
            leaves = functools.partial(self._leaves, groups, about)
            names = [name for group in groups for _, _, _, name in group]
            expectation = Expectation()
            try:
                executor.expected.add(expectation, names)
                answers = yield from executor.execute(batches, leaves)
                batches = []
                for leaving, answer in zip(about, answers, strict=False):
                    batch = self._left(leaving, answer, many)
                    if batch is not None:
                        executor.busy[batch.key] = batch
                        batches.append(batch)
            finally:
                expectation.over = True
                executor.expected.remove(names)
        yield from executor.execute(batches)
        yield from self._compact(many)
        self.look()
        return results

    def _end_one(self, ending: Ending, executor: Executor) -> Flow[SessionResult]:
        """Do what `end` does, without lists: this is what `Reference.dereference` waits for."""
        result, resource = SessionResult(), ending.resource
        partition, name = self._members.place(resource)
        about: list[_Leaving] = []
        sent: list[Operation] = []
        group = (((ending, result), resource, partition, name),)
        deque(self._make_leaves((group,), about, sent), 0)
        if not sent:
            self.look()
            return result
        many: list[tuple[Operation, int]] = []
        expectation = Expectation()
        try:
            executor.expected.add(expectation, (name,))
            (answer,) = yield Send(sent)
            batch = self._left(about[0], answer, many)
            if batch is not None:
                executor.busy[batch.key] = batch
        finally:
            expectation.over = True
            executor.expected.remove((name,))
        if batch is not None:
            yield from executor.execute((batch,))
        if many:
            yield from self._compact(many)
        if self.full or batch is not None or result.errors:
            self.look()
        return result

    def _left(
        self, leaving: _Leaving, answer: Any, many: list[tuple[Operation, int]]
    ) -> RunningBatch | None:
        """See to the answer to a leave. Return the batch that falls to us, if there is one."""
        operation, ending, data, kept, was_held, result = leaving
        if isinstance(answer, Exception):
            if not self._is_unknown(answer):
                self._not_left(ending, data, was_held)
            result.errors.append(answer)
            return None
        result.sent = True
        measures = self._identity.measures
        measures.end(data, opened=was_held is ABSENT)
        if measures.on_left is not None and answer[0] != _RUN:
            measures.on_left(ending.resource)
        result.left = answer[1]
        result.last = answer[0] != _HELD and bool(answer[2])
        if answer[0] == _RUN:
            run = Run(*answer)
            if run.modifications is not None:
                result.modifications = modifications_of(run.modifications)
            if run.content is not False:
                return RunningBatch(
                    operation.partition,
                    operation.resource,
                    run,
                    resource=ending.resource,
                    local=ending.parcel,
                    errors=result.errors,
                    # The very bytes that were sent: nobody else has added any.
                    kept=kept if run.size == 1 and run.content[:1] == [data] else None,
                )
        elif answer[0] == _HELD:
            if answer[3]:
                many.append((operation, answer[3]))
        elif len(answer) > 3:  # noqa: PLR2004 - the session's modifications
            result.modifications = modifications_of(answer[3] or None)
            if len(answer) > 4:  # noqa: PLR2004 - it is time to merge some
                many.append((operation, answer[4]))
        return None

    def _leaves(
        self,
        groups: Sequence[Sequence[tuple[tuple[Ending, SessionResult], str, int, bytes]]],
        about: list[_Leaving],
        sent: list[Operation],
    ) -> Iterator[None] | None:
        return _while_sending(self._make_leaves(groups, about, sent), sum(map(len, groups)))

    def _make_leaves(
        self,
        groups: Sequence[Sequence[tuple[tuple[Ending, SessionResult], str, int, bytes]]],
        about: list[_Leaving],
        sent: list[Operation],
    ) -> Iterator[None]:
        leaving = self._members.leaving
        for group in groups:
            for (ending, result), resource, partition, name in group:
                parcel = ending.parcel
                try:
                    data, kept = parcel.take_last() if parcel is not None else _NOTHING
                except Exception as error:  # noqa: BLE001 - what cannot be stored stays with its update
                    result.errors.append(error)
                    continue
                was_held = leaving(resource)
                flags = operations.FORCE * ending.force
                flags += operations.MODIFICATIONS * ending.modifications
                operation = operations.leave(partition, name, data or b"", flags)
                operation.held = was_held is not ABSENT
                about.append((operation, ending, data, kept, was_held, result))
                sent.append(operation)
            yield

    def _is_unknown(self, answer: Exception) -> bool:
        """Return whether nobody knows any more if the server has taken the data.

        It is told, and not sent again: it would be merged twice. See `rebirth`: that takes a week.
        """
        if not isinstance(answer, ConnectionLostError):
            return False
        self._reports.report_error(answer)
        return True

    def _not_left(self, ending: Ending, data: bytes | None, was_held: Any) -> None:
        """The server refused: the data is local again, and the session goes on."""
        if was_held is not ABSENT:
            self._members.held.setdefault(ending.resource, was_held)
        if data is not None:
            ending.parcel.put_back(data)
            self.unended.append(ending)

    # What is due

    def schedule(self, batch: RunningBatch, seconds: float) -> None:
        """Try a batch again that has failed."""
        self._enter(
            self._clock() + seconds,
            batch.partition,
            batch.name,
            batch.run.token,
            batch.local,
            True,  # noqa: FBT003 - in field order
        )
        self.look()

    def take_over(self, partition: int, name: bytes, token: int, seconds: float) -> None:
        """Execute a batch that was taken over, or that its executor has forgotten."""
        if (name, token) in self.busy or (name, token) in self._resuming:
            return
        known = self._due.get((name, token))
        local = known.local if known else None
        failed = known.failed if known else False
        self._enter(self._clock() + seconds, partition, name, token, local, failed)

    def knows(self, name: bytes, token: int) -> bool:
        """Return whether a batch is being executed here, or waits for it."""
        key = name, token
        if key in self._due or key in self.busy or key in self._resuming:
            return True
        return self.executor is not None and name in self.executor.expected

    @property
    def taken_over(self) -> int:
        """Return how many batches are due, or being executed, in the background."""
        now = self._clock()
        waiting = sum(due.at <= now for due in list(self._due.values()))
        running = sum(batch.background for batch in list(self.busy.values()))
        return waiting + len(self._resuming) + running

    @property
    def busy(self) -> MutableMapping[tuple[bytes, int], RunningBatch]:
        """The batches that are being executed."""
        return self.executor.busy if self.executor is not None else {}

    def _enter(
        self, at: float, partition: int, name: bytes, token: int, local: Any, failed: bool
    ) -> None:
        due = Due(at, next(self._order), partition, name, token, local, failed)
        self._due[name, token] = due
        heapq.heappush(self._heap, due)
        self.wake()

    def wake(self) -> None:
        """There is something to do: wake the worker, or start it."""
        if not self.stopping:
            self.start_worker()
        if self.signal is not None:
            self.signal.set()

    def _take_due(self, until: float, most: int, order: int, failed_before: int) -> list[Due]:
        """Remove and return batches that are due, of different resources, entered before then."""
        taken: dict[bytes, Due] = {}
        later: list[Due] = []
        while self._heap and len(taken) < most:
            due = self._heap[0]
            if due.at > until:
                break
            heapq.heappop(self._heap)
            if self._due.get((due.name, due.token)) is not due:
                continue  # entered anew since
            too_new = due.order > order or (due.failed and due.order > failed_before)
            if due.name in taken or too_new:
                later.append(due)
                continue
            self._resuming.add((due.name, due.token))
            del self._due[due.name, due.token]
            taken[due.name] = due
        for due in later:
            heapq.heappush(self._heap, due)
        return list(taken.values())

    def _next_due(self) -> float:
        return self._heap[0].at if self._heap else math.inf

    def mark(self) -> int:
        """Return a number that tells what has failed before this moment; see `retry`."""
        return next(self._order)

    def retry(self, until: float, failed_before: int | None = None) -> Flow[list[BaseException]]:
        """Execute batches that are due by then, a piece at a time, each once.

        Args:
            until: By when they are due, by the clock.
            failed_before: Leave those that have failed since this `mark`.

        Returns:
            What went wrong.
        """
        errors: list[BaseException] = []
        # What fails now is not tried again now, or it would use up its attempts in a moment.
        order = self.mark()
        failed_before = order if failed_before is None else failed_before
        while dues := self._take_due(until, CHUNK, order, failed_before):
            outcome = yield Branch(self._resume(dues))
            errors += [outcome.error] if outcome.error is not None else outcome.value
        return errors

    def _resume(self, dues: Sequence[Due]) -> Flow[list[BaseException]]:
        executor = self.executor
        assert executor is not None  # noqa: S101 - for the type checker
        errors: list[BaseException] = []
        failed = sum(due.failed for due in dues)
        self._retrying += failed  # they are undone until it is known what came of this attempt
        try:
            batches = yield from self._take_up(dues, executor, errors)
            yield from executor.execute(batches)
        finally:
            self._retrying -= failed
        self.look()
        return errors

    def _take_up(
        self, dues: Sequence[Due], executor: Executor, errors: list[BaseException]
    ) -> Flow[list[RunningBatch]]:
        """Return those batches that are still ours, with their content."""
        batches = []
        taken = [(due.name, due.token) for due in dues]
        try:
            dues = [due for due in dues if not self._lies_here(due, executor)]
            answers = yield Send([operations.resume(d.partition, d.name, d.token) for d in dues])
            for due, answer in zip(dues, answers, strict=True):
                if isinstance(answer, Exception) or answer is REBORN:
                    at = self._clock() + 1.0
                    self._enter(at, due.partition, due.name, due.token, due.local, due.failed)
                elif isinstance(answer, list) and answer[-1] is not False:
                    batch = RunningBatch(
                        due.partition,
                        due.name,
                        Run(*answer),
                        local=due.local,
                        errors=errors,
                        background=True,
                    )
                    executor.busy[batch.key] = batch
                    batches.append(batch)
        finally:
            self._resuming.difference_update(taken)
        return batches

    def _lies_here(self, due: Due, executor: Executor) -> bool:
        """Return whether another flow has the batch, or may have: then it is not resumed now.

        After a rebirth the former self's batches are taken over. The answer that started one of
        them may lie in a flow that still waits for its other answers, and will execute it.
        """
        if (due.name, due.token) in self.busy:
            return True
        if due.name not in executor.expected:
            return False
        at = self._clock() + AGAIN
        self._enter(at, due.partition, due.name, due.token, due.local, due.failed)
        return True

    # The worker

    def detach(self, run: Any) -> None:
        """Go on with a flow whose caller has gone."""
        self.detached[run] = object()
        self.look()
        self.wake()

    def settling(self) -> Flow[None]:
        """Wait, for a moment, until flows whose callers have gone have taken in their answers."""
        give_up = self._clock() + SETTLING
        while self._clock() < give_up and any(map(self.is_ready, list(self.detached))):
            yield Sleep(LOOK)

    def is_answered(self, run: Any) -> None:
        """Go on with a flow whose caller has gone, now that it has its answers."""
        if run in self.detached:
            self.wake()

    def work(self) -> Flow[None]:
        """Do in the background what is to be done, until the process stops."""
        while not self.stopping:
            try:
                yield from self.catch_up()
                yield from self.retry(self._clock())
            except Exception as error:  # noqa: BLE001 - whatever it is, the rest is to be done
                log.warning("unfinished work goes on later: %s", error)
            pause = AGAIN if self.has_work else IDLE
            pause = min(pause, max(0.0, self._next_due() - self._clock()))
            if self.signal is not None and not self.stopping:
                yield Wait(self.signal, pause)

    def catch_up(self) -> Flow[None]:
        """Send what was not answered, go on with flows that have their answers, store and end."""
        me = object()
        self._catching_up.add(me)
        try:
            yield from self._catch_up()
        finally:
            self._catching_up.discard(me)

    def _catch_up(self) -> Flow[None]:
        yield FLUSH
        for run in [run for run in list(self.detached) if self.is_ready(run)]:
            self._continue(run)
        if self.unended:
            unended, self.unended = self.unended, []
            outcome = yield Branch(self.end(_one_each(unended)))
            for result in outcome.value or ():
                for error in result.errors:
                    # It may be refused for long, and is tried again all the time.
                    if self._reports.once(f"end {error}"):
                        log.error("a session could still not be ended: %s", error)
                        self._reports.notify(error)
        if self.unstored:
            unstored, self.unstored = self.unstored, []
            yield Branch(self.store(unstored))
        self.look()

    def _continue(self, run: Any) -> None:
        """Go on with a flow, unless another thread does: it would execute a batch twice."""
        me, entered = object(), self.detached.get(run)
        try:
            if self._continued.setdefault(run, me) is not me:
                return
            try:
                self.resume(run)
            except PhononError as error:
                log.warning("a call that went on in the background failed: %s", error)
            except Exception as error:  # noqa: BLE001 - nobody is there to raise it to
                self._reports.notify(error)
            # Unless it was entered anew. An interrupt on the way here leaves it to the next one.
            if self.detached.get(run) is entered:
                self.detached.pop(run, None)
        finally:
            if self._continued.get(run) is me:
                del self._continued[run]


def _groups(
    items: Sequence[T], resources: Sequence[str], place: Callable[[str], tuple[int, bytes]]
) -> Iterator[list[tuple[T, str, int, bytes]]]:
    """Return items with their resources and places, those of a partition together, in groups."""
    partitions: dict[int, list[tuple[T, str, int, bytes]]] = {}
    for item, resource in zip(items, resources, strict=True):
        partition, name = place(resource)
        known = partitions.get(partition)
        if known is None:
            known = partitions[partition] = []
        known.append((item, resource, partition, name))
    group: list[tuple[T, str, int, bytes]] = []
    for some in partitions.values():
        group += some
        if len(group) >= GROUP:
            yield group
            group = []
    yield group


def _while_sending(making: Iterator[None], count: int) -> Iterator[None] | None:
    """Return what makes so many operations; None if they are few, and made now."""
    if count >= 2 * GROUP:
        return making
    deque(making, 0)
    return None


def _one_each(endings: Sequence[Ending]) -> list[Ending]:
    """Return one ending for each update and resource."""
    return list({(ending.resource, id(ending.parcel)): ending for ending in endings}.values())
