"""From a URL to a server. Processes of one interpreter that use the same URL share connections."""

import contextlib
import math
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.cluster import REDIS_ALLOWED_KEYS, ClusterNode
from redis.connection import URL_QUERY_ARGUMENT_PARSERS
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from phonon import embedded
from phonon.drivers.cluster import ClusterServer
from phonon.drivers.server import GONE, Server, refused, unreachable
from phonon.drivers.server import after_fork_in_child as after_fork_drop_connections
from phonon.errors import ConfigurationError
from phonon.protocol.library import Library

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
HIGHEST_PORT = 65535
#: Seconds to wait for a connection or for an answer before the call is repeated elsewhere.
SOCKET_TIMEOUT = 5.0

#: How a URL of each scheme reads. With TLS it begins with ``rediss``.
FORMS = {
    "redis": "redis://[user:password@]host[:port][/database]",
    "unix": "unix://[user:password@]/path/of/the/socket[?db=database]",
    "redis+cluster": "redis+cluster://[user:password@]host[:port],host[:port]",
    "redis+sentinel": (
        "redis+sentinel://[user:password@]host[:port],host[:port]/service[/database]"
        "[?sentinel_password=password]"
    ),
    "embedded": "embedded://[/path/of/a/directory]",
}

# A name or password with a character that should have been encoded must not pass for anything
# else: what could not be read is never repeated in an error, what could be read is.
_USER = "(?:(?P<user>[^:@/?#]*):(?P<password>[^@/?#]*)@)?"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/:@,?#\[\]%]+)(?::[0-9]{1,5})?"
_HOSTS = f"(?P<hosts>{_HOST}(?:,{_HOST})*)"
_QUERY = "(?:[?](?P<query>[^@#]*))?"
_PLACES = {
    "redis": f"(?P<hosts>{_HOST})?(?:/(?P<db>[0-9]{{0,9}}))?",
    "unix": "(?P<path>/[^?#]+)",
    "redis+cluster": f"{_HOSTS}/?0?",
    "redis+sentinel": f"{_HOSTS}/(?P<path>[^/?#@]+)(?:/(?P<db>[0-9]{{0,9}}))?",
}
_URLS = {
    scheme: re.compile(f"{_USER}(?P<place>{place}){_QUERY}") for scheme, place in _PLACES.items()
} | {"embedded": re.compile("(?P<place>(?P<path>[^?#]*))")}

# The driver repeats calls itself, under their operation number; a client that did so too would
# only multiply the time until a failure is noticed.
_OPTIONS: dict[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT,
    "socket_connect_timeout": SOCKET_TIMEOUT,
    "retry": Retry(NoBackoff(), 0),
    # Each thread that waits for a lock has one. redis-py 8 has 100 at the most by itself.
    "max_connections": 1 << 31,
}


_READERS: dict[str, Any] = dict(URL_QUERY_ARGUMENT_PARSERS)


class Address(NamedTuple):
    """A URL, taken apart.

    Attributes:
        scheme: As in `FORMS`.
        shown: The URL as it may be shown: without passwords and options.
        nodes: Hosts and ports.
        path: A socket, a directory, or a sentinel's service.
        options: Arguments for redis-py: database, credentials, TLS, time-outs.
        for_sentinel: Those that are only for talking to sentinels.
    """

    scheme: str
    shown: str
    nodes: list[tuple[str, int]]
    path: str
    options: dict[str, Any]
    for_sentinel: dict[str, Any]


