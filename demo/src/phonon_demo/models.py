"""The flights: their messages, the model that adds them up, and a plain loop to check it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from phonon import Model
from phonon.fields import ID, Count, Max, SetAppend, Sum

#: Rows of a table by their key, without it.
Table = dict[str, dict[str, Any]]


class Aircraft(Model, name="phonon_demo_aircraft"):
    """The flights of one aircraft."""

    tailnum: ID[str]
    airports: SetAppend[str]
    miles: Sum[int]
    worst_delay: Max[int]
    air_minutes: Sum[int]
    flights: Count = Count()


class Message(NamedTuple):
    """A message: a key, and the values of a record's other fields, which JSON can hold."""

    key: str
    content: list[Any]


class Rejected(ValueError):  # noqa: N818 - not an error of the program: it is counted
    """A row is unusable. The text is the reason, the same for all rows of the kind."""


def _flight(row: Sequence[str]) -> list[Any]:
    origin, dest, *numbers = row
    return [[origin, dest], *(None if text == "NA" else int(text) for text in numbers)]


def _add_flight(
    row: dict[str, Any] | None, airports: list[str], miles: int, delay: int | None, air: int | None
) -> dict[str, Any]:
    if row is None:
        row = {"airports": [], "miles": 0, "worst_delay": delay, "air_minutes": 0, "flights": 0}
    row["airports"] = sorted({*row["airports"], *airports})
    row["miles"] += miles
    if delay is not None:
        row["worst_delay"] = delay if row["worst_delay"] is None else max(row["worst_delay"], delay)
    row["air_minutes"] += air or 0
    row["flights"] += 1
    return row


class Job(NamedTuple):
    """A way to add up rows.

    Attributes:
        table: The name of the table.
        model: The model of its records.
        columns: The columns of the input, first that of the key.
        content: Turns the other columns of a row into the content of a message.
        expected: Adds such content to a row of the table, or begins one: a plain loop, which shares
            no code with the model.
    """

    table: str
    model: type[Model]
    columns: Sequence[str]
    content: Callable[[Sequence[Any]], list[Any]]
    expected: Callable[..., dict[str, Any]]

    def add_up(self, rows: Table, messages: Sequence[Message]) -> None:
        """Add messages to the rows that the table should have."""
        for key, content in messages:
            rows[key] = self.expected(rows.get(key), *content)


FLIGHTS = Job(
    "aircraft",
    Aircraft,
    ("tailnum", "origin", "dest", "distance", "dep_delay", "air_time"),
    _flight,
    _add_flight,
)
