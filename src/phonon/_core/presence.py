"""The facts about a process that each of its heartbeats publishes for operators."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgpack

#: The most names of classes and sources in a report, which travels with every heartbeat.
MOST_NAMES = 500


class Presence:
    """Makes a process's reports.

    Args:
        executes: Whether the process executes batches of others.
        classes: Returns the names of the classes that it can execute.
        backlog: Returns the amount of unfinished work.

    Attributes:
        counters: Returns the counters, by name.
        sources: Returns for each source that the process reads: name, kind, position as text, and
            lag in messages or None.
    """

    def __init__(
        self, *, executes: bool, classes: Callable[[], Iterable[str]], backlog: Callable[[], int]
    ) -> None:
        self._executes = executes
        self._classes = classes
        self._backlog = backlog
        self.counters: Callable[[], Mapping[str, Any]] = dict
        self.sources: Callable[[], Sequence[tuple[str, str, str, int | None]]] = tuple

    def report(self) -> bytes:
        """Return the facts that operators see."""
        try:
            return self._report()
        except Exception:  # noqa: BLE001 - a heartbeat must not fail because of its report
            return b""

    def _report(self) -> bytes:
        packed: bytes = msgpack.packb(
            {
                "executes": self._executes,
                "classes": sorted(self._classes())[:MOST_NAMES],
                "backlog": self._backlog(),
                "counters": dict(self.counters()),
                "sources": list(self.sources())[:MOST_NAMES],
            },
            unicode_errors="surrogatepass",
        )
        return packed
