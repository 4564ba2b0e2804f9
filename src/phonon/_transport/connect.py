"""Connects to the server of a URL. Processes of one interpreter share connections by URL."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import redis
import redis.asyncio
from redis.cluster import REDIS_ALLOWED_KEYS, ClusterNode
from redis.exceptions import RedisClusterException, RedisError, ResponseError
from redis.sentinel import Sentinel

from phonon import embedded
from phonon._transport import failures
from phonon._transport.cluster import ClusterServer
from phonon._transport.failures import REFUSED, refused, unreachable
from phonon._transport.server import FunctionLibrary, Server
from phonon._transport.server import after_fork_in_child as after_fork_drop_connections
from phonon._transport.steps import GONE, CallBlocking, Invoke, Node, RoundTrip, Share, Steps
from phonon._transport.urls import DEFAULT_SENTINEL_PORT, OPTIONS, Address, parse
from phonon.errors import ConfigurationError, ServerUnreachableError

#: Options of a URL that name files.
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")


class ClientBackend(NamedTuple):
    """A package of clients, and the functions to make connections with it.

    Attributes:
        package: Its name, for messages.
        client: Makes a client of one server from redis-py's options.
        client_class: The class of these clients.
        cluster_class: The class of clients of a cluster.
        cluster: Makes a client of a cluster from that class, nodes and options, and has it look
            for the other nodes.
        sentinel: Makes clients of sentinels.
        node: Makes the `Node` of a client.
        node_of_cluster: Makes the `Node` of a host and a port, from a cluster's client.
        close: Closes a client.
        initialize: Prepares a client of a cluster that the user made.
        lock: Makes locks for `Invoke`.
        scope: The event loop of the connections; None if any thread may use them.
    """

    package: str
    client: Callable[..., Any]
    client_class: Any
    cluster_class: Any
    cluster: Callable[..., Any]
    sentinel: Callable[..., Any]
    node: Callable[[Any], Node]
    node_of_cluster: Callable[[Any, str, int], Node]
    close: Callable[[Any], Any]
    initialize: Callable[[Any], Any] = lambda _: None
    lock: Callable[[], Any] = threading.Lock
    scope: Any = None


class SharedConnection:
    """A share in a server's connections; closing the last share closes them.

    Attributes:
        server: The server.
        client: A client of redis-py's for it.
    """

    def __init__(self, server: Server, client: Any, close: Callable[[], Steps[None]]) -> None:
        self.server = server
        self.client = client
        self._close: Callable[[], Steps[None]] | None = close

    def close(self) -> Steps[None]:
        """Return the share. A second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            yield from close()


class _Opened:
    """A server, its client, and the objects to close with them, the last first."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.client: Any = None
        self.closers: list[Callable[[], Steps[None]]] = []

    def on_close(self, function: Callable[..., Any], *args: Any) -> None:
        def close() -> Steps[None]:
            yield Invoke(function, args)

        self.closers.append(close)

    def close(self) -> Steps[None]:
        failure: BaseException | None = None
        while self.closers:
            try:
                yield from self.closers.pop()()
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001 - the rest has to be closed too
                failure = error
        if failure is not None:
            raise failure


class _Shared:
    """An opened server and its users."""

    def __init__(self, backend: ClientBackend) -> None:
        self.users: set[object] = set()
        self.starting = backend.lock()
        self.scope = backend.scope
        self.opened = _Opened()


_shared: dict[tuple[Any, ...], _Shared] = {}
_lock = threading.Lock()


def after_fork_in_child() -> None:
    """Free the locks that another thread of the parent may have held, and drop connections."""
    global _lock  # noqa: PLW0603 - a lock whose holder, a thread, is missing in the child cannot be freed
    _lock = threading.Lock()
    for key, shared in list(_shared.items()):
        if shared.opened.server is None or shared.scope is not None:
            del _shared[key]  # a thread was starting it, or it had an event loop
        else:
            shared.starting = threading.Lock()
    after_fork_drop_connections()


def connect(
    url: str | None,
    client: Any,
    library: FunctionLibrary,
    backend: ClientBackend,
    **settings: Any,
) -> Steps[SharedConnection]:
    """Connect to the server of a URL, or use a client if there is no URL; see `connect_url`."""
    if url is None:
        return connect_client(client, library, backend, **settings)
    return connect_url(url, library, backend, **settings)


def connect_url(
    url: str, library: FunctionLibrary, backend: ClientBackend, **settings: Any
) -> Steps[SharedConnection]:
    """Connect to the server of a URL, or share its present connections.

    Args:
        url: The server; see `urls.FORMS`.
        library: The function library to use.
        backend: Makes the connections.
        settings: See `Server`.

    Raises:
        ConfigurationError: The URL is invalid.
        ServerUnreachableError: Nothing answers there.
        ServerError: The server cannot be used.
        EmbeddedServerError: The bundled server did not start.
    """
    address = parse(url)
    key = (url, library.name, backend.scope, *sorted(settings.items()))
    user = object()
    with _lock:
        shared = _shared.setdefault(key, _Shared(backend))
        shared.users.add(user)

    def close() -> Steps[None]:
        with _lock:
            if user not in shared.users:
                return
            shared.users.discard(user)
            if shared.users:
                return
            if _shared.get(key) is shared:
                del _shared[key]
        yield from shared.opened.close()

    try:
        # A lock for each server: a caller that waits for one server must not block the others.
        starting = shared.starting
        yield Invoke(starting.acquire)
        try:
            if shared.opened.server is None:
                shared.opened = yield from _started(_open(address, library, backend, settings))
        finally:
            starting.release()
    except GeneratorExit:
        raise
    except BaseException:
        yield from close()
        raise
    server = shared.opened.server
    assert server is not None  # noqa: S101 - it was opened
    return SharedConnection(server, shared.opened.client, close)


def connect_client(
    client: Any, library: FunctionLibrary, backend: ClientBackend, **settings: Any
) -> Steps[SharedConnection]:
    """Use a client that the caller made, and leave it open.

    Args:
        client: A client of the backend's package.
        library: The function library to use.
        backend: Makes the connections.
        settings: See `Server`.

    Raises:
        ConfigurationError: The object is not such a client.
        ServerUnreachableError: Its server does not answer.
        ServerError: Its server cannot be used.
    """
    opened = yield from _started(_take(client, library, backend, settings))
    assert opened.server is not None  # noqa: S101 - it was opened
    return SharedConnection(opened.server, client, opened.close)


def make_cluster(cluster_class: Any, nodes: list[tuple[str, int]], options: dict[str, Any]) -> Any:
    """Make redis-py's client of a cluster, which connects at once."""
    startup: list[Any] = []
    try:
        for host, port in nodes:
            startup.append(ClusterNode(host, port))  # type: ignore[no-untyped-call]
        return cluster_class(startup_nodes=startup, **options)
    except BaseException:
        # Close the connections of a client whose constructor failed: redis-py does not.
        for node in startup:
            if node.redis_connection is not None:
                node.redis_connection.close()
        raise


