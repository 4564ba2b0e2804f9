"""Memberships: which resources this process holds, who else does, and who has modified them."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgpack

from phonon._core.flows import CALLER_GONE, REBORN, AwaitMail, Flow, Read, Send, read, single
from phonon._core.identity import Identity, Waiter
from phonon._protocol import operations
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import decode, encode_resource, is_semaphore
from phonon.errors import ProcessStoppedError

#: Seconds after which a waiter asks again, in case its wake-up was lost.
ASK_AGAIN = 5.0


class ProcessInfo(NamedTuple):
    """The place where a process runs.

    Attributes:
        id: Its id.
        host: Its host name; empty if the process has just gone.
        pid: Its number in its operating system; 0 if the process has just gone.
        since: Since when it holds the resource, seconds since the epoch by the server's clock; 0 if
            that is not known.
    """

    id: str
    host: str
    pid: int
    since: float


class PendingJoin:
    """A membership that no answer has confirmed yet.

    Attributes:
        pending: Operations under way that make this process a member.
        entered: Whether one of them has succeeded.
        identity: The identity under which the first one was sent. A rebirth joins all that is held.
        opener: The value in `Members.held`, if a leave has come meanwhile.
    """

    __slots__ = ("entered", "identity", "opener", "pending")

    def __init__(self, identity: bytes) -> None:
        self.opener: weakref.ref[Any] | None = None
        self.pending = 0
        self.entered = False
        self.identity = identity


class Members:
    """The memberships of this process.

    Args:
        identity: The identity of this process.

    Attributes:
        held: The resources, each with the update that ends its session in `stop`, if there is one.
            It follows the order in which operations are sent, not that of their answers.
        undelivered_results: Resources whose last member left by a call whose caller had gone; the
            next caller is told that it was the last.
        stopping: Whether the process stops, so that no call waits for other processes any more.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.stopping = False
        self.held: dict[str, weakref.ref[Any] | None] = {}
        self._entries: dict[str, PendingJoin] = {}
        self._doubtful: dict[str, None] = {}
        self.undelivered_results: set[str] = set()

    def begin(self) -> None:
        """Start without memberships: at first, and in a forked child."""
        self.stopping = False
        self.held = {}
        self._entries = {}
        self._doubtful = {}
        self.undelivered_results = set()

    def place(self, resource: str) -> tuple[int, bytes]:
        """Return the partition of a resource, and the server's name of it."""
        return self._identity.partitions.place(resource)

    def places(self, resources: Iterable[str]) -> list[tuple[int, bytes]]:
        """Do what `place` does, for many."""
        return list(map(self._identity.partitions.place, resources))

    def joins(self, more: Iterable[bytes] = ()) -> list[Operation]:
        """Return the operations that make a new identity a member of all that is held.

        Args:
            more: The server's names of other resources to join.
        """
        names = dict.fromkeys(map(encode_resource, list(self.held)))
        names.update(dict.fromkeys(more))
        of = self._identity.partitions.of
        return [operations.join(of(name), name) for name in names]

    @property
    def has_doubts(self) -> bool:
        """Return whether a resource is held of which this process may be no member."""
        return bool(self._doubtful)

    def settle_doubts(self) -> Flow[None]:
        """Join resources again that are held here, and perhaps not on the server."""
        doubtful, self._doubtful = self._doubtful, {}
        held = [resource for resource in doubtful if resource in self.held]
        answers = (
            (yield Send([operations.join(*self.place(each)) for each in held])) if held else ()
        )
        for resource, answer in zip(held, answers, strict=True):
            if isinstance(answer, Exception):
                self._doubtful[resource] = None

    def join(self, resource: str) -> Flow[None]:
        """Become a member.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        yield from self._enter(resource, operations.join(*self.place(resource)))

    def meet(self, resource: str, parties: int) -> Flow[None]:
        """Join a session of known parties."""
        partition, name = self.place(resource)
        first = self._identity.first_id
        yield from self._enter(resource, operations.meet(partition, name, parties, first))

    def modify(self, resource: str) -> Flow[None]:
        """Count that this process modified the resource; it becomes a member."""
        yield from self._enter(resource, operations.modify(*self.place(resource)))

    def restore(self, resource: str, modifications: dict[bytes, int]) -> Flow[None]:
        """Become a member again, as before a callback that failed."""
        partition, name = self.place(resource)
        yield from self._enter(resource, operations.restore(partition, name, modifications))

    def _enter(self, resource: str, operation: Operation) -> Flow[None]:
        entry = self.enter(resource)
        (answer,) = yield Send((operation,))
        failed = isinstance(answer, Exception)
        self.entered(resource, entry, failed=failed)
        yield from self.settle_doubts()
        if failed:
            raise answer

    def is_sure(self, resource: str) -> bool:
        """Return whether a resource is held, and no answer about that is still to come."""
        return resource in self.held and resource not in self._entries

    def entering(self, resources: Iterable[str]) -> list[PendingJoin | None]:
        """Hold resources from now on. The caller reports each outcome to `entered`.

        Returns:
            The entry to pass to `entered`, for each resource.
        """
        held, unsure = self.held, self._entries
        return [
            None if resource in held and resource not in unsure else self.enter(resource)
            for resource in resources
        ]

    def enter(self, resource: str) -> PendingJoin | None:
        """Do what `entering` does, for one resource."""
        held, unsure = self.held, self._entries
        if resource in held and resource not in unsure:
            return None
        entry = unsure.setdefault(resource, PendingJoin(self._identity.id))
        entry.pending += 1
        held.setdefault(resource)
        return entry

    def entered(self, resource: str, entry: PendingJoin | None, *, failed: bool) -> None:
        """Take in the outcome of joining. Stop holding a resource if no operation could join it."""
        if entry is None:
            return
        entry.pending -= 1
        if failed and entry.identity != self._identity.id:
            # A rebirth has joined it, but a leave may have come before the refusal.
            self._doubtful[resource] = None
        if not failed and not entry.entered:
            entry.entered = True
            self._identity.measures.opened += 1
        if not entry.pending and self._entries.get(resource) is entry:
            self._entries.pop(resource, None)  # a signal handler may have left it in between
            # A rebirth has joined the resource all the same, and a leave ends that.
            if not entry.entered and entry.identity == self._identity.id:
                self.held.pop(resource, None)

    def leaving(self, resource: str) -> Any:
        """Stop holding a resource. Return what `stay` is to be given, or `ABSENT`."""
        entry = self._entries.pop(resource, None)
        opener = self.held.pop(resource, ABSENT)
        if entry is None or opener is ABSENT:
            return opener
        entry.opener = opener
        return entry

    def stay(self, resource: str, left: Any) -> None:
        """Hold a resource again: the leave was refused, and perhaps the join before it as well."""
        if isinstance(left, PendingJoin):
            if not left.entered:
                self._doubtful[resource] = None
            left = left.opener
        self.held.setdefault(resource, left)

    def count(self, resource: str) -> Flow[int]:
        """Return the number of processes that hold a resource, read atomically."""
        partition, name = self.place(resource)
        reply = yield from read(self._identity.in_partition(partition, "count", name))
        return int(reply)

    def modified(self, resource: str) -> Flow[dict[str, int]]:
        """Return how often each process has modified the resource in this session."""
        partition, name = self.place(resource)
        reply = yield from read(self._identity.in_partition(partition, "modified", name))
        return modifications_of(reply)

    def holders(self, resource: str) -> Flow[list[ProcessInfo]]:
        """Return the processes that hold a resource, the longest-standing first."""
        partition, name = self.place(resource)
        reply = yield from read(self._identity.in_partition(partition, "members", name))
        pairs = sorted(zip(reply[::2], reply[1::2], strict=True), key=lambda pair: pair[1])
        return (yield from self.process_info([(pid, since / 1000) for pid, since in pairs]))

    def process_info(self, processes: Sequence[tuple[bytes, float]]) -> Flow[list[ProcessInfo]]:
        """Return where processes run, given ids and the times since which they hold a resource."""
        if not processes:
            return []
        request = self._identity.in_namespace("cards", *(pid for pid, _ in processes))
        cards = yield from read(request)
        return [
            _info(pid, since, card) for (pid, since), card in zip(processes, cards, strict=True)
        ]

    def wait_for_parties(self, resource: str, seconds: float) -> Flow[bool]:
        """Wait until all announced parties have come, and all others have left.

        Returns:
            Whether that happened in time.

        Raises:
            ProcessStoppedError: The process was stopped meanwhile.
        """
        waiters: list[str] = []
        try:
            return (yield from self._wait(resource, seconds, waiters))
        finally:
            for waiter in waiters:
                self._identity.waiters.pop(waiter, None)

    def _wait(self, resource: str, seconds: float, waiters: list[str]) -> Flow[bool]:
        partition, name = self.place(resource)
        identity = self._identity
        deadline = identity.clock() + seconds
        waiter = ""
        try_again = True
        found, left = False, seconds
        while try_again:
            if not waiter or operations.process_of(waiter) != identity.name:
                waiter = operations.holder_name(identity.name, identity.new_number())
                waiters.append(waiter)
                identity.waiters[waiter] = Waiter(
                    partition, identity.caller(), operations.forget, name
                )
            meeting = yield from single(operations.await_parties(partition, name, waiter))
            if meeting is REBORN:
                continue
            _, parties, arrived, members, member = meeting
            found = members <= member and arrived >= parties
            left = deadline - identity.clock()
            gone = yield CALLER_GONE
            try_again = not (found or left <= 0 or gone or self.stopping)
            if try_again:
                yield AwaitMail(partition, waiter, min(left, ASK_AGAIN))
        yield Send((operations.forget(partition, name, waiter),))
        if self.stopping and left > 0 and not found:
            raise ProcessStoppedError(
                f"process {identity.name} was stopped, and waits no longer for the other parties "
                f"of {resource!r}: make a new Process"
            )
        return found

    def registry(self, process: bytes | None = None) -> Flow[list[str]]:
        """Return the resources that a process may be responsible for.

        Args:
            process: Its id. None: this one's.
        """
        names = yield from self.registered(process)
        return [decode(name) for name in names if not is_semaphore(name)]

    def registered(self, process: bytes | None = None) -> Flow[list[bytes]]:
        """Return the server's names of these resources."""
        pid = process or self._identity.id
        names: list[bytes] = []
        partitions = range(self._identity.partitions.count)
        at = 0
        while partitions:
            last = at + _PAGE - 1
            replies = yield Read(
                [
                    self._identity.in_partition(p, "registry", pid, b"%d" % at, b"%d" % last)
                    for p in partitions
                ]
            )
            more = []
            for partition, reply in zip(partitions, replies, strict=True):
                if isinstance(reply, Exception):
                    raise reply
                names += reply
                if len(reply) == _PAGE:
                    more.append(partition)
            partitions, at = more, at + _PAGE  # type: ignore[assignment]  # a range, then a list
        return names

    def track(self, resource: str, *, there: bool) -> Flow[int]:
        """Enter a resource into the registry by hand, or remove it.

        Returns:
            1 if that changed anything.
        """
        make = operations.track if there else operations.untrack
        return int((yield from single(make(*self.place(resource)))))


#: Stands in for the value of a resource that was not held.
ABSENT: Any = object()
#: Names read at a time.
_PAGE = 1000


def modifications_of(pairs: Sequence[Any] | None) -> dict[str, int]:
    """Return modifications by process id, given the server's answer."""
    found: dict[str, int] = {}
    for process, times in zip((pairs or ())[::2], (pairs or ())[1::2], strict=True):
        if int(times):
            name = process.decode("utf-8", "backslashreplace")
            found[name] = found.get(name, 0) + int(times)
    return found


def _info(process: bytes, since: float, card: bytes) -> ProcessInfo:
    try:
        known = msgpack.unpackb(card) if card else {}
        host, pid = str(known.get("host", "")), int(known.get("pid", 0))
    except (ValueError, AttributeError, msgpack.exceptions.UnpackException):
        host, pid = "", 0  # a foreign value must not make a list of holders fail
    return ProcessInfo(decode(process), host, pid, since)
