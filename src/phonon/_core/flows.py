"""Effects: the requests of a flow to its driver.

A *flow* is a generator that holds one conversation. It yields effects and is sent their results, so
that the same flow runs in threads, in asyncio and in the simulation.

A flow may lose its caller: the answer does not come in time, or the caller is cancelled or
interrupted. Then the driver goes on with the flow in the background (`FlowRun`): its data is stored
once, and a batch that it gets is executed. A flow finds out by yielding `CALLER_GONE`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from inspect import GEN_CLOSED, GEN_CREATED, getgeneratorstate
from typing import Any, NamedTuple, Protocol, TypeVar

from phonon._protocol.library import Request
from phonon._protocol.operations import Operation

T = TypeVar("T")


#: Whether user code of a batch is running. The bound on unfinished work does not block such code,
#: because that work may wait for it. Drivers set this around jobs.
EXECUTING: ContextVar[bool] = ContextVar("phonon_executing", default=False)


class Outcome(NamedTuple):
    """The result of the user's code: a value, or an error of any kind."""

    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A call of the user's code.

    Attributes:
        function: The function to run; in asyncio also a coroutine function, or one that returns an
            awaitable.
        outcome: Its outcome; None as long as it has not ended. A job that has one is not run.
        begun: Whether the function has been called.
        running: The driver's handle, once the job has begun.
        is_callers: Whether the job runs in the caller's thread although there is an executor.
        returned: The value that the function has returned, if it has.
        raised: The error that the function has raised, if it has.
    """

    function: Callable[[], Any]
    outcome: Outcome | None = None
    begun: bool = False
    running: Any = field(default=None, repr=False)
    is_callers: bool = False
    returned: deque[Any] = field(default_factory=lambda: deque(maxlen=1), repr=False)
    raised: BaseException | None = field(default=None, repr=False)


class Signal(Protocol):
    """An object to wait for, made by a driver. Any thread may set it."""

    def set(self) -> None:
        """Wake the flow, now or as soon as it waits."""


@dataclass(slots=True, eq=False)  # made for each call: a tuple with names takes longer to make
class Send:
    """Send operations through their lanes. The result is their answers, in order.

    An answer is the server's; an exception if the operation failed or was refused; or `REBORN` if
    the operation is not repeated under another identity.

    Attributes:
        operations: The operations to send.
        first: Whether they go before the operations that wait for the former self's reap.
        more: Appends further operations to the list, a group at a time. A driver may send a group
            while the next one is made, so that the server and this process work at the same time.
    """

    operations: Sequence[Operation]
    first: bool = False
    more: Iterator[object] | None = None

    def make_all(self) -> None:
        """Make all operations, and append them to the list."""
        deque(self.more or (), 0)


class Read(NamedTuple):
    """Call functions outside of lanes, in one exchange. The result is a reply or error for each.

    Attributes:
        requests: The calls.
        patience: Seconds to go on repeating unanswered calls; None for `retry_timeout`.
    """

    requests: Sequence[Request]
    patience: float | None = None


class Sleep(NamedTuple):
    """Pause. A flow without a caller goes on at once."""

    seconds: float


class AwaitMail(NamedTuple):
    """Wait until a waiter is woken through its process's mailbox. The result: was it woken?

    Attributes:
        partition: The resource's partition.
        waiter: The waiter's name.
        seconds: Seconds to wait at the most.
    """

    partition: int
    waiter: str
    seconds: float


class Wait(NamedTuple):
    """Wait for a signal, and unset it. The result: was it set?

    Attributes:
        signal: The signal, made by the driver.
        seconds: Seconds to wait at the most.
    """

    signal: Any
    seconds: float


class Execute(NamedTuple):
    """Run the user's code.

    The driver sets each job's outcome. It returns when all jobs have ended, or after some time when
    some have, so that finished batches can be completed. The flow then yields the rest again.
    """

    jobs: Sequence[Job]


class Branch(NamedTuple):
    """Run another flow like one whose caller has gone. The result is its `Outcome`.

    If the server does not answer, the other flow goes on in the background, and the outcome is that
    error, so that the flow that waited can go on.
    """

    flow: Generator[Any, Any, Any]


class Effect(Enum):
    """Effects without arguments."""

    #: The result: is this flow without a caller?
    CALLER_GONE = "caller gone"
    #: Send the calls of all lanes, once.
    FLUSH = "flush"


CALLER_GONE = Effect.CALLER_GONE
FLUSH = Effect.FLUSH


class Reborn(Enum):
    """The answer to an operation that is not repeated under another identity."""

    REBORN = "reborn"


REBORN = Reborn.REBORN

AnyEffect = Send | Read | Sleep | AwaitMail | Wait | Execute | Branch | Effect
Flow = Generator[AnyEffect, Any, T]


def single(operation: Operation) -> Flow[Any]:
    """Send one operation.

    Raises:
        PhononError: The operation failed, or was refused.
    """
    (answer,) = yield Send((operation,))
    if isinstance(answer, Exception):
        raise answer
    return answer


def read(request: Request) -> Flow[Any]:
    """Call one function outside of lanes.

    Raises:
        PhononError: The server does not answer, or refuses.
    """
    (reply,) = yield from read_all((request,))
    return reply


def read_all(requests: Sequence[Request]) -> Flow[Sequence[Any]]:
    """Call functions outside of lanes, in one exchange.

    Raises:
        PhononError: The server does not answer, or refuses one of them.
    """
    replies: Sequence[Any] = yield Read(requests)
    return checked(replies)


def checked(answers: Sequence[Any]) -> Sequence[Any]:
    """Return answers, unless one of them is an error, which is raised."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def call(function: Callable[[], Any]) -> Flow[Outcome]:
    """Run one piece of the user's code, in the caller's thread."""
    job = Job(function, is_callers=True)
    while job.outcome is None:
        yield Execute((job,))
    return job.outcome


