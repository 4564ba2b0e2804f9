"""The outbox: all work of this process that is unfinished, with one bound on it.

Unfinished are updates that could not be stored, sessions that could not be ended, batches that
failed and are to be tried again, batches that were taken over, and flows whose callers have gone.
One background worker handles all of it, in this order: flows under way, unsent data, due batches.
"""

import functools
import heapq
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from phonon._core.compaction import LongSession
from phonon._core.executor import Executor, RunningBatch, Workload, resume
from phonon._core.flows import EXECUTING, FLUSH, REBORN, Branch, Flow, Send, Signal, Sleep, Wait
from phonon._core.identity import Identity
from phonon._core.members import ABSENT, Members, PendingJoin, modifications_of
from phonon._core.parcels import (
    Ending,
    Group,
    Parcel,
    SessionResult,
    groups,
    one_each,
    pieces,
    while_sending,
)
from phonon._core.reports import Reports
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Run
from phonon._protocol.operations import Operation
from phonon.errors import BacklogFullError, ConnectionLostError, PhononError

log = logging.getLogger("phonon")

#: The reaction of a full outbox to a new update.
Overflow = Literal["block", "raise"]
#: Sessions ended, or batches executed, together: a bound on what is held in memory.
CHUNK = 1000
#: Seconds after which the worker looks without a signal.
IDLE = 60.0
#: Seconds between two attempts to send unanswered calls.
AGAIN = 0.25
#: Seconds for which a call waits until earlier flows have taken in their answers.
SETTLING = 0.5
LOOK = 0.005

_HELD, _RUN, _STORED = int(Reply.HELD), int(Reply.RUN), int(Reply.STORED)


class _Appends(NamedTuple):
    """Partials that travel as one operation.

    Attributes:
        parcels: The updates that they come from.
        partials: The partials.
        entries: The return value of `Members.enter` for each.
    """

    parcels: Sequence[Any]
    partials: Sequence[bytes]
    entries: Sequence[PendingJoin | None]


class _Leaves(NamedTuple):
    """Leaves that travel as one operation, field by field.

    Attributes:
        operation: The operation.
        pairs: Each ending with its result.
        partials: The last data of each, or b"".
        kept: The same, undecoded, where the update has kept it.
        held: The return value of `Members.leaving` for each.
    """

    operation: Operation
    pairs: Sequence[tuple[Ending, SessionResult]]
    partials: Sequence[bytes]
    kept: Sequence[Any]
    held: Sequence[Any]


