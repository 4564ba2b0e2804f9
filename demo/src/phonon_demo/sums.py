"""Columns of the user's own input, added up per key."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phonon import Model, Process, Update
from phonon.fields import ID, Custom
from phonon_demo import exact
from phonon_demo.formats import Rejected, Values, is_utf8
from phonon_demo.jobs import Message, for_process
from phonon_demo.sink import Sink, Table

#: Figures by the columns of the table.
Figures = dict[str, exact.Number]


def _add_all(one: Figures, other: Figures) -> Figures:
    return {name: exact.add(one.get(name, 0), value) for name, value in other.items()}


class Totals(Model, name="phonon_demo_totals"):
    """Rows and sums of one key, by the names of the table's columns."""

    key: ID[str]
    figures: Custom[Figures] = Custom(merge=_add_all, zero={})

    def on_complete(self) -> None:
        """Write the session to the database."""
        Sink.current.write(self.key, [exact.to_sql(v) for v in self.figures.values()], self.token)


class SumUpdate(Update):
    """The same as an update: the figures are its ``doc``."""

    def merge(self, other: "SumUpdate") -> None:
        """Add up."""
        for name, value in other.doc.items():
            self.doc[name] = exact.add(self.doc[name], value)

    def execute(self) -> None:
        """Write the session to the database."""
        Sink.current.write(self._id, [exact.to_sql(v) for v in self.doc.values()], self.token)


@dataclass(frozen=True)
class Sums:
    """Sums of columns per key.

    Attributes:
        key: The column of the key.
        summed: The columns to add up.
    """

    key: str
    summed: tuple[str, ...]

    @property
    def columns(self) -> Sequence[str]:
        """The key's, and those to add up."""
        return self.key, *self.summed

    @property
    def table(self) -> Table:
        """One row a key."""
        figures = dict.fromkeys(self._names, "exact_add({old}, {new})")
        return Table("totals", "key", figures)

    @functools.cached_property
    def _names(self) -> list[str]:
        return ["rows", *(f"sum_{column}" for column in self.summed)]

    def message(self, values: Values) -> Message:
        """Make numbers of the columns to add up."""
        key, *rest = values
        if isinstance(key, bool):
            key = json.dumps(key)
        if not isinstance(key, str) or not key.strip():
            raise Rejected(f"no key in {self.key!r}")
        if not is_utf8(key):  # JSON can escape what no database stores
            raise Rejected("not UTF-8 text")
        numbers = []
        for column, value in zip(self.summed, rest, strict=True):
            try:
                numbers.append(exact.parse(value))
            except ValueError:
                raise Rejected(f"no number in {column!r}") from None
        return key, *numbers

    @property
    def model(self) -> type[Model]:
        """One record a key."""
        return Totals

    def row(self, message: Message) -> tuple[Any, ...]:
        """One row."""
        key, *numbers = message
        return key, dict(zip(self._names, (1, *numbers), strict=True))

    def update(self, process: Process, message: Message) -> Update:
        """One row."""
        key, doc = self.row(message)
        kind = for_process(SumUpdate, process)
        return kind(process, key, database="demo", collection="totals", doc=doc)

    def figures(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """The exact numbers."""
        return tuple(map(exact.from_sql, stored))
