"""A process's identity: its id, its listing, its lanes, and the end of its lease."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from phonon._core.flows import Flow, Read, Signal
from phonon._core.measures import Measures
from phonon._protocol.lane import Lane
from phonon._protocol.library import Library, Request
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import DEFAULT_PARTITIONS, Partitions
from phonon.errors import ConfigurationError, ServerError

#: A fenced lane is remembered for a week by the server. A call whose fate is asked for later than
#: this many seconds after the last heartbeat is not known any more.
REMEMBERED = 6.5 * 24 * 3600.0


#: This share of a lease a process does not count on. The server's clock may be set forward by that
#: much without its noticing; see JUMP in processes.lua.
MARGIN = 1 / 8
#: Commands that are sent beside those of the function library.
ALSO_SENT = (b"BLMPOP",)


class Waiter(NamedTuple):
    """Somebody who waits for mail.

    Attributes:
        partition: Where.
        owner: The thread or task that waits.
        leave: Makes the operation with which it leaves its line, of partition, name and waiter.
        name: The server's name of what it waits for.
    """

    partition: int
    owner: object
    leave: Callable[[int, bytes, str], Operation]
    name: bytes


class Identity:
    """The identity under which a process takes part, until it is declared dead and takes another.

    Args:
        namespace: The namespace.
        partitions: How many partitions to ask for, if the namespace is new; None for the default.
        lease: Seconds for which a heartbeat keeps the process alive.
        card: Tells where the process runs, for people to read.
        library: Names the server's functions.
        clock: Seconds, from a clock that is never set.
        new_id: Makes an id, unique for ever.

    Attributes:
        id: The id as the server knows it.
        first_id: The id before any rebirth; known parties are counted by it.
        former: Ids under which this process was declared dead.
        generation: Another object in a forked child, by which the parent's objects are recognized.
        listing: The number of the listing, which heartbeats carry.
        epoch: Names the server's data.
        lanes: The lanes, by partition. A rebirth puts another list in its place.
        lives_until: Until when, by the clock, nobody can have declared this process dead.
        losses: The error of each lane that was found to have lost calls, to be told at the rebirth.
        suspected: Whether a lane or a heartbeat was refused: a rebirth is due.
        measures: The counters.
        waiters: Who waits for mail, or is about to, and in which partition.
    """

    def __init__(
        self,
        *,
        namespace: str,
        partitions: int | None,
        lease: float,
        card: Callable[[], dict[str, str | int | float]],
        library: Library,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.lease = lease
        self.library = library
        self.clock = clock
        self.new_id = new_id
        self._wanted = partitions
        self._describe = card
        self.partitions = Partitions(namespace, partitions or DEFAULT_PARTITIONS)
        self.signal: Signal | None = None
        #: Returns the thread or task that runs; the driver's.
        self.me: Callable[[], object] = object
        self.begin()

    def begin(self) -> None:
        """Be somebody else, who holds nothing: at first, and in a forked child."""
        self.generation = object()
        self.measures = Measures()
        self._card = msgpack.packb(self._describe())
        self.id = b""
        self.name = self.new_id()
        self.id = self.name.encode()
        self.first_id = self.id
        self.former: list[bytes] = []
        self.listing = b""
        self.epoch = b""
        self.lanes: list[Lane] = []
        self.lives_until = -math.inf
        self.lived_since = math.inf
        self.suspected = False
        self.lost_calls: dict[int, int] = {}
        self.waiters: dict[str, Waiter] = {}
        self._numbers = itertools.count(1)
        self._rebirths: list[Callable[[], object]] = []

    # What is asked of the server

    def in_namespace(self, function: str, *arguments: bytes) -> Request:
        """Return a call that is about the namespace."""
        return self.library.request(function, self.partitions.prefix, *arguments)

    def in_partition(self, partition: int, function: str, *arguments: bytes) -> Request:
        """Return a call that is about a partition, outside of its lanes."""
        return self.library.request(function, self.partitions.prefixes[partition], *arguments)

    def everywhere(self, function: str, *arguments: bytes) -> list[Request]:
        """Return such a call for each partition."""
        return [
            self.library.request(function, prefix, *arguments)
            for prefix in self.partitions.prefixes
        ]

    @property
    def lease_ms(self) -> bytes:
        """The lease as heartbeats send it."""
        return b"%d" % math.ceil(self.lease * 1000)

    def nudges(self, process: bytes) -> list[Request]:
        """Return the calls that wake those who read a process's mail: they look why."""
        partitions = dict.fromkeys([waiter.partition for waiter in list(self.waiters.values())])
        return [self.in_partition(partition, "nudge", process) for partition in partitions]

    def appear(self, process: bytes, *, insist: bool) -> Flow[tuple[bytes, bytes, list[Lane]]]:
        """List a process and open its lanes: its first id, or a new one.

        Repeating this after a failure is harmless: the listing and the lanes are the same ones.

        Args:
            process: The id.
            insist: Whether the namespace keeps our number of partitions. Otherwise theirs is
                adopted.

        Returns:
            Epoch, number of the listing, and the lanes.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        while True:
            count = self.partitions.count
            listed = self.in_namespace(
                "list", process, self.lease_ms, b"%d" % count, self._card, b"%d" % insist
            )
            (answer,) = yield Read((listed,))
            epoch, listing, found = _checked(answer)
            if found != count:
                self._adopt(found)
                count = found
            requests = self.everywhere("open", process, b"%d" % count)
            opened = [_checked(reply) for reply in (yield Read(requests))]
            conflicts = {theirs for _, theirs in opened if theirs != count}
            if conflicts:
                # The namespace's own record was lost; those that live know better.
                self._adopt(conflicts.pop())
                insist = True
                continue
            if not all(number for number, _ in opened):
                raise ServerError(f"process {process.decode()} was declared dead before it began")
            lanes = [Lane(p, process, number) for p, (number, _) in enumerate(opened)]
            return epoch, listing, lanes

    def _adopt(self, count: int) -> None:
        if self._wanted is not None and self._wanted != count:
            raise ConfigurationError(
                f"namespace {self.partitions.namespace!r} has {count} partitions, which its first "
                f"process has chosen, and not partitions={self._wanted}: leave the argument out, "
                "or use another namespace="
            )
        self.partitions = Partitions(self.partitions.namespace, count)

    def start(self) -> Flow[None]:
        """Appear for the first time.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        yield from self._check_rights()
        begun = self.clock()
        epoch, listing, lanes = yield from self.appear(self.id, insist=False)
        self.become(self.id, epoch, listing, lanes, begun)

    def _check_rights(self) -> Flow[None]:
        """Find commands that are forbidden before one of them fails in the middle of a step.

        All partitions are asked: in a cluster each node has its own list of rights.
        """
        replies = yield Read(self.everywhere("rights", *ALSO_SENT))
        missing = dict.fromkeys(c.decode().lower() for reply in replies for c in _checked(reply))
        if missing:
            raise ServerError(
                f"the server's user may not run {', '.join(missing)}, which Phonon needs: grant "
                f"them with ACL SETUSER <user> {' '.join(f'+{command}' for command in missing)}"
            )

    def become(
        self, process: bytes, epoch: bytes, listing: bytes, lanes: list[Lane], begun: float
    ) -> None:
        """Go on under an id that is listed and has its lanes."""
        self.name = process.decode()
        self.id = process
        self.epoch, self.listing, self.lanes = epoch, listing, lanes
        self.lives_until = begun + self.lease
        self.lived_since = begun
        self.suspected = False
        self.lost_calls = {}

    # What is known

    @property
    def beaten_at(self) -> float:
        """When the last heartbeat that was answered was sent, by the clock."""
        return self.lives_until - self.lease

    @property
    def surely_lives(self) -> bool:
        """Return whether the lease lasts, so that nobody can have declared this process dead.

        Counted from before the last heartbeat was sent, so this ends earlier than on the server;
        also if the server's clock was set forward by as much as no heartbeat notices.
        """
        return not self.suspected and self.clock() < self.lives_until - self.lease * MARGIN

    def alive(self, begun: float) -> None:
        """A heartbeat that was sent then has been answered."""
        if begun >= self.lives_until:
            self.lived_since = begun  # it was overdue: it has to beat in time for a lease once more
        self.lives_until = max(self.lives_until, begun + self.lease)

    @property
    def may_mark(self) -> bool:
        """Return whether it has beaten in time for a whole lease, so that it can judge others."""
        return self.clock() - self.lived_since >= self.lease

    def new_number(self) -> int:
        """Return a number that this process uses for nothing else."""
        return next(self._numbers)

    def suspect(self, lane: Lane, kind: str, last: int) -> None:
        """A call of a lane was refused: the process was declared dead, or the server lost writes.

        Never blocks. The heartbeat does the rebirth.

        Args:
            lane: Whose call.
            kind: The server's word for it: PHONONFENCED, PHONONLOST or PHONONSTALE.
            last: The number of the last call that the server knows of.
        """
        lane.fence()
        if self.lanes and lane is self.lanes[lane.partition]:
            if kind != "PHONONFENCED":
                # Of a lane that was never used nothing is lost: it was reaped. Otherwise there is a
                # loss, though others may have been taken in their place.
                lost = max(1, lane.answered - last) if lane.answered else 0
                self.lost_calls[lane.partition] = lost
            self.suspected = True
            if self.signal is not None:
                self.signal.set()

    def on_rebirth(self, callback: Callable[[], object]) -> None:
        """Have a function called after each rebirth."""
        self._rebirths.append(callback)

    def reborn(self) -> None:
        """Tell those that asked for it."""
        for callback in self._rebirths:
            callback()


def _checked(reply: Any) -> Sequence[Any]:
    if isinstance(reply, Exception):
        raise reply
    answer: Sequence[Any] = reply
    return answer
