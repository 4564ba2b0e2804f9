"""Reads a namespace, and acts on it, without becoming one of its processes."""

import getpass
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar, get_args

from phonon._admin.acts import Acts
from phonon._admin.doctor import Doctor, Finding
from phonon._admin.inspector import Inspector
from phonon._admin.namespace import Namespace
from phonon._admin.pages import Walk, next_page
from phonon._admin.records import (
    Act,
    BatchState,
    BatchStatus,
    LockGrant,
    LockMode,
    LockStatus,
    LockWaiter,
    Partial,
    ProcessState,
    ProcessStatus,
    ResourceStatus,
    SessionStatus,
    SourceStatus,
)
from phonon._core.checks import is_number
from phonon._protocol import library
from phonon._transport import connect, sync_io
from phonon._transport.connect import SharedConnection
from phonon._transport.steps import Steps
from phonon.errors import ConfigurationError
from phonon.settings import check_count, check_flag, check_name, url_of

__all__ = [
    "Act",
    "Admin",
    "BatchState",
    "BatchStatus",
    "Finding",
    "LockGrant",
    "LockMode",
    "LockStatus",
    "LockWaiter",
    "Partial",
    "ProcessState",
    "ProcessStatus",
    "ResourceStatus",
    "SessionStatus",
    "SourceStatus",
]

T = TypeVar("T")
STATES: tuple[BatchState, ...] = get_args(BatchState)


class BaseAdmin:
    """The base of `Admin` and `AsyncAdmin`: everything but the waiting."""

    _inspector: Inspector
    _acts: Acts
    _doctor: Doctor

    def _begin(self, connection: SharedConnection, namespace: str, options: "AdminOptions") -> None:
        space = Namespace(connection.server, library.default(), namespace, options.timeout)
        self._inspector = Inspector(space)
        self._acts = Acts(space, self._inspector, options.who)
        self._doctor = Doctor(space, self._inspector)


class AdminOptions:
    """Checked arguments of an `Admin`.

    Args:
        url: See `Admin`.
        client: See `Admin`.
        namespace: See `Admin`.
        timeout: See `Admin`.
        who: See `Admin`.
    """

    def __init__(
        self, url: str | None, client: Any, namespace: str, timeout: float, who: str | None
    ) -> None:
        check_name("namespace", namespace)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ConfigurationError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self.url = url_of(url, None, client, ("localhost", 6379, 1))
        self.client = client
        self.timeout = float(timeout)
        self.who = _whoami() if who is None else check_name("who", who)

    def open(self, backend: connect.ClientBackend) -> Steps[SharedConnection]:
        """Connect, or share a present connection."""
        return connect.connect(
            self.url, self.client, library.default(), backend, may_lack_library=True
        )


