"""Locks: exclusive and shared access to a resource, and semaphores."""

import contextlib
import functools
import inspect
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

from phonon._core.blocks import BlockEnd
from phonon._core.executor import TOKENS
from phonon._core.flows import CALLER_GONE, Flow
from phonon._core.forks import notice
from phonon._core.leases import Attempt, Grant, LockRequest
from phonon._protocol.answers import Taken
from phonon._protocol.operations import is_shared, process_of
from phonon._protocol.partitions import encode_resource, encode_semaphore
from phonon.errors import (
    AlreadyLockedError,
    ConfigurationError,
    DeadlockError,
    LockLostError,
    PhononError,
    ServerError,
)
from phonon.settings import (
    check_api,
    check_callable,
    check_count,
    check_flag,
    check_name,
    check_owner,
    check_seconds,
    check_timeout,
)

if TYPE_CHECKING:
    from phonon.process import Process

P = ParamSpec("P")
R = TypeVar("R")


class LockHolder(NamedTuple):
    """A holder of a lock, or a waiter for it.

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


class _LossCallback:
    """The user's ``on_lost`` with its lock; the log names both if the function raises."""

    def __init__(self, lock: "BaseLock") -> None:
        self._lock = lock

    def __call__(self) -> object:
        on_lost = self._lock.on_lost
        return None if on_lost is None else on_lost(self._lock)

    def __repr__(self) -> str:
        return f"on_lost of {self._lock!r}"


class _Engine:
    """The parts of a lock's process, kept at the first use: an asyncio process may begin later."""

    def __get__(self, lock: "BaseLock", kind: object = None) -> Any:
        engine = lock.__dict__["_engine"] = check_owner(lock.process)
        return engine


