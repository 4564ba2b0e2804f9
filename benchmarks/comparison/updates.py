"""The update that Phonon's side of the benchmarks is about."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from comparison.sink import Sink
from comparison.stream import Message, Total
from phonon import Process, Update


class Tally(Update):
    """Sum, union and maximum."""

    sink: ClassVar[Sink | None] = None
    #: The executed records, if nothing is written to a database.
    kept: ClassVar[dict[str, Total]] = {}

    def __init__(self, process: Process, message: Message, *, init_cache: bool = True) -> None:
        self.key, self.count, element, self.high = message
        self.elements = {element}
        super().__init__(process, self.key, init_cache=init_cache)

    def merge(self, other: Self) -> None:
        """Add another one."""
        self.count += other.count
        self.elements |= other.elements
        self.high = max(self.high, other.high)

    def state(self) -> dict[str, Any]:
        """All there is."""
        return {
            "key": self.key, "count": self.count, "elements": self.elements, "high": self.high,
        }  # fmt: skip

    def reset_states(self) -> None:
        """Nothing."""
        self.count, self.elements, self.high = 0, set(), 0

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> None:
        """Write them in one transaction."""
        if cls.sink is None:
            for u in updates:
                n, elements, high = cls.kept.get(u.key, (0, frozenset[str](), 0))
                cls.kept[u.key] = n + u.count, elements | u.elements, max(high, u.high)
        else:
            cls.sink.write((u.key, u.count, u.elements, u.high, u.token or 0) for u in updates)


class Silent(Tally):
    """One that writes nothing at all."""

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> None:
        """Write nothing."""
