"""Executing batches: fetch, merge, run the user's code, report to the server; in lists."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, Self

from phonon._core import classes
from phonon._core.compaction import LongSession, compact
from phonon._core.flows import (
    REBORN,
    Execute,
    Flow,
    Job,
    Outcome,
    Send,
    T,
    call,
    never_run,
    read,
)
from phonon._core.identity import Identity
from phonon._core.parcels import SessionResult, groups
from phonon._core.reports import Event, Reports
from phonon._core.retry import RetryPolicy
from phonon._core.shown import shown
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Run
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import decode
from phonon.errors import BatchLostError, PhononError, UndecodableError, UnknownClassError

log = logging.getLogger("phonon")

#: A partition's token times this, plus the index of a class in its batch, is the token users see.
TOKENS = 1024
#: Records that ``execute_many`` is given at once, at the most.
MOST_TOGETHER = 250
#: Partials fetched at a time, where a batch has more than came with it.
PIECE = 1000
#: Bytes of a batch's partials that are held in memory before they are merged.
MOST_HELD = 4 * 1024 * 1024
#: Characters of an error's text that are kept with a batch.
ERROR_LENGTH = 4000

_RUN, _AGAIN, _LOST = int(Reply.RUN), int(Reply.AGAIN), int(Reply.LOST)
_RETRY = int(Reply.RETRY)


class Record(Protocol):
    """The part of a batch that belongs to one class."""

    #: The class, if its records are executed together; else None.
    group_class: Any

    def begin(self, token: int) -> Any:
        """Return the instance that executes, with its token set until `finish`."""

    def finish(self) -> None:
        """Note that the execution has ended."""


class RecordReader(Protocol):
    """Turns partials into records."""

    def records(self, resource: str, partials: Sequence[bytes], local: Any) -> Sequence[Record]:
        """Merge the partials of a batch, class by class; see `UpdateCodec.records`."""

    def kept(self, resource: str, partial: bytes, local: Any, content: Any) -> Sequence[Record]:
        """Return the records of the only partial of a batch, whose content ``local`` has kept."""

    def merge(self, resource: str, partials: Sequence[bytes]) -> list[bytes]:
        """Merge partials into fewer."""

    def check(self, resource: str, partial: bytes, where: str) -> None:
        """Check that a partial can be decoded, and executed, here.

        Raises:
            UnknownClassError: Its class is not known here.
            UndecodableError: It cannot be read.
        """


class RunningBatch:
    """A batch of this process on its way through execution.

    Attributes:
        resource: The batch's resource.
        name: The server's name of the resource.
        partition: Its partition.
        run: The server's answer; its content is in ``partials``.
        local: The update whose session ended here, if there is one.
        result: Collects the errors of the session that ended with this batch.
        background: Whether no caller waits for these errors.
        kept: The content of its only partial, if ``local`` has kept it, so that nothing is decoded.
        partials: The part of the batch's content that is here and not merged yet.
        records: The merged records, one a class; ``at`` is the index of the next one to run.
        job: The job that runs that record.
        error: The cause of its failure.
        pause: Seconds until it is tried again.
    """

    __slots__ = (
        "__weakref__",
        "at",
        "background",
        "error",
        "job",
        "kept",
        "local",
        "name",
        "partials",
        "partition",
        "pause",
        "records",
        "resource",
        "result",
        "run",
    )

    def __init__(
        self,
        partition: int,
        name: bytes,
        run: Run,
        partials: list[bytes],
        *,
        resource: str = "",
        local: Any = None,
        result: SessionResult | None = None,
        background: bool = False,
        kept: Any = None,
    ) -> None:
        self.partition = partition
        self.name = name
        self.kept = kept
        self.resource = resource or decode(name)
        self.run = run
        self.local = local
        self.result = result or SessionResult()
        self.background = background
        self.partials = partials
        self.records: Sequence[Record] = ()
        self.at = 0
        self.job: Job | None = None
        self.error: BaseException | None = None
        self.pause = 0.0

    @property
    def token(self) -> int:
        """The token as users see it."""
        return self.run.token * TOKENS


class Workload:
    """The batches that one flow executes, and those that an answer may bring it.

    An executor refers to its workloads weakly, because a signal handler's exception may end the
    flow at any point. Then the batches are not busy any more, and the heartbeat finds that this
    process has forgotten them.

    Attributes:
        batches: By resource and token. No other flow begins an attempt at them.
        expected: The resources of operations under way whose answers may bring a batch. An answer
            may have arrived already while the flow waits for others of the same `Send`.
        concluding: The resources of batches that are being reported. The answer may bring the next
            batch of the resource.
        owner: The id of this process under which the batches are known to be ours, or an older one.
    """

    __slots__ = ("__weakref__", "batches", "concluding", "expected", "owner")

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.batches: dict[tuple[bytes, int], RunningBatch] = {}
        self.expected: Collection[bytes] = ()
        self.concluding: Collection[bytes] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # An exception that the user keeps also keeps the flow's frame, and with it this workload.
        self.batches, self.expected, self.concluding = {}, (), ()

    def add(self, batch: RunningBatch) -> None:
        """Add a batch."""
        self.batches[batch.name, batch.run.token] = batch

    def drop(self, batch: RunningBatch) -> None:
        """Remove a batch."""
        self.batches.pop((batch.name, batch.run.token), None)


class Executor:
    """Executes batches.

    Args:
        identity: The identity of this process.
        codec: Turns partials into records.
        policy: When to retry and when to park a batch that failed.
        reports: Told about failures.
        schedule: Called with a batch that failed, and the seconds after which it is tried again.
    """

    def __init__(
        self,
        identity: Identity,
        codec: RecordReader,
        policy: RetryPolicy,
        reports: Reports,
        schedule: Callable[[RunningBatch, float], None],
    ) -> None:
        self._identity = identity
        self._codec = codec
        self._policy = policy
        self._reports = reports
        self._schedule = schedule
        self.begin()

    def begin(self) -> None:
        """Start without batches: at first, and in a forked child."""
        self._workloads: weakref.WeakValueDictionary[int, Workload] = weakref.WeakValueDictionary()

    def new_workload(self) -> Workload:
        """Return an empty workload for a flow."""
        workload = Workload(self._identity.id)
        self._workloads[id(workload)] = workload
        return workload

    @property
    def workloads(self) -> list[Workload]:
        """Return the workloads of all flows."""
        # Making the list is one step, which no other thread can interrupt.
        found = [reference() for reference in self._workloads.valuerefs()]
        return [workload for workload in found if workload is not None]

    def has(self, name: bytes, token: int) -> bool:
        """Return whether a flow has a batch in its workload."""
        return any((name, token) in workload.batches for workload in self.workloads)

    def expects(self, name: bytes) -> bool:
        """Return whether an answer that is under way may bring a batch of a resource."""
        return any(name in work.expected or name in work.concluding for work in self.workloads)

    def count_background(self) -> int:
        """Return how many batches are executed without a caller that waits for them."""
        return sum(b.background for work in self.workloads for b in list(work.batches.values()))

    def execute(
        self,
        workload: Workload,
        more: Callable[[list[Operation]], Iterator[object] | None] | None = None,
    ) -> Flow[list[Any]]:
        """Execute batches of ours, and the batches that follow them.

        A batch stays on the server until ``complete`` reports it as done. If the process dies
        before that, a survivor executes the batch under the same token.

        Args:
            workload: The batches.
            more: Adds operations to a list, to be sent together with the first completions, or
                returns what adds them while it is sent.

        Returns:
            The answers to those operations.
        """
        answers: list[Any] = []
        while workload.batches:
            waiting = list(workload.batches.values())
            yield from self._prepare([b for b in waiting if not b.records and b.error is None])
            while workload.owner != self._identity.id:
                yield from self._confirm(workload)
            yield from self._run_some(waiting)
            sent, reported = self._conclusions([b for b in waiting if b.job is None])
            own, making = len(sent), None
            if more is not None:
                making, more = more(sent), None
            workload.concluding = {batch.name for some in reported for batch in some}
            got = (yield Send(sent, more=making)) if sent or making else []
            answers += got[own:]
            for operation, some, answer in zip(sent, reported, got, strict=False):
                for batch, told in zip(some, operation.each(answer), strict=True):
                    # First: its retry may be due before this flow is done, and a batch in a
                    # workload is not retried.
                    workload.drop(batch)
                    following = self._concluded(batch, told)
                    if following is not None:
                        workload.add(following)
            for batch in waiting:
                if _is_unreported(batch):
                    workload.drop(batch)
                    if isinstance(batch.error, _NotFetchedError):
                        self._failed(batch, batch.error.cause, self._policy.pause(1))
            workload.concluding = ()
        if more is not None:
            sent = []
            making = more(sent)
            if sent or making:
                answers = yield Send(sent, more=making)
        return answers

    # Before

    def _prepare(self, batches: Iterable[RunningBatch]) -> Flow[None]:
        """Fetch the missing partials, and merge."""
        sizes: Counter[int] = Counter()
        for batch in batches:
            if batch.run.crashes > self._policy.crashes:
                batch.error = PhononError(
                    f"{batch.run.crashes} processes have died while they executed it"
                )
                continue
            if len(batch.partials) < batch.run.size and not (yield from self._fetch(batch)):
                batch.error = _TAKEN_OVER
                continue
            sizes[batch.run.size] += 1
            try:
                try:
                    batch.records = self._records_of(batch)
                except UndecodableError:
                    # Read it once more, as it would be parked at once: an exception that a signal
                    # handler raises during decoding looks the same, and does not come twice.
                    batch.records = self._records_of(batch)
            except BaseException as error:  # noqa: BLE001 - the user's merge: the batch has failed
                batch.error = error
            batch.partials = []
        for size, times in sizes.items():
            self._identity.measures.observe("batch_partials", size, times)

    def _records_of(self, batch: RunningBatch) -> Sequence[Record]:
        if batch.kept is None:
            return self._codec.records(batch.resource, batch.partials, batch.local)
        return self._codec.kept(batch.resource, batch.partials[0], batch.local, batch.kept)

    def _fetch(self, batch: RunningBatch) -> Flow[bool]:
        """Fetch the partials that did not come with the batch, merging them as they come.

        Returns:
            False if another process has the batch. Then this process has only a part of it. If it
            executed that part under the batch's token, the new owner's record would not count.
        """
        at = len(batch.partials)
        enough = MOST_HELD
        pid = self._identity.id
        while at < batch.run.size:
            words = (pid, batch.name, b"%d" % batch.run.token, b"%d" % at, b"%d" % (at + PIECE - 1))
            try:
                piece = yield from read(
                    self._identity.in_partition(batch.partition, "fetch", *words)
                )
            except PhononError as error:
                batch.error = _NotFetchedError(error)
                return True
            if not piece:
                return False
            at += len(piece)
            batch.partials.extend(piece)
            if sum(map(len, batch.partials)) > enough:
                outcome = yield from call(lambda: self._codec.merge(batch.resource, batch.partials))
                # An error of the merge comes again when the batch is executed, and is handled
                # there.
                if outcome.error is None:
                    batch.partials[:] = outcome.value
                # Partials that do not merge must not be tried again with each piece.
                enough = max(MOST_HELD, 2 * sum(map(len, batch.partials)))
        return True

    def _confirm(self, workload: Workload) -> Flow[None]:
        """Ask for the batches of a former self: if a survivor has them, it executes them."""
        owner = self._identity.id
        batches = [b for b in workload.batches.values() if not _is_unreported(b)]
        for batch, answer in (yield from resume(batches, [b.run.token for b in batches])):
            if batch.job is not None and batch.job.begun:
                continue  # the answer to its report tells the same
            if isinstance(answer, PhononError):
                batch.error = _NotFetchedError(answer)
            elif answer == _LOST:
                if batch.at:  # a part of it was executed here
                    self._lost(batch)
                batch.error = _TAKEN_OVER
            else:
                continue
            if batch.job is not None:
                batch.records[batch.at].finish()
                # No driver runs it any more. Others that it was to execute are executed alone.
                batch.job.outcome = Outcome(error=_TAKEN_OVER)
                batch.job = None
        workload.owner = owner

    # The user's code

    def _run_some(self, batches: Sequence[RunningBatch]) -> Flow[None]:
        """Run the next record of each batch. A batch without a job has no records left."""
        self._begin_jobs(batches)
        jobs: dict[int, Job] = {}
        for batch in batches:
            if batch.job is not None and batch.job.outcome is None:
                jobs[id(batch.job)] = batch.job
        clock = self._identity.clock
        begun = clock()
        if jobs:
            yield Execute(list(jobs.values()))
        ended = [b for b in batches if b.job is not None and b.job.outcome is not None]
        # In the caller's thread the jobs run one after the other: each counts a share of the time.
        seconds = (clock() - begun) / max(1, len(ended))
        counts: Counter[tuple[type, bool]] = Counter()
        for batch in ended:
            assert batch.job is not None  # noqa: S101 - for the type checker
            self._end_job(batch, batch.job, seconds, counts)
        for (cls, failed), times in counts.items():
            name = classes.known_name(cls)
            self._identity.measures.execution(name, seconds, failed=failed, times=times)

    def _begin_jobs(self, batches: Sequence[RunningBatch]) -> None:
        groups: dict[Any, list[tuple[RunningBatch, Any]]] = {}
        for batch in batches:
            if batch.job is not None or batch.error is not None or batch.at >= len(batch.records):
                continue
            record = batch.records[batch.at]
            instance = record.begin(batch.token + batch.at)
            if record.group_class is None:
                batch.job = Job(instance.execute)
            else:
                groups.setdefault(record.group_class, []).append((batch, instance))
        for cls, group in groups.items():
            for first in range(0, len(group), MOST_TOGETHER):
                some = group[first : first + MOST_TOGETHER]
                job = _ManyJob(cls, [instance for _, instance in some])
                for batch, _ in some:
                    batch.job = job

    def _end_job(
        self, batch: RunningBatch, job: Job, seconds: float, counts: Counter[tuple[type, bool]]
    ) -> None:
        record = batch.records[batch.at]
        outcome = job.outcome
        assert outcome is not None  # noqa: S101 - for the type checker
        if isinstance(job, _ManyJob):
            error = job.error_of(batch.records[batch.at])
            if error is _AGAIN_ALONE:
                # Any of the records may be the cause, so each is executed alone: then a bad
                # record does not delay the others.
                instance = record.begin(batch.token + batch.at)
                batch.job = _ManyJob(job.cls, [instance])
                return
        else:
            error = outcome.error
            if error is None and outcome.value is not None:
                error = never_run(outcome.value)
        executed: Any = record  # each of its records has its own outcome
        cls = type(executed.instance)
        record.finish()
        counts[cls, error is not None] += 1
        told = self._identity.measures.on_execution
        if told is not None:
            told(batch.resource, cls, seconds, error)
        batch.job = None
        batch.at += 1
        if error is not None:
            batch.error = error
        elif batch.at < len(batch.records):
            self._begin_jobs((batch,))

    # After

    def _conclusions(
        self, batches: Iterable[RunningBatch]
    ) -> tuple[list[Operation], list[Sequence[RunningBatch]]]:
        """Return the operations that report batches, each with its batches."""
        executed: list[RunningBatch] = []
        sent: list[Operation] = []
        reported: list[Sequence[RunningBatch]] = []
        for batch in batches:
            error = batch.error
            if error is None:
                executed.append(batch)
            elif not _is_unreported(batch):
                sent.append(self._failure(batch, error))
                reported.append((batch,))
        places = [(batch.partition, batch.name) for batch in executed]
        for partition, some, names in groups(executed, places):
            tokens = [batch.run.token for batch in some]
            sent.append(operations.complete_many(partition, names, tokens))
            reported.append(some)
        return sent, reported

    def _failure(self, batch: RunningBatch, error: BaseException) -> Operation:
        """Return the operation that reports a batch that has failed."""
        place = batch.partition, batch.name, batch.run.token
        if isinstance(error, UnknownClassError):
            return operations.hand_off(*place, operations.class_queue(error.class_name))
        attempts = self._policy.attempts
        if isinstance(error, UndecodableError) or batch.run.crashes > self._policy.crashes:
            attempts = 0  # a retry would not make it readable
        batch.pause = self._policy.pause(batch.run.attempts + 1)
        return operations.fail(*place, _text_of(error), int(batch.pause * 1000), attempts)

    def _concluded(self, batch: RunningBatch, answer: Any) -> RunningBatch | None:
        """Handle the answer to a report. Return the resource's next batch, if it came with it."""
        if isinstance(answer, Exception) or answer is REBORN:
            # The report failed, but the batch is still ours: it is reported again.
            error = batch.error or (answer if isinstance(answer, Exception) else None)
            if error is not None:
                self._failed(batch, error, self._policy.pause(1))
            return None
        code = answer[0] if isinstance(answer, list) else answer
        if code == _LOST:
            self._lost(batch)
            return None
        if batch.error is not None:
            retry = batch.pause if code == _RETRY else None
            if isinstance(batch.error, UnknownClassError):
                self._handed_off(batch, batch.error)
            else:
                self._failed(batch, batch.error, retry)
        if code == _AGAIN:
            run = Run(*answer)
            return RunningBatch(
                batch.partition,
                batch.name,
                run,
                run.content or [],
                resource=batch.resource,
                local=batch.local,
                result=batch.result,
                background=batch.background,
            )
        return None

    def _lost(self, batch: RunningBatch) -> None:
        resource, token = batch.resource, batch.token
        if batch.error is not None:
            batch.result.failed(batch.error)
            return
        self._reports.report_error(
            BatchLostError(
                f"batch {token} of {shown(resource)} was executed here, but another process has "
                "taken it over: this one was believed dead; a database that checks the token has "
                "it once",
                resource,
                token,
            )
        )

    def _failed(self, batch: RunningBatch, error: BaseException, retry_in: float | None) -> None:
        self._identity.measures.add("retries" if retry_in is not None else "parked")
        if retry_in is not None:
            self._schedule(batch, retry_in)
            then = f"is tried again in {retry_in:.1f} s"
        else:
            then = "is parked: see Process.parked()"
        text = f"batch {batch.token} of {shown(batch.resource)} failed and {then}"
        error.add_note(f"phonon: {text}; its data is kept")
        name = self._identity.name
        fields = {"resource": batch.resource, "token": batch.token, "process_id": name}
        log.warning("%s: %s: %s", text, type(error).__name__, error, extra=fields)
        if retry_in is None:
            self._reports.emit(Event("parked", text, batch.resource, batch.token, name, error))
        batch.result.failed(error)
        if batch.background:
            self._reports.notify(error)

    def _handed_off(self, batch: RunningBatch, error: UnknownClassError) -> None:
        """Note that a batch was left to others. Log one a class: there may be very many."""
        if self._reports.once(f"class {error.class_name}"):
            is_known = classes.find(error.class_name) is not None
            whom = "an AsyncProcess" if is_known else "a process"
            text = f"batches of {error.class_name} are left to {whom} that has imported it"
            error.add_note(f"phonon: {text}; their data is kept")
            log.warning("%s: %s", text, error)
            self._reports.notify(error)
        if not batch.background:  # a batch that was taken over has no caller to raise to
            batch.result.failed(error)

    def compact(self, sessions: Sequence[LongSession]) -> Flow[int]:
        """Merge some partials of open sessions."""
        merge = self._codec.merge
        return compact(self._identity, sessions, lambda name, some: merge(decode(name), some))


