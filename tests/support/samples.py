"""Updates that remember their writes, for the tests of the public objects."""

import threading
from collections import Counter
from typing import Any, ClassVar, NamedTuple

from phonon import Process, Update
from phonon._core import classes


class Written(NamedTuple):
    """One call of ``execute``."""

    record: Any
    doc: dict[str, Any]
    token: int
    process: str


class Tally(Update):
    """Adds up the numbers in ``doc``, key by key."""

    written: ClassVar[list[Written]] = []

    def merge(self, other: Any) -> None:
        self.doc = dict(Counter(self.doc) + Counter(other.doc))

    def execute(self) -> None:
        assert type(self.token) is int
        entry = Written(self._id, dict(self.doc), self.token, self.process().id)
        type(self).written.append(entry)

    @classmethod
    def docs(cls) -> dict[Any, dict[str, Any]]:
        """Return the records that were written, each of which must be there once."""
        assert len({entry.record for entry in cls.written}) == len(cls.written), cls.written
        return {entry.record: entry.doc for entry in cls.written}


#: The class that `fresh` made last: what is left of an earlier test may still refer to it.
_sheets: list[type[Tally]] = []


def fresh() -> type[Tally]:
    """A `Tally` that has written nothing yet, in the place of the one that was made before."""
    while _sheets:
        classes.forget(_sheets.pop())

    class Sheet(Tally):
        written: ClassVar[list[Written]] = []

    _sheets.append(Sheet)
    return Sheet


def forget(kind: type[Update]) -> None:
    """Forget a class, as if this process had not imported it."""
    classes.forget(kind)


def put(kind: type[Tally], process: Process, record: Any, n: int = 1, **options: Any) -> Tally:
    """A message about a record."""
    return kind(process, record, doc={"n": n}, **options)


class Sluice:
    """Holds up all callers, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)