def parse(url: str) -> Address:
    """Take a URL apart.

    Raises:
        ConfigurationError: The URL cannot be meant.
    """
    spelled, separator, rest = url.partition("://")
    tls = spelled.startswith("rediss")
    scheme = "redis" + spelled[6:] if tls else spelled
    if not separator or scheme not in FORMS:
        raise ConfigurationError(
            f"this is no URL of a server: one reads {', '.join(FORMS.values())}; with TLS it "
            "begins with rediss"
        )
    match = _URLS[scheme].fullmatch(rest)
    if match is None:
        raise ConfigurationError(
            f"this {scheme}:// URL cannot be read: one is {FORMS[scheme]}, where characters like "
            "/ ? # @ % in a name or password are written %2F %3F %23 %40 %25 (a password alone is "
            ":password@)"
        )
    parts = match.groupdict()
    user = "" if parts.get("password") is None else f"{parts['user']}:***@"
    shown = f"{spelled}://{user}{parts['place']}"
    options = _options(shown, parts.get("query") or "", tls=tls)
    if user:
        options |= {
            "username": unquote(parts["user"]) or None,
            "password": unquote(parts["password"]),
        }
    if parts.get("db"):
        options["db"] = int(parts["db"])
    for_sentinel = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in list(options)
        if scheme == "redis+sentinel" and name.startswith("sentinel_")
    }
    default = DEFAULT_SENTINEL_PORT if scheme == "redis+sentinel" else DEFAULT_PORT
    nodes = _nodes(shown, parts.get("hosts") or "localhost", default)
    return Address(scheme, shown, nodes, unquote(parts.get("path") or ""), options, for_sentinel)


