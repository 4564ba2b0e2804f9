"""Reports: errors that no caller is there to be raised to, and what is worth a line in the log."""

import logging
from collections.abc import Callable

log = logging.getLogger("phonon")


class Reports:
    """Logs background errors, and passes them to the user's ``on_error``.

    Args:
        on_error: The user's function, if there is one.
        run: Runs it; an asyncio process awaits what it returns.
    """

    def __init__(
        self,
        on_error: Callable[[Exception], object] | None,
        run: Callable[..., object] = lambda function, *args: function(*args),
    ) -> None:
        self.on_error = on_error
        self._run = run
        self._said: set[str] = set()

    def report_error(self, error: Exception) -> None:
        """Log a background error and pass it to `on_error`."""
        log.error("%s", error)
        self.notify(error)

    def notify(self, error: BaseException) -> None:
        """Pass an error to `on_error` that was logged already."""
        if self.on_error is not None and isinstance(error, Exception):
            self.call(self.on_error, error)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function of the user's. What it raises is logged and harms nothing."""
        try:
            self._run(function, *arguments)
        except Exception:
            log.exception("%r has raised", function)

    def once(self, subject: str) -> bool:
        """Return whether this is the first time that something is reported about a subject."""
        if subject in self._said:
            return False
        if len(self._said) >= MOST_SUBJECTS:
            self._said.clear()
        self._said.add(subject)
        return True


#: Subjects that are remembered. To report one twice is better than to remember all.
MOST_SUBJECTS = 1000