def _started(opening: "Callable[[_Opened], Steps[None]]") -> Steps[_Opened]:
    """Open a server and start it; close everything again if that fails."""
    opened = _Opened()
    try:
        yield from opening(opened)
        server = opened.server
        assert server is not None  # noqa: S101 - opening sets it
        opened.closers.append(server.close)
        yield from server.start()
    except GeneratorExit:
        raise
    except BaseException:
        yield from opened.close()
        raise
    return opened


def _take(
    client: Any, library: FunctionLibrary, backend: ClientBackend, settings: dict[str, Any]
) -> Callable[[_Opened], Steps[None]]:
    """Open a server with a client that the user made."""

    def take(opened: _Opened) -> Steps[None]:
        opened.client = client
        if isinstance(client, backend.cluster_class):
            try:
                yield Invoke(backend.initialize, (client,))
            except (*GONE, RedisClusterException) as error:
                raise unreachable("the client's cluster", error.__cause__ or error) from error
            opened.server = _cluster_server(
                client, None, _known(client), library, backend, settings
            )
        elif isinstance(client, backend.client_class):
            node = backend.node(client)
            place = node.service or node.path or f"{node.host}:{node.port}"
            opened.server = Server(node, library, f"the client's server {place}", **settings)
        else:
            raise ConfigurationError(
                f"client= takes a {backend.package}.Redis or {backend.package}.RedisCluster, "
                f"{_instead(client)}"
            )

    return take


def _known(cluster: Any) -> list[tuple[str, int]]:
    """Return the nodes that a client of a cluster knows."""
    return [(node.host, node.port) for node in cluster.get_nodes() if node.host]


def _instead(client: Any) -> str:
    """Describe an argument that is not a client, and name the right one."""
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
    address: Address, library: FunctionLibrary, backend: ClientBackend, settings: dict[str, Any]
) -> Callable[[_Opened], Steps[None]]:
    """Open a server with clients that Phonon makes."""

    def open_it(opened: _Opened) -> Steps[None]:
        where = address
        if where.scheme == "embedded":
            handle = yield CallBlocking(embedded.start, (where.path or None,))
            opened.on_close(handle.close)
            where = where._replace(path=handle.socket_path, options=OPTIONS)
        _check_files(where)
        client = _plain_client(where, backend)
        if where.scheme == "redis+cluster":
            yield Invoke(backend.close, (client,))
            client = yield from _cluster_client(where, backend)
        elif where.scheme == "redis+sentinel":
            yield Invoke(backend.close, (client,))
            client = yield from _sentinel_client(where, backend, opened)
        opened.client = client
        opened.on_close(backend.close, client)
        if where.scheme == "redis+cluster":
            opened.server = _cluster_server(
                client, where.shown, where.nodes, library, backend, settings
            )
        else:
            opened.server = Server(backend.node(client), library, where.shown, **settings)

    return open_it


