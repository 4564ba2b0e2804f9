"""Granted locks: acquiring, releasing, renewing, and finding that one was lost."""

import contextlib
import itertools
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from phonon._core.flows import (
    CALLER_GONE,
    REBORN,
    AwaitMail,
    Flow,
    Send,
    Signal,
    Wait,
    read,
    single,
)
from phonon._core.identity import Identity, Waiter
from phonon._protocol import operations
from phonon._protocol.answers import Reply, Taken
from phonon._protocol.operations import Holder
from phonon.errors import PhononError, ProcessStoppedError, ServerError

log = logging.getLogger("phonon")

#: How often a lock with a lease of its own is renewed within it.
RENEWALS = 4
#: Seconds after which the worker ends that has nothing to do.
IDLE = 10.0

_GRANTED, _WAIT = int(Reply.GRANTED), int(Reply.WAIT)
#: The result of an attempt whose caller has gone, which is not used.
_ABANDONED = Taken(_WAIT, -1, b"", 0, b"")


class LockRequest(NamedTuple):
    """A caller's request for a lock.

    Attributes:
        key: The resource, or the semaphore, for people.
        partition: Where it is.
        name: The server's name of it.
        shared: Whether to share it with others that do.
        places: How many may share it at the same time; 0 if any number may.
        lease: Seconds that a grant lasts unless renewed; None: as long as the process's lease.
        thread: Who in the process wants it, for others to read.
    """

    key: str
    partition: int
    name: bytes
    shared: bool = False
    places: int = 0
    lease: float | None = None
    thread: str = ""


class Attempt:
    """One call that takes a lock, until the lock is given back as often as it was taken.

    Attributes:
        place: Where the lock is: its partition and the server's name of it.
        holders: The server's names of those that have asked.
        grant: What it has got. If a lock is reentrant, other attempts of its thread have the same.
        asking: Refers to something as long as it asks, and its flow lives. So no exception out of a
            signal handler, which may end the flow anywhere, leaves it asking.
    """

    __slots__ = ("asking", "grant", "holders", "place")

    def __init__(self, partition: int, name: bytes) -> None:
        self.place = partition, name
        self.holders: list[Holder] = []
        self.grant: Grant | None = None
        self.asking: Callable[[], object] = lambda: None


class _Asking:
    """Lives as long as a flow that asks for a lock."""

    __slots__ = ("__weakref__",)


class Grant:
    """One acquisition that was granted, until it is released.

    Attributes:
        request: The request that was granted.
        holder: The server's name of it.
        token: Its fencing token.
        generation: Whose process it is: a forked child has another one.
        owner: The thread or task that took it.
        until: When its own lease is over unless renewed, by the clock, which was read before the
            grant was asked for, so it is earlier than on the server. Infinite without such a lease.
        attempts: Those that have it: as often its thread has taken it.
        losses: Counts how often the loss was found; it is told once.
        lost: Whether it was found to be ours no longer.
        got_at: When it was got, by the clock; 0 before.
    """

    __slots__ = (
        "_identity",
        "attempts",
        "generation",
        "got_at",
        "holder",
        "losses",
        "lost",
        "on_lost",
        "owner",
        "request",
        "token",
        "until",
    )

    def __init__(
        self,
        identity: Identity,
        request: LockRequest,
        holder: Holder,
        token: int,
        asked: float,
        owner: object,
        on_lost: "Callable[[Grant], object]",
    ) -> None:
        self._identity = identity
        self.request = request
        self.holder = holder
        self.token = token
        self.generation = identity.generation
        self.owner = owner
        self.got_at = 0.0
        self.until = math.inf if request.lease is None else asked + request.lease
        self.attempts: dict[Attempt, None] = {}
        self.lost = False
        self.losses = itertools.count()
        self.on_lost = on_lost

    @property
    def is_ours(self) -> bool:
        """Return whether the grant lasts, so that nobody else can have the lock."""
        identity = self._identity
        if self.lost or self.generation is not identity.generation:
            return False
        if operations.process_of(self.holder) != identity.name:
            return False
        return identity.surely_lives and identity.clock() < self.until


