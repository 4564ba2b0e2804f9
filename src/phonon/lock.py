"""The exclusive lock of a resource."""

import contextlib
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from phonon.errors import (
    AlreadyLockedError,
    ConnectionLostError,
    DeclaredDeadError,
    LockLostError,
    ProcessStoppedError,
    ServerError,
)
from phonon.protocol import locks
from phonon.protocol.effects import Participant
from phonon.protocol.messages import Locked

if TYPE_CHECKING:
    from phonon.process import Process


class Lock:
    """Exclusive access to a resource, across processes and threads.

    Made by `Process.lock` or `Reference.lock`; use it in a ``with`` block. The lock is leased for
    `Process.TTL` seconds and the lease is renewed by the process's heartbeat for as long as the
    lock is held. Waiters are served in order of arrival, and woken when it is their turn.

    Args:
        process: Who wants it.
        lock_key: The resource, any text.
        block: Whether to wait if it is taken: `Process.BLOCKING_TIMEOUT` seconds at the most.

    Attributes:
        token: The fencing token of this grant, an int that grows strictly per resource; None
            while the lock is not held. A store that refuses writes under a lower token than the
            last one it saw is safe from a holder that was paused beyond its lease.
    """

    def __init__(self, process: "Process", lock_key: str, block: bool = True) -> None:
        self.lock_key = lock_key
        self.block = block
        self.token: int | None = None
        self.base = process.engine.keys.base(lock_key)
        self.lease_ms = int(process.TTL * 1000)
        self._process = process
        self._me: Participant | None = None
        self._home: object = None
        self._holder = ""
        self._thread = 0
        self._lost = threading.Event()

    def __repr__(self) -> str:
        state = f"held, token {self.token}" if self.token is not None else "not held"
        if self.lost:
            state = f"lost, token {self.token}"
        return f"<phonon.Lock {self.lock_key!r} of process {self._process.id}: {state}>"

    def acquire(self, block: bool | None = None, timeout: float | None = None) -> bool:
        """Take the lock.

        Args:
            block: Whether to wait if it is taken. None: as the lock was made.
            timeout: Seconds to wait at the most. None: `Process.BLOCKING_TIMEOUT`.

        Returns:
            Whether the lock is held now.

        Raises:
            ConnectionLostError: The server does not answer.
        """
        return self._acquire(block, timeout) is None

    def release(self) -> None:
        """Give the lock back.

        Raises:
            LockLostError: It was not held any more, or never was.
            ServerError: The server refused; the lock is still held.
        """
        process, me, holder = self._process, self._me, self._holder
        token, self.token = self.token, None
        if token is None or me is None:
            raise LockLostError(f"the lock on {self.lock_key!r} is not held: acquire it first")
        process.engine.locks.pop(holder, None)
        if self._home is not process.engine.home:
            raise LockLostError(
                f"the lock on {self.lock_key!r} was taken before fork() and is the parent's"
            )
        try:
            released = process.engine.run(self.base, locks.release(me, self.base, holder))
        except ServerError:
            # It refused, so the lock is still ours: to be renewed, and to be released again.
            process.engine.locks[holder] = self
            self.token = token
            raise
        if not released:
            raise LockLostError(
                f"the lock on {self.lock_key!r} was lost before it was released: its lease of "
                f"{process.TTL} s ran out, or the server lost it; what it protected may have been "
                "changed by another holder since"
            )

    def owned(self) -> bool:
        """Whether this object holds the lock, as far as the last heartbeat knows.

        False as well once that is so long ago that others may have taken the lock over.
        """
        engine = self._process.engine
        mine = self._me is engine.me  # after fork() it is the parent's
        return mine and self.token is not None and not self._lost.is_set() and engine.surely_lives

    def owned_here(self) -> bool:
        """Whether it was this thread that took it."""
        return self._thread == threading.get_ident() and self.owned()

    @property
    def lost(self) -> bool:
        """Whether the heartbeat found that the lock is not ours any more."""
        return self._lost.is_set()

    def lose(self) -> None:
        """The heartbeat found that the lock is not ours any more."""
        self._lost.set()

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

    def _acquire(self, block: bool | None, timeout: float | None) -> AlreadyLockedError | None:
        process = self._process
        if self.token is not None:
            raise AlreadyLockedError(
                f"this Lock object already holds {self.lock_key!r}: make one a thread"
            )
        block = self.block if block is None else block
        seconds = process.BLOCKING_TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + seconds if block else 0.0
        me, holder = process.engine.new_holder()
        queued = False
        try:
            while not process.stopping:
                left = deadline - time.monotonic() if block else 0.0
                # Should no answer come, we may have the lock, or a place in line.
                process.waiters[holder] = self.base
                try:
                    answer = process.engine.run(
                        self.base,
                        locks.acquire(me, self.base, holder, self.lease_ms, queue=left > 0),
                    )
                except DeclaredDeadError:
                    process.engine.run(self.base, process.engine.be_reborn(me))
                    del process.waiters[holder]
                    me, holder = process.engine.new_holder()
                    continue
                if answer.kind == "granted":
                    self._me, self._holder, self.token = me, holder, answer.number
                    self._home = process.engine.home
                    self._thread = threading.get_ident()
                    self._lost.clear()
                    process.engine.locks[holder] = self
                    del process.waiters[holder]
                    return None
                queued = queued or answer.kind == "wait"
                if not queued:
                    del process.waiters[holder]
                if left <= 0:
                    return self._taken(answer, seconds if block else None)
                if not process.stopping:
                    pause = min(left, answer.number / 1000)
                    process.engine.run(self.base, locks.wait(self.base, holder, pause))
            raise ProcessStoppedError(
                f"process {process.id} was stopped, so nobody waits for {self.lock_key!r}: make a "
                "new Process"
            )
        finally:
            if holder in process.waiters:
                # Whoever gives up must not stay in line: it would swallow the next wake-up.
                try:
                    with contextlib.suppress(ConnectionLostError):  # it goes on by itself
                        process.engine.run(self.base, locks.release(me, self.base, holder))
                finally:
                    del process.waiters[holder]

    def _taken(self, answer: Locked, seconds: float | None) -> AlreadyLockedError:
        waited = "" if seconds is None else f" after {seconds:g} s of waiting"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer.since_ms / 1000))
        return AlreadyLockedError(
            f"{self.lock_key!r} is locked by process {answer.owner} since {since}{waited}; "
            "wait for it with block=True, or look at Reference.holders()"
        )
