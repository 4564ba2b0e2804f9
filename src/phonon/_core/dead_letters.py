"""Dead letters: batches that failed too often, kept until they are replayed or discarded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from phonon._core.executor import TOKENS, Executor, RecordReader, RunningBatch
from phonon._core.flows import REBORN, Flow, read, read_all, single
from phonon._core.identity import Identity
from phonon._core.members import Members
from phonon._core.parcels import SessionResult
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Run
from phonon._protocol.partitions import decode
from phonon.errors import BatchMissingError, BatchRunningError, ConfigurationError

#: Partials, or resources, read at a time.
PIECE = 1000
#: Lua's numbers are exact up to here, so a greater token cannot exist.
_MOST = 2**53

_MISSING, _RUNNING = int(Reply.MISSING), int(Reply.RUNNING)


class Parked(NamedTuple):
    """A batch that was parked.

    Attributes:
        resource: The batch's resource.
        token: The batch's number, for `Process.replay` and `Process.discard`.
        error: The error of the last attempt: type and text.
        attempts: The number of attempts.
        owner: The id of the process that tried last.
        since: When its session ended, seconds since the epoch by the server's clock.
        parked_at: When it was parked.
        size: The number of its partials.

    Example:
        >>> class Broken(ConflictFreeUpdate):
        ...     def execute(self):
        ...         raise RuntimeError("no such table")
        >>> with Process(retry=RetryPolicy(attempts=1)) as process:
        ...     try:
        ...         Broken(process, "ada", doc={"n": 1}).end_session()
        ...     except RuntimeError:
        ...         (parked,) = process.parked()
        >>> parked.resource, parked.attempts, parked.error
        ('test.test.ada', 1, 'RuntimeError: no such table')
    """

    resource: str
    token: int
    error: str
    attempts: int
    owner: str
    since: float
    parked_at: float
    size: int


class DeadLetters:
    """The parked batches of a namespace.

    Args:
        identity: The identity of this process.
        members: Knows the partitions of resources.
        executor: Executes replayed batches.
        codec: Reads partials.
    """

    def __init__(
        self, identity: Identity, members: Members, executor: Executor, codec: RecordReader
    ) -> None:
        self._identity = identity
        self._members = members
        self._executor = executor
        self._codec = codec

    def find(self) -> Flow[list[Parked]]:
        """Return all parked batches of the namespace, ordered by resource and token.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        identity = self._identity
        places: list[tuple[int, bytes]] = []
        replies = yield from read_all(identity.everywhere("parked"))
        for partition, names in enumerate(replies):
            places += [(partition, name) for name in names]
        found: list[Parked] = []
        for first in range(0, len(places), PIECE):
            page = places[first : first + PIECE]
            replies = yield from read_all(
                [identity.in_partition(p, "entries", name) for p, name in page]
            )
            for (_, name), entries in zip(page, replies, strict=True):
                found += [
                    parse_entry(name, *entry)
                    for entry in zip(entries[::3], entries[1::3], entries[2::3], strict=True)
                ]
        return sorted(found)

    def look(self, resource: str, token: int) -> Flow[list[bytes]]:
        """Return a batch's partials, in the order in which they were stored.

        Raises:
            BatchMissingError: There is no such batch.
        """
        partition, name = self._members.place(resource)
        stored = _stored_token(resource, token)
        partials: list[bytes] = []
        while True:
            page = yield from self._piece(partition, name, stored, len(partials), PIECE)
            if not page:
                break
            partials += page
        if not partials:
            raise missing(resource, token)
        return partials

    def _piece(
        self, partition: int, name: bytes, token: int, first: int, count: int
    ) -> Flow[Sequence[bytes]]:
        words = (name, b"%d" % token, b"%d" % first, b"%d" % (first + count - 1))
        page: Sequence[bytes] = yield from read(
            self._identity.in_partition(partition, "look", *words)
        )
        return page

    def key(self, resource: str, token: int) -> str:
        """Return the key that holds a batch's partials, for messages."""
        partition, name = self._members.place(resource)
        prefix = decode(self._identity.partitions.prefixes[partition])
        return f"{prefix}dead:{_stored_token(resource, token)}:{decode(name)}"

    def replay(self, resource: str, token: int) -> Flow[Sequence[BaseException]]:
        """Execute a batch after all, under a new token.

        Returns:
            The errors of its execution.

        Raises:
            BatchMissingError: There is no such batch.
            BatchRunningError: Another batch of the resource is being executed.
            UnknownClassError: Its class is not imported here. Nothing has changed.
            UndecodableError: It cannot be read. Nothing has changed.
        """
        partition, name = self._members.place(resource)
        stored = _stored_token(resource, token)
        # A batch of an unknown class would be handed off, and not be parked with its error any
        # more.
        first = yield from self._piece(partition, name, stored, 0, 1)
        if not first:
            raise missing(resource, token)
        self._codec.check(resource, first[0], self.key(resource, token))
        result = SessionResult()
        with self._executor.new_workload() as workload:
            workload.expected = (name,)
            answer = yield from single(operations.replay(partition, name, stored))
            if answer == _MISSING:
                raise missing(resource, token)
            if answer == _RUNNING:
                raise BatchRunningError(
                    f"another batch of {resource!r} is being executed: replay {token} when it is "
                    "done"
                )
            if answer is not REBORN and answer[-1] is not False:
                # Otherwise a survivor has taken it over, and executes it.
                run = Run(*answer)
                workload.add(
                    RunningBatch(
                        partition, name, run, run.content, resource=resource, result=result
                    )
                )
            workload.expected = ()
            yield from self._executor.execute(workload)
        return result.errors

    def discard(self, resource: str, token: int) -> Flow[None]:
        """Delete a batch, with its data.

        Raises:
            BatchMissingError: There is no such batch.
        """
        partition, name = self._members.place(resource)
        stored = _stored_token(resource, token)
        answer = yield from single(operations.discard(partition, name, stored))
        if answer == _MISSING:
            raise missing(resource, token)


def missing(resource: str, token: int) -> BatchMissingError:
    """Return the error for a batch that does not exist."""
    return BatchMissingError(
        f"{resource!r} has no parked batch {token}: it was replayed or discarded; "
        "Process.parked() lists those that there are"
    )


def _stored_token(resource: str, token: Any) -> int:
    """Return the server's form of a token."""
    if not isinstance(token, int) or isinstance(token, bool):
        raise ConfigurationError(
            f"token is a number, not {token!r}: give the token of an entry of Process.parked()"
        )
    stored, index = divmod(token, TOKENS)
    if index or not 0 <= stored < _MOST:
        raise missing(resource, token)
    return stored


def parse_entry(name: bytes, token: bytes, entry: bytes, size: int) -> Parked:
    """Return the dead letter of an entry on the server."""
    try:
        known = msgpack.unpackb(entry, raw=True)
        error = known[b"error"].decode("utf-8", "replace")
        owner = known[b"owner"].decode("utf-8", "replace")
        numbers = [int(known[field]) for field in (b"attempts", b"since", b"at")]
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.exceptions.UnpackException):
        # A foreign or damaged entry must not hide the others.
        error, owner, numbers = "UndecodableError: its entry cannot be read", "", [0, 0, 0]
    attempts, since, at = numbers
    number = int(token) * TOKENS if token.isdigit() else 0
    return Parked(decode(name), number, error, attempts, owner, since / 1000, at / 1000, int(size))
