"""One server, or the primary that a sentinel names: sends requests, survives lost connections."""

import logging
import random
import re
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from phonon._core.settings import Durability
from phonon._protocol.library import Request
from phonon._transport import failures
from phonon._transport.failures import is_passing, lacks_library
from phonon._transport.steps import GONE, Invoke, Node, Pause, RoundTrip, Share, Steps
from phonon.errors import ConfigurationError, ConnectionLostError, ServerError, ServerTooOldError

__all__ = ["FIRST_PAUSE", "FunctionLibrary", "Reply", "Request", "Server", "after_fork_in_child"]

log = logging.getLogger("phonon")

#: Seconds; the pauses between attempts to reach a server double from the first to the longest.
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 1.0
#: Seconds that count as no time: a timer may be early by this.
AT_ONCE = 0.001
#: The least time-out of an attempt, in seconds, even if the caller's time is nearly up.
SHORTEST_TIMEOUT = 0.05
#: Seconds that the server may be late with the answer to a wait.
WAIT_GRACE = 5.0
#: Seconds that it may be late with a confirmation: it checks its clock ten times a second.
CONFIRM_GRACE = 1.0
#: Seconds before `Server.wait` returns if the server is gone.
WAIT_PAUSE = 0.1

UNANSWERED = object()

#: The answer to a request: the server's, its error, or Phonon's error if there is none.
Reply: TypeAlias = Any | ResponseError | ConnectionLostError


class FunctionLibrary(Protocol):
    """The function library that the server must have."""

    @property
    def name(self) -> str:
        """Its name, which changes with its text."""

    @property
    def source(self) -> str:
        """Its text."""


_servers: "weakref.WeakSet[Server]" = weakref.WeakSet()


def after_fork_in_child() -> None:
    """Drop the connections of all servers, because they are the parent's."""
    for server in list(_servers):
        server.forget_connections()


