"""Granted locks: acquiring, releasing, renewing, and finding that one was lost."""

import contextlib
import itertools
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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

#: The number of renewals of a lock with a lease of its own within that lease.
RENEWALS = 4
#: Seconds without work after which the worker ends.
IDLE = 10.0

_GRANTED, _WAIT = int(Reply.GRANTED), int(Reply.WAIT)
#: The unused result of an attempt whose caller has gone.
_ABANDONED = Taken(_WAIT, -1, b"", 0, b"")


@dataclass(slots=True, eq=False)
class LockRequest:
    """A caller's request for a lock.

    Attributes:
        key: The resource or the semaphore, for messages.
        partition: The partition.
        name: The server's name of the resource.
        shared: Whether to share the lock with other shared holders.
        places: The number of holders that may share it at the same time; 0: any number.
        lease: Seconds that a grant lasts unless renewed; None: as long as the process's lease.
        thread: The name of the thread or task, for other processes.
    """

    key: str
    partition: int
    name: bytes
    shared: bool = False
    places: int = 0
    lease: float | None = None
    thread: str = ""


class Attempt:
    """One call that takes a lock, until the lock is released.

    Attributes:
        place: The partition of the lock, and the server's name of its resource.
        holders: The holders' names under which it has asked.
        grant: The grant. Attempts of one thread at a reentrant lock have the same one.
        asking: A weak reference that lives as long as the flow asks. So a signal handler's
            exception, which may end the flow anywhere, also ends the asking.
    """

    __slots__ = ("asking", "grant", "holders", "place")

    def __init__(self, partition: int, name: bytes) -> None:
        self.place = partition, name
        self.holders: list[Holder] = []
        self.grant: Grant | None = None
        self.asking: Callable[[], object] = lambda: None


class _PendingRequest:
    """Lives as long as a flow that asks for a lock, or releases one."""

    __slots__ = ("__weakref__",)


