"""Carries the transport's steps out in threads, on connections made with redis-py.

redis-py makes a connection (TLS, log-in, sentinels); from then on the socket is ours, with a
deadline for each exchange. A connection is in its node's idle list only while no answer is due on
it: it is taken out before anything is sent and put back after the last answer, so an exception that
a signal handler raises, at any bytecode, leaves it out, and its answers are never read by
another caller.
"""

import contextlib
import os
import select
import socket
import struct
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import redis
from hiredis import Reader, pack_command
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from phonon._protocol.library import Request
from phonon._transport import connect
from phonon._transport.server import Server
from phonon._transport.steps import (
    GONE,
    CallBlocking,
    Invoke,
    Node,
    Pause,
    RoundTrip,
    Share,
    Step,
    Steps,
)

T = TypeVar("T")

_RECEIVE = 1 << 16
_NOT_ENOUGH = object()
_getpid = os.getpid


class Connection:
    """A connection to a server.

    Args:
        node: The node to connect to.
        deadline: The time, by ``time.monotonic``, until which to connect.
    """

    __slots__ = ("__weakref__", "_real", "_timeout", "closed", "pid", "reader", "sock")

    def __init__(self, node: Node, deadline: float) -> None:
        self.closed = False
        self.pid = _getpid()
        options = dict(node.options)
        left = max(deadline - time.monotonic(), 0.001)
        for name in ("socket_timeout", "socket_connect_timeout"):
            options[name] = min(options[name], left)
        # Kept: it closes the socket when this object is dropped, after an interrupt for example.
        self._real: Any = node.connection_class(**options)
        try:
            self._real.connect()
        except BaseException:
            self.close()
            raise
        self.sock: socket.socket = self._real._sock  # noqa: SLF001 - redis-py has no other name for it
        self._timeout = _kernel_timeout(self.sock, node.reply_timeout)
        self.rest()
        self.reader = Reader(
            protocolError=RedisConnectionError,
            replyError=ResponseError,
            notEnoughData=_NOT_ENOUGH,
        )

    def rest(self) -> None:
        """Use the node's reply time-out from now on, instead of a deadline."""
        self.sock.settimeout(self._timeout)

    def send(self, data: bytes, deadline: float) -> None:
        """Send commands.

        Raises:
            Exception: One of `GONE`.
        """
        self.sock.settimeout(_left(deadline))
        self.sock.sendall(data)

    def read(self, deadline: float) -> Any:
        """Read an answer; an error is returned.

        Raises:
            Exception: One of `GONE`.
        """
        reader = self.reader
        reply = reader.gets()
        while reply is _NOT_ENOUGH:
            self.sock.settimeout(_left(deadline))
            data = self.sock.recv(_RECEIVE)
            if not data:
                raise RedisConnectionError("the server has closed the connection")
            reader.feed(data)
            reply = reader.gets()
        return reply

    def is_stale(self) -> bool:
        """Return whether the server has closed the connection, or has sent something unasked."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def interrupt(self) -> None:
        """Make a thread that reads from the connection see its end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. In a forked child this does not disturb the parent."""
        self.closed = True
        self._real.disconnect()


def _kernel_timeout(sock: socket.socket, seconds: float) -> float | None:
    """Let the kernel watch the time, if it can: a timeout of Python's polls before each call.

    Returns:
        The timeout that Python has to watch.
    """
    # OpenSSL would wait again, and so would the event loop behind a monkey-patched socket.
    if type(sock).__module__ != "socket" or sys.platform == "win32":
        return seconds
    timeval = struct.pack("@ll", *divmod(int(seconds * 1_000_000), 1_000_000))
    try:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, timeval)
    except OSError:
        return seconds  # the system's struct timeval is different
    return None


def _left(deadline: float) -> float:
    """Return the seconds until a deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise RedisTimeoutError("no answer in time")
    return left


