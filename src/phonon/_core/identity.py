"""A process's identity: its id, its listing, its lanes, and the end of its lease."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import msgpack

from phonon._core.flows import Flow, Signal, read, read_all
from phonon._core.measures import Measures
from phonon._protocol.lane import Lane
from phonon._protocol.library import Library, Request
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import DEFAULT_PARTITIONS, Partitions
from phonon.errors import ConfigurationError, ServerError

#: The server remembers a fenced lane for a week. Later than this many seconds after the last
#: heartbeat the outcome of a call is not known any more.
REMEMBERED = 6.5 * 24 * 3600.0


#: The share of a lease on which a process does not rely, because the server's clock may be set
#: forward by that much unnoticed; see JUMP in processes.lua.
MARGIN = 1 / 8
#: Commands that Phonon sends besides those of the function library.
ALSO_SENT = (b"BLMPOP",)


class Waiter(NamedTuple):
    """A thread or task that waits for mail.

    Attributes:
        partition: The partition of the resource.
        owner: The thread or task that waits.
        leave: Makes the operation that leaves the queue, given partition, name and waiter.
        name: The server's name of the resource that it waits for.
    """

    partition: int
    owner: object
    leave: Callable[[int, bytes, str], Operation]
    name: bytes


class Identity:
    """The identity of a process on the server. A process that is declared dead takes another one.

    Args:
        namespace: The namespace.
        partitions: The number of partitions to ask for, if the namespace is new; None: the default.
        lease: Seconds for which a heartbeat keeps the process alive.
        describe: Tells where the process runs, for operators.
        library: Knows the names of the server's functions.
        clock: Seconds, from a clock that is never set.
        new_id: Makes an id that no other process ever has.

    Attributes:
        id: The id as the server knows it.
        first_id: The id before any rebirth; known parties are counted by it.
        former: Ids under which this process was declared dead.
        generation: An object that differs in a forked child, to recognize the parent's objects.
        listing: The number of the listing, which heartbeats carry.
        epoch: Names the server's data.
        lanes: The lanes, by partition. A rebirth puts another list in its place.
        lives_until: The time, by the clock, before which this process cannot be declared dead.
        losses: The error of each lane that was found to have lost calls, to be told at the rebirth.
        suspected: Whether a lane or a heartbeat was refused: a rebirth is due.
        measures: The counters.
        waiters: The waiters for mail, by name, from shortly before they wait.
    """

    def __init__(
        self,
        *,
        namespace: str,
        partitions: int | None,
        lease: float,
        describe: Callable[[], dict[str, str | int | float]],
        library: Library,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.lease = lease
        self.library = library
        self.clock = clock
        self.new_id = new_id
        self._wanted = partitions
        self._describe = describe
        self.partitions = Partitions(namespace, partitions or DEFAULT_PARTITIONS)
        self.signal: Signal | None = None
        #: Returns the running thread or task; set by the driver.
        self.caller: Callable[[], object] = object
        self.begin()

    def begin(self) -> None:
        """Start as a new process: at first, and in a forked child."""
        self.generation = object()
        self.measures = Measures()
        self._description = msgpack.packb(self._describe())
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

    # Requests

    def in_namespace(self, function: str, *arguments: bytes) -> Request:
        """Return a call of a function of the namespace."""
        return self.library.request(function, self.partitions.prefix, *arguments)

    def in_partition(self, partition: int, function: str, *arguments: bytes) -> Request:
        """Return a call of a function of a partition, outside of its lanes."""
        return self.library.request(function, self.partitions.prefixes[partition], *arguments)

    def everywhere(self, function: str, *arguments: bytes) -> list[Request]:
        """Return such a call for each partition."""
        return [
            self.library.request(function, prefix, *arguments)
            for prefix in self.partitions.prefixes
        ]

    @property
    def lease_ms(self) -> bytes:
        """The lease in the form of a heartbeat's argument."""
        return b"%d" % math.ceil(self.lease * 1000)

    def nudges(self, process: bytes) -> list[Request]:
        """Return the calls that wake the readers of a process's mail, which find out the reason."""
        partitions = dict.fromkeys([waiter.partition for waiter in list(self.waiters.values())])
        return [self.in_partition(partition, "nudge", process) for partition in partitions]

    def register(self, process: bytes, *, exact: bool) -> Flow[tuple[bytes, bytes, list[Lane]]]:
        """Register an id of the process, the first one or a new one, and open its lanes.

        Repeating this after a failure is harmless: it finds the same listing and lanes.

        Args:
            process: The id.
            exact: Whether this process's number of partitions is required. Otherwise the
                namespace's number is adopted.

        Returns:
            Epoch, number of the listing, and the lanes.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        while True:
            count = self.partitions.count
            listed = self.in_namespace(
                "list",
                process,
                self.lease_ms,
                b"%d" % count,
                self._description,
                b"%d" % exact,
            )
            epoch, listing, found = yield from read(listed)
            if found != count:
                self._adopt_count(found)
                count = found
            requests = self.everywhere("open", process, b"%d" % count)
            opened = yield from read_all(requests)
            conflicts = {other for _, other in opened if other != count}
            if conflicts:
                # The namespace's record was lost; the lanes of other processes have the number.
                self._adopt_count(conflicts.pop())
                exact = True
                continue
            if not all(number for number, _ in opened):
                raise ServerError(f"process {process.decode()} was declared dead before it began")
            lanes = [Lane(p, process, number) for p, (number, _) in enumerate(opened)]
            return epoch, listing, lanes

    def _adopt_count(self, count: int) -> None:
        if self._wanted is not None and self._wanted != count:
            raise ConfigurationError(
                f"namespace {self.partitions.namespace!r} has {count} partitions, which its first "
                f"process has chosen, and not partitions={self._wanted}: leave the argument out, "
                "or use another namespace="
            )
        self.partitions = Partitions(self.partitions.namespace, count)

    def start(self) -> Flow[None]:
        """Register the process for the first time.

        Raises:
            PhononError: The server does not answer, or refuses.
        """
        yield from self._check_rights()
        begun = self.clock()
        epoch, listing, lanes = yield from self.register(self.id, exact=False)
        self.switch_to(self.id, epoch, listing, lanes, begun)

    def _check_rights(self) -> Flow[None]:
        """Find forbidden commands before one of them fails in the middle of a step.

        All partitions are asked: in a cluster each node has its own list of rights.
        """
        replies = yield from read_all(self.everywhere("rights", *ALSO_SENT))
        missing = dict.fromkeys(c.decode().lower() for reply in replies for c in reply)
        if missing:
            raise ServerError(
                f"the server's user may not run {', '.join(missing)}, which Phonon needs: grant "
                f"them with ACL SETUSER <user> {' '.join(f'+{command}' for command in missing)}"
            )

    def switch_to(
        self, process: bytes, epoch: bytes, listing: bytes, lanes: list[Lane], begun: float
    ) -> None:
        """Go on under an id that is registered and has lanes."""
        self.name = process.decode()
        self.id = process
        self.epoch, self.listing, self.lanes = epoch, listing, lanes
        self.lives_until = begun + self.lease
        self.lived_since = begun
        self.suspected = False
        self.lost_calls = {}

    # State

    @property
    def beaten_at(self) -> float:
        """The time, by the clock, at which the last answered heartbeat was sent."""
        return self.lives_until - self.lease

    @property
    def surely_lives(self) -> bool:
        """Return whether the lease lasts, so that this process cannot have been declared dead.

        The lease is counted from before the last heartbeat was sent, so it ends earlier here than
        on the server, even if the server's clock was set forward by an unnoticed margin.
        """
        return not self.suspected and self.clock() < self.lives_until - self.lease * MARGIN

    def beat_answered(self, begun: float) -> None:
        """Note that the heartbeat that was sent at that time was answered."""
        if begun >= self.lives_until:
            self.lived_since = begun  # it was overdue: the time of beating in time starts anew
        self.lives_until = max(self.lives_until, begun + self.lease)

    @property
    def may_mark(self) -> bool:
        """Return whether it has beaten in time for a whole lease, so that it may judge others."""
        return self.clock() - self.lived_since >= self.lease

    def new_number(self) -> int:
        """Return a number that this process uses for nothing else."""
        return next(self._numbers)

    def suspect(self, lane: Lane, kind: str, last: int) -> None:
        """Note that a lane's call was refused: declared dead, or the server lost writes.

        This never blocks. The heartbeat does the rebirth.

        Args:
            lane: The lane of the call.
            kind: The server's error code: PHONONFENCED, PHONONLOST or PHONONSTALE.
            last: The number of the last call that the server knows of.
        """
        lane.fence()
        if self.lanes and lane is self.lanes[lane.partition]:
            if kind != "PHONONFENCED":
                # A lane without a stamp was never used and was reaped, or is closed: it has lost
                # nothing. Any other has lost calls, even if the server has others in their place.
                lost = max(1, lane.answered - last) if lane.stamp else 0
                self.lost_calls[lane.partition] = lost
            self.suspected = True
            if self.signal is not None:
                self.signal.set()

    def on_rebirth(self, callback: Callable[[], object]) -> None:
        """Have a function called after each rebirth."""
        self._rebirths.append(callback)

    def reborn(self) -> None:
        """Call the functions that were given to `on_rebirth`."""
        for callback in self._rebirths:
            callback()