def never_run(value: Any) -> TypeError | None:
    """Return an error if a return value shows that the user's code never ran.

    The drivers detect generators and coroutines. Other iterators may be leftovers of finished work,
    such as a database cursor or a file.
    """
    if isinstance(value, map | filter):
        return TypeError(
            f"a {type(value).__name__} object was returned, whose function was never called: use a "
            "for loop"
        )
    return None


def has_begun(flow: Generator[Any, Any, Any]) -> bool:
    """Return whether a flow has been started; it may have ended."""
    return getgeneratorstate(flow) != GEN_CREATED


def goes_on(flow: Generator[Any, Any, Any]) -> bool:
    """Return whether a flow has begun, and an interrupt has not ended it."""
    return getgeneratorstate(flow) not in (GEN_CREATED, GEN_CLOSED)


@dataclass(slots=True, eq=False)
class Done:
    """The last effect of each flow, when it has returned."""

    value: Any


class FlowRun:
    """A running flow. Its driver may go on with it after its caller has gone.

    Args:
        flow: The flow.
        name: The flow's name, for messages.
        background: Whether it never had a caller. Then the error of an unanswered `Send` is raised
            inside the flow, because nothing else would go on with it.

    Attributes:
        effects: The effect that the flow waits for, as the only element; empty before the start.
        ticket: The ticket for the answers, if the effect is a `Send`.
        caller_gone: Whether the flow has no caller any more.
        has_sent: Whether the flow has put operations into lanes.
        running: The driver's handle, if the flow goes on without a caller.
    """

    # Class attributes that most runs never set: a run may be made for each message.
    name = ""
    background = False
    ticket: Any = None
    caller_gone = False
    has_sent = False
    running: Any = None

    def __init__(self, flow: Flow[Any], name: str = "", *, background: bool = False) -> None:
        self.flow: Any = _to_its_end(flow)
        self.effects: deque[AnyEffect | Done] = deque((), 1)  # noqa: RUF037 - it is faster so
        if name:
            self.name = name
        if background:
            self.background = True

    def __repr__(self) -> str:
        return f"<FlowRun {self.name or self.flow!r}>"

    @property
    def is_over(self) -> bool:
        """Return whether the flow has returned or raised."""
        effects = self.effects
        return self.flow.gi_frame is None or (bool(effects) and type(effects[0]) is Done)

    def advance(self, reply: Any) -> None:
        """Send the flow the result of its effect, and keep its next effect.

        The flow's step and keeping its effect are one step for signal handlers: a handler that
        raised in between would leave a flow whose effect is lost.

        Raises:
            BaseException: The error of the flow.
        """
        self.effects.extend(map(self.flow.send, (reply,)))

    def throw(self, error: BaseException) -> None:
        """Raise an error inside the flow, and keep its next effect.

        Raises:
            BaseException: The error of the flow.
        """
        self.effects.extend(map(self.flow.throw, (error,)))


def _to_its_end(flow: Flow[Any]) -> Generator[AnyEffect | Done, Any, None]:
    yield Done((yield from flow))