class SyncNode(Node):
    """An address, with its idle connections.

    Args:
        connection_class: See `Node`.
        options: See `Node`.
        service: See `Node`.
    """

    def __init__(
        self, connection_class: Any, options: dict[str, Any], service: str | None = None
    ) -> None:
        super().__init__(connection_class, options, service)
        self.idle: list[Connection] = []
        self._made: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._alone: set[Connection] = set()
        self.closed = False

    @staticmethod
    def no_retry() -> Any:
        """Return redis-py's object for "no retries"."""
        return Retry(NoBackoff(), 0)

    def take(self, deadline: float, *, alone: bool = False) -> Connection:
        """Take an idle connection that is alive, or make one."""
        connection = self._pop()
        while connection is not None and (connection.closed or connection.is_stale()):
            connection.close()
            connection = self._pop()
        if connection is None:
            connection = Connection(self, deadline)
            self._made.add(connection)
        if alone:
            self._alone.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Put back a connection on which no answer is due."""
        self._alone.discard(connection)
        connection.rest()
        self.idle.append(connection)
        if self.closed:
            self.retire()

    def drop(self, connection: Connection) -> None:
        """Close a connection on which answers may be due."""
        connection.close()
        self._alone.discard(connection)

    def retire(self) -> None:
        """Close the idle connections. A connection in use fails at its next read."""
        while (connection := self._pop()) is not None:
            connection.close()

    def forget(self) -> None:
        """Close the copies of the parent's sockets, in a forked child.

        These include sockets that frames of the child still read from, if a signal handler has
        forked during a call. The parent's connections stay intact: a copy is not shut down.
        """
        self.idle = [connection for connection in self.idle if connection.pid == _getpid()]
        self._alone = set()
        for connection in list(self._made):
            if connection.pid != _getpid():
                connection.close()

    def close(self) -> None:
        """Close the idle connections now, and those in use when they come back. End all waits."""
        self.closed = True
        self.retire()
        for connection in list(self._alone):
            connection.interrupt()

    def _pop(self) -> Connection | None:
        try:
            connection = self.idle.pop()
        except IndexError:
            return None
        if connection.pid != _getpid():
            # A fork without a call of the fork hooks.
            self.forget()
            connection.close()
            return None
        return connection


def exchange_now(server: Server, request: Request) -> Any:
    """Send one request on an idle connection, without retries.

    Args:
        server: The server.
        request: The request.

    Returns:
        The answer. None after any problem, when it is unknown if the request was carried out: then
        `Server.exchange` repeats it, byte for byte, and handles the problem. This function does
        not wait for `Durability`.
    """
    if len(request.words[-1]) > server.most_bytes:
        return None
    node: SyncNode = server.node_of(request.key)  # type: ignore[assignment]  # all of ours are
    connection = None
    try:
        connection = node.idle.pop()
        if connection.pid != _getpid() or connection.closed:
            node.forget()
            connection.close()
            return None
        connection.sock.sendall(pack_command(request.words))  # type: ignore[arg-type]  # see _send
        server.round_trips += 1
        reader = connection.reader
        reader.feed(connection.sock.recv(_RECEIVE))
        reply = reader.gets()
        if reply is _NOT_ENOUGH:
            reply = connection.read(time.monotonic() + node.reply_timeout)
            connection.rest()
    except IndexError:
        return None
    except GONE:
        if connection is not None:
            connection.close()
        node.retire()  # the other idle connections are probably dead as well
        return None
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    node.idle.append(connection)
    if node.closed:
        node.retire()
    return None if isinstance(reply, ResponseError) else reply


class Flight:
    """Requests on an idle connection, sent in groups before any answer is read.

    As with `exchange_now` any problem ends it; `Server.exchange` repeats the requests without
    answers.

    Args:
        node: The connection's node.
        connection: The connection, which is in no list.
    """

    __slots__ = ("_connection", "_node", "_sent")

    def __init__(self, node: SyncNode, connection: Connection) -> None:
        self._node = node
        self._connection: Connection | None = connection
        self._sent = 0

    def send(self, requests: Sequence[Request]) -> bool:
        """Send requests. Return whether they were sent."""
        connection = self._connection
        if connection is None:
            return False
        data = b"".join([pack_command(request.words) for request in requests])  # type: ignore[arg-type]  # see _send
        try:
            connection.send(data, time.monotonic() + self._node.reply_timeout)
        except GONE:
            self.abort()
            return False
        self._sent += len(requests)
        return True

    def land(self) -> Iterator[Any]:
        """Read the answers in order, up to the first problem."""
        connection = self._connection
        if connection is None:
            return
        deadline = time.monotonic() + self._node.reply_timeout
        try:
            for left in reversed(range(self._sent)):
                reply = connection.read(deadline)
                if not left:
                    self._connection = None
                    self._node.give_back(connection)
                yield reply  # worked on while the server makes the next one
        except GONE:
            self.abort()
            self._node.retire()

    def abort(self) -> None:
        """Close the connection, unless all answers were read."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def take_off(node: Node) -> Flight | None:
    """Return a flight on an idle connection, if there is one."""
    ours = cast("SyncNode", node)
    try:
        connection = ours.idle.pop()
    except IndexError:
        return None
    if connection.pid != _getpid() or connection.closed:
        ours.forget()
        connection.close()
        return None
    return Flight(ours, connection)