def resume(batches: Sequence[T], tokens: Sequence[int]) -> Flow[list[tuple[T, Any]]]:
    """Take batches of ours up again.

    Args:
        batches: Have a partition and a name.
        tokens: The partition's token of each.

    Returns:
        Each batch with its answer, in another order.
    """
    pairs: list[tuple[Any, int]] = list(zip(batches, tokens, strict=True))
    grouped = groups(pairs, [(batch.partition, batch.name) for batch, _ in pairs])
    sent = [
        operations.resume_many(partition, names, [token for _, token in some])
        for partition, some, names in grouped
    ]
    answers = yield Send(sent)
    return [
        (batch, told)
        for group, operation, answer in zip(grouped, sent, answers, strict=True)
        for (batch, _), told in zip(group.items, operation.each(answer), strict=True)
    ]


class _NotFetchedError(PhononError):
    """The server did not answer with all of a batch, which is not the batch's fault.

    Args:
        cause: The error that callers get.
    """

    def __init__(self, cause: PhononError) -> None:
        super().__init__(str(cause))
        self.cause = cause


_TAKEN_OVER = PhononError("another process has the batch by now")
_AGAIN_ALONE = PhononError("executed by itself")


def _is_unreported(batch: RunningBatch) -> bool:
    """Return whether a batch was not executed for another reason than an error of its own."""
    return batch.error is _TAKEN_OVER or isinstance(batch.error, _NotFetchedError)


