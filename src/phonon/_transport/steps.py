"""The steps that the transport's logic yields, and the nodes that they are about.

A generator of this package (`Steps`) never touches a socket. It yields a step, and is sent the
step's result by ``sync_io.run`` or ``async_io.run``, which carry it out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

#: Errors of a server that is not there, or does not answer.
GONE = (RedisConnectionError, RedisTimeoutError, OSError)
#: Seconds to wait for a connection, or for an answer, unless the client has a limit of its own.
SOCKET_TIMEOUT = 5.0

#: Phonon drives its connections, so redis-py must not repeat calls, decode answers or take pushes.
_OUR_WAY: dict[str, Any] = {"protocol": 2, "decode_responses": False, "health_check_interval": 0}
#: Options of a pool that a connection does not need, or that push messages into it.
_NOT_OURS = (
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "oss_cluster_maint_notifications_handler",
    "orig_host_address",
    "orig_socket_timeout",
    "orig_socket_connect_timeout",
    "himport_registry",
    "retry_on_error",
    "retry_on_timeout",
)


class Node(ABC):
    """One address, and Phonon's connections to the server there.

    They are made like those of the client's pool, but do not count in it: if the pool is small,
    neither the client nor Phonon runs out of connections because of the other.

    Args:
        connection_class: The client's class of connections.
        options: The options of the client's connections.
        service: The service that the address stands for, if sentinels are asked for it.

    Attributes:
        reply_timeout: Seconds to wait for an answer.
    """

    def __init__(
        self, connection_class: Any, options: dict[str, Any], service: str | None = None
    ) -> None:
        self.connection_class = connection_class
        self.service = service
        self.host: str | None = options.get("host")
        self.path: str | None = options.get("path")
        self.port: int | None = options.get("port")
        self.reply_timeout: float = options.get("socket_timeout") or SOCKET_TIMEOUT
        self.connect_timeout: float = options.get("socket_connect_timeout") or self.reply_timeout
        kept = {name: value for name, value in options.items() if name not in _NOT_OURS}
        self.options = {**kept, **_OUR_WAY, "retry": self.no_retry()}
        self.options["socket_timeout"] = self.reply_timeout
        self.options["socket_connect_timeout"] = self.connect_timeout
        if options.get("db"):
            # As bytes: hiredis crashes if a signal handler raises while it packs an int.
            self.options["db"] = str(options["db"]).encode()

    @staticmethod
    @abstractmethod
    def no_retry() -> Any:
        """Return the client's object for "no retries"."""

    @abstractmethod
    def retire(self) -> None:
        """Use none of the present connections for a new call.

        Their server is gone, or is not a primary any more.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop all connections in a forked child, without disturbing the parent."""

    @abstractmethod
    def close(self) -> Any:
        """Close all connections; in asyncio the result has to be awaited."""


@dataclass(slots=True, eq=False)
class Share:
    """The commands of a round trip that go to one node.

    Attributes:
        node: The node that gets them.
        commands: The commands, all words as bytes.
        timeout: Seconds until the last answer at the latest.
        alone: Whether they block, and so need a connection of their own.
        replies: The answers so far; a ``ResponseError`` where the server answered with an error.
        failure: The reason why there are no more answers, or None.
    """

    node: Node
    commands: list[tuple[bytes, ...]]
    timeout: float
    alone: bool = False
    replies: list[Any] = field(default_factory=list)
    failure: BaseException | None = None


class RoundTrip(NamedTuple):
    """Send all shares, then read their answers. The result is in the shares."""

    shares: list[Share]


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class CallBlocking(NamedTuple):
    """Call a function that blocks; in asyncio it is called in a thread."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


class Invoke(NamedTuple):
    """Call a function of the client; in asyncio its result is awaited if it is awaitable."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


Step: TypeAlias = RoundTrip | Pause | CallBlocking | Invoke
T = TypeVar("T")
#: Yields steps, is sent their results, and returns a ``T``.
Steps: TypeAlias = Generator[Step, Any, T]
