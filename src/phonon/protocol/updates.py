"""Flows of partials and batches: store, end a session, execute, retry."""

import random
from typing import NamedTuple, Protocol

from phonon.errors import PhononError, UndecodableError, UnknownClassError
from phonon.protocol import compaction, heirs, messages, parking
from phonon.protocol.effects import Execute, Flow, Outcome, Participant
from phonon.protocol.messages import Batch, Ran

#: Partials fetched at a time, where a batch has more than came with it.
PIECE = 1000
#: Bytes of a batch's partials that are held in memory before they are merged.
MOST_HELD = 4 * 1024 * 1024


class Parcel(Protocol):
    """Local data on its way to the server."""

    def take(self) -> bytes | None:
        """Move out what is unsent, as one partial; None if there is nothing."""

    def put_back(self, partial: bytes) -> None:
        """The server refused it: it is unsent again."""


class RetryPolicy(NamedTuple):
    """What happens to a batch whose execution failed.

    Attributes:
        attempts: How often it is tried before it is parked.
        first_delay: Seconds before the second attempt; each further one waits twice as long.
        longest_delay: Seconds; the delays grow no further.
        jitter: The share of a delay, 0 to 1, up to which it is shortened at random, so that what
            failed together is not tried again together.
        crashes: How many processes may die while they execute it; with one more it is parked, so
            that a batch that kills its process does not kill all of them in turn.
    """

    attempts: int = 8
    first_delay: float = 1.0
    longest_delay: float = 300.0
    jitter: float = 0.5
    crashes: int = 10

    def delay(self, failed: int) -> float:
        """Seconds to wait after the given number of failed attempts, at the most."""
        return float(min(self.longest_delay, self.first_delay * 2 ** min(failed - 1, 60)))

    def pause(self, failed: int) -> float:
        """Seconds to wait after the given number of failed attempts."""
        return self.delay(failed) * (1 - self.jitter * random.random())  # noqa: S311 - no secret


class Failure(NamedTuple):
    """A batch that could not be executed.

    Attributes:
        token: Which.
        error: Why.
        retry_in: Seconds until its owner tries again; None if it is parked or somebody else's.
        fate: retry, parked, entrusted or lost.
    """

    token: int
    error: BaseException
    retry_in: float | None
    fate: str


class Ended(NamedTuple):
    """What the end of a session came to.

    Attributes:
        last: Whether this process was the last member.
        remaining: Members that are left.
        modifications: By process id, if the session ended here.
        executed: How many batches this process executed.
        failures: Those that failed, in token order.
        lost: Tokens of batches that were executed here, but taken over by another process before
            they could be completed.
    """

    last: bool
    remaining: int
    modifications: dict[bytes, int]
    executed: int
    failures: list[Failure]
    lost: list[int]


class Runner(Protocol):
    """The user's code, about one resource."""

    def __call__(self, batch: Batch) -> None:
        """Run ``execute`` on a batch."""

    def merge(self, partials: list[bytes]) -> list[bytes]:
        """What they come to, in fewer; see `compaction`."""


def append(me: Participant, base: bytes, parcel: Parcel, *, keep: bool = True) -> Flow[int | None]:
    """Store what the parcel has, if anything.

    Args:
        me: The process.
        base: The resource.
        parcel: The data.
        keep: Whether the process sees to it if no answer comes. Otherwise the data is the
            caller's again, who cannot know whether it was stored.

    Returns:
        None if there was nothing. Otherwise how many partials there are by now, if it is time to
        merge some of them (see `compaction`), and else 0.
    """
    partial = parcel.take()
    if partial is None:
        return None
    try:
        yield from me.hold(base, keep=keep)
        answer = yield me.step("append", base, me.lease_ms, partial, keep=keep, stores=True)
    except PhononError:
        parcel.put_back(partial)
        raise
    return messages.stored(answer)


def leave(
    me: Participant,
    base: bytes,
    run: Runner,
    policy: RetryPolicy,
    parcel: Parcel | None = None,
    *,
    force: bool = False,
) -> Flow[Ended]:
    """Store the last partial, leave, and execute the session's batch if that falls to us.

    Args:
        me: The process.
        base: The resource.
        run: Executes a batch, or merges partials if there are many.
        policy: What to do if that fails.
        parcel: The last partial, if there may be one.
        force: Execute what has come together so far although others still hold the resource.
    """
    partial = parcel.take() if parcel else None
    try:
        yield from me.hold(base, keep=True)
        args = (int(force), me.lease_ms, partial or b"")
        answer = yield me.step("leave", base, *args, keep=True, stores=partial is not None)
    except PhononError:
        if parcel is not None and partial is not None:
            parcel.put_back(partial)  # it was refused
        raise
    left = messages.left(answer)
    if left.batch is None:
        yield from me.let_go(base, left.clear)
        if left.many:
            yield from compaction.compact(me, base, left.many, run.merge)
        return Ended(left.last, left.remaining, left.modifications, 0, [], [])
    executed, failures, lost = yield from execute(me, base, left.batch, run, policy)
    return Ended(left.last, left.remaining, left.modifications, executed, failures, lost)


