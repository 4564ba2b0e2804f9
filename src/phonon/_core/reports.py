"""Reports background errors and events: to the log, to ``on_error`` and to listeners."""

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from phonon.errors import (
    BatchLostError,
    DeclaredDeadError,
    LockLostError,
    ServerStateLostError,
)

log = logging.getLogger("phonon")


EventName = Literal[
    "parked", "takeover", "lock_lost", "batch_lost", "declared_dead", "state_lost", "error"
]
EVENTS: tuple[EventName, ...] = get_args(EventName)


class Event(NamedTuple):
    """Something that happened to a process; see `Process.on`.

    Attributes:
        name: ``"parked"`` (a batch failed too often), ``"takeover"`` (this process has taken over
            from a dead one), ``"lock_lost"``, ``"batch_lost"`` (executed here, and taken over
            meanwhile), ``"declared_dead"``, ``"state_lost"`` (the server came back without its
            data), or ``"error"``: another background error.
        text: The event in words, as in the log.
        resource: The resource; empty if the event is not about one.
        token: The batch's token, or 0.
        process: The id of the process; of a takeover, the id of the dead one.
        error: The cause, if it is an error.
    """

    name: EventName
    text: str
    resource: str = ""
    token: int = 0
    process: str = ""
    error: BaseException | None = None


_NAMES: dict[type[Exception], EventName] = {
    LockLostError: "lock_lost",
    BatchLostError: "batch_lost",
    DeclaredDeadError: "declared_dead",
    ServerStateLostError: "state_lost",
}


def event_of(error: Exception) -> Event:
    """Return the event of an error."""
    name: EventName = next((n for kind, n in _NAMES.items() if isinstance(error, kind)), "error")
    resource, token = getattr(error, "resource", ""), getattr(error, "token", 0)
    return Event(name, str(error), resource or "", token or 0, error=error)


class Reports:
    """Logs background errors, and passes them to the user's ``on_error``.

    Args:
        on_error: The user's function, if there is one.
        run: Runs it; an asyncio process awaits its result.
    """

    def __init__(
        self,
        on_error: Callable[[Exception], object] | None,
        run: Callable[..., object] = lambda function, *args: function(*args),
    ) -> None:
        self.on_error = on_error
        self._run = run
        self._reported: set[str] = set()
        self._listeners: dict[str, list[Callable[[Event], object]]] = {}

    def report_error(self, error: Exception) -> None:
        """Log a background error and pass it to `on_error`."""
        event = event_of(error)
        log.error("%s", error, extra={"resource": event.resource, "token": event.token})
        self.emit(event)
        self.notify(error)

    def on(self, name: str, function: Callable[[Event], object]) -> None:
        """Have a function called with each event of that name."""
        self._listeners.setdefault(name, []).append(function)

    def emit(self, event: Event) -> None:
        """Call the listeners of an event."""
        for function in self._listeners.get(event.name, ()):
            self.call(function, event)

    def notify(self, error: BaseException) -> None:
        """Pass an error that was logged already to `on_error`."""
        if self.on_error is not None and isinstance(error, Exception):
            self.call(self.on_error, error)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function of the user's. An error is logged and has no other effect."""
        try:
            self._run(function, *arguments)
        except Exception:
            log.exception("%r has raised", function)

    def once(self, subject: str) -> bool:
        """Return whether this is the first report about a subject."""
        if subject in self._reported:
            return False
        if len(self._reported) >= MOST_SUBJECTS:
            self._reported.clear()
        self._reported.add(subject)
        return True


#: The most subjects to remember: reporting one twice is better than growing without limit.
MOST_SUBJECTS = 1000