def _check_files(address: Address) -> None:
    """Name a missing file, because the error of the TLS library does not."""
    for name in _FILES:
        path = address.options.get(name)
        if path is not None and not Path(path).exists():
            raise ServerUnreachableError(
                f"{address.shown}: No such file: {path}, which its option {name} names"
            )


def _plain_client(address: Address, backend: ClientBackend) -> Any:
    """Make a client of the first node. This also proves that redis-py knows the options."""
    if address.scheme in ("unix", "embedded"):
        where: dict[str, Any] = {"unix_socket_path": address.path}
    else:
        host, port = address.nodes[0]
        where = {"host": host, "port": port}
    try:
        client = backend.client(**where, **address.options)
        # redis-py looks at some options only when it connects.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError, RedisError) as error:
        raise _unknown_option(address, set(address.options)) from error
    return client


def _unknown_option(address: Address, names: set[str]) -> ConfigurationError:
    named = ", ".join(sorted(names - OPTIONS.keys() - {"username", "password", "db", "ssl"}))
    return ConfigurationError(
        f"{address.shown}: redis-py does not know this option, or not this value of it, in a "
        f"{address.scheme} connection: {named}"
    )


def _cluster_client(address: Address, backend: ClientBackend) -> Steps[Any]:
    """Make a client of a cluster."""
    options = {name: value for name, value in address.options.items() if name != "retry"}
    if options.pop("db", 0):
        raise ConfigurationError(f"{address.shown}: a cluster has no database but 0; name none")
    unknown = options.keys() - set(REDIS_ALLOWED_KEYS)
    if unknown:  # redis-py would ignore them, and some are for safety
        raise _unknown_option(address, unknown)
    try:
        client = yield Invoke(backend.cluster, (backend.cluster_class, address.nodes, options))
    except IndexError as error:  # from redis-py 5
        failure = RedisError("none of its nodes has slots")
        raise unreachable(address.shown, failure) from error
    except RedisClusterException as error:
        if "not enabled" in str(error):
            raise failures.no_cluster(address.shown) from error
        raise unreachable(address.shown, error.__cause__ or error) from error
    except GONE as error:
        raise unreachable(address.shown, error) from error
    return client


def _cluster_server(
    client: Any,
    shown: str | None,
    given: list[tuple[str, int]],
    library: FunctionLibrary,
    backend: ClientBackend,
    settings: dict[str, Any],
) -> ClusterServer:
    def node_at(host: str, port: int) -> Node:
        return backend.node_of_cluster(client, host, port)

    known = _known(client)
    if shown is None:
        shown = "the client's cluster at " + ",".join(f"{host}:{port}" for host, port in known)
    remap = client.nodes_manager.remap_host_port
    return ClusterServer(node_at, remap, known, given, library, shown, **settings)


def _sentinel_client(address: Address, backend: ClientBackend, opened: _Opened) -> Steps[Any]:
    """Make a client of the primary, as the sentinels name it."""
    ssl = {name: value for name, value in address.options.items() if name.startswith("ssl")}
    try:
        sentinel = backend.sentinel(
            address.nodes,
            sentinel_kwargs={**OPTIONS, **ssl, **address.for_sentinel},
            **address.options,
        )
    except TypeError as error:
        names = {f"sentinel_{name}" for name in address.for_sentinel}
        raise _unknown_option(address, names) from error
    for client in sentinel.sentinels:
        opened.on_close(backend.close, client)
    yield from _check_sentinels([backend.node(client) for client in sentinel.sentinels], address)
    return sentinel.master_for(address.path)


def _check_sentinels(nodes: list[Node], address: Address) -> Steps[None]:
    """Name the problem of sentinels, or of the service name, because redis-py does not."""
    known: set[str] = set()
    failure: BaseException | None = None
    for node in nodes:
        share = Share(node, [(b"SENTINEL", b"MASTERS")], node.reply_timeout)
        try:
            yield RoundTrip([share])
        finally:
            yield Invoke(node.close)
        reply = share.failure if share.failure is not None else share.replies[0]
        if isinstance(reply, REFUSED) or str(reply).startswith(("NOAUTH", "WRONGPASS")):
            raise refused(
                f"a sentinel of {address.shown}",
                reply,
                "add ?sentinel_password= and, if it has users, &sentinel_username= to the URL",
            ) from reply
        if isinstance(reply, ResponseError):
            raise ConfigurationError(
                f"{address.shown}: there is no sentinel at this address ({reply}); their usual "
                f"port is {DEFAULT_SENTINEL_PORT}, and a server is redis://host:port/database"
            ) from reply
        if isinstance(reply, BaseException):
            failure = reply
            continue
        for facts in reply:
            known.add(facts[facts.index(b"name") + 1].decode(errors="replace"))
        if address.path in known:
            return
    if known or failure is None:
        raise ConfigurationError(
            f"{address.shown}: the sentinels watch no service {address.path!r}, but "
            f"{', '.join(map(repr, sorted(known))) or 'none'}"
        )
    raise unreachable(address.shown, failure)
