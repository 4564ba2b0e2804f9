"""Locks: exclusive and shared access to a resource, and semaphores."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from phonon.errors import (
    AlreadyLockedError,
    ConfigurationError,
    ConnectionLostError,
    DeadlockError,
    DeclaredDeadError,
    LockLostError,
    ProcessStoppedError,
    ServerError,
)
from phonon.protocol import locks, references
from phonon.protocol.effects import Flow, Participant
from phonon.protocol.locks import Wish
from phonon.protocol.messages import Locked

if TYPE_CHECKING:
    from phonon.process import Process

log = logging.getLogger("phonon")


class LockHolder(NamedTuple):
    """Who holds a lock, or waits for it.

    Attributes:
        id: The process's id.
        host: Its host name; empty if the process has just gone.
        pid: Its number in its operating system; 0 if the process has just gone.
        thread: The name of the thread that took it; empty for a waiter.
        shared: Whether it shares the lock with others.
        since: Since when, seconds since the epoch by the server's clock; 0 for a waiter.
        token: The grant's fencing token; 0 for a waiter.
    """

    id: str
    host: str
    pid: int
    thread: str
    shared: bool
    since: float
    token: int


class Grant:
    """One acquisition that was granted, until it is released.

    Attributes:
        lock: The object that it was granted to.
        wish: What was granted.
        me: The identity that has it. Another one could not release it.
        home: Whose process it is: a forked child has another one.
        token: Its fencing token.
        thread: Who took it. Not its number, which another thread may get when it has ended.
        until: When its lease is over unless renewed, by the local clock. It was read before the
            grant was asked for, so it is earlier than on the server.
        depth: How often its thread has taken it.
        lost: Whether it was found to be ours no longer.
    """

    __slots__ = ("depth", "home", "lock", "lost", "me", "thread", "token", "until", "wish")

    def __init__(self, lock: "Lock", wish: Wish, me: Participant, token: int, until: float) -> None:
        self.lock = lock
        self.wish = wish
        self.me = me
        self.home = lock.process.engine.home
        self.token = token
        self.thread = lock.process.engine.runtime.me()
        self.until = until
        self.depth = 1
        self.lost = False

    @property
    def is_ours(self) -> bool:
        """Whether it is sure, without asking, that nobody else has the lock."""
        engine = self.lock.process.engine
        if self.lost or self.me is not engine.me:
            return False
        return engine.surely_lives and engine.clock() < self.until

    @property
    def is_here(self) -> bool:
        """Whether it was this thread that took it."""
        return self.thread is self.lock.process.engine.runtime.me() and self.is_ours

    def lease_ms(self, now: float) -> int:
        """How long it is to last from now on: its lease, or longer if it was extended."""
        return max(self.wish.lease_ms, math.ceil((self.until - now) * 1000))


class Grants:
    """All that a process has been granted, by holder and by resource."""

    def __init__(self) -> None:
        self._all: dict[str, Grant] = {}
        self._at: dict[bytes, dict[str, Grant]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, grant: Grant) -> None:
        """Note a grant."""
        holder = grant.wish.holder
        with self._lock:
            self._all[holder] = self._at.setdefault(grant.lock.base, {})[holder] = grant

    def remove(self, grant: Grant) -> bool:
        """Forget a grant. Was it there?"""
        holder, base = grant.wish.holder, grant.lock.base
        with self._lock:
            if self._all.pop(holder, None) is None:
                return False
            del self._at[base][holder]
            if not self._at[base]:
                del self._at[base]
            return True

    def everywhere(self) -> list[Grant]:
        """All of them."""
        with self._lock:
            return list(self._all.values())

    def here(self, base: bytes) -> list[Grant]:
        """Those of a resource that this thread has taken."""
        if base not in self._at:
            return []
        with self._lock:
            return [grant for grant in self._at.get(base, {}).values() if grant.is_here]


class Lock:
    """Exclusive or shared access to a resource, across processes and threads.

    Made by `Process.lock` or `Reference.lock`; use it in a ``with`` block. The lock is leased, and
    the lease is renewed in the background for as long as the process lives and the lock is held.
    Waiters are served in order of arrival, and woken when it is their turn. One object may be used
    by several threads, each of which takes and releases the lock for itself.

    Args:
        process: Who wants it.
        lock_key: The resource, any text.
        block: Whether to wait if it is taken: `Process.BLOCKING_TIMEOUT` seconds at the most.
        shared: Whether to share it with others who do. Nobody who comes later than a waiting
            exclusive one goes in before it.
        reentrant: Whether the thread that has the lock may take it again; it is free when it was
            released as often. Otherwise that raises at once, since nobody else could release it.
        lease: Seconds that a grant lasts unless renewed. None: `Process.TTL`.
        on_lost: Called with this lock, from any thread, once it is found to be lost.

    Raises:
        ConfigurationError: ``lease`` is not above 0.
    """

    def __init__(
        self,
        process: "Process",
        lock_key: str,
        block: bool = True,
        *,
        shared: bool = False,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: "Callable[[Lock], object] | None" = None,
    ) -> None:
        lease = process.TTL if lease is None else lease
        if not 0 < lease < math.inf:
            raise ConfigurationError(f"lease is a number of seconds above 0, not {lease!r}")
        self.process = process
        self.lock_key = lock_key
        self.block = block
        self.shared = shared
        self.reentrant = reentrant
        self.lease = lease
        self.on_lost = on_lost
        self.base = self._base_of(process, lock_key)
        self._places = 0
        #: What was acquired through this object: a grant as often as it was taken.
        self._grants: list[Grant] = []

    @staticmethod
    def _base_of(process: "Process", name: str) -> bytes:
        return process.engine.keys.base(name)

    def __repr__(self) -> str:
        grant = self._grant
        if grant is None:
            state = "not held"
        elif grant.is_ours:
            left = grant.until - self.process.engine.clock()
            state = f"held by {grant.wish.thread}, token {grant.token}, lease {left:.1f} s"
        else:
            state = f"lost, token {grant.token}"
        mode = "shared " if self.shared else ""
        kind = type(self).__name__
        return f"<phonon.{kind} {mode}{self.lock_key!r} of process {self.process.id}: {state}>"

    @property
    def name(self) -> str:
        """The resource."""
        return self.lock_key

    @property
    def token(self) -> int | None:
        """The fencing token of the grant: it grows strictly per resource. None while not held.

        A store that refuses writes under a lower token than the last one it saw is safe from a
        holder that was paused beyond its lease.
        """
        grant = self._grant
        return None if grant is None else grant.token

    # To take and to release

    def acquire(
        self,
        block: bool | None = None,
        timeout: float | None = None,
        *,
        blocking: bool | None = None,
        blocking_timeout: float | None = None,
    ) -> bool:
        """Take the lock.

        Args:
            block: Whether to wait if it is taken. None: as the lock was made.
            timeout: Seconds to wait at the most; below 0 for ever. None:
                `Process.BLOCKING_TIMEOUT`.
            blocking: Another name of ``block``, which the locks of the standard library and of
                redis-py have.
            blocking_timeout: Another name of ``timeout``, which those of redis-py have.

        Returns:
            Whether the lock is held now.

        Raises:
            DeadlockError: This thread has the lock already, and would wait for itself.
            ConnectionLostError: The server does not answer.
        """
        block = blocking if block is None else block
        timeout = blocking_timeout if timeout is None else timeout
        return self._acquire(block, timeout) is None

    def release(self) -> None:
        """Give the lock back.

        Raises:
            LockLostError: It was not held any more, or never was.
            ServerError: The server refused; the lock is still held.
        """
        grant = self._take_out()
        engine = self.process.engine
        if grant.home is not engine.home:
            raise LockLostError(
                f"the lock on {self.lock_key!r} was taken before fork() and is the parent's"
            )
        if grant.lost:
            raise self._lost(grant)
        grant.depth -= 1
        if grant.depth:
            return
        engine.grants.remove(grant)
        try:
            flow = locks.release(grant.me, self.base, grant.wish.holder)
            released = engine.run(self.base, flow)
        except ServerError:
            # It refused, so the lock is still ours: to be renewed, and to be released again.
            grant.depth += 1
            engine.grants.add(grant)
            self._grants.append(grant)
            raise
        if not released:
            self._tell(grant)
            raise self._lost(grant)

    def extend(self, additional_time: float | None = None, replace_ttl: bool = False) -> bool:
        """Make the lease longer, for a time in which it cannot be renewed.

        It is never made shorter, so that a message which the network delivers late can take
        nothing away.

        Args:
            additional_time: Seconds to add to what is left of it. None: start it anew.
            replace_ttl: Whether they take the place of what is left, if that is less.

        Returns:
            True.

        Raises:
            LockLostError: It is not held any more.
            ConfigurationError: ``additional_time`` is not above 0.
        """
        if additional_time is not None and not 0 < additional_time < math.inf:
            raise ConfigurationError(
                f"additional_time is a number of seconds above 0, not {additional_time!r}"
            )
        grant = self._held()

        def lease_ms(now: float) -> int:
            if additional_time is None:
                return grant.wish.lease_ms
            left = 0.0 if replace_ttl else max(0.0, grant.until - now)
            return math.ceil((left + additional_time) * 1000)

        self._renew(grant, lease_ms)
        return True

    def reacquire(self) -> bool:
        """Start the lease anew; redis-py's name for ``extend()``."""
        return self.extend()

    def check(self) -> None:
        """Ask the server whether the lock is still held, and renew it.

        Raises:
            LockLostError: It is not, or never was.
        """
        grant = self._held()
        self._renew(grant, grant.lease_ms)

    # To look at

    def owned(self) -> bool:
        """Whether this object holds the lock: without asking, and never for too long.

        False as well once the lease, counted from before it was asked for, is over, or others may
        have declared this process dead.
        """
        grant = self._grant
        return grant is not None and grant.is_ours

    def locked(self) -> bool:
        """Whether anybody holds the lock."""
        return bool(self._lockers().holders)

    def holders(self) -> list[LockHolder]:
        """Who holds the lock."""
        lockers = self._lockers().holders
        stays = self.process.engine.stays(
            [locks.process_of(locker.holder) for locker in lockers], self.base
        )
        return [
            LockHolder(
                locks.process_of(locker.holder),
                stay.card.get("host", ""),
                int(stay.card.get("pid", 0)),
                locker.thread,
                locks.is_shared(locker.holder),
                locker.since_ms / 1000,
                locker.token,
            )
            for locker, stay in zip(lockers, stays, strict=True)
        ]

    def waiters(self) -> list[LockHolder]:
        """Who waits for the lock, in order."""
        waiters = self._lockers().waiters
        ids = [locks.process_of(waiter) for waiter in waiters]
        stays = self.process.engine.stays(ids, self.base)
        return [
            LockHolder(
                process_id,
                stay.card.get("host", ""),
                int(stay.card.get("pid", 0)),
                "",
                locks.is_shared(waiter),
                0.0,
                0,
            )
            for process_id, waiter, stay in zip(ids, waiters, stays, strict=True)
        ]

    def __enter__(self) -> Self:
        taken = self._acquire(None, None)
        if taken is not None:
            raise taken
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except Exception as lost:
            if error is None:
                raise
            # The body's own exception is the one to see.
            error.add_note(f"phonon: {lost}")

    # Machinery

    @property
    def _grant(self) -> Grant | None:
        """This thread's grant; another thread's, if it has none: any thread may release a lock."""
        here = self.process.engine.runtime.me()
        for grant in reversed(self._grants):
            if grant.thread is here:
                return grant
        return self._grants[-1] if self._grants else None

    def _take_out(self) -> Grant:
        while True:
            grant = self._grant
            if grant is None:
                raise LockLostError(f"the lock on {self.lock_key!r} is not held: acquire it first")
            with contextlib.suppress(ValueError):  # another thread was faster
                self._grants.remove(grant)
                return grant

    def _held(self) -> Grant:
        grant = self._grant
        if grant is None:
            raise LockLostError(f"the lock on {self.lock_key!r} is not held: acquire it first")
        if grant.lost or grant.home is not self.process.engine.home:
            raise self._lost(grant)
        return grant

    def _lost(self, grant: Grant) -> LockLostError:
        return LockLostError(
            f"the lock on {self.lock_key!r} (token {grant.token}) was lost before it was released: "
            f"its lease of {self.lease:g} s ran out, the server lost it, its process was stopped, "
            "or it was taken over; what it protected may have been changed by another holder since"
        )

    def lose(self, grant: Grant) -> None:
        """It was found that the lock is not ours any more: say so, once."""
        if self.process.engine.grants.remove(grant):
            self._tell(grant)

    def _tell(self, grant: Grant) -> None:
        grant.lost = True
        self.process.engine.tell(self._lost(grant))
        if self.on_lost is not None:
            try:
                self.process.engine.runtime.tell(self.on_lost, self)
            except Exception:
                log.exception("on_lost of %r has raised", self)

    def _renew(self, grant: Grant, lease_ms: "Callable[[float], int]") -> None:
        if not self.process.engine.run(b"renew " + self.base, renewing(self, grant, lease_ms)):
            self.lose(grant)
            raise self._lost(grant)

    def _lockers(self) -> locks.Lockers:
        engine = self.process.engine
        return engine.run(b"lockers " + self.base, locks.lockers(engine.me, self.base))

    def _again(self, block: bool) -> bool:
        """Whether this thread has the lock and may take it once more."""
        for grant in self.process.engine.grants.here(self.base):
            if self.reentrant and (self.shared or not grant.lock.shared):
                grant.depth += 1
                self._grants.append(grant)
                return True
            # Shared twice would go well until somebody waits for it exclusively in between. The
            # places of a semaphore are another matter: whoever wants two takes two.
            if block and not self._places:
                raise DeadlockError(
                    f"this thread holds {self.lock_key!r} already and would wait for itself: "
                    "release it first, or make the lock with reentrant=True"
                )
        return False

    def _acquire(self, block: bool | None, timeout: float | None) -> AlreadyLockedError | None:
        block = self.block if block is None else block
        if timeout is None:
            timeout = self.process.BLOCKING_TIMEOUT
        seconds = math.inf if timeout < 0 else timeout
        if self._again(block and seconds > 0):
            return None
        return Acquiring(self, self._places).run(seconds if block else None)

    def granted(self, grant: Grant) -> None:
        """It is ours now."""
        self._grants.append(grant)
        self.process.engine.holds_lock(grant)