class BaseLock:
    """The base of `Lock` and `AsyncLock`: everything but the waiting."""

    #: The package from which users import the class, for its repr.
    _package = "phonon"
    #: Whether its methods are awaited.
    _is_async = False
    _engine: Any = _Engine()

    def __init__(
        self,
        process: Any,
        lock_key: str,
        block: bool = True,
        *,
        shared: bool = False,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[Any], object] | None = None,
        timeout: float | None = None,
    ) -> None:
        check_name("lock_key", lock_key)
        if lease is not None:
            check_seconds("lease", lease)
        if timeout is not None:
            check_timeout("timeout", timeout)
        self.process = process
        self._check_process()
        if on_lost is not None:
            check_callable("on_lost", on_lost, is_async=self._is_async)
        self.timeout = timeout
        self.lock_key = lock_key
        self.block = check_flag("block", block)
        self.shared = check_flag("shared", shared)
        self.reentrant = check_flag("reentrant", reentrant)
        self.lease = lease
        self.on_lost = on_lost
        self._name = self._encode(lock_key)
        self._places = 0
        #: The attempts through which this object has acquired the lock and not released it yet.
        self.taken: list[Attempt] = []
        self._blocks: dict[int, _Block] = {}

    def _check_process(self) -> None:
        """Refuse a process of the other API."""
        is_async = self._engine.is_async
        check_api(type(self), process_is_async=is_async, is_async=self._is_async)

    def _check_decorated(self, function: Callable[..., Any]) -> None:
        """Refuse a function around which a decorator cannot hold the lock.

        Raises:
            ConfigurationError: It is not a function, or its body runs after the call has returned.
        """
        name = getattr(function, "__qualname__", repr(function))
        is_coroutine = inspect.iscoroutinefunction(function)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            remedy = "use a with block inside it"
        elif not callable(function):
            remedy = "write it above a function, as in @process.lock(...)"
        elif is_coroutine and not self._is_async:
            remedy = "its body would run without the lock: use the lock of an AsyncProcess"
        elif self._is_async and not is_coroutine:
            remedy = "make it an async function, or use the lock of a Process"
        else:
            return
        raise ConfigurationError(
            f"the lock on {self.lock_key!r} cannot be held around {name}: {remedy}"
        )

    @staticmethod
    def _encode(key: str) -> bytes:
        return encode_resource(key)

    def __repr__(self) -> str:
        grant = self._grant
        if grant is None:
            state = "not held"
        elif grant.is_ours:
            identity = self._engine.identity
            left = min(grant.until, identity.lives_until) - identity.clock()
            thread = grant.request.thread
            state = f"held by {thread}, token {_token_of(grant)}, lease {left:.1f} s"
        else:
            state = f"lost, token {_token_of(grant)}"
        mode = "shared " if self.shared else ""
        kind = f"{self._package}.{type(self).__name__}"
        return f"<{kind} {mode}{self.lock_key!r} of process {self.process.id}: {state}>"

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
        notice()
        grant = self._grant
        if grant is None or grant.generation is not self._engine.generation:
            return None
        return _token_of(grant)

    def owned(self) -> bool:
        """Return whether this object surely holds the lock, without asking the server.

        The answer is False as well once the lease is over, counted from before the request for it,
        or once others may have declared this process dead.
        """
        notice()
        grant = self._grant
        return grant is not None and grant.is_ours

    # Acquiring

    def new_attempt(self) -> Attempt:
        """Return a record of the call's acquisition, in case the call is interrupted."""
        return Attempt(self._engine.identity.partitions.of(self._name), self._name)

    def entering(self, attempt: Attempt | None = None) -> Flow[bool]:
        """Take the lock with the options of its constructor.

        Args:
            attempt: Records what the call acquires.

        Returns:
            Whether the lock is held. False only for a caller that has gone meanwhile.

        Raises:
            AlreadyLockedError: Another holder has the lock.
        """
        return self._entering(
            self._seconds(None, None), self._engine.driver.caller(), attempt or self.new_attempt()
        )

    def _entering(self, seconds: float | None, owner: object, attempt: Attempt) -> Flow[bool]:
        taken = yield from self._acquiring(seconds, owner, attempt)
        if taken is None:
            return True
        # A caller that has gone, perhaps while its error was prepared, gets no error.
        if (yield CALLER_GONE):
            return False
        refusal = yield from self._refusal(taken, seconds)
        if (yield CALLER_GONE):
            return False
        raise refusal

    def _acquire(
        self,
        block: bool | None,
        timeout: float | None,
        blocking: bool | None,
        blocking_timeout: float | None,
        attempt: Attempt | None = None,
    ) -> Flow[Taken | None]:
        if blocking is not None:
            check_flag("blocking", blocking)
        if blocking_timeout is not None:
            check_timeout("blocking_timeout", blocking_timeout)
        block = blocking if block is None else block
        timeout = blocking_timeout if timeout is None else timeout
        return self._acquiring(
            self._seconds(block, timeout),
            self._engine.driver.caller(),
            attempt or self.new_attempt(),
        )

    def _seconds(self, block: bool | None, timeout: float | None) -> float | None:
        """Return how many seconds to wait; None not to wait."""
        block = self.block if block is None else check_flag("block", block)
        if timeout is None:
            timeout = self.process.BLOCKING_TIMEOUT if self.timeout is None else self.timeout
        seconds = check_timeout("timeout", timeout)
        return seconds if block else None

    def _acquiring(
        self, seconds: float | None, owner: object, attempt: Attempt
    ) -> Flow[Taken | None]:
        """Take the lock. The result is None, or the answer that names the holder."""
        if self._takes_again(owner, attempt, waits=bool(seconds)):
            return None
        engine = self._engine
        request = LockRequest(
            self.lock_key,
            *attempt.place,
            self.shared,
            self._places,
            self.lease,
            engine.driver.my_name(),
        )
        answer = yield from engine.leases.acquire(request, seconds, owner, self._tell_loss, attempt)
        if isinstance(answer, Taken):
            return answer
        # Here and not in the caller: an interrupt could keep the caller from doing it.
        self.taken.append(attempt)
        if self.lease is not None:
            engine.leases.start_work()
        return None

    def _takes_again(self, owner: object, attempt: Attempt, *, waits: bool) -> bool:
        """Take the lock once more if this thread has it already; return whether it did."""
        leases = self._engine.leases
        for grant in leases.here(self._name, owner):
            if self.reentrant and (self.shared or not grant.request.shared):
                leases.take_again(grant, attempt)
                self.taken.append(attempt)
                return True
            # Sharing twice works until a waiter for the exclusive lock comes in between. A thread
            # may take several places of a semaphore, though.
            if waits and not self._places:
                raise DeadlockError(
                    f"this thread holds {self.lock_key!r} already and would wait for itself: "
                    "release it first, or make the lock with reentrant=True"
                )
        return False

    def _refusal(self, taken: Taken, seconds: float | None) -> Flow[AlreadyLockedError]:
        """Return the error that names the holder."""
        (holder,) = yield from self._described([(taken.holder, 0, taken.since_ms, taken.thread)])
        waited = "" if seconds is None else f" after {seconds:g} s of waiting"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
        mode = "shared" if holder.shared else "exclusive"
        return AlreadyLockedError(
            f"{self.lock_key!r} is locked ({mode}) by process {holder.id} (host "
            f"{holder.host or 'unknown'}, pid {holder.pid or 'unknown'}, thread "
            f"{holder.thread or 'unknown'}) since {since}{waited}; wait for it with block=True, or "
            "look at Lock.holders()",
            holder,
        )

    # Releasing

    def releasing(self, taken: Attempt | None = None) -> Flow[None]:
        """Give the lock back.

        Args:
            taken: The attempt that acquired it. None: this thread's latest.

        Raises:
            LockLostError: The lock was not held any more, or never was.
        """
        # A task of another loop, or of a forked child, must not remove the grant from the object.
        self._engine.driver.check()
        attempt, grant = self._take_out(taken)
        if grant.generation is not self._engine.generation:
            raise LockLostError(
                f"the lock on {self.lock_key!r} was taken before fork() and is the parent's"
            )
        if grant.lost:
            raise self._lost(grant)
        grant.attempts.pop(attempt, None)
        return self._released() if grant.attempts else self._releasing(attempt, grant)

    @staticmethod
    def _released() -> Flow[None]:
        yield from ()

    def _releasing(self, attempt: Attempt, grant: Grant) -> Flow[None]:
        try:
            released = yield from self._engine.leases.release(grant)
        except ServerError:
            # The server refused, so the lock is still ours: it is renewed, and can be released.
            grant.attempts[attempt] = None
            self.taken.append(attempt)
            raise
        if not released:
            self._found_lost(grant)
            raise self._lost(grant)

    def _take_out(self, attempt: Attempt | None) -> tuple[Attempt, Grant]:
        while True:
            attempt = attempt or self.latest
            grant = None if attempt is None else attempt.grant
            if attempt is None or grant is None:
                raise self._not_held()
            try:
                self.taken.remove(attempt)
            except ValueError:
                attempt = None  # another thread was faster
            else:
                return attempt, grant

    @property
    def latest(self) -> Attempt | None:
        """This thread's latest attempt, or else another thread's: any thread may release a lock."""
        self._engine.leases.settle()
        taken = self.taken
        if not taken:
            return None
        here = self._engine.driver.caller()
        for attempt in reversed(taken):
            if attempt.grant is not None and attempt.grant.owner is here:
                return attempt
        with contextlib.suppress(IndexError):  # released by another thread meanwhile
            return taken[-1]
        return None

    @property
    def _grant(self) -> Grant | None:
        """The latest grant, this thread's if it has one."""
        attempt = self.latest
        return None if attempt is None else attempt.grant

    def _held(self) -> Grant:
        self._engine.driver.check()
        grant = self._grant
        if grant is None:
            raise self._not_held()
        if grant.lost or grant.generation is not self._engine.generation:
            raise self._lost(grant)
        return grant

    # Renewing

    def _extend(self, additional_time: float | None, *, replace_ttl: bool) -> Flow[bool]:
        check_flag("replace_ttl", replace_ttl)
        if additional_time is not None:
            check_seconds("additional_time", additional_time)
        grant = self._held()
        now = self._engine.identity.clock()
        if grant.request.lease is None:
            seconds = 0.0
        elif additional_time is None:
            seconds = grant.request.lease
        else:
            left = 0.0 if replace_ttl else max(0.0, grant.until - now)
            seconds = left + additional_time
        return self._renewing(grant, seconds)

    def _check(self) -> Flow[bool]:
        grant = self._held()
        lease = grant.request.lease
        left = grant.until - self._engine.identity.clock()
        return self._renewing(grant, 0.0 if lease is None else max(lease, left))

    def _renewing(self, grant: Grant, seconds: float) -> Flow[bool]:
        if not (yield from self._engine.leases.renew(grant, seconds)):
            self._found_lost(grant)
            raise self._lost(grant)
        return True

    # Losing

    def _found_lost(self, grant: Grant) -> None:
        """Report the loss at once, so that `on_lost` is called before a caller gets the error."""
        grant.lost = True
        grant.on_lost(grant)
        self._engine.leases.lose((grant,))

    def _tell_loss(self, grant: Grant) -> None:
        """Report a loss once, even if several threads find it at the same time."""
        if next(grant.losses):
            return
        reports = self._engine.reports
        reports.report_error(self._lost(grant))
        if self.on_lost is not None:
            reports.call(_LossCallback(self))

    def _not_held(self) -> LockLostError:
        return LockLostError(f"the lock on {self.lock_key!r} is not held: acquire it first")

    def _lost(self, grant: Grant) -> LockLostError:
        lease = grant.request.lease
        seconds = self._engine.identity.lease if lease is None else lease
        return LockLostError(
            f"the lock on {self.lock_key!r} (token {_token_of(grant)}) was lost before it was "
            f"released: its lease of {seconds:g} s ran out, the server lost it, its process was "
            "stopped, or it was taken over; another holder may have changed the protected data "
            "since"
        )

    # Looking

    def _lockers(self) -> Flow[tuple[list[Any], list[bytes]]]:
        partition = self._engine.identity.partitions.of(self._name)
        found: tuple[list[Any], list[bytes]] = yield from self._engine.leases.lockers(
            partition, self._name
        )
        return found

    def _locked(self) -> Flow[bool]:
        holders, _ = yield from self._lockers()
        return bool(holders)

    def _holders(self) -> Flow[list[LockHolder]]:
        found, _ = yield from self._lockers()
        rows = zip(found[::5], found[1::5], found[2::5], found[4::5], strict=True)
        return (yield from self._described(list(rows)))

    def _waiters(self) -> Flow[list[LockHolder]]:
        _, waiters = yield from self._lockers()
        return (yield from self._described([(waiter, 0, 0, b"") for waiter in waiters]))

    def _described(self, rows: list[tuple[bytes, int, int, bytes]]) -> Flow[list[LockHolder]]:
        """Return holders, given for each its name, token, start in ms, and thread."""
        names = [_text(row[0]) for row in rows]
        infos = yield from self._engine.members.process_info(
            [(process_of(name).encode(), 0.0) for name in names]
        )
        return [
            LockHolder(
                info.id,
                info.host,
                info.pid,
                _text(thread),
                is_shared(name),
                since_ms / 1000,
                token * TOKENS,
            )
            for info, name, (_, token, since_ms, thread) in zip(infos, names, rows, strict=True)
        ]


