"""From a URL to a server. Processes of one interpreter that use the same URL share connections."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from phonon import embedded
from phonon.drivers.server import Server
from phonon.drivers.server import after_fork_in_child as after_fork_drop_connections
from phonon.errors import ConfigurationError
from phonon.protocol.library import Library

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
#: Seconds to wait for a connection or for an answer before the call is repeated elsewhere.
SOCKET_TIMEOUT = 5.0

SCHEMES = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// and embedded://"

# The driver repeats calls itself, under their operation number; a client that did so too would
# only multiply the time until a failure is noticed.
_OPTIONS: dict[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT,
    "socket_connect_timeout": SOCKET_TIMEOUT,
    "retry": Retry(NoBackoff(), 0),
}


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


class Lease:
    """A share in a server's connections; the last one returned closes them.

    Attributes:
        server: The server.
        client: Its redis-py client.
    """

    def __init__(self, server: Server, close: Callable[[], None]) -> None:
        self.server = server
        self.client = server.client
        self._close = close

    def close(self) -> None:
        """Return the share. A second call does nothing."""
        close, self._close = self._close, lambda: None
        close()


_shared: dict[tuple[Any, ...], tuple[Server, contextlib.ExitStack, set[object]]] = {}
_lock = threading.Lock()


def after_fork_in_child() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock  # noqa: PLW0603 - a lock that is held by a thread that is not here cannot be freed
    _lock = threading.Lock()
    after_fork_drop_connections()


def connect_url(url: str, library: Library, **settings: Any) -> Lease:
    """Connect to the server that a URL names, or join a connection that is there.

    Args:
        url: Where; see `SCHEMES`.
        library: The function library to use.
        settings: See `Server`.

    Raises:
        ConfigurationError: The URL cannot be meant.
        ServerUnreachableError: Nothing answers there.
        ServerError: The server cannot be used.
        EmbeddedServerError: The bundled server did not start.
    """
    key = (url, library.name, *sorted(settings.items()))
    me = object()
    with _lock:
        if key not in _shared:
            with contextlib.ExitStack() as stack:
                server = _open(url, library, stack, settings)
                stack.callback(server.close)
                server.start()
                _shared[key] = (server, stack.pop_all(), set())
        server, stack, users = _shared[key]
        users.add(me)

    def close() -> None:
        with _lock:
            if key not in _shared or me not in _shared[key][2]:
                return
            _, stack, users = _shared[key]
            users.discard(me)
            if not users:
                del _shared[key]
                stack.close()

    return Lease(server, close)


def connect_client(client: Any, library: Library, **settings: Any) -> Lease:
    """Use a client that the caller made, and leave it open.

    Raises:
        ConfigurationError: The object is no redis-py client.
    """
    if isinstance(client, redis.RedisCluster):
        from phonon.drivers.cluster import ClusterServer

        server: Server = ClusterServer(client, library, "the client's cluster", **settings)
    elif hasattr(client, "connection_pool"):
        server = Server(client, library, f"the client's server {client!r}", **settings)
    else:
        raise ConfigurationError(
            f"client= takes a redis.Redis or redis.RedisCluster, not {type(client).__name__}"
        )
    server.start()
    return Lease(server, lambda: None)


def _open(
    url: str, library: Library, stack: contextlib.ExitStack, settings: dict[str, Any]
) -> Server:
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigurationError(f"{url!r} is no URL: Phonon takes {SCHEMES}")
    shown = without_password(url)
    if scheme in ("redis", "rediss", "unix"):
        return Server(_plain_client(url, shown), library, shown, **settings)
    if scheme == "embedded":
        handle = stack.enter_context(embedded.start(unquote(rest) or None))
        client = redis.Redis(unix_socket_path=handle.socket_path, **_OPTIONS)
        return Server(client, library, shown, **settings)
    if scheme == "redis+sentinel":
        return Server(_sentinel_client(url, shown), library, shown, **settings)
    if scheme == "redis+cluster":
        from phonon.drivers.cluster import ClusterServer, cluster_client

        return ClusterServer(cluster_client(url, shown, _OPTIONS), library, shown, **settings)
    raise ConfigurationError(f"{shown!r}: unknown scheme {scheme!r}, Phonon takes {SCHEMES}")


def _plain_client(url: str, shown: str) -> "redis.Redis":
    try:
        return redis.Redis.from_url(url, **_OPTIONS)
    except ValueError as error:
        raise ConfigurationError(f"{shown!r} cannot be read: {error}") from error


def nodes(netloc: str, default_port: int, shown: str) -> list[tuple[str, int]]:
    """``host[:port],host[:port],…`` as pairs.

    Raises:
        ConfigurationError: A port is no number, or there is no host.
    """
    found = []
    for node in netloc.rpartition("@")[2].split(","):
        host, separator, port = node.rpartition(":")
        if not separator or node.endswith("]"):
            host, port = node, str(default_port)
        if not host or not port.isdigit():
            raise ConfigurationError(f"{shown!r}: {node!r} is no host[:port]")
        found.append((host.strip("[]"), int(port)))
    return found


def _sentinel_client(url: str, shown: str) -> "redis.Redis":
    parts = urlsplit(url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service or not (db or "0").isdigit():
        raise ConfigurationError(
            f"{shown!r}: a sentinel URL reads redis+sentinel://host:port,host:port/service/db"
        )
    options = dict(_OPTIONS)
    if parts.password:
        options |= {
            "username": unquote(parts.username or "") or None,
            "password": unquote(parts.password),
        }
    query = dict(parse_qsl(parts.query))
    to_sentinel = {
        name.removeprefix("sentinel_"): value
        for name, value in query.items()
        if name.startswith("sentinel_")
    }
    sentinel = Sentinel(
        nodes(parts.netloc, DEFAULT_SENTINEL_PORT, shown),
        sentinel_kwargs={"socket_timeout": SOCKET_TIMEOUT, **to_sentinel},
        db=int(db or 0),
        **options,
    )
    client: redis.Redis = sentinel.master_for(service)
    return client
