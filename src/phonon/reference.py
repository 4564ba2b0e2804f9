"""References: who uses a resource, who modified it, who was the last."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon.errors import ConfigurationError, ConnectionLostError, PhononError
from phonon.lock import Lock
from phonon.protocol import locks, references
from phonon.protocol.effects import Execute, Flow, Outcome, T
from phonon.protocol.updates import Ended

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.process import Process
    from phonon.update import Update


#: Seconds after which a waiter looks by itself, should nobody have woken it.
ASK_AGAIN = 5.0


class Holder(NamedTuple):
    """A process that holds a resource.

    Attributes:
        id: The process's id.
        host: Its host name; empty if the process has just gone.
        pid: Its number in its operating system; 0 if the process has just gone.
        since: When it joined, seconds since the epoch by the server's clock.
    """

    id: str
    host: str
    pid: int
    since: float


class Reference:
    """A process's membership in a resource.

    Made by `Process.create_reference`. A process is a member once, however often and from however
    many threads it creates the reference: all these objects stand for the same membership, and
    the first `dereference` ends it. Threads that are to count separately take a `Process` each.

    Args:
        process: Whose membership.
        resource: The name of the resource, any text.
        block: Whether `lock` waits by default.
        parties: How many different processes the session is to have, if that is known: until so
            many have come, nobody is the last.

    Attributes:
        resource_key: The name of the resource.
        force_expiry: If true, `dereference` executes what has come together so far, although
            others still hold the resource.
    """

    def __init__(
        self,
        process: "Process",
        resource: str,
        block: bool = True,
        parties: int | None = None,
    ) -> None:
        if parties is not None and parties < 1:
            raise ConfigurationError(f"a session has 1 party at the least, not {parties!r}")
        self.resource_key = resource
        self.block = block
        self.parties = parties
        self.force_expiry = False
        self._process = process
        self._base = process.engine.keys.base(resource)
        self._modifications: Mapping[bytes, int] | None = None

    def __repr__(self) -> str:
        return f"<phonon.Reference {self.resource_key!r} of process {self._process.id}>"

    def lock(
        self,
        block: bool | None = None,
        shared: bool = False,
        *,
        reentrant: bool = False,
        lease: float | None = None,
        on_lost: Callable[[Lock], object] | None = None,
    ) -> Lock:
        """A lock on the resource, for a ``with`` block.

        Args:
            block: Whether to wait if it is taken. None: as the reference was told to.
            shared: Whether to share it with others who do.
            reentrant: Whether the thread that has it may take it again.
            lease: Seconds that it lasts unless renewed. None: `Process.TTL`.
            on_lost: Called with the lock, from any thread, once it is found to be lost.
        """
        return self._process.lock(
            self.resource_key,
            self.block if block is None else block,
            shared,
            reentrant=reentrant,
            lease=lease,
            on_lost=on_lost,
        )

    def count(self) -> int:
        """The number of processes that hold the resource, read atomically."""
        return self._run(references.count(self._process.engine.me, self._base))

    def refresh_session(self) -> None:
        """Renew the membership, or join again.

        A membership lasts `Process.session_length` seconds from the last time it was used. The
        heartbeat renews it for as long as the process lives, so this is rarely needed.
        """
        engine = self._process.engine
        if self.parties is None:
            engine.join(self.resource_key, self._base)
        else:
            engine.run(self._base, engine.meeting(self.resource_key, self._base, self.parties))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all others are done: as many as were announced have come, and have left.

        Only for a reference made with ``parties``. Afterwards this process is the only one that
        still holds the resource, and its `dereference` the last one.

        Args:
            timeout: Seconds to wait at the most. None: `Process.BLOCKING_TIMEOUT`.

        Returns:
            Whether they are. False if it took too long.

        Raises:
            ConfigurationError: It was made without ``parties``.
        """
        if self.parties is None:
            raise ConfigurationError(
                f"nobody said how many processes are to hold {self.resource_key!r}: "
                "create_reference(..., parties=n)"
            )
        engine = self._process.engine
        seconds = self._process.BLOCKING_TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + seconds
        _, waiter = engine.new_holder()
        # They are no operations on the resource: others need not wait for them.
        name = b"meeting " + waiter.encode()
        try:
            while True:
                left = deadline - time.monotonic()
                meeting = engine.run(name, references.meeting(engine.me, self._base, waiter))
                alone = meeting.remaining <= int(meeting.member)
                if alone and meeting.arrived >= meeting.parties:
                    return True
                if left <= 0 or self._process.stopping:
                    return False
                engine.run(name, locks.wait(self._base, waiter, min(left, ASK_AGAIN)))
        finally:
            engine.runtime.clean_up(
                lambda: engine.run(name, references.stop_waiting(self._base, waiter))
            )

    def increment_times_modified(self) -> None:
        """Count that this process modified the resource."""
        engine = self._process.engine
        self._run(engine.living(lambda me: references.modify(me, self._base)))
        engine.held.setdefault(self.resource_key)

    def get_times_modified(self) -> int:
        """How often the resource was modified in this session, by all processes.

        In the callback of `dereference` it is the session's final figure.
        """
        return sum(self.modified_by().values())

    def modified_by(self) -> dict[str, int]:
        """Which process modified the resource how often in this session."""
        found = self._modifications
        if found is None:
            found = self._run(references.modified(self._process.engine.me, self._base))
        return {process_id.decode(): times for process_id, times in found.items()}

    def holders(self) -> list[Holder]:
        """The processes that hold the resource, in order of their leases."""
        ids = self._run(references.members(self._process.engine.me, self._base))
        stays = self._process.engine.stays(ids, self._base)
        return [
            Holder(
                process_id,
                stay.card.get("host", ""),
                int(stay.card.get("pid", 0)),
                stay.since_ms / 1000,
            )
            for process_id, stay in zip(ids, stays, strict=True)
        ]

    def dereference(
        self,
        callback: Callable[..., Any] | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        block: bool | None = None,
    ) -> bool:
        """Let go of the resource.

        If the resource has partials of updates and this process is the last, they are executed
        before the callback is called.

        Args:
            callback: Called if this process is the last to let go. It runs under the resource's
                lock, which is taken around the whole call unless this thread holds it. If it
                raises, the process holds the resource again, as before the call, and the error is
                passed on. It is called at most once: work that must survive a crash is an
                `Update`.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            block: Whether to wait for that lock. None: as the reference was told to.

        Returns:
            Whether this process was the last. Of all processes that held the resource in one
            session, exactly one gets True. A process that did not hold it gets False.

        Raises:
            AlreadyLockedError: The lock is taken; the reference is still held.
            ConnectionLostError: The server does not answer; the call goes on when it does.
        """
        if callback is None:
            return self._leave(None)
        call, user_code = self._process.engine.runtime.call, callback

        def run() -> Any:
            return call(user_code, *(args or ()), **(kwargs or {}))

        if any(not grant.lock.shared for grant in self._process.engine.grants.here(self._base)):
            return self._leave(run)
        with self.lock(block):
            return self._leave(run)

    def _leave(self, callback: Callable[[], Any] | None) -> bool:
        engine = self._process.engine
        if engine.batch is not None:
            engine.batch.join_now(self.resource_key, self._base)
        # An update of ours may have data that is nowhere else yet.
        opener = engine.held.get(self.resource_key)
        update = opener() if opener is not None else None
        leaving = engine.leaving(self.resource_key, self._base, update, force=self.force_expiry)
        if callback is None:
            return self._told(engine, leaving, update)
        ended, outcome = engine.run(
            self._base,
            self._with_callback(leaving, callback),
            lambda result: engine.report(self._base, result[0], update),
        )
        if outcome.error is not None:
            raise outcome.error
        return ended.last

    def _told(self, engine: "Engine", leaving: Flow[Ended], update: "Update | None") -> bool:
        given_up = False

        def done(ended: Ended) -> None:
            engine.report(self._base, ended, update)
            if given_up and ended.last:
                engine.untold.add(self.resource_key)

        try:
            last = engine.run(self._base, leaving, done).last
        except ConnectionLostError:
            # It goes on by itself. If it comes out that we were the last, the next call says so.
            given_up = True
            raise
        if self.resource_key in engine.untold:
            engine.untold.discard(self.resource_key)
            return True
        return last

    def _with_callback(
        self, leaving: Flow[Ended], callback: Callable[[], Any]
    ) -> Flow[tuple[Ended, Outcome]]:
        ended = yield from leaving
        outcome = Outcome()
        if ended.last:
            self._modifications = ended.modifications
            outcome = yield Execute(callback)
            self._modifications = None
            if outcome.error is not None:
                # As before the call: whoever raised may try again, or somebody else be the last.
                engine = self._process.engine
                try:
                    yield from engine.living(
                        lambda me: references.join(me, self._base, ended.modifications)
                    )
                except PhononError as failure:
                    outcome.error.add_note(f"phonon: and it is not held again: {failure}")
                else:
                    engine.held.setdefault(self.resource_key)
        return ended, outcome

    def _run(self, flow: Flow[T]) -> T:
        return self._process.engine.run(self._base, flow)
