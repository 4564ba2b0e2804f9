"""Carries the transport's steps out in an event loop, on connections made with redis.asyncio.

All tasks share one connection to a node: requests are written in order, and the answers, which come
in the same order, are handed to the waiting tasks. When a caller is cancelled, or runs out of time,
its place stays in the queue: its answers are read and dropped. A command that blocks (a wait, or a
confirmation by the disk) has a connection of its own: otherwise all commands behind it would wait.

redis.asyncio makes a connection (TLS, log-in, sentinels); from then on its transport is ours.
"""

import asyncio
import contextlib
import inspect
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import redis.asyncio as aioredis
from hiredis import Reader, pack_command
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from phonon._transport import connect
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

_NOT_ENOUGH = object()
_CLOSED = "the connection is closed"

#: Connections that a forked child has from its parent. It must not even close them: closing would
#: remove the sockets from the selector, which the child shares with the parent.
_left_alone: list[Any] = []


class Slot:
    """The place of a share in a connection's queue.

    Attributes:
        due: The number of answers that have not come yet.
        replies: The list that gets them.
        done: Resolved when no answer is due any more.
        sent: The loop's time at which the share was sent.
    """

    __slots__ = ("done", "due", "replies", "sent", "share", "timer")

    def __init__(self, share: Share, loop: asyncio.AbstractEventLoop) -> None:
        self.share: Share | None = share
        self.due = len(share.commands)
        self.replies = share.replies
        self.done: asyncio.Future[None] = loop.create_future()
        self.sent = loop.time()
        self.timer: asyncio.TimerHandle | None = None

    def finish(self, failure: BaseException | None = None) -> None:
        """Let the caller go on."""
        if self.timer is not None:
            self.timer.cancel()
        if self.share is not None and failure is not None:
            self.share.failure = failure
        self.share = None
        settle(self.done)

    def abandon(self) -> None:
        """Read and drop the answers that are still to come: the caller has gone."""
        if self.timer is not None:
            self.timer.cancel()
        self.share = None
        self.replies = []


class Channel(asyncio.Protocol):
    """A connection to a server, for many tasks at once.

    Args:
        real: A connection of redis.asyncio's that has been made.
        silence: Seconds without any answer, while some are due, after which it counts as dead.
    """

    def __init__(self, real: Any, silence: float) -> None:
        self._real = real  # kept, because its destructor closes the transport
        self._loop = asyncio.get_running_loop()
        self._silence = silence
        self._slots: deque[Slot] = deque()
        self._heard = self._loop.time()
        self._retired = False
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._reader = Reader(
            protocolError=RedisConnectionError,
            replyError=ResponseError,
            notEnoughData=_NOT_ENOUGH,
        )
        # redis-py has no other names for them.
        stream, self._transport = real._reader, real._writer.transport  # noqa: SLF001
        if self._transport.is_closing() or stream.at_eof():
            real._close()  # noqa: SLF001
            raise RedisConnectionError("the server has closed the connection")
        self._transport.set_protocol(self)

    @property
    def is_usable(self) -> bool:
        """Return whether the connection can send a call."""
        return not self._retired and not self._transport.is_closing()

    @property
    def is_idle(self) -> bool:
        """Return whether no answer is due."""
        return not self._slots

    def send(self, share: Share, deadline: float) -> Slot:
        """Send commands. The slot is done when they are answered, or the connection is lost."""
        data = b"".join([pack_command(words) for words in share.commands])  # type: ignore[arg-type]  # it takes tuples of any length
        slot = Slot(share, self._loop)
        self._slots.append(slot)
        slot.timer = self._loop.call_at(deadline, self._run_out, slot)
        self._transport.write(data)
        return slot

    def retire(self) -> None:
        """Close the connection once the last due answer has come."""
        self._retired = True
        if not self._slots:
            self.abort()

    def abort(self, error: BaseException | None = None) -> None:
        """Close the connection now."""
        self._transport.abort()
        self._fail(error or RedisConnectionError(_CLOSED))

    def _run_out(self, slot: Slot) -> None:
        """Fail a caller whose time is up; if the server is silent, fail all callers."""
        share = slot.share
        if share is None:
            return
        slot.finish(RedisTimeoutError(f"no answer in {share.timeout:.1f} s"))
        slot.replies = []
        since = max(self._heard, self._slots[0].sent) if self._slots else self._loop.time()
        # A caller with a shorter time-out must not cut off the others.
        if share.alone or self._loop.time() - since >= self._silence * 0.99:
            self.abort(RedisTimeoutError("the server has not answered other calls either"))

    def _fail(self, error: BaseException) -> None:
        while self._slots:
            self._slots.popleft().finish(_copy(error))

    # asyncio calls these

    def data_received(self, data: bytes) -> None:
        """Hand answers to the waiting tasks."""
        self._heard = self._loop.time()
        reader, slots = self._reader, self._slots
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOT_ENOUGH:
                if not slots:
                    raise RedisConnectionError("the server has said something unasked")  # noqa: TRY301 - handled like the reader's errors
                slot = slots[0]
                slot.replies.append(reply)
                slot.due -= 1
                if not slot.due:
                    slots.popleft()
                    slot.finish()
        except RedisConnectionError as error:
            self.abort(error)
            return
        if self._retired and not slots:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail all tasks that wait for an answer."""
        self._real._writer = self._real._reader = None  # noqa: SLF001 - it is closed
        self._fail(RedisConnectionError(str(exc) if exc else "the server has closed it"))
        settle(self.lost)


def settle(future: "asyncio.Future[Any]", result: Any = None) -> None:
    """Let those go on that wait for a future, if any do.

    A signal handler may cancel a task at any moment, as asyncio's own for SIGINT does; so it is no
    use to ask before whether the future is done.
    """
    with contextlib.suppress(asyncio.InvalidStateError):
        future.set_result(result)


def _copy(error: BaseException) -> BaseException:
    """Return a copy of an error for another task: each raise adds to an error's traceback."""
    try:
        return type(error)(*error.args)
    except TypeError:  # its class takes other arguments
        return RedisConnectionError(str(error))