class Leases:
    """All locks that a process has been granted.

    Args:
        identity: Who it is.
        tell: Runs a function of the user's in the background.

    Attributes:
        attempts: Those that ask for a lock right now, by the server's name of them.
        forsaken: Attempts that nobody gives back, because an exception out of a signal handler has
            ended their call, with the list in which their lock has them. To add one is a single
            step, so that no second exception comes between; `settle` does the rest.
        stopping: Whether the process stops: nobody waits for a lock any more.
        is_working: Whether the worker will look again whether there is something to do.
    """

    def __init__(self, identity: Identity, tell: Callable[[Callable[[], object]], object]) -> None:
        self._identity = identity
        self._tell = tell
        self.start_worker: Callable[[], None] = lambda: None
        self.signal: Signal | None = None
        self.begin()

    def begin(self) -> None:
        """Hold nothing: at first, and in a forked child."""
        self.stopping = self.is_working = False
        self._due = math.inf
        self._unknown: dict[tuple[int, bytes], None] = {}
        self._doubtful: dict[bytes, None] = {}
        self.forsaken: deque[tuple[Attempt | None, list[Attempt]]] = deque()
        self.attempts: dict[Holder, Attempt] = {}
        self._all: dict[Holder, Grant] = {}
        self._by_name: dict[bytes, dict[Holder, Grant]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._all)

        # Locks that are held

    def _add(self, grant: Grant) -> None:
        with self._lock:
            self._all[grant.holder] = grant
            self._by_name.setdefault(grant.request.name, {})[grant.holder] = grant

    def _remove(self, grant: Grant) -> bool:
        """Forget a grant. Return whether it was present."""
        with self._lock:
            was_here = self._all.pop(grant.holder, None) is not None
            here = self._by_name.get(grant.request.name, {})
            here.pop(grant.holder, None)
            if not here:
                self._by_name.pop(grant.request.name, None)
            return was_here

    def everywhere(self) -> list[Grant]:
        """Return all grants."""
        return list(self._all.values())

    def here(self, name: bytes, owner: object) -> list[Grant]:
        """Return the grants of a resource that a thread or task has taken, and still has."""
        if self.forsaken:
            self.settle()
        if name not in self._by_name:
            return []
        with self._lock:
            grants = list(self._by_name.get(name, {}).values())
        return [grant for grant in grants if grant.owner is owner and grant.is_ours]

    def soonest(self) -> float:
        """Return the seconds until a lease has to be renewed."""
        leases = [g.request.lease for g in self.everywhere() if g.request.lease is not None]
        return min(leases, default=math.inf) / RENEWALS

    # Taking and releasing

    def acquire(
        self,
        request: LockRequest,
        seconds: float | None,
        owner: object,
        on_lost: Callable[[Grant], object],
        attempt: Attempt | None = None,
    ) -> Flow[Grant | Taken]:
        """Take a lock, or find out who has it.

        If the caller goes, nothing is taken and nobody stays in line.

        Args:
            request: The request.
            seconds: How long to wait at the most; None not to wait.
            owner: The thread or task that wants it.
            on_lost: Called once the grant is found to be lost.
            attempt: Notes what it asks for and gets, for a caller that may be interrupted.

        Raises:
            ProcessStoppedError: The process was stopped meanwhile.
            PhononError: The server does not answer, or refuses.
        """
        attempt = attempt or Attempt(request.partition, request.name)
        asking: _Asking | None = _Asking()
        attempt.asking = weakref.ref(asking)
        try:
            return (yield from self._ask(request, seconds, owner, on_lost, attempt))
        finally:
            asking = None
            for holder in attempt.holders:
                self._no_longer(holder)

    def _ask(
        self,
        request: LockRequest,
        seconds: float | None,
        owner: object,
        on_lost: Callable[[Grant], object],
        attempt: Attempt,
    ) -> Flow[Grant | Taken]:
        identity = self._identity
        begun = identity.clock()
        deadline = begun + (seconds or 0.0)
        place = attempt.place
        holder = name = ""
        queued = False
        try:
            while not self.stopping:
                if name != identity.name:
                    self._no_longer(holder)
                    name = identity.name
                    holder = self._new_holder(name, request, attempt)
                    queued = False
                asked = identity.clock()
                left = deadline - asked if seconds is not None else 0.0
                operation = operations.lock(
                    *place,
                    holder,
                    queue=left > 0,
                    lease_ms=math.ceil((request.lease or 0.0) * 1000),
                    thread=request.thread,
                )
                (answer,) = yield Send((operation,))
                if isinstance(answer, Exception):
                    raise answer
                if answer is REBORN or name != identity.name:
                    continue
                if (yield CALLER_GONE) or self.stopping:
                    queued = queued or answer[0] in (_GRANTED, _WAIT)
                    break
                if answer[0] == _GRANTED:
                    grant = Grant(identity, request, holder, answer[1], asked, owner, on_lost)
                    self.take_again(grant, attempt)
                    self._add(grant)
                    if not self.stopping:
                        grant.got_at = identity.clock()
                        identity.measures.observe("lock_wait", grant.got_at - begun)
                        return grant
                    # `stop`, in the middle of this, may not have seen it.
                    self._remove(grant)
                    grant.lost = queued = True
                    break
                queued = queued or answer[0] == _WAIT
                if left <= 0:
                    if queued:
                        yield from self._quit(place, holder)
                    return Taken(*answer)
                pause = min(left, answer[1] / 1000)
                yield AwaitMail(request.partition, holder, pause)
                if (yield CALLER_GONE):
                    break
        except PhononError:
            if queued:
                yield from self._quit(place, holder)
            raise
        if queued:
            # A waiter that gives up must not stay in line: it would swallow the next wake-up.
            yield from self._quit(place, holder)
        if (yield CALLER_GONE):
            return _ABANDONED
        raise ProcessStoppedError(
            f"process {identity.name} was stopped, and waits no longer for {request.key!r}: make "
            "a new Process"
        )

    def _new_holder(self, process: str, request: LockRequest, attempt: Attempt) -> Holder:
        identity = self._identity
        holder = operations.holder_name(
            process, identity.new_number(), shared=request.shared, places=request.places
        )
        attempt.holders.append(holder)
        self.attempts[holder] = attempt
        # Also one that does not wait: what it is granted while the process stops is to be released.
        identity.waiters[holder] = Waiter(
            request.partition, identity.me(), operations.unlock, request.name
        )
        return holder

    def _no_longer(self, holder: Holder) -> None:
        self._identity.waiters.pop(holder, None)
        self.attempts.pop(holder, None)

    @staticmethod
    def take_again(grant: Grant, attempt: Attempt) -> None:
        """Have a grant once more."""
        attempt.grant = grant
        grant.attempts[attempt] = None

    def settle(self) -> None:
        """Take out what is forsaken. To do it again, or side by side, does no harm."""
        while self.forsaken:
            with contextlib.suppress(IndexError, ValueError):  # others may do the same
                attempt, kept = entry = self.forsaken[0]
                if attempt is None:
                    self.forsaken.remove(entry)
                    continue
                if attempt in kept:
                    kept.remove(attempt)
                grant = attempt.grant
                if grant is not None:
                    grant.attempts.pop(attempt, None)
                    if not grant.attempts:
                        self._remove(grant)
                if grant is None or not grant.attempts:
                    self._unknown[attempt.place] = None  # the worker gives back what the server has
                self.forsaken.remove(entry)

    @staticmethod
    def _quit(place: tuple[int, bytes], holder: Holder) -> Flow[None]:
        yield Send((operations.unlock(*place, holder),))

    def release(self, grant: Grant) -> Flow[bool]:
        """Give a lock back.

        Returns:
            Whether it was still ours.

        Raises:
            ServerError: The server refused; the lock is still held.
        """
        self._remove(grant)
        if grant.got_at:
            self._identity.measures.observe("lock_hold", self._identity.clock() - grant.got_at)
        operation = operations.unlock(grant.request.partition, grant.request.name, grant.holder)
        (answer,) = yield Send((operation,))
        if isinstance(answer, ServerError):
            self._add(grant)  # to be renewed, and to be released again
            raise answer
        if isinstance(answer, Exception):
            raise answer
        return bool(answer == int(Reply.RELEASED))

    def release_all(self) -> Flow[list[Exception]]:
        """Give all locks back, in one exchange. Returns the errors."""
        yield from self._give_back_unknown()
        grants = self.everywhere()
        for grant in grants:
            self._remove(grant)
            grant.lost = True
        if not grants:
            return []
        answers = yield Send(
            [operations.unlock(g.request.partition, g.request.name, g.holder) for g in grants]
        )
        return [answer for answer in answers if isinstance(answer, Exception)]

    def renew(self, grant: Grant, seconds: float) -> Flow[bool]:
        """Make a lock's own lease longer, and see whether the lock is still held.

        Args:
            grant: Which.
            seconds: How long it is to last from now on; it is never made shorter.
        """
        asked = self._identity.clock()
        lease_ms = 0 if grant.request.lease is None else math.ceil(seconds * 1000)
        answer = yield from single(
            operations.renew(grant.request.partition, grant.request.name, grant.holder, lease_ms)
        )
        if answer != int(Reply.RENEWED):
            return False
        if grant.request.lease is not None:
            grant.until = max(grant.until, asked + seconds)
        return True

    def start_work(self) -> None:
        """Renew locks in the background: the heartbeat does not wait for lanes."""
        pace = self.soonest()
        if not self.stopping and (self._has_differences or pace < math.inf):
            self.start_worker()
            if self._has_differences or self._identity.clock() + pace < self._due:
                self.wake()

    def wake(self) -> None:
        """There is something to do now, or sooner than there was."""
        if self.signal is not None:
            self.signal.set()

    def work(self) -> Flow[None]:
        """Renew locks with leases of their own, and settle differences with the server."""
        clock = self._identity.clock
        self.is_working = True
        last = clock()
        while not self.stopping:
            self._due = last + self.soonest()
            if self._has_differences or clock() >= self._due:
                last = clock()
                yield from self._catch_up()
                continue
            if self._due == math.inf:
                last = clock()
            woken = yield Wait(self.signal, min(self._due - clock(), IDLE))
            if not woken and self._due == math.inf and self._is_done():
                return
        self.is_working = False

    def _is_done(self) -> bool:
        """Return whether there is nothing to do. A grant that is added then starts a worker."""
        self.is_working = False
        self.is_working = self._has_differences or self.soonest() < math.inf
        return not self.is_working

    def _catch_up(self) -> Flow[None]:
        try:
            yield from self.renew_all()
            yield from self._give_back_unknown()
            while self._doubtful:
                name = next(iter(self._doubtful))
                del self._doubtful[name]
                for grant in list(self._by_name.get(name, {}).values()):
                    if not (yield from self.renew(grant, 0.0)):
                        self.lose((grant,))
        except PhononError as error:
            log.warning("locks of process %s are renewed later: %s", self._identity.name, error)

    def renew_all(self) -> Flow[None]:
        """Renew the locks that have a lease of their own."""
        asked = self._identity.clock()
        grants = [grant for grant in self.everywhere() if grant.request.lease is not None]
        if not grants:
            return
        wanted = [max(g.request.lease or 0.0, g.until - asked) for g in grants]
        answers = yield Send(
            [
                operations.renew(
                    g.request.partition, g.request.name, g.holder, math.ceil(seconds * 1000)
                )
                for g, seconds in zip(grants, wanted, strict=True)
            ]
        )
        lost = []
        for grant, seconds, answer in zip(grants, wanted, answers, strict=True):
            if answer == int(Reply.RENEWED):
                grant.until = max(grant.until, asked + seconds)
            elif answer == int(Reply.NOT_HELD):
                lost.append(grant)
        self.lose(lost)

    # Losing

    def lose(self, grants: Iterable[Grant]) -> None:
        """Mark grants as lost, and tell their owners, once, in the background."""
        lost = [grant for grant in grants if self._remove(grant)]
        self._identity.measures.add("lost_locks", len(lost))
        for grant in lost:
            grant.lost = True
            # The user's function may take time, and use this process.
            self._tell(partial(grant.on_lost, grant))

    def lose_former(self) -> None:
        """Lose the grants of a former identity."""
        name = self._identity.name
        self.lose([g for g in self.everywhere() if operations.process_of(g.holder) != name])

    # Looking

    def lockers(self, partition: int, name: bytes) -> Flow[tuple[list[Any], list[bytes]]]:
        """Return who holds a lock: holder, token, since ms, ms left, thread, ...; and who waits."""
        holders, waiters = yield from read(self._identity.in_partition(partition, "lockers", name))
        return holders, waiters

    @property
    def _has_differences(self) -> bool:
        """Whether the server and this process disagree about which locks the process has."""
        return bool(self.forsaken or self._unknown or self._doubtful)

    def compare(self, partition: int, names: Sequence[bytes], gone: Sequence[bytes] = ()) -> None:
        """Compare the locks that the server says are ours with those that are known here.

        Args:
            partition: Where they are.
            names: Those that the registry names. An interrupted call may have left one.
            gone: Those of them that are not held: somebody has deleted a key.
        """
        self.settle()
        for name in names:
            if not any(holder in self._all for holder in self._by_name.get(name, ())):
                self._unknown[partition, name] = None
        for name in gone:
            if name in self._by_name:
                self._doubtful[name] = None

    def _give_back_unknown(self) -> Flow[None]:
        self.settle()
        while self._unknown:
            place = next(iter(self._unknown))
            del self._unknown[place]
            yield from self._give_back(*place)

    def _give_back(self, partition: int, name: bytes) -> Flow[None]:
        holders, waiters = yield from self.lockers(partition, name)
        mine = self._identity.id + b"/"
        for holder in [*holders[::5], *waiters]:
            text = holder.decode("utf-8", "replace")
            attempt = self.attempts.get(text)
            asks = attempt is not None and attempt.asking() is not None
            if holder.startswith(mine) and text not in self._all and not asks:
                yield Send((operations.unlock(partition, name, text),))
