"""What a flow asks of its driver, and who asks.

A *flow* is a generator that holds one conversation with the server. It yields effects and is sent
their results, so that one text of it serves threads, asyncio and the tests' schedulers alike.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from phonon.errors import ServerError
from phonon.protocol.keys import Keys

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Call:
    """Call a step on the server; the result is its answer.

    Attributes:
        step: The step's name, or "" for a plain command that ``args`` spells out.
        base: The key that the call is about; it decides the server in a cluster.
        args: What the step is given, the process id first.
        registry: The caller's registry, where one call may touch both keys.
        numbered: Whether it changes state: the driver gives it the next operation number, once,
            and repeats it under that number as often as it has to.
        keep: What to do if no answer comes. A kept call is repeated, with the rest of its flow,
            before anything else is done with the resource; another one's flow gets the error.
        stores: Whether it stores data of the user's, which may have to be safe before the answer
            counts.
        number: The operation number, once given.
    """

    step: str
    base: bytes
    args: tuple[Any, ...]
    registry: bytes | None = None
    numbered: bool = False
    keep: bool = False
    stores: bool = False
    number: int = 0


@dataclass(slots=True, eq=False)
class Execute:
    """Run the user's code; the result is an `Outcome`. Meanwhile others have the resource.

    Attributes:
        function: What to run.
        batch: Whose batch that executes, and the batch, if it is one: then it may be executed
            together with others instead.
    """

    function: Callable[[], Any]
    batch: tuple[Any, Any] | None = None


@dataclass(slots=True)
class Outcome:
    """What became of the user's code."""

    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Wait:
    """Wait until an element arrives in a list, and take it; the result is whether one came.

    Attributes:
        key: The list.
        timeout: Seconds to wait at the most.
    """

    key: bytes
    timeout: float


Effect = Call | Execute | Wait
#: A conversation with the server that returns a ``T``.
Flow = Generator[Effect, Any, T]


#: A flow that asks for nothing, and costs no more than that.
NOTHING: tuple[()] = ()


def _once(call: Call) -> Flow[None]:
    yield call


def clear(registry: bytes, base: bytes) -> Flow[None]:
    """Take a resource out of a registry.

    If its process was buried meanwhile there is a tombstone, and nothing to be taken out.
    """
    with suppress(ServerError):
        yield Call("", registry, (b"ZREM", registry, base), keep=True)


class Participant:
    """A process, as the protocol sees it.

    Args:
        process_id: Its identity.
        keys: The keys of its namespace.
        lease_ms: How long a membership lasts unless renewed, milliseconds.
        colocated: Whether all keys live on one server, so that a step can keep the registry in
            the same call. Otherwise (a cluster) it is written in a call before and after.
    """

    __slots__ = ("colocated", "id", "keys", "lease_ms", "registry")

    def __init__(self, process_id: str, keys: Keys, lease_ms: int, *, colocated: bool) -> None:
        self.id = process_id.encode()
        self.keys = keys
        self.lease_ms = lease_ms
        self.colocated = colocated
        self.registry = keys.registry(self.id)

    def step(
        self, step: str, base: bytes, *args: Any, keep: bool = False, stores: bool = False
    ) -> Call:
        """A numbered call of a step."""
        registry = self.registry if self.colocated else None
        return Call(step, base, (self.id, *args), registry, True, keep, stores)  # noqa: FBT003

    def plain(self, step: str, base: bytes, *args: Any) -> Call:
        """A call that may be repeated as it is: it only reads, or changes nothing twice."""
        return Call(step, base, (self.id, *args))

    def hold(self, base: bytes, *, lock: bool = False, keep: bool = False) -> Iterable[Effect]:
        """Enter a resource into the registry, before a step that makes it, or its lock, ours.

        A flow that has data in hand keeps this call like the step that stores it.
        """
        if self.colocated:
            return NOTHING
        return _once(Call("hold", self.registry, (base, self.id, int(lock)), keep=keep))

    def let_go(self, base: bytes, nothing_left: int) -> Iterable[Effect]:
        """Clear the registry after a step that answered that nothing there is ours."""
        if self.colocated or not nothing_left:
            return NOTHING
        return clear(self.registry, base)