class Grant:
    """One acquisition that was granted, until it is released.

    Attributes:
        request: The request that was granted.
        holder: The server's name of the holder.
        token: Its fencing token.
        generation: The process's generation: a forked child has another one.
        owner: The thread or task that took it.
        until: When its own lease is over unless renewed, by the clock. It counts from before the
            request, so it is earlier than on the server. Infinite without such a lease.
        attempts: The attempts that have it: one for each time that its thread has taken the lock.
        losses: Counts how often its loss was found. It is reported once.
        lost: Whether the lock was found to be lost.
        got_at: When the lock was granted, by the clock; 0 before.
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
        """Return whether the grant lasts, so that no other holder can have the lock."""
        identity = self._identity
        if self.lost or self.generation is not identity.generation:
            return False
        if operations.process_of(self.holder) != identity.name:
            return False
        return identity.surely_lives and identity.clock() < self.until


class Leases:
    """All locks that a process has been granted.

    Args:
        identity: The identity of this process.
        tell: Runs a function of the user's in the background.

    Attributes:
        forsaken: Attempts that no caller will release, because a signal handler's exception has
            ended their call; each with its lock's list of attempts. Adding one is a single step,
            which no second exception can interrupt; `settle` does the rest.
        stopping: Whether the process stops, so that no caller waits for a lock any more.
        is_working: Whether the worker will check for work again before it ends.
    """

    def __init__(self, identity: Identity, tell: Callable[[Callable[[], object]], object]) -> None:
        self._identity = identity
        self._tell = tell
        self.start_worker: Callable[[], None] = lambda: None
        self.signal: Signal | None = None
        self.begin()

    def begin(self) -> None:
        """Start without locks: at first, and in a forked child."""
        self.stopping = self.is_working = False
        self._due = math.inf
        self._unknown: dict[tuple[int, bytes], None] = {}
        self._doubtful: dict[bytes, None] = {}
        self.forsaken: deque[tuple[Attempt | None, list[Attempt]]] = deque()
        #: Weak references that live as long as the flows that ask for a lock, or release one.
        self._flows: dict[Holder, Callable[[], object]] = {}
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
        """Return the grants of a resource that a thread or task holds."""
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
        """Take a lock, or find out its holder.

        If the caller goes, no lock is taken and no waiter stays in the queue.

        Args:
            request: The request.
            seconds: Seconds to wait at the most; None not to wait.
            owner: The thread or task that wants it.
            on_lost: Called once the grant is found to be lost.
            attempt: Records the holder's name and the grant, for a caller that may be interrupted.

        Raises:
            ProcessStoppedError: The process was stopped meanwhile.
            PhononError: The server does not answer, or refuses.
        """
        attempt = attempt or Attempt(request.partition, request.name)
        asking: _PendingRequest | None = _PendingRequest()
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
                    lease_ms=0 if request.lease is None else math.ceil(request.lease * 1000),
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
                    # A `stop` meanwhile may not have seen the grant.
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
            # A waiter that gives up must leave the queue: it would swallow the next wake-up.
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
        self._flows[holder] = attempt.asking
        # Also without waiting: a stopping process has to release a lock that is granted meanwhile.
        identity.waiters[holder] = Waiter(
            request.partition, identity.caller(), operations.unlock, request.name
        )
        return holder

    def _no_longer(self, holder: Holder) -> None:
        self._identity.waiters.pop(holder, None)
        self._flows.pop(holder, None)

    @staticmethod
    def take_again(grant: Grant, attempt: Attempt) -> None:
        """Count a grant once more."""
        attempt.grant = grant
        grant.attempts[attempt] = None

    def settle(self) -> None:
        """Release forsaken attempts. Several calls, even at the same time, do no harm."""
        while self.forsaken:
            with contextlib.suppress(IndexError, ValueError):  # another thread may do the same
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
                    self._unknown[attempt.place] = None  # the worker asks the server, and releases
                self.forsaken.remove(entry)

    @staticmethod
    def _quit(place: tuple[int, bytes], holder: Holder) -> Flow[None]:
        yield Send((operations.unlock(*place, holder),))

    def release(self, grant: Grant) -> Flow[bool]:
        """Release a lock.

        Returns:
            Whether it was still held.

        Raises:
            ServerError: The server refused; the lock is still held.
        """
        self._remove(grant)
        if grant.got_at:
            self._identity.measures.observe("lock_hold", self._identity.clock() - grant.got_at)
        place, holder = (grant.request.partition, grant.request.name), grant.holder
        # The worker must not release it meanwhile: if this release is refused, the lock is held.
        releasing: _PendingRequest | None = _PendingRequest()
        self._flows[holder] = weakref.ref(releasing)
        try:
            (answer,) = yield Send((operations.unlock(*place, holder),))
            if isinstance(answer, ServerError):
                if (yield CALLER_GONE):  # so the worker has to release it
                    self._unknown[place] = None
                    return True
                self._add(grant)  # to be renewed, and to be released again
        finally:
            releasing = None
            self._flows.pop(holder, None)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer == int(Reply.RELEASED))

    def release_all(self) -> Flow[list[Exception]]:
        """Release all locks in one exchange. Return the errors."""
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
        """Make a lock's own lease longer. Return whether the lock is still held.

        Args:
            grant: The lock's grant.
            seconds: The new remaining time; the lease is never made shorter.
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
        """Start renewing locks in the background, because the heartbeat must not wait for lanes."""
        pace = self.soonest()
        if not self.stopping and (self._has_differences or pace < math.inf):
            self.start_worker()
            if self._has_differences or self._identity.clock() + pace < self._due:
                self.wake()

    def wake(self) -> None:
        """Wake the worker: there is work, or it is due earlier than before."""
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
        """Return whether there is no work. A later grant then starts another worker."""
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
        """Mark grants as lost, and call each `on_lost` once, in the background."""
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
        """Return a lock's holders (name, token, since ms, ms left, thread, ...) and waiters."""
        holders, waiters = yield from read(self._identity.in_partition(partition, "lockers", name))
        return holders, waiters

    @property
    def _has_differences(self) -> bool:
        """Return whether the server and this process disagree about the process's locks."""
        return bool(self.forsaken or self._unknown or self._doubtful)

    def compare(self, partition: int, names: Sequence[bytes], gone: Sequence[bytes] = ()) -> None:
        """Compare the process's locks on the server with those that are known here.

        Args:
            partition: Their partition.
            names: The resources in the registry. An interrupted call may have left a lock.
            gone: Those of them without a lock on the server: its key was deleted by hand.
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
            flow = self._flows.get(text)
            is_free = flow is None or flow() is None
            if holder.startswith(mine) and text not in self._all and is_free:
                yield Send((operations.unlock(partition, name, text),))
