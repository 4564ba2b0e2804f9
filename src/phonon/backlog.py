"""A bound on what a process leaves undone while the database or the server is in trouble."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from phonon.errors import BacklogFullError, ConfigurationError
from phonon.runtime import Condition

#: What happens to those who would add to a backlog that is full.
Overflow = Literal["block", "raise"]


def check(max_backlog: int, overflow: Overflow) -> None:
    """Refuse what cannot be meant, before anything is begun.

    Raises:
        ConfigurationError: It cannot.
    """
    if max_backlog < 1:
        raise ConfigurationError(f"max_backlog is at least 1, not {max_backlog!r}")
    if overflow not in ("block", "raise"):
        raise ConfigurationError(f'overflow is "block" or "raise", not {overflow!r}')


class Backlog:
    """Keeps new messages out while too much is left undone.

    Undone are sessions whose ``execute`` has failed and is to be tried again, and whatever could
    not be sent because the server did not answer. All of it is done in the background, as soon
    as that is possible, and then there is room again.

    Args:
        count: How much is undone.
        most: How much may be.
        overflow: What a new message is met with while it is full.
        local: Tells for each thread or task whether it works on the backlog itself.
        changed: Those who are kept out wait for it.

    Attributes:
        full: Whether new messages have to wait, as of the last look.
    """

    def __init__(
        self,
        count: Callable[[], int],
        most: int,
        overflow: Overflow,
        local: Any,
        changed: Condition,
    ) -> None:
        self.full = False
        self._count = count
        self._most = most
        self._overflow = overflow
        self._local = local
        self._changed = changed

    @property
    def size(self) -> int:
        """How much is undone."""
        return self._count()

    def look(self) -> None:
        """Something has been left undone, or done after all."""
        full = self.size >= self._most
        if full or self.full:
            with self._changed:
                self.full = full
                if not full:
                    self._changed.notify_all()

    def open(self) -> None:
        """Keep nobody out any more: the process has stopped."""
        with self._changed:
            self.full = False
            self._changed.notify_all()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The user's code that runs in here is not kept out: the backlog may wait for it."""
        outer = self._is_working
        self._local.working = True
        try:
            yield
        finally:
            self._local.working = outer

    @property
    def _is_working(self) -> bool:
        return getattr(self._local, "working", False)

    def wait(self, timeout: float) -> None:
        """Wait until there is room.

        Args:
            timeout: Seconds to wait at the most.

        Raises:
            BacklogFullError: There is none, and waiting was not wanted or took too long.
        """
        if self._is_working:
            return
        if self._overflow == "block":
            with self._changed:
                if self._changed.wait_for(lambda: not self.full, timeout):
                    return
        if self.full:
            raise BacklogFullError(
                f"{self.size:,} sessions could not be written to the database, or sent to the "
                "server, and are tried again; until then no new messages are taken in, and this "
                "one was not: give it back to the broker. The log says what is wrong; "
                "Process(max_backlog=...) is the bound"
            )
