"""A Redis Cluster: each call goes to the node that has its slot, a pipeline a node."""

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.cluster import ClusterNode
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from phonon.drivers.connect import DEFAULT_PORT, nodes
from phonon.drivers.server import Server, unreachable
from phonon.errors import ConfigurationError
from phonon.protocol.effects import Call


def cluster_client(url: str, shown: str, options: dict[str, Any]) -> "redis.RedisCluster":
    """A client for ``redis+cluster://[user:password@]host:port,host:port``.

    Raises:
        ConfigurationError: The URL cannot be meant.
        ServerUnreachableError: None of the nodes answers.
    """
    parts = urlsplit(url)
    if parts.path.strip("/") not in ("", "0"):
        raise ConfigurationError(f"{shown!r}: a cluster has no database but 0")
    start = [ClusterNode(*node) for node in nodes(parts.netloc, DEFAULT_PORT, shown)]
    credentials: dict[str, Any] = {}
    if parts.password:
        credentials["username"] = unquote(parts.username or "") or None
        credentials["password"] = unquote(parts.password)
    kept = {name: value for name, value in options.items() if name != "retry"}
    try:
        return redis.RedisCluster(startup_nodes=start, **credentials, **kept)
    except (RedisClusterException, RedisConnectionError, RedisTimeoutError) as error:
        raise unreachable(shown, error) from error


class ClusterServer(Server):
    """Sends calls to the nodes of a cluster. A resource's keys are all in one slot."""

    colocated = False
    client: "redis.RedisCluster"

    def start(self) -> None:
        """Load the library on every primary.

        Raises:
            ServerUnreachableError: A primary does not answer.
            ServerError: One cannot be used.
        """
        try:
            for node in self.client.get_primaries():
                self._load(self._pool(node))
        except (RedisError, OSError) as error:
            raise self.unreachable(error) from error

    def _route(
        self, calls: Sequence[Call], indices: Sequence[int]
    ) -> Iterable[tuple[Any, Sequence[int]]]:
        by_node: dict[int, tuple[Any, list[int]]] = {}
        for i in indices:
            pool = self._pool_of(calls[i].base)
            by_node.setdefault(id(pool), (pool, []))[1].append(i)
        return by_node.values()

    def _pool_of(self, key: bytes) -> Any:
        return self._pool(self.client.nodes_manager.get_node_from_slot(key_slot(key)))