class AsyncNode(Node):
    """An address, with its connections in one event loop.

    Args:
        connection_class: See `Node`.
        options: See `Node`.
        service: See `Node`.
    """

    def __init__(
        self, connection_class: Any, options: dict[str, Any], service: str | None = None
    ) -> None:
        super().__init__(connection_class, options, service)
        self._shared: Channel | None = None
        self._connecting: asyncio.Task[Channel] | None = None
        self._idle: list[Channel] = []
        self._channels: set[Channel] = set()
        self._closed = False

    @staticmethod
    def no_retry() -> Any:
        """Return redis.asyncio's object for "no retries"."""
        return Retry(NoBackoff(), 0)

    def ready(self, *, alone: bool) -> Channel | None:
        """Return a connection that can be used at once."""
        if not alone:
            return self._shared if self._shared is not None and self._shared.is_usable else None
        while self._idle:
            channel = self._idle.pop()
            if channel.is_usable and channel.is_idle:
                return channel
        return None

    def begin(self) -> "asyncio.Task[Channel]":
        """Begin to make the shared connection, unless that is under way.

        It is a task, so that a thousand callers wait for one attempt and get its error, even if
        the first of them is cancelled.
        """
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._open())
            self._connecting.add_done_callback(self._connected)
        return self._connecting

    async def open_alone(self, deadline: float) -> Channel:
        """Make a connection for one caller, before a deadline by the loop's time.

        Raises:
            Exception: One of `GONE`, or a ``ResponseError``.
        """
        async with asyncio.timeout_at(deadline):
            return await self._open()

    def give_back(self, channel: Channel) -> None:
        """Keep a connection that a caller does not need any more."""
        if self._closed or not channel.is_idle:
            channel.abort()
        elif channel.is_usable:
            self._idle.append(channel)

    def retire(self) -> None:
        """Use the present connections for no new call."""
        shared, self._shared = self._shared, None
        idle, self._idle = self._idle, []
        for channel in (*idle, *([] if shared is None else [shared])):
            channel.retire()

    def forget(self) -> None:
        """Leave all connections alone in a forked child."""
        _left_alone.append((self, self._shared, self._idle, self._channels, self._connecting))
        self._shared = self._connecting = None
        self._idle, self._channels = [], set()

    async def close(self) -> None:
        """Close all connections, and wait until they are closed."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        channels = list(self._channels)
        for channel in channels:
            channel.abort()
        for channel in channels:
            await channel.lost
        self._shared, self._idle = None, []

    async def _open(self) -> Channel:
        if self._closed:
            raise RedisConnectionError(_CLOSED)
        real = self.connection_class(**self.options)
        try:
            # One limit for the TCP connection, and one for the log-in on it.
            async with asyncio.timeout(self.connect_timeout + self.reply_timeout):
                await real.connect()
            channel = Channel(real, self.reply_timeout)
        except TimeoutError as error:
            real._close()  # noqa: SLF001 - without waiting for the other side
            raise RedisTimeoutError("Timeout connecting to server") from error
        except BaseException:
            real._close()  # noqa: SLF001
            raise
        if self._closed:
            channel.abort()
            raise RedisConnectionError(_CLOSED)
        self._channels.add(channel)
        channel.lost.add_done_callback(lambda _: self._channels.discard(channel))
        return channel

    def _connected(self, task: "asyncio.Task[Channel]") -> None:
        if self._connecting is task:
            self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._shared = task.result()


async def run(steps: Steps[T]) -> T:
    """Carry steps out, in this task, and return their result."""
    result: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = steps.send(result) if failure is None else steps.throw(failure)
        except StopIteration as stop:
            return cast("T", stop.value)
        result = failure = None
        try:
            result = await _perform(step)
        except BaseException as error:  # noqa: BLE001 - thrown into the steps, which may clean up
            failure = error


async def _perform(step: Step) -> Any:
    if isinstance(step, RoundTrip):
        return await _round_trip(step.shares)
    if isinstance(step, Pause):
        return await asyncio.sleep(step.seconds)
    if isinstance(step, CallBlocking):
        return await asyncio.to_thread(step.function, *step.args)
    assert isinstance(step, Invoke)  # noqa: S101 - there is no other step
    result = step.function(*step.args)
    return await result if inspect.isawaitable(result) else result


async def _round_trip(shares: Sequence[Share]) -> None:
    """Send all shares before any answer is awaited: the nodes work side by side."""
    sent: list[tuple[Share, Channel, Slot]] = []
    try:
        await _send(shares, sent)
        for share, channel, slot in sent:
            await slot.done
            if share.alone:
                cast("AsyncNode", share.node).give_back(channel)
    except BaseException:
        for share, channel, slot in sent:
            slot.abandon()
            if share.alone and not channel.is_idle:
                channel.abort()  # a wait must not take an element that no task gets
        raise


async def _send(shares: Sequence[Share], sent: list[tuple[Share, Channel, Slot]]) -> None:
    """Send shares, first those that need no new connection, because connecting takes time."""
    start = asyncio.get_running_loop().time()
    waiting: list[Share] = []
    for share in shares:
        node = cast("AsyncNode", share.node)
        channel = node.ready(alone=share.alone)
        if channel is None:
            waiting.append(share)
            if not share.alone:
                node.begin()
        else:
            sent.append((share, channel, channel.send(share, start + share.timeout)))
    for share in waiting:
        channel = await _connect(share, start + share.timeout)
        if channel is not None:
            sent.append((share, channel, channel.send(share, start + share.timeout)))


async def _connect(share: Share, deadline: float) -> Channel | None:
    """Wait for a connection for a share. If there is none, the share has the reason."""
    node = cast("AsyncNode", share.node)
    try:
        if share.alone:
            return await node.open_alone(deadline)
        task = node.begin()
        left = deadline - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait([task], timeout=max(left, 0))
        if not done:
            share.failure = RedisTimeoutError("Timeout connecting to server")
        elif task.cancelled():
            share.failure = RedisConnectionError(_CLOSED)
        elif (error := task.exception()) is not None:
            share.failure = _copy(error)
        elif task.result().is_usable:
            return task.result()
        else:
            share.failure = RedisConnectionError(_CLOSED)
    except TimeoutError:
        share.failure = RedisTimeoutError("Timeout connecting to server")
    except (*GONE, ResponseError) as error:
        share.failure = error
    return None


# The client backend


def _node(client: Any) -> Node:
    pool = client.connection_pool
    service = getattr(pool, "service_name", None)
    return AsyncNode(pool.connection_class, pool.connection_kwargs, service)


def _node_of_cluster(client: Any, host: str, port: int) -> Node:
    options = dict(client.get_connection_kwargs())
    for name in ("response_callbacks", "max_connections"):
        options.pop(name, None)
    connection_class = options.pop("connection_class", Connection)
    return AsyncNode(connection_class, {**options, "host": host, "port": port})


def _client(**options: Any) -> Any:
    return aioredis.Redis(**_translated(options))


def _sentinel(nodes: Any, sentinel_kwargs: dict[str, Any], **options: Any) -> Any:
    return Sentinel(  # type: ignore[no-untyped-call]  # redis-py lacks types
        nodes, sentinel_kwargs=_translated(sentinel_kwargs), **_translated(options)
    )


def _translated(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of redis-py as redis.asyncio takes them."""
    return {**options, "retry": Retry(NoBackoff(), 0)} if "retry" in options else options


async def _make_cluster(
    cluster_class: Any, nodes: list[tuple[str, int]], options: dict[str, Any]
) -> Any:
    startup = [ClusterNode(host, port) for host, port in nodes]
    client = cluster_class(startup_nodes=startup, **options)
    try:
        await client.initialize()
    except BaseException:
        with contextlib.suppress(Exception):
            await client.aclose()
        raise
    return client


async def _initialize(client: Any) -> None:
    await client.initialize()


async def _close(client: Any) -> None:
    await client.aclose()


def backend(loop: asyncio.AbstractEventLoop) -> connect.ClientBackend:
    """Return the backend of redis.asyncio for an event loop."""
    return connect.ClientBackend(
        package="redis.asyncio",
        client=_client,
        client_class=aioredis.Redis,
        cluster_class=aioredis.RedisCluster,
        cluster=_make_cluster,
        sentinel=_sentinel,
        node=_node,
        node_of_cluster=_node_of_cluster,
        close=_close,
        initialize=_initialize,
        lock=asyncio.Lock,
        scope=loop,
    )