class _Block:
    """A ``with`` block of a lock.

    Attributes:
        attempt: The attempt of its lock, until the lock is given back.
        end: Refers to an object that lives as long as the block.
    """

    __slots__ = ("attempt", "end")

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self.end: Callable[[], object] = lambda: None


class Lock(BaseLock):
    """Exclusive or shared access to a resource, across processes and threads.

    Made by `Process.lock` or `Reference.lock`; use it in a ``with`` block. A lock lasts as long as
    its process's lease, which the heartbeat renews, or as a lease of its own. A waiter is served in
    order of arrival, and woken when its turn comes. Several threads may use one object; each of
    them takes and releases the lock for itself.

    Args:
        process: The process that wants the lock.
        lock_key: The resource, any text.
        block: Whether to wait if the lock is taken: `Process.BLOCKING_TIMEOUT` seconds at the most.
        shared: Whether to share the lock with other shared holders. A shared request that comes
            after a waiting exclusive one is granted after it.
        reentrant: Whether the thread that has the lock may take it again; the lock is free when it
            was released as often. Otherwise taking it again raises at once, because the thread
            would wait for itself.
        lease: Seconds that a grant lasts unless renewed. None: as long as the process's lease. Give
            one to have the lock freed sooner than a process is declared dead.
        on_lost: Called with this lock, from any thread, once the lock is found to be lost.
        timeout: Seconds to wait at the most, unless `acquire` is given another number; -1 waits
            for ever. None: `Process.BLOCKING_TIMEOUT`.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> with process.lock("report") as lock:
        ...     print("a fencing token:", lock.token > 0)
        a fencing token: True
        >>> @process.lock("report")
        ... def write_report():  # one call at a time, in all processes
        ...     return "written"
        >>> write_report()
        'written'
    """

    process: "Process"

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
            block: Whether to wait if the lock is taken. None: as given to the constructor.
            timeout: Seconds to wait at the most; -1 for ever. None:
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
        attempt = self.new_attempt()
        try:
            flow = self._acquire(block, timeout, blocking, blocking_timeout, attempt)
            return self._engine.run(flow) is None
        except PhononError:
            raise
        except BaseException:
            # After an interrupt no code would release a lock that was granted already.
            self._engine.leases.forsaken.append((attempt, self.taken))
            self._engine.leases.start_work()
            raise

    def release(self) -> None:
        """Give the lock back.

        Raises:
            LockLostError: The lock was not held any more, or never was.
            ServerError: The server refused; the lock is still held.
        """
        attempt = None
        try:
            attempt = self.latest
            self._engine.run(self.releasing(attempt))
        except PhononError:
            raise
        except BaseException:
            # After an interrupt, at the end of a with block say, no code would call this again.
            self._engine.leases.forsaken.append((attempt or self.latest, self.taken))
            self._engine.leases.start_work()
            raise

    def extend(self, additional_time: float | None = None, replace_ttl: bool = False) -> bool:
        """Make the lock's own lease longer, before a time in which it cannot be renewed.

        The lease is never made shorter, not even by a call that the network delivers late. A lock
        without a lease of its own lasts as long as its process's lease, and is only checked.

        Args:
            additional_time: Seconds to add to the remaining time. None: start the lease anew.
            replace_ttl: Whether these seconds replace the remaining time, if that is less.

        Returns:
            True.

        Raises:
            LockLostError: The lock is not held any more.
            ConfigurationError: ``additional_time`` is not above 0.
        """
        return bool(self._engine.run(self._extend(additional_time, replace_ttl=replace_ttl)))

    def reacquire(self) -> bool:
        """Start the lease anew: the name that redis-py has for ``extend()``."""
        return self.extend()

    def check(self) -> None:
        """Ask the server whether the lock is still held, and renew it.

        Raises:
            LockLostError: The lock is not held any more, or never was.
        """
        self._engine.run(self._check())

    def locked(self) -> bool:
        """Return whether any process holds the lock."""
        return bool(self._engine.run(self._locked()))

    def holders(self) -> list[LockHolder]:
        """Return the holders of the lock."""
        found: list[LockHolder] = self._engine.run(self._holders())
        return found

    def waiters(self) -> list[LockHolder]:
        """Return the waiters for the lock, in order."""
        found: list[LockHolder] = self._engine.run(self._waiters())
        return found

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: each call of it takes the lock, and gives it back.

        Raises:
            ConfigurationError: The function is a coroutine function or a generator, whose body runs
                later.
        """
        self._check_decorated(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return locked

    def _begins(self, end: object) -> "_Block":
        """Note that a block begins; see `BlockEnd`."""
        block = _Block()
        block.end = weakref.ref(end, lambda _: self._is_left(block))
        self._blocks[threading.get_ident()] = block
        return block

    def _is_left(self, block: "_Block") -> None:
        """Give back the lock of a block that a signal handler's exception has left."""
        attempt, block.attempt = block.attempt, None
        if attempt is not None:
            self._engine.leases.forsaken.append((attempt, self.taken))
            self._engine.leases.start_work()

    def __enter__(self) -> "HeldLock":
        attempt = self.new_attempt()
        block = self._blocks.pop(threading.get_ident(), None)
        try:
            if block is not None and block.end() is not None:
                block.attempt = attempt
            self._engine.run(self.entering(attempt))
            return cast("HeldLock", self)
        except PhononError:
            if block is not None:
                block.attempt = None
            raise
        except BaseException:
            self._engine.leases.forsaken.append((attempt, self.taken))
            self._engine.leases.start_work()
            raise

    @BlockEnd
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        *,
        block: "_Block | None" = None,
    ) -> None:
        attempt = None
        try:
            attempt = self.latest
            self._engine.run(self.releasing(attempt))
        except PhononError as lost:
            if error is None:
                raise
            # The user has to see the body's own exception.
            error.add_note(f"phonon: {lost}")
        except BaseException:
            self._engine.leases.forsaken.append((attempt or self.latest, self.taken))
            self._engine.leases.start_work()
            raise
        finally:
            if block is not None:
                block.attempt = None


