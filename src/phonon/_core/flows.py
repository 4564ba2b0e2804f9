"""Effects: the requests of a flow to its driver.

A *flow* is a generator that holds one conversation. It yields effects and is sent their results, so
that one text of it serves threads, asyncio and the simulation.

A flow may lose its caller: its answer does not come in time, or the caller is cancelled or
interrupted. Its driver then goes on with it in the background (`FlowRun`): data that it has in hand
is stored once, a batch that falls to it is executed. A flow that has to know asks with
`CALLER_GONE`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar

from phonon._protocol.library import Request
from phonon._protocol.operations import Operation

T = TypeVar("T")


#: Whether the user's code runs that belongs to a batch: the bound on unfinished work does not stop
#: it, for the work may wait for it. Drivers set it around jobs.
EXECUTING: ContextVar[bool] = ContextVar("phonon_executing", default=False)


class Outcome(NamedTuple):
    """The result of the user's code: a value, or an error of any kind."""

    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Job:
    """Something of the user's to run.

    Attributes:
        function: The function to run; in asyncio also a coroutine function, or one that returns an
            awaitable.
        outcome: Its outcome; None as long as it has not ended.
        running: The driver's handle, once it has begun.
        is_callers: Whether it runs in the caller's thread, although there is an executor.
    """

    function: Callable[[], Any]
    outcome: Outcome | None = None
    running: Any = field(default=None, repr=False)
    is_callers: bool = False


class Signal(Protocol):
    """Something to wait for, made by a driver. Any thread may set it."""

    def set(self) -> None:
        """Wake the flow that waits, now or as soon as it does."""


class Send(NamedTuple):
    """Send operations through their lanes. The result is their answers, in order.

    An answer is what the server packed; an exception if the operation failed or was refused; or
    `REBORN` for one that is not repeated under another identity.

    Attributes:
        operations: The operations to send.
        first: Whether they go before those that wait for the former self to be reaped.
        more: Appends further operations to the list, a group at a time. A driver may send a group
            while the next one is made, so that the server and this process work side by side.
    """

    operations: Sequence[Operation]
    first: bool = False
    more: Iterator[object] | None = None

    def make_all(self) -> None:
        """Have all operations in the list."""
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
    """Pause. A flow without a caller does not."""

    seconds: float


class AwaitMail(NamedTuple):
    """Wait until a waiter is woken through its process's mailbox. The result is whether it was.

    Attributes:
        partition: Where its resource is.
        waiter: Its name.
        seconds: How long to wait at the most.
    """

    partition: int
    waiter: str
    seconds: float


class Wait(NamedTuple):
    """Wait for a signal, which is unset by that. The result is whether it was set.

    Attributes:
        signal: Made by the driver.
        seconds: How long to wait at the most.
    """

    signal: Any
    seconds: float


class Execute(NamedTuple):
    """Run the user's code.

    The driver sets each job's outcome. It returns when all have ended, or after some time when some
    have, so that finished batches can be completed; the flow then yields the rest again.
    """

    jobs: Sequence[Job]


class Branch(NamedTuple):
    """Run another flow as one whose caller has gone. The result is its `Outcome`.

    If the server does not answer it, it goes on in the background, and the outcome is that error:
    the flow that waited can do other things meanwhile.
    """

    flow: Generator[Any, Any, Any]


class Effect(Enum):
    """Effects without arguments."""

    #: The result is whether nobody waits for this flow's result any more.
    CALLER_GONE = "caller gone"
    #: Send what is queued in any lane, once.
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
        PhononError: It failed, or was refused.
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
    (reply,) = yield Read((request,))
    if isinstance(reply, Exception):
        raise reply
    return reply


def call(function: Callable[[], Any]) -> Flow[Outcome]:
    """Run one piece of the user's code, in the caller's thread."""
    job = Job(function, is_callers=True)
    while job.outcome is None:
        yield Execute((job,))
    return job.outcome


def never_run(value: Any) -> TypeError | None:
    """Return an error if a return value shows that code of the user's never ran.

    Generators and coroutines are seen by the drivers. Other iterators may be what is left of work
    that was done: a cursor of a database, say, or a file.
    """
    if isinstance(value, map | filter):
        return TypeError(
            f"a {type(value).__name__} object was returned, whose function was never called: use a "
            "for loop"
        )
    return None


class Done(NamedTuple):
    """The last effect of each flow: it has returned."""

    value: Any


class FlowRun:
    """A flow under way. Its driver may go on with it after its caller has gone.

    Args:
        flow: The flow.
        name: Its name, for people.
        background: Whether it never had a caller. An unanswered `Send` is raised inside it then,
            since nothing else would go on with it.

    Attributes:
        effects: The effect that it waits for, as its only element; empty before it begins.
        ticket: The ticket for the answers, if the effect is a `Send`.
        caller_gone: Whether nobody waits for its result any more.
        has_sent: Whether the lanes got anything of it.
        running: The driver's handle, where it goes on by itself.
    """

    # Those that most runs never change cost nothing here: each message may be one.
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
        """Send the flow the result of its effect, and keep its next one.

        Nothing comes between the flow's step and the keeping of what it yields: a signal handler
        that raises there would leave a flow whose effect is lost.

        Raises:
            BaseException: What the flow raises.
        """
        self.effects.extend(map(self.flow.send, (reply,)))

    def throw(self, error: BaseException) -> None:
        """Raise an error where the flow waits, and keep its next effect.

        Raises:
            BaseException: What the flow raises.
        """
        self.effects.extend(map(self.flow.throw, (error,)))


def _to_its_end(flow: Flow[Any]) -> Generator[AnyEffect | Done, Any, None]:
    yield Done((yield from flow))