def run(steps: Steps[T]) -> T:
    """Carry steps out, in this thread, and return their result."""
    result: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = steps.send(result) if failure is None else steps.throw(failure)
        except StopIteration as stop:
            return cast("T", stop.value)
        result = failure = None
        try:
            result = _perform(step)
        except BaseException as error:  # noqa: BLE001 - thrown into the steps, which may clean up
            failure = error


def _perform(step: Step) -> Any:
    if isinstance(step, RoundTrip):
        return _round_trip(step.shares)
    if isinstance(step, Pause):
        return time.sleep(step.seconds)
    assert isinstance(step, CallBlocking | Invoke)  # noqa: S101 - there is no other step
    return step.function(*step.args)


def _round_trip(shares: Sequence[Share]) -> None:
    """Send all shares before any answer is read: the nodes work side by side."""
    under_way: list[tuple[Share, Connection, float]] = []
    try:
        # First those that need no new connection: connecting to a dead network takes time.
        for share in sorted(shares, key=_has_no_idle) if len(shares) > 1 else shares:
            _send(share, under_way)
        while under_way:
            share, connection, deadline = under_way[0]
            _read(share, connection, deadline)
            del under_way[0]
    except BaseException:
        # Interrupted with answers still to come, which no other caller must take for its own.
        for share, connection, _ in under_way:
            cast("SyncNode", share.node).drop(connection)
        raise


def _has_no_idle(share: Share) -> bool:
    return not cast("SyncNode", share.node).idle


def _send(share: Share, under_way: list[tuple[Share, Connection, float]]) -> None:
    node = cast("SyncNode", share.node)
    connection = None
    try:
        deadline = time.monotonic() + share.timeout
        connection = node.take(deadline, alone=share.alone)
        data = b"".join([pack_command(words) for words in share.commands])  # type: ignore[arg-type]  # it takes tuples of any length
        connection.send(data, deadline)
        under_way.append((share, connection, deadline))
    except (*GONE, ResponseError) as error:  # an error of the server's: while connecting
        share.failure = error
        if connection is not None:
            node.drop(connection)
        node.retire()
    except BaseException:
        if connection is not None:
            node.drop(connection)
        raise


def _read(share: Share, connection: Connection, deadline: float) -> None:
    node = cast("SyncNode", share.node)
    try:
        while len(share.replies) < len(share.commands):
            share.replies.append(connection.read(deadline))
    except GONE as error:
        share.failure = _told(error, share)
        node.drop(connection)
        node.retire()
        return
    node.give_back(connection)


def _told(error: BaseException, share: Share) -> BaseException:
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return RedisTimeoutError(f"no answer in {share.timeout:.1f} s")
    return error


# The client backend


def _node(client: Any) -> Node:
    pool = client.connection_pool
    service = getattr(pool, "service_name", None)
    return SyncNode(pool.connection_class, pool.connection_kwargs, service)


def _node_of_cluster(client: Any, host: str, port: int) -> Node:
    # A separate node object, so that the client's changes to its own nodes do not affect it.
    place = ClusterNode(host, port)  # type: ignore[no-untyped-call]  # redis-py lacks types
    return _node(client.get_redis_connection(place))


def _close_client(client: Any) -> None:
    client.close()


#: Makes clients and nodes with redis-py.
BACKEND = connect.ClientBackend(
    package="redis",
    client=redis.Redis,
    client_class=redis.Redis,
    cluster_class=redis.RedisCluster,
    cluster=connect.make_cluster,
    sentinel=Sentinel,
    node=_node,
    node_of_cluster=_node_of_cluster,
    close=_close_client,
)
