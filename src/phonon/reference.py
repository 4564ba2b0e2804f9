"""References: they count the users of a resource and its modifications, and find the last user."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phonon._core.flows import CALLER_GONE, Branch, Flow, Outcome, call, never_run
from phonon._core.members import Members
from phonon._core.members import ProcessInfo as Holder
from phonon._core.parcels import Ending, SessionResult
from phonon.errors import ConfigurationError, PhononError
from phonon.lock import Lock
from phonon.settings import (
    check_api,
    check_arguments,
    check_callable,
    check_flag,
    check_name,
    check_owner,
    check_parties,
    check_timeout,
)

if TYPE_CHECKING:
    from phonon.process import Process

__all__ = ["BaseReference", "Holder", "Reference"]


class BaseReference:
    """The base of `Reference` and `AsyncReference`: everything but the waiting."""

    #: The package from which users import the class, for its repr.
    _package = "phonon"
    #: Whether its methods are awaited.
    _is_async = False

    def __init__(
        self, process: Any, resource: str, block: bool = True, parties: int | None = None
    ) -> None:
        self.resource_key = check_name("resource", resource)
        self.block = check_flag("block", block)
        self.parties = check_parties(parties)
        self.force_expiry = False
        self._process = process
        self._engine = check_owner(process)
        check_api(type(self), process_is_async=self._engine.is_async, is_async=self._is_async)
        #: The session's final figures, while the callback of `dereference` runs.
        self._modifications: Mapping[str, int] | None = None

    def __repr__(self) -> str:
        kind = f"{self._package}.{type(self).__name__}"
        return f"<{kind} {self.resource_key!r} of process {self._process.id}>"

    # Flows

    def joining(self) -> Flow[None]:
        """Join the resource, or make sure that the process is a member."""
        members: Members = self._engine.members
        if self.parties is None:
            return members.join(self.resource_key)
        return members.meet(self.resource_key, self.parties)

    def _count(self) -> Flow[int]:
        count: int = yield from self._engine.members.count(self.resource_key)
        return count

    def _wait(self, timeout: float | None) -> Flow[bool]:
        if self.parties is None:
            raise ConfigurationError(
                f"the number of processes that are to hold {self.resource_key!r} is unknown: "
                "create_reference(..., parties=n)"
            )
        seconds = self._process.BLOCKING_TIMEOUT if timeout is None else timeout
        return self._waiting(check_timeout("timeout", seconds))

    def _waiting(self, seconds: float) -> Flow[bool]:
        done: bool = yield from self._engine.members.wait_for_parties(self.resource_key, seconds)
        return done

    def _increment(self) -> Flow[None]:
        yield from self._engine.members.modify(self.resource_key)

    def _modified_by(self) -> Flow[dict[str, int]]:
        if self._modifications is not None:
            return dict(self._modifications)
        found: dict[str, int] = yield from self._engine.members.modified(self.resource_key)
        return found

    def _times_modified(self) -> Flow[int]:
        return sum((yield from self._modified_by()).values())

    def _holders(self) -> Flow[list[Holder]]:
        found: list[Holder] = yield from self._engine.members.holders(self.resource_key)
        return found

    def _dereference(self, callback: Callable[[], Any] | None, block: bool | None) -> Flow[bool]:
        """Leave the resource, and call the callback if this process was the last member.

        The lock is taken around both unless this thread holds it exclusively.
        """
        if block is not None:
            check_flag("block", block)
        engine = self._engine
        batch = engine.batch
        if callback is None:
            return self._leaving(None, batch)
        _, name = engine.members.place(self.resource_key)
        if any(not g.request.shared for g in engine.leases.here(name, engine.driver.caller())):
            return self._leaving(callback, batch)
        lock = self._process.lock(self.resource_key, self.block if block is None else block)
        return self._locked_leaving(lock, callback, batch)

    def _locked_leaving(self, lock: Any, callback: Callable[[], Any], batch: Any) -> Flow[bool]:
        attempt = lock.new_attempt()
        failure: BaseException | None = None
        last = False
        try:
            if not (yield from lock.entering(attempt)):
                return False  # the caller has gone, so the reference stays held
            try:
                last = yield from self._leaving(callback, batch)
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001 - raised after the lock is released
                failure = error
            if failure is None:
                yield from lock.releasing(attempt)
                return last
            # If the server does not answer, the release goes on in the background, and this raises.
            released: Outcome = yield Branch(lock.releasing(attempt))
            if released.error is not None:
                failure.add_note(f"phonon: {released.error}")
            raise failure  # noqa: TRY301 - handled apart from interrupts
        except BaseException as error:
            if not isinstance(error, PhononError | GeneratorExit) and error is not failure:
                # Interrupted: the lock may have been granted.
                self._engine.leases.forsaken.append((attempt, lock.taken))
                self._engine.leases.start_work()
            raise

    def _leaving(self, callback: Callable[[], Any] | None, batch: Any) -> Flow[bool]:
        members, resource = self._engine.members, self.resource_key
        # An open batch must not join the resource after this.
        if batch is not None and batch.take_join(resource):
            yield from members.join(resource)
        # An update in this process may have unsent data.
        opener = members.held.get(resource)
        parcel = opener() if opener is not None else None
        ending = Ending(resource, parcel, self.force_expiry, callback is not None)
        outbox = self._engine.outbox
        if parcel is None:
            result = yield from outbox.leave(ending)
        else:
            (result,) = yield from outbox.end((ending,))
        _check(result)
        last = result.last
        if not last and not result.left:
            # Let an earlier leave whose caller has gone take in its answer: it may have been the
            # last.
            yield from outbox.settling()
        gone = yield CALLER_GONE
        # An earlier leave without a caller was the last one of its session.
        if not gone and resource in members.undelivered_results:
            members.undelivered_results.discard(resource)
            last = True
        if not last:
            return False
        if callback is not None:
            yield from self._calling(callback, result.modifications)
        elif gone:
            # The caller has got a ConnectionLostError. The next call reports it.
            members.undelivered_results.add(resource)
        return True

    def _calling(self, callback: Callable[[], Any], modifications: dict[str, int]) -> Flow[None]:
        self._modifications = modifications
        try:
            outcome: Outcome = yield from call(callback)
        finally:
            self._modifications = None
        error = outcome.error or never_run(outcome.value)
        if error is None:
            return
        # Restore the state before the call: this process may try again, or another one may be last.
        times = {process.encode(): count for process, count in modifications.items()}
        # If the server does not answer, the release goes on in the background, and this raises.
        restored: Outcome = yield Branch(self._engine.members.restore(self.resource_key, times))
        if restored.error is not None:
            error.add_note(f"phonon: and it is not held again: {restored.error}")
        raise error


def _check(result: SessionResult) -> None:
    """Raise interrupts, and errors that prevented the end. Log errors of ``execute``.

    A failed batch is kept and tried again; the process has left the resource all the same.
    """
    for error in result.errors:
        if not result.sent or not isinstance(error, Exception):
            raise error


class Reference(BaseReference):
    """A process's membership in a resource.

    Made by `Process.create_reference`. A process is a member once, even if several threads create
    the reference several times: all these objects stand for the same membership, and the first
    `dereference` ends it. To count threads separately, give each thread a `Process`.

    Args:
        process: The process that is a member.
        resource: The name of the resource, any text.
        block: Whether `lock` waits by default.
        parties: The number of different processes that the session will have, if known. No process
            is the last one before so many have joined.

    Attributes:
        resource_key: The name of the resource.
        force_expiry: If true, `dereference` executes all data stored so far, even if others still
            hold the resource.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> reference = process.create_reference("import-42")
        >>> reference.count()
        1
        >>> reference.dereference(callback=lambda: print("the last one publishes"))
        the last one publishes
        True
    """

    _process: "Process"

    def lock(
        self,
        block: bool | None = None,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[Lock], object] | None = None,
        timeout: float | None = None,
    ) -> Lock:
        """Return a lock on the resource, for a ``with`` block.

        Args:
            block: Whether to wait if the lock is taken. None: as given to the reference.
            shared: Whether to share the lock with other shared holders.
            reentrant: Whether the thread that has the lock may take it again.
            lease: Seconds that it lasts unless renewed. None: as long as the process's lease.
            on_lost: Called with the lock, from any thread, once the lock is found to be lost.
            timeout: Seconds to wait at the most, unless `acquire` is given another number; -1 waits
                for ever. None: `Process.BLOCKING_TIMEOUT`.
        """
        return self._process.lock(
            self.resource_key,
            self.block if block is None else block,
            shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
            timeout=timeout,
        )

    def count(self) -> int:
        """Return the number of processes that hold the resource, read atomically."""
        return int(self._engine.run(self._count()))

    def refresh_session(self) -> None:
        """Make sure that the process is a member, and join again if it is not.

        A membership lasts as long as its process's lease, which the heartbeat renews, so this is
        rarely needed.
        """
        self._engine.run(self.joining())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the announced number of processes have joined, and all others have left.

        Only for a reference made with ``parties``. Afterwards only this process still holds the
        resource, and its `dereference` is the last one.

        Args:
            timeout: Seconds to wait at the most; -1 for ever. None: `Process.BLOCKING_TIMEOUT`.

        Returns:
            Whether all others have left in time.

        Raises:
            ConfigurationError: The reference was made without ``parties``.
            ProcessStoppedError: The process was stopped meanwhile.
        """
        return bool(self._engine.run(self._wait(timeout)))

    def increment_times_modified(self) -> None:
        """Count that this process modified the resource."""
        self._engine.run(self._increment())

    def get_times_modified(self) -> int:
        """Return how often the resource was modified in this session, by all processes.

        In the callback of `dereference` it is the session's final figure.
        """
        return int(self._engine.run(self._times_modified()))

    def modified_by(self) -> dict[str, int]:
        """Return how often each process has modified the resource in this session."""
        found: dict[str, int] = self._engine.run(self._modified_by())
        return found

    def holders(self) -> list[Holder]:
        """Return the processes that hold the resource, in the order in which they joined."""
        found: list[Holder] = self._engine.run(self._holders())
        return found

    def dereference(
        self,
        callback: Callable[..., Any] | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        block: bool | None = None,
    ) -> bool:
        """Leave the resource.

        If the resource has partials of updates and this process is the last, they are executed
        before the callback is called.

        Args:
            callback: Called if this process is the last to leave. It runs under the resource's
                lock, which is held around the whole call unless this thread has it already. If
                the callback raises, the process holds the resource again, as before the call, and
                the error is passed on. It is called at most once: use an `Update` for work that
                must survive a crash.
            args: Positional arguments of the callback.
            kwargs: Keyword arguments of the callback.
            block: Whether to wait for the lock. None: as given to the reference.

        Returns:
            Whether this process was the last. Of all processes that held the resource in one
            session, exactly one gets True. A process that did not hold it gets False.

        Raises:
            AlreadyLockedError: Another holder has the lock; the reference is still held.
            ConnectionLostError: The server does not answer. The call goes on when it does, unless
                it was still waiting for the lock; calling again is right in both cases.
        """
        check_callable("callback", callback, is_async=True)  # a coroutine function: see `bound`
        given = check_arguments(args, kwargs)
        run = None if callback is None else bound(callback, *given)
        return bool(self._engine.run(self._dereference(run, block)))


def bound(
    callback: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[], Any]:
    """Return a function with the callback's name that calls it with arguments."""

    def run() -> Any:
        return callback(*args, **kwargs)

    # An error, about a coroutine function for example, shows this name.
    run.__qualname__ = getattr(callback, "__qualname__", repr(callback))
    return run