class Admin(BaseAdmin):
    """Reads a namespace, and acts on it, without becoming one of its processes.

    It has no heartbeat and no id, takes over nothing, needs none of the classes whose data it
    shows, and changes data only in methods for that. Iterating over a listing reads it from the
    server page by page; it may or may not show later changes.

    Args:
        url: The server's URL; see `Process`. None: the environment variable ``PHONON_URL``, or
            ``redis://localhost:6379/1``.
        client: A ``redis.Redis`` or ``redis.RedisCluster`` to use instead.
        namespace: The namespace.
        timeout: Seconds to go on asking a server that does not answer.
        who: The operator's name, for the log on the server. None: user, host and process.

    Raises:
        ConfigurationError: An argument is invalid.
        ServerUnreachableError: There is no server.
        ServerError: The server cannot be used.

    Example:
        >>> with Admin() as admin:  # at $PHONON_URL, or on this machine
        ...     for batch in admin.batches(state="parked"):
        ...         print(batch.resource, batch.token, batch.error)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: Any = None,
        namespace: str = "phonon",
        timeout: float = 15.0,
        who: str | None = None,
    ) -> None:
        options = AdminOptions(url, client, namespace, timeout, who)
        self.namespace = namespace
        self._connection = sync_io.run(options.open(sync_io.BACKEND))
        self._begin(self._connection, namespace, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<phonon.Admin of {self.namespace!r} at {self.address}>"

    @property
    def address(self) -> str:
        """Return the server's address, without a password."""
        return self._connection.server.address

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        sync_io.run(self._connection.close())

    def processes(self) -> list[ProcessStatus]:
        """Return all processes: the dead ones first, then by the time since their last heartbeat.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        return sync_io.run(self._inspector.processes())

    def locks(self, prefix: str = "") -> Iterator[LockStatus]:
        """Iterate over the locks that are held or waited for.

        Args:
            prefix: The beginning of their names.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        return _iterate(lambda: self._inspector.locks(check_name("prefix", prefix)))

    def lock(self, name: str, *, semaphore: bool = False) -> LockStatus | None:
        """Return a lock with all its holders and waiters; None if it is free.

        Args:
            name: The resource, or the semaphore.
            semaphore: Whether the name is a semaphore's.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        check_name("name", name)
        check_flag("semaphore", semaphore)
        return sync_io.run(self._inspector.lock(name, semaphore=semaphore))

    def sessions(self, older: float | None = None, prefix: str = "") -> Iterator[SessionStatus]:
        """Iterate over the open sessions, in no particular order.

        Args:
            older: The least age of the sessions in seconds.
            prefix: The beginning of their resources' names.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        check_older(older)
        return _iterate(lambda: self._inspector.sessions(older, check_name("prefix", prefix)))

    def oldest_sessions(
        self, most: int, older: float | None = None, prefix: str = ""
    ) -> list[SessionStatus]:
        """Return the oldest open sessions, the oldest first, without reading all of them.

        The search may miss sessions whose resources are also locked by their processes.

        Args:
            most: The most sessions to return.
            older: The least age of the sessions in seconds.
            prefix: The beginning of their resources' names.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        check_older(older)
        check_count("most", most)
        steps = self._inspector.oldest_sessions(most, older, check_name("prefix", prefix))
        return sync_io.run(steps)

    def batches(
        self, state: BatchState | Sequence[BatchState] | None = None, prefix: str = ""
    ) -> Iterator[BatchStatus]:
        """Iterate over the batches.

        Args:
            state: The state, or several; None for all of them.
            prefix: The beginning of their resources' names.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        states = states_of(state)
        return _iterate(lambda: self._inspector.batches(states, check_name("prefix", prefix)))

    def sources(self) -> list[SourceStatus]:
        """Return the sources of messages, as reported by the processes that read them.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        return sync_io.run(self._inspector.sources())

    def resource(self, name: str) -> ResourceStatus:
        """Return the members, the lock and the batches of a resource.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        return sync_io.run(self._inspector.resource(check_name("name", name)))

    def content(self, resource: str, token: int | None = None) -> Iterator[Partial]:
        """Iterate over the partials of a batch, decoded without their class.

        Args:
            resource: The resource.
            token: The token of a running or parked batch; None for the open session.

        Raises:
            BatchMissingError: There is no such batch.
        """
        check_name("resource", resource)
        if token is not None:
            check_token(token)
        return _iterate(lambda: self._inspector.content(resource, token))

    def examine(self) -> list[Finding]:
        """Check the server, the namespace and this host.

        Raises:
            PhononError: The server does not answer.
        """
        return sync_io.run(self._doctor.examine())

    def acts(self, most: int = 100) -> list[Act]:
        """Return the acts of operators in this namespace, the latest first.

        Args:
            most: The most acts to return. The server remembers about 1,000 in each partition.
        """
        return sync_io.run(self._inspector.acts(check_count("most", most)))

    def replay(self, resource: str, token: int) -> str:
        """Hand a parked batch to a process that can execute it, under a new token.

        Returns:
            The act in words.

        Raises:
            BatchMissingError: There is no such parked batch.
            BatchRunningError: Another batch of the resource is being executed.
            UndecodableError: The batch cannot be read. It stays parked.
            UnknownClassError: No live process can execute its class. It stays parked.
        """
        check_name("resource", resource)
        return sync_io.run(self._acts.replay(resource, check_token(token)))

    def discard(self, resource: str, token: int) -> str:
        """Delete a parked batch, with its data.

        Returns:
            The act in words.

        Raises:
            BatchMissingError: There is no such parked batch.
        """
        check_name("resource", resource)
        return sync_io.run(self._acts.discard(resource, check_token(token)))

    def break_lock(self, name: str, token: int, *, semaphore: bool = False) -> str:
        """Release a lock in place of its holder, and wake the next waiter.

        The holder does not notice before it checks the lock, so only a store that compares fencing
        tokens is safe from its writes. If a process hangs, it is better to end that process.

        Args:
            name: The resource, or the semaphore.
            token: The token of the grant to break, so that no later grant is broken.
            semaphore: Whether the name is a semaphore's.

        Returns:
            The act in words.

        Raises:
            LockLostError: The lock is not held under that token.
        """
        check_flag("semaphore", semaphore)
        check_name("name", name)
        steps = self._acts.break_lock(name, check_token(token), semaphore=semaphore)
        return sync_io.run(steps)

    def expire(self, process: str) -> str:
        """Declare a process dead, so that survivors take over from it.

        Returns:
            The act in words.

        Raises:
            ProcessMissingError: There is no such process.
        """
        return sync_io.run(self._acts.expire(check_name("process", process)))


def _iterate(begin: Callable[[], Walk[T]]) -> Iterator[T]:
    walk = begin()
    while (page := sync_io.run(next_page(walk))) is not None:
        yield from page


def states_of(state: Any) -> tuple[BatchState, ...]:
    """Return the states of an argument.

    Raises:
        ConfigurationError: There is no such state.
    """
    if state is None:
        return STATES
    states = tuple(state) if isinstance(state, list | tuple | set | frozenset) else (state,)
    for each in states:
        if each not in STATES:
            raise ConfigurationError(f"state is one of {', '.join(STATES)}, not {each!r}")
    return states


def check_older(older: Any) -> None:
    """Check an age.

    Raises:
        ConfigurationError: The age is not a number of seconds.
    """
    if older is not None and not (is_number(older) and 0 <= older < math.inf):
        raise ConfigurationError(
            f"older is a number of seconds, not {older!r}: give one like older=60, or leave it out"
        )


def check_token(token: Any) -> int:
    """Check a token, and return it.

    Raises:
        ConfigurationError: The token is not a number.
    """
    if not isinstance(token, int) or isinstance(token, bool):
        raise ConfigurationError(f"token is a number, not {token!r}: give that of a listing")
    return token


def _whoami() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no entry
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} ({os.getpid()})"