def renewing(lock: Lock, grant: Grant, lease_ms: "Callable[[float], int]") -> Flow[bool]:
    """Prolong a lease by hand; the result is whether the lock is still ours.

    It takes turns with the heartbeat, so that the later one to be sent knows of the earlier.
    """
    now = lock.process.engine.clock()
    ms = lease_ms(now)
    renewed = yield from references.renew(grant.me, lock.base, [(grant.wish.holder, ms)])
    if renewed[1]:
        grant.until = max(grant.until, now + ms / 1000)
    return bool(renewed[1])


class Acquiring:
    """One thread's attempt to take a lock.

    Args:
        lock: Which.
        places: How many may share it at the same time; 0 if any number may.
    """

    def __init__(self, lock: Lock, places: int) -> None:
        self._lock = lock
        self._process = lock.process
        self._places = places
        self._begin()

    def _begin(self) -> None:
        lock = self._lock
        self._me, holder = self._process.engine.new_holder(shared=lock.shared, places=self._places)
        lease_ms = math.ceil(lock.lease * 1000)
        self._wish = Wish(lock.base, holder, lease_ms, self._process.engine.runtime.my_name())

    def run(self, seconds: float | None) -> AlreadyLockedError | None:
        """Take the lock, or say why not.

        Args:
            seconds: How long to wait at the most; None not to wait.
        """
        process, base = self._process, self._lock.base
        deadline = time.monotonic() + (seconds or 0.0)
        queued = False
        try:
            while not process.stopping:
                left = deadline - time.monotonic() if seconds is not None else 0.0
                # Should no answer come, we may have the lock, or a place in line.
                process.waiters[self._wish.holder] = base
                asked = process.engine.clock()
                try:
                    answer = self._ask(queue=left > 0)
                except DeclaredDeadError:
                    process.engine.run(base, process.engine.be_reborn(self._me))
                    del process.waiters[self._wish.holder]
                    self._begin()
                    continue
                if answer.kind == "granted":
                    until = asked + self._lock.lease
                    self._lock.granted(
                        Grant(self._lock, self._wish, self._me, answer.number, until)
                    )
                    del process.waiters[self._wish.holder]
                    return None
                queued = queued or answer.kind == "wait"
                if not queued:
                    del process.waiters[self._wish.holder]
                if left <= 0:
                    return self._taken(answer, seconds)
                if not process.stopping:
                    pause = min(left, answer.number / 1000)
                    process.engine.run(base, locks.wait(base, self._wish.holder, pause))
            raise ProcessStoppedError(
                f"process {process.id} was stopped, so nobody waits for {self._lock.lock_key!r}: "
                "make a new Process"
            )
        finally:
            if self._wish.holder in process.waiters:
                process.engine.runtime.clean_up(self._give_up)

    def _ask(self, *, queue: bool) -> Locked:
        flow = locks.acquire(self._me, self._wish, queue=queue)
        return self._process.engine.run(self._lock.base, flow)

    def _give_up(self) -> None:
        """Whoever gives up must not stay in line: it would swallow the next wake-up."""
        process, holder = self._process, self._wish.holder
        try:
            with contextlib.suppress(ConnectionLostError):  # it goes on by itself
                process.engine.run(
                    self._lock.base, locks.release(self._me, self._lock.base, holder)
                )
        finally:
            del process.waiters[holder]

    def _taken(self, answer: Locked, seconds: float | None) -> AlreadyLockedError:
        process_id = locks.process_of(answer.holder)
        (stay,) = self._process.engine.stays([process_id], self._lock.base)
        card = stay.card
        waited = "" if seconds is None else f" after {seconds:g} s of waiting"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer.since_ms / 1000))
        holder = LockHolder(
            process_id,
            card.get("host", ""),
            int(card.get("pid", 0)),
            answer.thread,
            locks.is_shared(answer.holder),
            answer.since_ms / 1000,
            0,
        )
        mode = "shared" if holder.shared else "exclusive"
        return AlreadyLockedError(
            f"{self._lock.lock_key!r} is locked ({mode}) by process {process_id} (host "
            f"{holder.host or 'unknown'}, pid {holder.pid or 'unknown'}, thread "
            f"{holder.thread or 'unknown'}) since {since}{waited}; wait for it with block=True, or "
            "look at Lock.holders()",
            holder,
        )


class Semaphore(Lock):
    """A number of places, across processes and threads: so many hold it at the same time.

    Made by `Process.semaphore`. Waiters are served in order of arrival. The place of a process
    that dies is free again when it is declared dead.

    Args:
        process: Who wants a place.
        name: The semaphore's name, any text. It has nothing to do with a resource of that name.
        places: How many may hold it at the same time; the same for all who use it.
        options: As of a `Lock`, but for ``shared``.
    """

    def __init__(
        self,
        process: "Process",
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: "Callable[[Lock], object] | None" = None,
    ) -> None:
        if places < 1:
            raise ConfigurationError(f"a semaphore has 1 place at the least, not {places!r}")
        super().__init__(process, name, block, shared=True, lease=lease, on_lost=on_lost)
        self._places = places

    @staticmethod
    def _base_of(process: "Process", name: str) -> bytes:
        return process.engine.keys.semaphore(name)