class Server:
    """Sends requests to one Redis or Valkey server.

    Args:
        node: Makes the connections.
        library: The function library, loaded when the server lacks it.
        address: The server's name in messages, without a password.
        longest_pause: Seconds between two attempts, at the most.
        durability: The safety of data before a request that wants confirmation is answered.
        may_lack_library: Whether a user without the right to load the library can use the server:
            it may be loaded already, and otherwise the first call shows that it is missing.

    Attributes:
        troubles: The number of attempts that left a request unanswered.
        round_trips: The number of times that requests were sent and answers awaited. Requests that
            are sent together count as one, and blocking reads of mail do not count.
        trouble: The reason why the last attempt left a request unanswered, or None.
        most_bytes: The longest word that a request may have. A server hangs up on a longer one, so
            that it seems to be gone.
    """

    #: Whether one ``BLMPOP`` may name lists of several partitions.
    colocated = True

    def __init__(
        self,
        node: Node,
        library: FunctionLibrary,
        address: str,
        *,
        longest_pause: float = LONGEST_PAUSE,
        durability: Durability | None = None,
        may_lack_library: bool = False,
    ) -> None:
        self.may_lack_library = may_lack_library
        self.library = library
        self.address = address
        self.longest_pause = longest_pause
        self.durability = durability
        self.troubles = self.round_trips = 0
        self.trouble: BaseException | None = None
        self.most_bytes = _MOST_BYTES
        self._node = node
        _servers.add(self)

    def start(self) -> Steps[None]:
        """Check that the server is usable, and load the library.

        Raises:
            ServerUnreachableError: Nothing answers.
            AuthenticationError: The server wants other credentials.
            ServerTooOldError: It has no Functions.
            ConfigurationError: It is a node of a cluster, a sentinel or a replica, or cannot
                confirm the calls, as ``durability`` demands.
        """
        try:
            yield from self._prepare(self._node, check_mode=True)
        except GONE as error:
            raise failures.unreachable(self.address, error) from error
        except ResponseError as error:
            raise self.explain(error) from error

    def exchange(
        self, requests: Sequence[Request], patience: float, *, confirm: bool = False
    ) -> Steps[list[Reply]]:
        """Send requests together, and repeat those without an answer.

        Args:
            requests: The requests; a repeated one is the same, byte for byte.
            patience: Seconds after the first sending in which they are repeated; with 0 they are
                sent once.
            confirm: Whether answers count only once data is as safe as ``durability`` demands.

        Returns:
            The answer or the error of each request, in order.
        """
        replies: list[Reply] = [UNANSWERED] * len(requests)
        unanswered: list[int] = list(range(len(requests)))
        give_up = time.monotonic() + patience
        pause = FIRST_PAUSE
        limit: float | None = patience or None
        while True:
            self.round_trips += 1
            failure = yield from self._attempt(requests, unanswered, replies, limit, confirm)
            unanswered = [i for i in unanswered if replies[i] is UNANSWERED]
            if not unanswered:
                self.trouble = None
                return replies
            if str(failure).startswith("READONLY"):
                failure = yield from self._demoted(self.node_of(requests[unanswered[0]].key))
            self.trouble = failure
            self.troubles += 1
            left = give_up - time.monotonic()
            if left < AT_ONCE or isinstance(failure, failures.REFUSED):
                for i in unanswered:
                    replies[i] = self.lost(failure)  # one each: a raise extends its traceback
                return replies
            yield Pause(min(left, pause * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
            pause = min(pause * 2, self.longest_pause)
            limit = max(give_up - time.monotonic(), SHORTEST_TIMEOUT)

    def wait(self, keys: Sequence[bytes], timeout: float) -> Steps[list[bytes]]:
        """Wait for elements in lists, and take those of one list, on a separate connection.

        Args:
            keys: The lists; in a cluster all of one slot.
            timeout: Seconds.

        Returns:
            The elements; none if none came in time, or the server is gone.

        Raises:
            ServerError: The server refuses to wait.
        """
        node = self.node_of(keys[0])
        seconds, count = b"%.3f" % max(timeout, 0.001), b"%d" % len(keys)
        words = (b"BLMPOP", seconds, count, *keys, b"LEFT", b"COUNT", _MOST_ELEMENTS)
        share = Share(node, [words], timeout + WAIT_GRACE, alone=True)
        yield RoundTrip([share])
        reply = share.replies[0] if share.replies else None
        if share.failure is not None or (isinstance(reply, ResponseError) and is_passing(reply)):
            # The wait ends with an error if the server is demoted, or gives the slot away.
            if isinstance(reply, ResponseError):
                self._note(node, reply)
            yield Pause(min(timeout, WAIT_PAUSE))
            return []
        if isinstance(reply, ResponseError):
            raise self.explain(reply, keys)
        elements: list[bytes] = [] if reply is None else reply[1]
        return elements

    def close(self) -> Steps[None]:
        """Close the connections; a wait in another thread ends."""
        yield Invoke(self._node.close)

    def forget_connections(self) -> None:
        """Drop the connections after a fork, because they are the parent's."""
        self._node.forget()

    def node_of(self, key: bytes) -> Node:  # noqa: ARG002 - a cluster needs it
        """Return the node that has a key."""
        return self._node

    def explain(self, error: ResponseError, keys: Sequence[bytes | str] = ()) -> Exception:
        """Turn a server's error into one that names the remedy."""
        return failures.explain(self.address, error, keys)

    def lost(self, error: BaseException | None) -> ConnectionLostError:
        """Return the error for a server that stopped answering during a call."""
        return failures.lost(self.address, error or self.trouble)

    # One attempt

    def _attempt(
        self,
        requests: Sequence[Request],
        indices: Sequence[int],
        replies: list[Reply],
        limit: float | None,
        confirm: bool,
    ) -> Steps[BaseException | None]:
        """Send requests once and take their answers.

        Requests that must be sent again stay unanswered.

        Returns:
            Why some are unanswered; None if all are answered.
        """
        shares: dict[Node, list[int]] = {}
        for i in indices:
            shares.setdefault(self.node_of(requests[i].key), []).append(i)
        confirm = confirm and self.durability is not None
        sent = [
            self._share(node, [requests[i].words for i in mine], limit, confirm)
            for node, mine in shares.items()
        ]
        yield RoundTrip(sent)
        failure: BaseException | None = None
        for share, mine in zip(sent, shares.values(), strict=True):
            problem = yield from self._take(share, mine, replies, confirm)
            failure = problem or failure
        return failure

    def _share(
        self, node: Node, commands: list[tuple[bytes, ...]], limit: float | None, confirm: bool
    ) -> Share:
        timeout = node.reply_timeout if limit is None else min(node.reply_timeout, limit)
        if confirm and self.durability is not None:
            # Last on its own connection: a call behind it would wait for the disk too.
            commands = [*commands, self.durability.command]
            timeout += self.durability.timeout + CONFIRM_GRACE
            return Share(node, commands, timeout, alone=True)
        return Share(node, commands, timeout)

    def _take(
        self, share: Share, indices: Sequence[int], replies: list[Reply], confirm: bool
    ) -> Steps[BaseException | None]:
        """Take the answers of a share. Return why some of its requests have none."""
        if isinstance(share.failure, ResponseError):
            # The error came while connecting: the database, or the right to use it, is gone.
            for i in indices:
                replies[i] = share.failure
            return None
        failure = share.failure
        safe = not confirm or self._is_safe(share, len(indices))
        lacking = []
        for i, reply in zip(indices, share.replies, strict=False):
            if isinstance(reply, ResponseError) and (is_passing(reply) or lacks_library(reply)):
                failure = failure or reply
                self._note(share.node, reply)
                if lacks_library(reply):
                    lacking.append(i)
            elif safe or isinstance(reply, ResponseError):
                replies[i] = reply
            # An unconfirmed request is repeated: that changes nothing, and asks for it again.
        if lacking:
            failure = (yield from self._reload(share.node, lacking, replies)) or failure
        if not safe and failure is None:
            failure = RedisTimeoutError(f"data is not as safe as {self.durability} demands")
        return failure

    def _reload(
        self, node: Node, indices: Sequence[int], replies: list[Reply]
    ) -> Steps[BaseException | None]:
        """Load the library for requests that missed it. If that fails, they get the error."""
        problem = yield from self._load(node)
        if isinstance(problem, ResponseError) and not is_passing(problem):
            for i in indices:
                replies[i] = problem
        return problem

    def _is_safe(self, share: Share, count: int) -> bool:
        """Return whether the server has confirmed that the share's data is safe."""
        if self.durability is None or len(share.replies) <= count:
            return False
        reply = share.replies[count]
        # An error means: the append-only file was switched off, or the server is a replica now.
        return not isinstance(reply, ResponseError) and self.durability.is_reached(reply)

    def _note(self, node: Node, error: ResponseError) -> None:
        """Learn from a temporary error."""
        if str(error).startswith(failures.DEMOTED):
            node.retire()

    def _demoted(self, node: Node) -> Steps[BaseException]:
        """Return the error for a server that refuses writes; it names the primary."""
        where = "unknown"
        try:
            (role,) = yield from self._commands(node, (b"ROLE",))
            if isinstance(role, list) and role[0] == b"slave":
                where = f"{role[1].decode()}:{role[2]}"
        except (*GONE, ResponseError):
            pass  # the error then says only that the server is a replica
        return RedisConnectionError(f"it is a replica now, and its primary is at {where}")

    # Single commands

    def _commands(self, node: Node, *commands: tuple[bytes, ...]) -> Steps[list[Any]]:
        """Send commands to one node. Return their answers or errors.

        Raises:
            Exception: One of `GONE`, or a ``ResponseError`` while connecting.
        """
        share = Share(node, list(commands), node.reply_timeout)
        yield RoundTrip([share])
        if share.failure is not None:
            raise share.failure
        return share.replies

    def _load(self, node: Node) -> Steps[BaseException | None]:
        """Load the library. Return the error, or None."""
        try:
            command = (b"FUNCTION", b"LOAD", self.library.source.encode())
            reply = (yield from self._commands(node, command))[0]
        except (*GONE, ResponseError) as error:
            return error
        if isinstance(reply, ResponseError) and "already exists" not in str(reply):
            return reply
        return None  # loaded, perhaps by another process a moment earlier

    # The start

    def _prepare(self, node: Node, *, check_mode: bool) -> Steps[None]:
        """Check one server, and load the library there."""
        info, *limits = yield from self._commands(node, (b"INFO",), *_LIMITS)
        # Start even if the user has no right to ask: a call that needs a right will show it.
        facts = _facts(info) if isinstance(info, bytes) else {}
        if facts.get("loading", "0") != "0":  # its appendonly, for one, looks as if it were off
            raise RedisConnectionError("LOADING the server reads its data from the disk")
        self.most_bytes = min(self.most_bytes, *map(_limit, limits))
        if check_mode:
            self._check_mode(node, facts)
        problem = yield from self._load(node)
        if self.may_lack_library and str(problem).startswith("NOPERM"):
            problem = None
        if problem is not None:
            text = str(problem)
            if "unknown command" in text.lower():
                raise self._too_old(facts) from problem
            _wait_out(problem)
            raise problem
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            log.warning(
                "%s has maxmemory-policy %s: under memory pressure it deletes keys that Phonon "
                "needs; set maxmemory-policy noeviction there",
                self.address,
                policy,
            )
        yield from self._check_durability(node, facts)

    def _check_mode(self, node: Node, facts: dict[str, str]) -> None:
        if facts.get("cluster_enabled") == "1":
            raise ConfigurationError(
                f"{self.address} is a node of a cluster: connect with redis+cluster://host:port"
            )
        if "sentinel" in (facts.get("redis_mode"), facts.get("server_mode")):
            raise ConfigurationError(
                f"{self.address} is a sentinel: connect with redis+sentinel://host:port/service"
            )
        if facts.get("role") == "slave" and node.service is None:
            primary = f"{facts.get('master_host')}:{facts.get('master_port')}"
            raise ConfigurationError(
                f"{self.address} is a replica; its primary is at {primary}: connect there"
            )

    def _check_durability(self, node: Node, facts: dict[str, str]) -> Steps[None]:
        """Check that the server can give the demanded confirmation."""
        if self.durability is None:
            return
        reason = None
        if self.durability.fsync and facts.get("aof_enabled") == "0":
            reason = "its appendonly is no"
        else:
            command = self.durability._replace(replicas=0, timeout=0.001).command
            reply = (yield from self._commands(node, command))[0]
            _wait_out(reply)  # it was restarted meanwhile
            reason = str(reply) if isinstance(reply, ResponseError) else None
        if reason is not None:
            raise ConfigurationError(
                f"{self.address} cannot confirm that data is safe ({reason}): fsync needs Redis "
                "7.2 or Valkey 7.2 with appendonly yes; without, use Durability(fsync=False)"
            )

    def _too_old(self, facts: dict[str, str]) -> ServerError:
        version = facts.get("redis_version")
        runs = f"Redis {version}" if version else "an unknown version"
        return ServerTooOldError(
            f"{self.address} runs {runs}, which has no Functions: Phonon needs Redis 7.0 "
            "or Valkey 7.2 at the least"
        )


#: The settings that bound the length of a word, with their defaults.
_LIMITS = (
    (b"CONFIG", b"GET", b"proto-max-bulk-len"),
    (b"CONFIG", b"GET", b"client-query-buffer-limit"),
)
_MOST_BYTES = 512 * 1024 * 1024
#: Elements of a list that a wait takes at once.
_MOST_ELEMENTS = b"100"
#: Bytes of a request beside the longest value.
_AROUND = 4096


def _limit(answer: Any) -> int:
    """Return a limit of a server; the default if the user may not ask, or it has none."""
    if isinstance(answer, list) and len(answer) > 1 and answer[1].isdigit() and int(answer[1]):
        return int(answer[1]) - _AROUND
    return _MOST_BYTES


def _wait_out(reply: Any) -> None:
    """Raise an answer of a server that will serve again, as if it were away."""
    if isinstance(reply, ResponseError) and is_passing(reply):
        raise RedisConnectionError(str(reply))


def _facts(info: bytes) -> dict[str, str]:
    """Return the answer to ``INFO``."""
    lines: Iterable[str] = re.split(r"\r?\n", info.decode(errors="replace"))
    return dict(line.split(":", 1) for line in lines if ":" in line)