def execute(
    me: Participant, base: bytes, batch: Batch | None, run: Runner, policy: RetryPolicy
) -> Flow[tuple[int, list[Failure], list[int]]]:
    """Execute a batch that is ours, and those that come up behind it.

    The batch stays on the server until ``complete`` says it is done, so that whoever dies in
    between leaves it to a survivor, under the same token.

    Returns:
        How many were executed; which failed; the tokens of those that were taken over.
    """
    executed, clear = 0, 0
    failures: list[Failure] = []
    lost: list[int] = []
    while batch is not None:
        try:
            ran, failure = yield from _attempt(me, base, batch, run, policy)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - an interrupt is raised by the driver itself
            # We are its owner and nobody else takes it up while we live.
            again_in = policy.pause(batch.attempt + 1)
            failures.append(Failure(batch.token, error, again_in, "retry"))
            return executed, failures, lost
        if failure is not None:
            failures.append(failure)
        elif ran.kind == "lost":
            lost.append(batch.token)
        else:
            executed += 1
        batch, clear = ran.batch, ran.clear
    yield from me.let_go(base, clear)
    return executed, failures, lost


def _attempt(
    me: Participant, base: bytes, batch: Batch, run: Runner, policy: RetryPolicy
) -> Flow[tuple[Ran, Failure | None]]:
    """Execute a batch and report what became of it."""
    if not (yield from _fetch_rest(me, base, batch, run)):
        return Ran("lost", 0, None), None
    outcome = yield Execute(lambda: run(batch), (run, batch))
    if outcome.error is None:
        return messages.ran((yield me.step("complete", base, batch.token, keep=True))), None
    error = outcome.error
    if isinstance(error, UnknownClassError):
        ran = yield from heirs.entrust(me, base, batch, heirs.heir(error.class_name))
        return ran, Failure(batch.token, error, None, ran.kind)
    failed = batch.attempt + 1
    # What cannot be read will not become readable.
    if isinstance(error, UndecodableError) or failed >= policy.attempts:
        return (yield from park(me, base, batch, error))
    pause = policy.pause(failed)
    args = (batch.token, parking.text_of(error), int(pause * 1000), policy.attempts)
    ran = messages.ran((yield me.step("fail", base, *args, keep=True)))
    if ran.kind in {"parked", "again"}:
        # Another attempt of ours was counted meanwhile: a retry beside the takeover from ourselves.
        yield from parking.index(me, base)
        return ran, Failure(batch.token, error, None, "parked")
    return ran, Failure(batch.token, error, pause if ran.kind == "retry" else None, ran.kind)


def park(
    me: Participant, base: bytes, batch: Batch, error: BaseException
) -> Flow[tuple[Ran, Failure]]:
    """Put a batch of ours aside, so that it does not hold up what came after."""
    yield from parking.index(me, base)
    args = (batch.token, parking.text_of(error), 0, 0)
    ran = messages.ran((yield me.step("fail", base, *args, keep=True)))
    if ran.kind == "lost":
        return ran, Failure(batch.token, error, None, "lost")
    # Somebody may have found the index idle meanwhile.
    yield from parking.index(me, base)
    return ran, Failure(batch.token, error, None, "parked")


def _fetch_rest(me: Participant, base: bytes, batch: Batch, run: Runner) -> Flow[bool]:
    """Fetch the partials that did not come with the batch, merging them as they come.

    Returns:
        False if the batch was taken over meanwhile. What we have then is not all of it, and to
        execute that under its token would keep the new owner's from counting.
    """
    first = len(batch.partials)
    enough = MOST_HELD
    while first < batch.size:
        piece = yield me.plain("fetch", base, batch.token, first, first + PIECE - 1)
        if not piece:
            return False
        first += len(piece)
        batch.partials.extend(piece)
        if sum(map(len, batch.partials)) > enough:
            outcome: Outcome = yield Execute(lambda: run.merge(batch.partials))
            # What went wrong does so again when the batch is executed, and is dealt with there.
            if outcome.error is None:
                batch.partials[:] = outcome.value
            # What does not merge is not merged over and over.
            enough = max(MOST_HELD, 2 * sum(map(len, batch.partials)))
    return True


def retry(
    me: Participant, base: bytes, token: int, run: Runner, policy: RetryPolicy
) -> Flow[tuple[int, list[Failure], list[int]]]:
    """Take up a batch of ours again whose execution failed."""
    try:
        ran = messages.ran((yield me.step("resume", base, token, keep=True)))
    except PhononError as error:
        return 0, [Failure(token, error, policy.longest_delay, "retry")], []
    if ran.batch is None:  # another process has it now
        yield from me.let_go(base, ran.clear)
        return 0, [], []
    return (yield from execute(me, base, ran.batch, run, policy))