class DueBatch(NamedTuple):
    """A batch of ours that is to be executed.

    Attributes:
        at: When it is due, by the clock.
        order: The place among those that are due at the same time.
        partition: Its partition.
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
        identity: The identity of this process.
        members: The memberships of the process.
        reports: Told about errors in the background.
        most: The most unfinished work.
        overflow: Whether a new update waits or raises when the outbox is full.
        changed: The condition on which callers wait for room.

    Attributes:
        full: Whether new updates are kept out, as of the last look.
        unsent: Updates with data that could not be stored.
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
        self.excess: Callable[[], int] = lambda: 0
        self.start_worker: Callable[[], None] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Start empty: at first, and in a forked child."""
        self.full = False
        self.unsent: list[Any] = []
        self.unended: list[Ending] = []
        self.detached: dict[Any, object] = {}
        self._continued: dict[Any, object] = {}
        self._catching_up: set[object] = set()
        self._due: dict[tuple[bytes, int], DueBatch] = {}
        self._heap: list[DueBatch] = []
        # Removed from the due batches and not executed yet: the answer to the resume may be under
        # way.
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
        undone = failed + self._retrying + len(self.unsent) + len(self.unended) + len(self.detached)
        return undone + self.excess()

    @property
    def is_unfinished(self) -> bool:
        """Return whether an entry is still to be stored or ended, or is being worked on.

        User code that runs as part of that work must not wait for it.
        """
        if EXECUTING.get():
            return bool(
                self.unsent or self.unended or self.detached.keys() - self._continued.keys()
            )
        return bool(self.unsent or self.unended or self.detached or self._catching_up)

    @property
    def has_work(self) -> bool:
        """Return whether anything is unfinished, apart from batches that are not due."""
        return bool(self.unsent or self.unended or self.detached) or any(
            lane.has_work for lane in self._identity.lanes
        )

    def update_room(self) -> None:
        """Update `full`, after the amount of unfinished work has changed."""
        full = self.size >= self._most
        if full or self.full:
            with self._room:
                self.full = full
                if not full:
                    self._room.notify_all()

    def open(self) -> None:
        """Admit every update from now on: the process has stopped."""
        with self._room:
            self.full = False
            self._room.notify_all()

    def wait_for_room(self, timeout: float) -> None:
        """Wait until there is room, in a thread.

        Raises:
            BacklogFullError: There is no room, and the policy is "raise" or the time is up.
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
        """Store the unsent data of updates, and join resources, in one exchange.

        Args:
            parcels: The updates; several of one resource are stored one after the other.
            joins: Resources to become a member of.

        Returns:
            The errors. Data that was not stored is back in its update.
        """
        members = self._members
        errors: list[BaseException] = []
        sent: list[Operation] = []
        stored: list[_Appends] = []
        joined = [resource for resource in joins if not members.is_sure(resource)]
        joining: list[tuple[Sequence[str], Sequence[PendingJoin | None]]] = []

        def make() -> Iterator[int]:
            for group in groups(parcels, members.places([p.resource_id for p in parcels])):
                self._append(group, sent, stored, errors)
                yield len(group.names)
            for partition, some, names in groups(joined, map(members.place, joined)):
                joining.append((some, members.entering(some)))
                sent.append(operations.join_many(partition, names))
                yield len(names)

        making = while_sending(make(), len(parcels) + len(joined))
        if not (sent or making):
            return errors
        answers = yield Send(sent, more=making)
        many: list[LongSession] = []
        size = count = 0
        for appends, operation, answer in zip(stored, sent, answers, strict=False):
            told = operation.each(answer)
            failed = 0
            if told.count(_STORED) < len(told):
                failed = self._not_all_stored(appends, operation, told, errors, many)
            elif any(appends.entries):
                self._entered([p.resource_id for p in appends.parcels], appends.entries, told)
            size += sum(map(len, appends.partials))
            count += len(told) - failed
        behind = len(stored)
        for (resources, entries), operation, answer in zip(
            joining, sent[behind:], answers[behind:], strict=True
        ):
            told = operation.each(answer)
            self._entered(resources, entries, told)
            errors += [error for error in told if isinstance(error, Exception)]
        yield from members.settle_doubts()
        if errors:
            self.update_room()
        self._identity.measures.add_stored(count, size)
        yield from self._compact(many)
        return errors

    def _append(
        self,
        group: Group,
        sent: list[Operation],
        stored: list[_Appends],
        errors: list[BaseException],
    ) -> None:
        """Take the unsent data of updates, and make the operation that stores it."""
        held, entering = self._members.held, self._members.entering
        taken: list[Any] = []
        names: list[bytes] = []
        partials: list[bytes] = []
        try:
            for parcel, name in zip(group.items, group.names, strict=True):
                try:
                    partial = parcel.take()
                except Exception as error:  # noqa: BLE001 - data that cannot be stored stays in its update
                    errors.append(error)
                    continue
                if partial is not None:
                    taken.append(parcel)
                    partials.append(partial)
                    names.append(name)
        except BaseException:
            for parcel, partial in zip(taken, partials, strict=False):
                parcel.put_back(partial)
            raise
        for piece in pieces(partials) if taken else ():
            resources = [parcel.resource_id for parcel in taken[piece]]
            entries = entering(resources)
            for parcel, resource in zip(taken[piece], resources, strict=True):
                # Another thread may have left the resource in between.
                if held.get(resource, ABSENT) is None:
                    held[resource] = weakref.ref(parcel)
            stored.append(_Appends(taken[piece], partials[piece], entries))
            sent.append(operations.append_many(group.partition, names[piece], partials[piece]))

    def _entered(
        self, resources: Sequence[str], entries: Sequence[PendingJoin | None], told: Sequence[Any]
    ) -> None:
        entered = self._members.entered
        for resource, entry, answer in zip(resources, entries, told, strict=True):
            if entry is not None:
                entered(resource, entry, failed=isinstance(answer, Exception))

    def _not_all_stored(
        self,
        appends: _Appends,
        operation: Operation,
        told: Sequence[Any],
        errors: list[BaseException],
        many: list[LongSession],
    ) -> int:
        """Handle answers of which some are errors or ask to merge. Return the number of errors."""
        failed = 0
        resources = [parcel.resource_id for parcel in appends.parcels]
        self._entered(resources, appends.entries, told)
        for words, parcel, partial, answer in zip(
            operation.changes(), appends.parcels, appends.partials, told, strict=True
        ):
            if isinstance(answer, Exception):
                if not self._is_unknown(answer):
                    parcel.put_back(partial)
                    self.unsent.append(parcel)
                failed += 1
                errors += () if answer in errors else (answer,)
            elif answer != _STORED:
                many.append(LongSession(operation.partition, words[1], answer))
        return failed

    def _compact(self, sessions: Sequence[LongSession]) -> Flow[None]:
        """Merge some partials of open sessions. The data is stored, so an error fails no call."""
        if sessions and self.executor is not None:
            yield Branch(self.executor.compact(sessions))

    def end(self, endings: Sequence[Ending]) -> Flow[list[SessionResult]]:
        """End sessions: store the last data, leave, and execute the batches that become ours.

        Many are ended in pieces; the leaves of the next piece go with the completions of this one.

        Args:
            endings: Of different resources.

        Returns:
            The result of each. Data that could not be sent is back in its update.
        """
        executor = self.executor
        assert executor is not None  # noqa: S101 - for the type checker
        results = [SessionResult() for _ in endings]
        pairs = list(zip(endings, results, strict=True))
        many: list[LongSession] = []
        place = self._members.place
        with executor.new_workload() as workload:
            for first in range(0, len(pairs), CHUNK):
                about: list[_Leaves] = []
                some = pairs[first : first + CHUNK]
                grouped = groups(some, [place(ending.resource) for ending, _ in some])
                workload.expected = {name for group in grouped for name in group.names}
                # The leaves are made when they are sent, not before batches are executed: a join in
                # between would be held here, and undone on the server.
                leaves = functools.partial(self._leaves, grouped, about)
                answers = yield from executor.execute(workload, leaves)
                for group, answer in zip(about, answers, strict=False):
                    self._left(group, answer, workload, many)
                workload.expected = ()
            yield from executor.execute(workload)
        yield from self._compact(many)
        self.update_room()
        return results

    def leave(self, ending: Ending) -> Flow[SessionResult]:
        """Do what `end` does, for one resource of which this process has no data.

        `Reference.dereference` runs this flow.
        """
        executor = self.executor
        assert executor is not None  # noqa: S101 - for the type checker
        result = SessionResult()
        many: list[LongSession] = []
        about: list[_Leaves] = []
        sent: list[Operation] = []
        partition, name = self._members.place(ending.resource)
        with executor.new_workload() as workload:
            workload.expected = (name,)
            self._leave(Group(partition, ((ending, result),), (name,)), about, sent)
            (answer,) = yield Send(sent)
            self._left(about[0], answer, workload, many)
            workload.expected = ()
            done = not workload.batches
            yield from () if done else executor.execute(workload)
        yield from self._compact(many)
        if not done or result.errors or self.full:
            self.update_room()
        return result

    def _leaves(
        self, grouped: Sequence[Group], about: list[_Leaves], sent: list[Operation]
    ) -> Iterator[object] | None:
        def make() -> Iterator[int]:
            for group in grouped:
                self._leave(group, about, sent)
                yield len(group.names)

        return while_sending(make(), sum([len(group.names) for group in grouped]))

    def _leave(self, group: Group, about: list[_Leaves], sent: list[Operation]) -> None:
        """Take the last data of sessions, and make the operation that ends them."""
        leaving = self._members.leaving
        pairs: list[tuple[Ending, SessionResult]] = []
        names: list[bytes] = []
        partials: list[bytes] = []
        kept: list[Any] = []
        held: list[Any] = []
        try:
            for pair, name in zip(group.items, group.names, strict=True):
                ending = pair[0]
                data = content = None
                if ending.parcel is not None:
                    try:
                        data, content = ending.parcel.take_last()
                    except Exception as error:  # noqa: BLE001 - data that cannot be stored stays in its update
                        pair[1].failed(error)
                        continue
                pairs.append(pair)
                partials.append(data or b"")
                kept.append(content)
                names.append(name)
                held.append(leaving(ending.resource))
        except BaseException:
            for (ending, _), data, was_held in zip(pairs, partials, held, strict=False):
                self._not_left(ending, data, was_held)
            raise
        for piece in pieces(partials) if pairs else ():
            some = pairs[piece]
            flags = [
                operations.FORCE * ending.force + operations.MODIFICATIONS * ending.modifications
                for ending, _ in some
            ]
            operation = operations.leave_many(group.partition, names[piece], flags, partials[piece])
            places = zip(names[piece], held[piece], strict=True)
            operation.held = [name for name, was_held in places if was_held is not ABSENT]
            about.append(_Leaves(operation, some, partials[piece], kept[piece], held[piece]))
            sent.append(operation)

    def _left(
        self, leaves: _Leaves, answer: Any, workload: Workload, many: list[LongSession]
    ) -> None:
        """Handle the answers to leaves: put refused data back, and take over the batches."""
        operation = leaves.operation
        partition, names = operation.partition, operation.words[1::4]
        measures = self._identity.measures
        ended = opened = stored = size = 0
        for (ending, result), name, data, kept, was_held, told in zip(
            leaves.pairs, names, leaves.partials, leaves.kept, leaves.held, operation.each(answer),
            strict=True,
        ):  # fmt: skip
            if isinstance(told, Exception):
                if not self._is_unknown(told):
                    self._not_left(ending, data, was_held)
                result.failed(told)
                continue
            ended += 1
            opened += was_held is ABSENT
            stored += bool(data)
            size += len(data)
            code = told[0]
            result.sent = True
            result.left = told[1]
            result.last = code != _HELD and bool(told[2])
            if code == _RUN:
                run = Run(*told)
                if run.modifications is not None:
                    result.modifications = modifications_of(run.modifications)
                if run.content is not False:
                    # True: the batch is just the partial that this leave sent.
                    alone = run.content is True
                    workload.add(
                        RunningBatch(
                            partition,
                            name,
                            run,
                            [data] if alone else run.content,
                            resource=ending.resource,
                            local=ending.parcel,
                            result=result,
                            kept=kept if alone else None,
                        )
                    )
                continue
            if measures.on_left is not None:
                measures.on_left(ending.resource)
            if code == _HELD:
                if told[3]:
                    many.append(LongSession(partition, name, told[3]))
            elif len(told) > 3:  # noqa: PLR2004 - the session's modifications
                result.modifications = modifications_of(told[3] or None)
                if len(told) > 4:  # noqa: PLR2004 - it is time to merge some
                    many.append(LongSession(partition, name, told[4]))
        measures.end(ended, opened=opened)
        measures.add_stored(stored, size)

    def _is_unknown(self, answer: Exception) -> bool:
        """Return whether it is too late to find out if the server has taken the data.

        The caller gets an error. The data is not sent again, because it could be merged twice. It
        takes a week to come to this, see `rebirth`.
        """
        if not isinstance(answer, ConnectionLostError):
            return False
        if self._reports.once(f"unknown {answer}"):
            self._reports.report_error(answer)
        return True

    def _not_left(self, ending: Ending, data: bytes, was_held: Any) -> None:
        """Handle a refusal: the data is local again, and the session goes on."""
        if was_held is not ABSENT:
            self._members.held.setdefault(ending.resource, was_held)
        if data:
            ending.parcel.put_back(data)
            self.unended.append(ending)

    # Due work

    def schedule(self, batch: RunningBatch, seconds: float) -> None:
        """Schedule the retry of a batch that has failed."""
        self._enter(
            self._clock() + seconds,
            batch.partition,
            batch.name,
            batch.run.token,
            batch.local,
            True,  # noqa: FBT003 - in field order
        )
        self.update_room()

    def take_over(self, partition: int, name: bytes, token: int, seconds: float) -> None:
        """Schedule a batch that was taken over, or that its executor has forgotten."""
        if self._is_busy(name, token) or (name, token) in self._resuming:
            return
        known = self._due.get((name, token))
        local = known.local if known else None
        failed = known.failed if known else False
        self._enter(self._clock() + seconds, partition, name, token, local, failed)

    def knows(self, name: bytes, token: int) -> bool:
        """Return whether a batch is being executed here, or waits for it."""
        key = name, token
        if key in self._due or key in self._resuming or self._is_busy(name, token):
            return True
        return self.executor is not None and self.executor.expects(name)

    @property
    def taken_over(self) -> int:
        """Return how many batches are due, or being executed, in the background."""
        now = self._clock()
        waiting = sum(due.at <= now for due in list(self._due.values()))
        running = 0 if self.executor is None else self.executor.count_background()
        return waiting + len(self._resuming) + running

    def _is_busy(self, name: bytes, token: int) -> bool:
        return self.executor is not None and self.executor.has(name, token)

    def _enter(
        self, at: float, partition: int, name: bytes, token: int, local: Any, failed: bool
    ) -> None:
        due = DueBatch(at, next(self._order), partition, name, token, local, failed)
        self._due[name, token] = due
        heapq.heappush(self._heap, due)
        self.wake()

    def wake(self) -> None:
        """Wake the worker, or start it: there is work."""
        if not self.stopping:
            self.start_worker()
        if self.signal is not None:
            self.signal.set()

    def _take_due(self, until: float, most: int, order: int, failed_before: int) -> list[DueBatch]:
        """Remove and return batches that are due, of different resources, entered before then."""
        taken: dict[bytes, DueBatch] = {}
        later: list[DueBatch] = []
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
            # First: the batch counts as unfinished until the outcome of this attempt is known, and
            # another thread may look in between.
            self._retrying += due.failed
            del self._due[due.name, due.token]
            taken[due.name] = due
        for due in later:
            heapq.heappush(self._heap, due)
        return list(taken.values())

    def _next_due(self) -> float:
        return self._heap[0].at if self._heap else math.inf

    def mark(self) -> int:
        """Return a number by which `retry` tells earlier failures from later ones."""
        return next(self._order)

    def retry(self, until: float, failed_before: int | None = None) -> Flow[list[BaseException]]:
        """Execute batches that are due by then, a piece at a time, each once.

        Args:
            until: By when they are due, by the clock.
            failed_before: Leave those that have failed since this `mark`.

        Returns:
            The errors.
        """
        errors: list[BaseException] = []
        # A batch that fails in this pass is not retried in it, or it would use up its attempts at
        # once.
        order = self.mark()
        failed_before = order if failed_before is None else failed_before
        while dues := self._take_due(until, CHUNK, order, failed_before):
            outcome = yield Branch(self._resume(dues))
            errors += [outcome.error] if outcome.error is not None else outcome.value
        return errors

    def _resume(self, dues: Sequence[DueBatch]) -> Flow[Sequence[BaseException]]:
        executor = self.executor
        assert executor is not None  # noqa: S101 - for the type checker
        result = SessionResult()
        failed = sum(due.failed for due in dues)
        try:
            with executor.new_workload() as workload:
                yield from self._take_up(dues, executor, workload, result)
                yield from executor.execute(workload)
        finally:
            self._retrying -= failed
        self.update_room()
        return result.errors

    def _take_up(
        self,
        dues: Sequence[DueBatch],
        executor: Executor,
        workload: Workload,
        result: SessionResult,
    ) -> Flow[None]:
        """Resume the batches that are still ours, and fetch their content."""
        taken = [(due.name, due.token) for due in dues]
        try:
            dues = [due for due in dues if not self._lies_here(due, executor)]
            for due, told in (yield from resume(dues, [due.token for due in dues])):
                if isinstance(told, Exception) or told is REBORN:
                    at = self._clock() + 1.0
                    self._enter(at, due.partition, due.name, due.token, due.local, due.failed)
                elif isinstance(told, list) and told[-1] is not False:
                    run = Run(*told)
                    workload.add(
                        RunningBatch(
                            due.partition,
                            due.name,
                            run,
                            run.content,
                            local=due.local,
                            result=result,
                            background=True,
                        )
                    )
        finally:
            self._resuming.difference_update(taken)

    def _lies_here(self, due: DueBatch, executor: Executor) -> bool:
        """Return whether another flow has the batch, or may have: then it is not resumed now.

        After a rebirth the former self's batches are taken over. The answer that started one of
        them may lie in a flow that still waits for its other answers, and will execute it.
        """
        if executor.has(due.name, due.token):
            return True
        if not executor.expects(due.name):
            return False
        at = self._clock() + AGAIN
        self._enter(at, due.partition, due.name, due.token, due.local, due.failed)
        return True

    # The worker

    def detach(self, run: Any) -> None:
        """Go on with a flow whose caller has gone."""
        self.detached[run] = object()
        self.update_room()
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
        """Work off the unfinished work in the background, until the process stops."""
        while not self.stopping:
            try:
                yield from self.catch_up()
                yield from self.retry(self._clock())
            except Exception as error:  # noqa: BLE001 - one error must not stop the remaining work
                log.warning("unfinished work goes on later: %s", error)
            pause = AGAIN if self.has_work else IDLE
            pause = min(pause, max(0.0, self._next_due() - self._clock()))
            if self.signal is not None and not self.stopping:
                yield Wait(self.signal, pause)

    def catch_up(self) -> Flow[None]:
        """Resend unanswered calls, continue flows that have their answers, store and end."""
        marker = object()
        self._catching_up.add(marker)
        try:
            yield from self._catch_up()
        finally:
            self._catching_up.discard(marker)

    def _catch_up(self) -> Flow[None]:
        yield FLUSH
        for run in [run for run in list(self.detached) if self.is_ready(run)]:
            self._continue(run)
        if self.unended:
            unended, self.unended = self.unended, []
            outcome = yield Branch(self.end(one_each(unended)))
            for result in outcome.value or ():
                for error in result.errors:
                    # The server may refuse for a long time, and each retry would log the same
                    # error.
                    if self._reports.once(f"end {error}"):
                        log.error("a session could still not be ended: %s", error)
                        self._reports.notify(error)
        if self.unsent:
            unsent, self.unsent = self.unsent, []
            yield Branch(self.store(unsent))
        self.update_room()

    def _continue(self, run: Any) -> None:
        """Go on with a flow, unless another thread does: it would execute a batch twice."""
        marker, entered = object(), self.detached.get(run)
        try:
            if self._continued.setdefault(run, marker) is not marker:
                return
            try:
                self.resume(run)
            except PhononError as error:
                log.warning("a call that went on in the background failed: %s", error)
            except Exception as error:  # noqa: BLE001 - no caller is left to raise it to
                self._reports.notify(error)
            # Unless the flow was entered again. If an interrupt keeps us from this, the next pass
            # does it.
            if self.detached.get(run) is entered:
                self.detached.pop(run, None)
        finally:
            if self._continued.get(run) is marker:
                del self._continued[run]