if TYPE_CHECKING:

    class HeldLock(Lock):
        """The type of a lock inside its ``with`` block, where its token is never None."""

        @property
        def token(self) -> int:
            """The fencing token of the grant."""


class BaseSemaphore(BaseLock):
    """The base of `Semaphore` and `AsyncSemaphore`."""

    def __init__(
        self,
        process: Any,
        name: str,
        places: int,
        block: bool = True,
        *,
        lease: float | None = None,
        on_lost: Callable[[Any], object] | None = None,
        timeout: float | None = None,
    ) -> None:
        check_name("name", name)
        number = check_count("places", places)
        super().__init__(
            process, name, block, shared=True, lease=lease, on_lost=on_lost, timeout=timeout
        )
        self._places = number

    @staticmethod
    def _encode(key: str) -> bytes:
        return encode_semaphore(key)


class Semaphore(BaseSemaphore, Lock):
    """A number of places that processes and threads can hold at the same time.

    Made by `Process.semaphore`. Waiters are served in order of arrival. When a process dies, its
    place is free again as soon as the process is declared dead.

    Args:
        process: The process that wants a place.
        name: The semaphore's name, any text. A resource of the same name is independent of it.
        places: The number of places; all processes must name the same number.
        options: The arguments of `Lock`, except ``shared``.

    Example:
        >>> with process.semaphore("connections", 10) as place:
        ...     place.owned()
        True
    """


def _token_of(grant: Grant) -> int:
    return grant.token * TOKENS


def _text(word: bytes) -> str:
    return word.decode("utf-8", "replace")