def _options(shown: str, query: str, *, tls: bool) -> dict[str, Any]:
    """What follows the ``?``, and the options that we set."""
    options: dict[str, Any] = {"ssl": True} if tls else {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name.startswith("ssl") and not tls:
            raise ConfigurationError(
                f"{shown} has TLS options: with TLS a URL begins with rediss instead of redis"
            )
        try:
            value = _READERS.get(name, str)(text)
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(value, float) and not 0 < value < threading.TIMEOUT_MAX:
            raise ConfigurationError(f"{shown}: the value of its option {name} cannot be read")
        options[name] = value
    return {**_OPTIONS, **options}


def _nodes(shown: str, hosts: str, default: int) -> list[tuple[str, int]]:
    """Hosts and their ports."""
    found = []
    for node in hosts.split(","):
        host, _, port = node.rpartition(":") if re.search(":[0-9]+$", node) else (node, "", default)
        if not 0 < int(port) <= HIGHEST_PORT:
            raise ConfigurationError(f"{shown}: a port is a number from 1 to {HIGHEST_PORT}")
        try:
            host.encode("idna")  # as it is looked up: a label is neither empty nor long
        except UnicodeError as error:
            raise ConfigurationError(f"{shown}: {host!r} is no name of a host") from error
        found.append((host.strip("[]"), int(port)))
    return found


def _here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class Kit(NamedTuple):
    """What connections are made with.

    Attributes:
        client: Makes clients, from redis-py's options.
        cluster: Makes clients of a cluster.
        sentinel: Makes clients of sentinels.
        given: Takes a client that the user made; None if it is of another kind.
        server: Makes a `Server`.
        cluster_server: Makes a `ClusterServer`.
        lock: Makes locks that may be held during calls.
        block: Calls a function that takes its time.
        scope: Who may share connections: None for all threads, or an event loop.
    """

    client: Callable[..., Any] = redis.Redis
    cluster: Callable[..., Any] = redis.RedisCluster
    sentinel: Callable[..., Any] = Sentinel
    given: Callable[[Any], Any] = lambda client: (
        client if isinstance(client, redis.Redis | redis.RedisCluster) else None
    )
    server: Callable[..., Server] = Server
    cluster_server: Callable[..., Server] = ClusterServer
    lock: Callable[[], Any] = threading.Lock
    block: Callable[..., Any] = _here
    scope: Any = None


#: redis-py itself.
SYNC = Kit()


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


class _Shared:
    """A server's connections and who uses them."""

    def __init__(self, kit: Kit) -> None:
        self.users: set[object] = set()
        self.starting = kit.lock()
        self.server: Server | None = None
        self.stack = contextlib.ExitStack()


_shared: dict[tuple[Any, ...], _Shared] = {}
_lock = threading.Lock()


def after_fork_in_child() -> None:
    """Another thread of the parent may have held a lock, or used a connection."""
    global _lock  # noqa: PLW0603 - a lock that is held by a thread that is not here cannot be freed
    _lock = threading.Lock()
    for key, shared in list(_shared.items()):
        shared.starting = threading.Lock()
        if shared.server is None or shared.server.only_here:
            del _shared[key]  # that thread was about to start it, or had an event loop
    after_fork_drop_connections()


def connect_url(url: str, library: Library, kit: Kit = SYNC, **settings: Any) -> Lease:
    """Connect to the server that a URL names, or join a connection that is there.

    Args:
        url: Where; see `FORMS`.
        library: The function library to use.
        kit: What connections are made with.
        settings: See `Server`.

    Raises:
        ConfigurationError: The URL cannot be meant.
        ServerUnreachableError: Nothing answers there.
        ServerError: The server cannot be used.
        EmbeddedServerError: The bundled server did not start.
    """
    address = parse(url)
    key = (url, library.name, kit.scope, *sorted(settings.items()))
    me = object()
    with _lock:
        shared = _shared.setdefault(key, _Shared(kit))
        shared.users.add(me)

    def close() -> None:
        with _lock:
            if me not in shared.users:
                return
            shared.users.discard(me)
            if shared.users:
                return
            del _shared[key]
        shared.stack.close()

    try:
        # A lock of its own: to wait for one server must keep nobody from another.
        with shared.starting:
            if shared.server is None:
                with contextlib.ExitStack() as stack:
                    server = _open(address, library, stack, kit, settings)
                    stack.callback(server.close)
                    server.start()
                    shared.server, shared.stack = server, stack.pop_all()
    except BaseException:
        close()
        raise
    return Lease(shared.server, close)


def connect_client(client: Any, library: Library, kit: Kit = SYNC, **settings: Any) -> Lease:
    """Use a client that the caller made, and leave it open.

    Raises:
        ConfigurationError: The object is no redis-py client.
        ServerUnreachableError: Its server does not answer.
        ServerError: Its server cannot be used.
    """
    server: Server
    used = kit.given(client)
    if used is None:
        package = "redis.asyncio" if kit.scope else "redis"
        raise ConfigurationError(
            f"client= takes a {package}.Redis or {package}.RedisCluster, {_instead(client)}"
        )
    if hasattr(used, "get_nodes"):
        nodes = ",".join(f"{node.host}:{node.port}" for node in used.get_nodes())
        server = kit.cluster_server(used, library, f"the client's cluster at {nodes}", **settings)
    else:
        kwargs = used.connection_pool.connection_kwargs
        place = kwargs.get("path") or f"{kwargs.get('host')}:{kwargs.get('port')}"
        place = getattr(used.connection_pool, "service_name", place)
        server = kit.server(used, library, f"the client's server {place}", **settings)
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        server.start()
        return Lease(server, stack.pop_all().close)


def _instead(client: Any) -> str:
    """What somebody gave who did not give a client, and what to give instead."""
    if isinstance(client, str):
        return "not a str: give a URL as url="
    if isinstance(client, type):
        return f"not the class {client.__name__}: make one"
    if isinstance(client, Sentinel):
        return "not a Sentinel: give its master_for(service)"
    if isinstance(client, redis.asyncio.Redis | redis.asyncio.RedisCluster):
        return "not one of redis.asyncio: its calls cannot be waited for here"
    if isinstance(client, redis.Redis | redis.RedisCluster):
        return "not one of redis: it would hold up the event loop"
    return f"not a {type(client).__module__}.{type(client).__name__}"


def _open(
    address: Address,
    library: Library,
    stack: contextlib.ExitStack,
    kit: Kit,
    settings: dict[str, Any],
) -> Server:
    if address.scheme == "embedded":
        handle = kit.block(embedded.start, address.path or None)
        stack.callback(handle.close)
        address = address._replace(path=handle.socket_path, options=_OPTIONS)
    client = _plain_client(address, kit)
    if address.scheme == "redis+sentinel":
        client = _sentinel_client(address, stack, kit)
    elif address.scheme == "redis+cluster":
        cluster = _cluster_client(address, kit)
        stack.callback(cluster.close)
        return kit.cluster_server(cluster, library, address.shown, address.nodes, **settings)
    stack.callback(client.close)
    return kit.server(client, library, address.shown, **settings)


def _plain_client(address: Address, kit: Kit) -> Any:
    """A client for the first node. For the others it proves that redis-py knows the options."""
    if address.scheme in ("unix", "embedded"):
        where: dict[str, Any] = {"unix_socket_path": address.path}
    else:
        host, port = address.nodes[0]
        where = {"host": host, "port": port}
    try:
        client = kit.client(**where, **address.options)
        # redis-py looks at some options only when it connects.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError, RedisError) as error:
        raise _unknown_option(address, set(address.options)) from error
    return client


def _unknown_option(address: Address, names: set[str]) -> ConfigurationError:
    named = ", ".join(sorted(names - _OPTIONS.keys() - {"username", "password", "db"}))
    return ConfigurationError(
        f"{address.shown}: redis-py does not know this option, or not this value of it, in a "
        f"{address.scheme} connection: {named}"
    )


def _cluster_client(address: Address, kit: Kit) -> Any:
    options = {name: value for name, value in address.options.items() if name != "retry"}
    if options.pop("db", 0):
        raise ConfigurationError(f"{address.shown}: a cluster has no database but 0; name none")
    unknown = options.keys() - set(REDIS_ALLOWED_KEYS)
    if unknown:  # redis-py would go on without them, and some are for safety
        raise _unknown_option(address, unknown)
    nodes: list[ClusterNode] = []
    try:
        nodes += [ClusterNode(host, port) for host, port in address.nodes]
        return kit.cluster(startup_nodes=nodes, **options)
    except IndexError as error:  # from redis-py 5
        _close(nodes)
        raise unreachable(address.shown, RedisError("none of its nodes has slots")) from error
    except RedisClusterException as error:
        _close(nodes)
        if "not enabled" in str(error):
            raise ConfigurationError(
                f"{address.shown} is no cluster: connect with redis://host:port/database"
            ) from error
        raise unreachable(address.shown, error.__cause__ or error) from error
    except GONE as error:
        _close(nodes)
        raise unreachable(address.shown, error) from error


def _close(nodes: list[ClusterNode]) -> None:
    """Close what a client that did not come about has opened; redis-py leaves it to the garbage."""
    for node in nodes:
        if node.redis_connection is not None:
            node.redis_connection.close()


def _sentinel_client(address: Address, stack: contextlib.ExitStack, kit: Kit) -> Any:
    ssl = {name: value for name, value in address.options.items() if name.startswith("ssl")}
    try:
        sentinel = kit.sentinel(
            address.nodes,
            sentinel_kwargs={**_OPTIONS, **ssl, **address.for_sentinel},
            **address.options,
        )
    except TypeError as error:
        names = {f"sentinel_{name}" for name in address.for_sentinel}
        raise _unknown_option(address, names) from error
    for client in sentinel.sentinels:
        stack.callback(client.close)
    _check_sentinels(sentinel, address)
    return sentinel.master_for(address.path)


def _check_sentinels(sentinel: Any, address: Address) -> None:
    """Say what is wrong with sentinels, or with what we want from them, which redis-py does not."""
    known: set[str] = set()
    failure: BaseException | None = None
    for client in sentinel.sentinels:
        try:
            known.update(map(str, client.sentinel_masters()))
        except (AuthenticationError, AuthorizationError) as error:
            raise refused(
                f"a sentinel of {address.shown}",
                error,
                "add ?sentinel_password= and, if it has users, &sentinel_username= to the URL",
            ) from error
        except ResponseError as error:
            raise ConfigurationError(
                f"{address.shown}: there is no sentinel at this address ({error}); their usual "
                f"port is {DEFAULT_SENTINEL_PORT}, and a server is redis://host:port/database"
            ) from error
        except GONE as error:
            failure = error
        if address.path in known:
            return
    if known or failure is None:
        raise ConfigurationError(
            f"{address.shown}: the sentinels watch no service {address.path!r}, but "
            f"{', '.join(map(repr, sorted(known))) or 'none'}"
        )
    raise unreachable(address.shown, failure)
