"""Executing batches: fetch, merge, run the user's code, report to the server; in lists."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from phonon._core import classes, compaction
from phonon._core.expected import Expectation, Expected
from phonon._core.flows import REBORN, Execute, Flow, Job, Send, call, never_run, read
from phonon._core.identity import Identity
from phonon._core.reports import Event, Reports
from phonon._core.retry import RetryPolicy
from phonon._core.shown import shown
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Run
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import decode
from phonon.errors import BatchLostError, PhononError, UndecodableError, UnknownClassError

log = logging.getLogger("phonon")

#: A partition's token is multiplied by this; an index is added where a batch has several classes.
TOKENS = 1024
#: Records that ``execute_many`` is given at once, at the most.
MOST_TOGETHER = 250
#: Partials fetched at a time, where a batch has more than came with it.
PIECE = 1000
#: Bytes of a batch's partials that are held in memory before they are merged.
MOST_HELD = 4 * 1024 * 1024
#: As much of an error's text as is kept with a batch, characters.
ERROR_LENGTH = 4000

_RUN, _AGAIN, _LOST = int(Reply.RUN), int(Reply.AGAIN), int(Reply.LOST)
_RETRY = int(Reply.RETRY)


class Record(Protocol):
    """The part of a batch that belongs to one class."""

    #: The class, if its records are executed together; else None.
    together: Any

    def begin(self, token: int) -> Any:
        """Return the instance that executes; it knows its token until `finish`."""

    def finish(self) -> None:
        """The execution has ended."""


class RecordReader(Protocol):
    """Makes records of partials."""

    def records(self, resource: str, partials: Sequence[bytes], local: Any) -> Sequence[Record]:
        """Merge the partials of a batch, class by class.

        Args:
            resource: Whose.
            partials: In the order in which they were stored.
            local: The update whose session ended here; it executes what is of its class.

        Raises:
            UnknownClassError: A class is not known here.
            UndecodableError: Something cannot be read.
            Exception: The user's ``merge`` has raised.
        """

    def kept(self, resource: str, partial: bytes, local: Any, content: Any) -> Sequence[Record]:
        """Return the records of the only partial of a batch, whose content ``local`` has kept."""

    def merge(self, resource: str, partials: Sequence[bytes]) -> list[bytes]:
        """Merge partials into fewer."""

    def check(self, partial: bytes) -> None:
        """Raise if the batch that a partial is of cannot be executed here.

        Raises:
            UnknownClassError: Its class is not known here.
            UndecodableError: It cannot be read.
        """

    def can_execute(self, class_name: str) -> bool:
        """Return whether this process can execute batches of a class."""


class RunningBatch:
    """A batch of this process's, on its way through execution.

    Attributes:
        resource: Whose.
        name: The server's name of it.
        partition: Where it is.
        run: What the server has answered.
        local: The update whose session ended here, if there is one.
        errors: Where what went wrong is noted; of the session that ended with this batch.
        background: Whether no caller waits for these errors.
        kept: The content of its only partial, if that is ``local``'s and need not be decoded.
        partials: The batch's content, as far as it is here and not merged.
        records: What it comes to, class by class, and ``at`` the one whose turn it is.
        job: What runs that one.
        error: Why the batch has failed.
        pause: Seconds until it is tried again.
    """

    __slots__ = (
        "__weakref__",
        "at",
        "background",
        "error",
        "errors",
        "job",
        "kept",
        "local",
        "name",
        "partials",
        "partition",
        "pause",
        "records",
        "resource",
        "run",
    )

    def __init__(
        self,
        partition: int,
        name: bytes,
        run: Run,
        *,
        resource: str = "",
        local: Any = None,
        errors: list[BaseException] | None = None,
        background: bool = False,
        kept: Any = None,
    ) -> None:
        self.partition = partition
        self.name = name
        self.kept = kept
        self.resource = resource or decode(name)
        self.run = run
        self.local = local
        self.errors: list[BaseException] = [] if errors is None else errors
        self.background = background
        self.partials: list[bytes] = run.content or []
        self.records: Sequence[Record] = ()
        self.at = 0
        self.job: Job | None = None
        self.error: BaseException | None = None
        self.pause = 0.0

    @property
    def token(self) -> int:
        """The token as users see it."""
        return self.run.token * TOKENS

    @property
    def key(self) -> tuple[bytes, int]:
        """Return the key of the batch among all batches of this process."""
        return self.name, self.run.token


def _no_batches() -> "weakref.WeakValueDictionary[tuple[bytes, int], RunningBatch]":
    """Return where batches are while a flow has them.

    Weakly: a signal handler's exception may end the flow at any point of it. Then the batch is not
    busy any more, and the heartbeat finds that this process has forgotten it.
    """
    return weakref.WeakValueDictionary()


class Executor:
    """Executes batches.

    Args:
        identity: Who it is.
        codec: Makes records of partials.
        policy: What to do with what failed.
        reports: Told about failures.
        schedule: Called with a batch that failed and is to be tried again in so many seconds.

    Attributes:
        busy: The batches that are being executed: another attempt at them is not begun.
        expected: Resources with whose answers a batch may come.
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
        self.busy = _no_batches()
        self.expected = Expected()

    def begin(self) -> None:
        """Execute nothing: in a forked child."""
        self.busy = _no_batches()
        self.expected = Expected()

    def execute(
        self,
        batches: Sequence[RunningBatch],
        more: Callable[[list[Operation]], Iterator[object] | None] | None = None,
    ) -> Flow[list[Any]]:
        """Execute batches of ours, and those that come up behind them.

        A batch stays on the server until ``complete`` says that it is done, so that a process that
        dies in between leaves it to a survivor, under the same token.

        Args:
            batches: Of different resources.
            more: Adds operations to a list, to be sent together with the first completions, or
                returns what adds them while it is sent.

        Returns:
            The answers to those operations.
        """
        answers: list[Any] = []
        waiting = list(batches)
        for batch in waiting:
            self.busy[batch.key] = batch
        try:
            while waiting:
                yield from self._prepare([b for b in waiting if not b.records and b.error is None])
                yield from self._run_some(waiting)
                done = [batch for batch in waiting if batch.job is None]
                waiting = [batch for batch in waiting if batch.job is not None]
                sent = [operation for batch in done for operation in self._conclusions(batch)]
                own, making = len(sent), None
                if more is not None:
                    making, more = more(sent), None
                names = [batch.name for batch in done]
                expectation = Expectation()
                try:
                    self.expected.add(expectation, names)
                    got = (yield Send(sent, more=making)) if sent or making else []
                    answers += got[own:]
                    told = iter(got)
                    for batch in done:
                        # First: if it is to be tried again, that may be due before we are done
                        # here, and what is busy is not tried.
                        self.busy.pop(batch.key, None)
                        following = self._concluded(batch, self._conclusion_of(batch, told))
                        if following is not None:
                            self.busy[following.key] = following
                            waiting.append(following)
                finally:
                    expectation.over = True
                    self.expected.remove(names)
        finally:
            for batch in waiting:
                self.busy.pop(batch.key, None)
        if more is not None:
            sent = []
            making = more(sent)
            if sent or making:
                answers = yield Send(sent, more=making)
        return answers

    # Before

    def _prepare(self, batches: Iterable[RunningBatch]) -> Flow[None]:
        """Fetch what did not come along, and merge."""
        for batch in batches:
            if batch.run.crashes > self._policy.crashes:
                batch.error = PhononError(
                    f"{batch.run.crashes} processes have died while they executed it"
                )
                continue
            if len(batch.partials) < batch.run.size and not (yield from self._fetch(batch)):
                batch.error = _TAKEN_OVER
                continue
            self._identity.measures.observe("batch_partials", batch.run.size)
            try:
                try:
                    batch.records = self._records_of(batch)
                except UndecodableError:
                    # It would be parked at once. An exception that a signal handler raises in the
                    # middle of decoding looks the same, and does not come again.
                    batch.records = self._records_of(batch)
            except BaseException as error:  # noqa: BLE001 - the user's merge: the batch has failed
                batch.error = error
            batch.partials = []

    def _records_of(self, batch: RunningBatch) -> Sequence[Record]:
        if batch.kept is None:
            return self._codec.records(batch.resource, batch.partials, batch.local)
        return self._codec.kept(batch.resource, batch.partials[0], batch.local, batch.kept)

    def _fetch(self, batch: RunningBatch) -> Flow[bool]:
        """Fetch the partials that did not come with the batch, merging them as they come.

        Returns:
            False if another process has the batch. What is here then is not all of it, and to
            execute that under its token would keep the new owner's from counting.
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
                # What went wrong does so again when the batch is executed, and is dealt with there.
                if outcome.error is None:
                    batch.partials[:] = outcome.value
                # What does not merge is not merged over and over.
                enough = max(MOST_HELD, 2 * sum(map(len, batch.partials)))
        return True

    # The user's code

    def _run_some(self, batches: Sequence[RunningBatch]) -> Flow[None]:
        """Run the next record of each batch. A batch without a job has come to its end."""
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
        # In the caller's thread they run one after the other: each is given its share of the time.
        seconds = (clock() - begun) / max(1, len(ended))
        for batch in ended:
            assert batch.job is not None  # noqa: S101 - for the type checker
            self._end_job(batch, batch.job, seconds)

    def _begin_jobs(self, batches: Sequence[RunningBatch]) -> None:
        together: dict[Any, list[tuple[RunningBatch, Any]]] = {}
        for batch in batches:
            if batch.job is not None or batch.error is not None or batch.at >= len(batch.records):
                continue
            record = batch.records[batch.at]
            instance = record.begin(batch.token + batch.at)
            if record.together is None:
                batch.job = Job(instance.execute)
            else:
                together.setdefault(record.together, []).append((batch, instance))
        for cls, group in together.items():
            for first in range(0, len(group), MOST_TOGETHER):
                some = group[first : first + MOST_TOGETHER]
                job = _ManyJob(cls, [instance for _, instance in some])
                for batch, _ in some:
                    batch.job = job

    def _end_job(self, batch: RunningBatch, job: Job, seconds: float) -> None:
        record = batch.records[batch.at]
        outcome = job.outcome
        assert outcome is not None  # noqa: S101 - for the type checker
        if isinstance(job, _ManyJob):
            error = job.error_of(batch.records[batch.at])
            if error is _AGAIN_ALONE:
                # It is not known which of them was at fault, so each is executed by itself: then
                # what is at fault holds up nothing else.
                instance = record.begin(batch.token + batch.at)
                batch.job = _ManyJob(job.cls, [instance])
                return
        else:
            error = outcome.error
            if error is None and outcome.value is not None:
                error = never_run(outcome.value)
        executed: Any = record  # what it has executed is in each of them
        cls = type(executed.instance)
        record.finish()
        measures = self._identity.measures
        measures.execution(classes.known_name(cls), seconds, failed=error is not None)
        if measures.on_execution is not None:
            measures.on_execution(batch.resource, cls, seconds, error)
        batch.job = None
        batch.at += 1
        if error is not None:
            batch.error = error
        elif batch.at < len(batch.records):
            self._begin_jobs((batch,))

    # After

    def _conclusions(self, batch: RunningBatch) -> list[Operation]:
        """Return the operation that reports a batch, if there is anything to report."""
        error, place = batch.error, (batch.partition, batch.name, batch.run.token)
        if error is None:
            return [operations.complete(*place)]
        if error is _TAKEN_OVER or isinstance(error, _NotFetchedError):
            return []
        if isinstance(error, UnknownClassError):
            return [operations.hand_off(*place, operations.class_queue(error.class_name))]
        attempts = self._policy.attempts
        if isinstance(error, UndecodableError) or batch.run.crashes > self._policy.crashes:
            attempts = 0  # it will not become readable
        batch.pause = self._policy.pause(batch.run.attempts + 1)
        return [operations.fail(*place, _text_of(error), int(batch.pause * 1000), attempts)]

    @staticmethod
    def _conclusion_of(batch: RunningBatch, told: Any) -> Any:
        if batch.error is _TAKEN_OVER:
            return _LOST
        return batch.error if isinstance(batch.error, _NotFetchedError) else next(told)

    def _concluded(self, batch: RunningBatch, answer: Any) -> RunningBatch | None:
        """See to what a batch came to; returns the one that comes up behind it."""
        if isinstance(answer, Exception) or answer is REBORN:
            # Nothing is lost: the batch is still ours, and is reported once more.
            error = batch.error or (answer if isinstance(answer, Exception) else None)
            if isinstance(error, _NotFetchedError):
                error = error.cause
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
            return RunningBatch(
                batch.partition,
                batch.name,
                Run(*answer),
                resource=batch.resource,
                local=batch.local,
                errors=batch.errors,
                background=batch.background,
            )
        return None

    def _lost(self, batch: RunningBatch) -> None:
        if batch.error is _TAKEN_OVER:
            return
        resource, token = batch.resource, batch.token
        if batch.error is not None:
            batch.errors.append(batch.error)
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
        batch.errors.append(error)
        if batch.background:
            self._reports.notify(error)

    def _handed_off(self, batch: RunningBatch, error: UnknownClassError) -> None:
        """A batch was left to others. There may be very many of that kind: log the first one."""
        if self._reports.once(f"class {error.class_name}"):
            is_known = classes.find(error.class_name) is not None
            whom = "an AsyncProcess" if is_known else "a process"
            text = f"batches of {error.class_name} are left to {whom} that has imported it"
            error.add_note(f"phonon: {text}; their data is kept")
            log.warning("%s: %s", text, error)
            self._reports.notify(error)
        if not batch.background:  # it was taken over, and is in better hands: nothing to raise
            batch.errors.append(error)

    def compact(self, partition: int, name: bytes, count: int) -> Flow[None]:
        """Merge some partials of a session that goes on."""
        resource = decode(name)
        yield from compaction.compact(
            self._identity,
            partition,
            name,
            count,
            lambda partials: self._codec.merge(resource, partials),
        )


class _NotFetchedError(PhononError):
    """The server did not answer with all of a batch: it is no fault of the batch's.

    Args:
        cause: What callers are told.
    """

    def __init__(self, cause: PhononError) -> None:
        super().__init__(str(cause))
        self.cause = cause


_TAKEN_OVER = PhononError("another process has the batch by now")
_AGAIN_ALONE = PhononError("executed by itself")


class _ManyJob(Job):
    """Runs ``execute_many`` on the records of several batches."""

    __slots__ = ("_failed", "cls", "instances")

    def __init__(self, cls: Any, instances: list[Any]) -> None:
        super().__init__(partial(cls.execute_many, list(instances)))  # the user may sort it
        self.cls = cls
        self.instances = instances
        self._failed: dict[int, BaseException | None] | TypeError | None = None

    def error_of(self, record: Any) -> BaseException | None:
        """Return what went wrong with a record."""
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
        """Return the errors by record, or the error that what was returned is not that."""
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
        except Exception as error:  # noqa: BLE001 - what the user returned is not what is asked for
            why = str(error)
        if not why:
            return failed
        return TypeError(
            f"{self.cls.__qualname__}.execute_many() returns pairs of an update and its error, "
            f"or None, not {value!r} ({why}); its batches are kept"
        )


def _text_of(error: BaseException) -> bytes:
    """Return an error as it is kept with a batch."""
    text = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
    return text.encode("utf-8", "backslashreplace")
