"""Records of counted messages, for tests of their readers: executed numbers are added up here."""

from collections import Counter
from typing import Any, ClassVar

from phonon import ConflictFreeUpdate, Model
from phonon.fields import ID
from phonon.fields import Count as Tally


class Count(ConflictFreeUpdate, name="counted"):
    """Messages of a key.

    Attributes:
        executed: The number that were executed, by key.
    """

    executed: ClassVar[Counter[Any]] = Counter()

    def execute(self) -> None:
        self.executed[self._id] += self.doc["n"]


class Visits(Model, name="counted_visits"):
    """The same as a model."""

    key: ID[int]
    n: Tally = Tally()

    def on_complete(self) -> None:
        Count.executed[self.key] += self.n
