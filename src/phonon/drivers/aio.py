"""The connections of redis.asyncio, made to look like those of redis-py.

So `Server`, `ClusterServer` and what connects them are the same for both: where they wait for a
connection, the task that calls waits (see `phonon.tasks`).
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel as RedisSentinel
from redis.backoff import NoBackoff

from phonon.drivers.cluster import ClusterServer
from phonon.drivers.connect import Kit
from phonon.drivers.server import Server
from phonon.tasks import Lock, Tasks, await_

#: Seconds: longer than anybody waits. redis-py's own limit, if there is one, is not meant for that.
FOR_EVER = 1e6


def _options(options: dict[str, Any], *, sentinel: bool = False) -> dict[str, Any]:
    """Options of redis-py as redis.asyncio takes them."""
    options = dict(options)
    if "retry" in options:
        options["retry"] = Retry(NoBackoff(), 0)
    if not sentinel:
        # The limits are set here, one for each wait: redis-py starts a task for each call it sends.
        options["socket_timeout"] = None
    return options


class Connection:
    """A connection.

    Args:
        real: That of redis.asyncio.
        timeout: Seconds to wait for it; None if it sees to that itself.
    """

    __slots__ = ("_early", "_timeout", "real")

    def __init__(self, real: Any, timeout: float | None) -> None:
        self.real = real
        self._timeout = timeout
        self._early: list[tuple[Any, Exception | None]] = []

    def send_packed_command(self, parts: Sequence[bytes]) -> None:
        """Send what was packed."""
        await_(self.real.send_packed_command(parts), self._timeout)

    def read_response(self, *, disable_decoding: bool) -> Any:
        """Read an answer."""
        if self._early:
            reply, error = self._early.pop()
            if error is not None:
                raise error
            return reply
        return await_(self.real.read_response(disable_decoding=disable_decoding), self._timeout)

    def can_read(self, timeout: float) -> bool:
        """Wait for an answer, for so many seconds at the most. Without one it is of no use."""
        try:
            reply = await_(
                self.real.read_response(disable_decoding=True, timeout=FOR_EVER), timeout
            )
        except TimeoutError:
            return False
        except Exception as error:  # noqa: BLE001 - for whoever reads it
            self._early.append((None, error))
        else:
            self._early.append((reply, None))
        return True

    def disconnect(self) -> None:
        """Close it, without waiting for the other side."""
        await_(self.real.disconnect(nowait=True))


class Pool:
    """A pool of connections.

    Args:
        real: That of redis.asyncio.
        timeout: See `Connection`.
    """

    def __init__(self, real: Any, timeout: float | None) -> None:
        self.real = real
        self._timeout = timeout
        self.connection_class = real.connection_class
        if hasattr(real, "service_name"):
            self.service_name = real.service_name

    @property
    def connection_kwargs(self) -> dict[str, Any]:
        """What connections are made with."""
        kwargs: dict[str, Any] = self.real.connection_kwargs
        return kwargs

    def get_connection(self) -> Connection:
        """Take one that is connected."""
        return Connection(await_(self.real.get_connection(), self._timeout), self._timeout)

    def release(self, connection: Connection) -> None:
        """Give it back."""
        await_(self.real.release(connection.real))

    def disconnect(self) -> None:
        """Close all of them."""
        await_(self.real.disconnect())


class Client:
    """A client.

    Args:
        real: That of redis.asyncio.
        timeout: See `Connection`.
    """

    def __init__(self, real: Any, timeout: float | None) -> None:
        self.real = real
        self.connection_pool = Pool(real.connection_pool, timeout)

    @classmethod
    def made(cls, **options: Any) -> "Client":
        """A client of our own."""
        timeout = options.get("socket_timeout")
        return cls(aioredis.Redis(**_options(options)), timeout)

    def close(self) -> None:
        """Close its connections."""
        await_(self.real.aclose())

    def sentinel_masters(self) -> Any:
        """What a sentinel watches."""
        return await_(self.real.sentinel_masters())


class Sentinel:
    """Clients of sentinels, which see to their time-outs themselves."""

    def __init__(
        self, nodes: Sequence[tuple[str, int]], sentinel_kwargs: dict[str, Any], **options: Any
    ) -> None:
        self._real = RedisSentinel(
            nodes,
            sentinel_kwargs=_options(sentinel_kwargs, sentinel=True),
            **_options(options, sentinel=True),
        )
        self.sentinels = [Client(client, None) for client in self._real.sentinels]

    def master_for(self, service: str) -> Client:
        """A client of a service's primary."""
        return Client(self._real.master_for(service), None)


class Cluster:
    """A client of a cluster.

    Args:
        real: That of redis.asyncio.
        timeout: See `Connection`.
    """

    def __init__(self, real: Any, timeout: float | None) -> None:
        self.real = real
        self.nodes_manager = real.nodes_manager
        self._timeout = timeout
        await_(real.initialize())

    @classmethod
    def made(cls, startup_nodes: Sequence[Any], **options: Any) -> "Cluster":
        """A client of our own."""
        nodes = [ClusterNode(node.host, node.port) for node in startup_nodes]
        real = aioredis.RedisCluster(startup_nodes=nodes, **options)
        return cls(real, options.get("socket_timeout"))

    def get_nodes(self) -> Any:
        """The nodes that it knows."""
        return self.real.get_nodes()

    def get_redis_connection(self, node: Any) -> Client:
        """A client of a node."""
        options = dict(self.real.get_connection_kwargs())
        for name in ("response_callbacks", "max_connections"):
            options.pop(name, None)
        options |= {"host": node.host, "port": node.port, "retry": Retry(NoBackoff(), 0)}
        if self._timeout is not None:
            options["socket_timeout"] = None
        pool = aioredis.ConnectionPool(max_connections=1 << 31, **options)
        return Client(aioredis.Redis(connection_pool=pool), self._timeout)

    def close(self) -> None:
        """Close its connections."""
        await_(self.real.aclose())


#: What a forked child has got from its parent, and must not even close: the parent's event loop
#: would hear of it.
_left_alone: list[Any] = []


class _InLoop:
    """What a server of an event loop does in a way of its own."""

    only_here = True
    sleep: Callable[[float], None] = staticmethod(Tasks.sleep)
    _idle: dict[Any, list[Any]]

    def forget_connections(self) -> None:
        """After a fork: they are the parent's."""
        _left_alone.append(self._idle)
        _left_alone.append(self)
        self._idle = {}


class AsyncServer(_InLoop, Server):
    """`Server`, for tasks."""


class AsyncClusterServer(_InLoop, ClusterServer):
    """`ClusterServer`, for tasks."""


def _given(client: Any) -> Client | Cluster | None:
    """Take a client that the user made; it has time-outs of its own."""
    if isinstance(client, aioredis.RedisCluster):
        return Cluster(client, None)
    if isinstance(client, aioredis.Redis):
        return Client(client, None)
    return None


def _block(function: Callable[..., Any], *args: Any) -> Any:
    return await_(asyncio.to_thread(function, *args))


def kit(runtime: Tasks) -> Kit:
    """What connections are made with in an event loop."""
    return Kit(
        client=Client.made,
        cluster=Cluster.made,
        sentinel=Sentinel,
        given=_given,
        server=AsyncServer,
        cluster_server=AsyncClusterServer,
        lock=Lock,
        block=_block,
        scope=runtime.loop,
    )