class _ManyJob(Job):
    """Runs ``execute_many`` on the records of several batches."""

    __slots__ = ("_failed", "cls", "instances")

    def __init__(self, cls: Any, instances: list[Any]) -> None:
        super().__init__(partial(cls.execute_many, list(instances)))  # the user may sort it
        self.cls = cls
        self.instances = instances
        self._failed: dict[int, BaseException | None] | TypeError | None = None

    def error_of(self, record: Any) -> BaseException | None:
        """Return the error of a record."""
        outcome = self.outcome
        assert outcome is not None  # noqa: S101 - for the type checker
        if outcome.error is not None:
            if len(self.instances) > 1 and isinstance(outcome.error, Exception):
                return _AGAIN_ALONE
            return outcome.error
        if outcome.value is None:
            return None
        if self._failed is None:
            self._failed = self._read(outcome.value)  # once: it may be an iterator
        if isinstance(self._failed, TypeError):
            return self._failed
        return self._failed.get(id(record.instance))

    def _read(self, value: Any) -> dict[int, BaseException | None] | TypeError:
        """Return the errors by record, or a TypeError if the value has another form."""
        failed: dict[int, BaseException | None] = {}
        known = set(map(id, self.instances))
        why = ""
        try:
            for update, error in value:
                if id(update) not in known:
                    why = f"{update!r} is none of the updates that it was given"
                elif error is not None and not isinstance(error, BaseException):
                    why = f"{error!r} is no exception"
                failed[id(update)] = error
        except Exception as error:  # noqa: BLE001 - the user's value has another form
            why = str(error)
        if not why:
            return failed
        return TypeError(
            f"{self.cls.__qualname__}.execute_many() returns pairs of an update and its error, "
            f"or None, not {value!r} ({why}); its batches are kept"
        )


def _text_of(error: BaseException) -> bytes:
    """Return the text of an error that is kept with a batch."""
    text = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
    return text.encode("utf-8", "backslashreplace")
