"""The two aggregations of the demo: flights per aircraft, and sums of the user's own columns."""

import decimal
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from phonon import Model
from phonon.fields import ID, Count, Custom, Max, SetAppend, Sum
from phonon_demo.rows import Rejected

#: A missing value in the flights' file.
MISSING = "NA"
#: An exact sum of numbers of up to 400 digits and exponents of up to 400; more would raise.
_EXACT = decimal.Context(prec=2000, Emax=9999, Emin=-9999, traps=[decimal.Inexact])
_MOST_DIGITS = 400
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?\s*")


class Message(NamedTuple):
    """A message: a key, and content that JSON can hold."""

    key: str
    content: list[Any]

    @property
    def value(self) -> bytes:
        """The content as JSON."""
        return json.dumps(self.content).encode()


class Aggregation(NamedTuple):
    """A way to add up messages.

    Attributes:
        table: The name of the table.
        model: The model of its records.
        columns: The columns of the input.
        message: Turns a row's columns into a message, or raises `Rejected`.
        values: Turns a message's content into the values of a record's fields.
        expected: Adds a message's content to a row, or begins one if it is None: a plain loop,
            which shares no code with the model.
    """

    table: str
    model: type[Model]
    columns: Sequence[str]
    message: Callable[[Sequence[Any]], Message]
    values: Callable[[list[Any]], tuple[Any, ...]]
    expected: Callable[[dict[str, Any] | None, list[Any]], dict[str, Any]]


# Flights


class Aircraft(Model, name="phonon_demo_aircraft"):
    """The flights of one aircraft."""

    tailnum: ID[str]
    airports: SetAppend[str]
    miles: Sum[int]
    worst_delay: Max[int]
    air_minutes: Sum[int]
    flights: Count = Count()


def _flight(row: Sequence[Any]) -> Message:
    tailnum, origin, dest, *numbers = row
    if tailnum == MISSING:
        raise Rejected("no tail number")
    try:
        return Message(
            tailnum, [origin, dest, *(None if n == MISSING else int(n) for n in numbers)]
        )
    except ValueError:
        raise Rejected("not a number where one should be") from None


def _aircraft(content: list[Any]) -> tuple[Any, ...]:
    origin, dest, *numbers = content
    return (origin, dest), *numbers


def _expected_aircraft(row: dict[str, Any] | None, content: list[Any]) -> dict[str, Any]:
    origin, dest, miles, delay, minutes = content
    if row is None:
        row = {"airports": [], "miles": 0, "worst_delay": delay, "air_minutes": 0, "flights": 0}
    row["airports"] = sorted({*row["airports"], origin, dest})
    row["miles"] += miles
    if delay is not None:
        row["worst_delay"] = delay if row["worst_delay"] is None else max(row["worst_delay"], delay)
    row["air_minutes"] += minutes or 0
    row["flights"] += 1
    return row


FLIGHTS = Aggregation(
    "aircraft",
    Aircraft,
    ("tailnum", "origin", "dest", "distance", "dep_delay", "air_time"),
    _flight,
    _aircraft,
    _expected_aircraft,
)


# Sums of the user's columns


def add(one: Decimal, other: Decimal) -> Decimal:
    """Return the exact sum, so that the order of addition makes no difference."""
    return _EXACT.add(one, other)


def _add_all(one: dict[str, Decimal], other: dict[str, Decimal]) -> dict[str, Decimal]:
    return {name: add(one.get(name, Decimal()), value) for name, value in other.items()}


class Totals(Model, name="phonon_demo_totals"):
    """Rows and sums of one key; the sums by the name of their column."""

    key: ID[str]
    sums: Custom[dict[str, Decimal]] = Custom(merge=_add_all, zero={})
    rows: Count = Count()


def _totals(content: list[Any]) -> tuple[Any, ...]:
    return ({name: Decimal(text) for name, text in content},)


def _expected_totals(row: dict[str, Any] | None, content: list[Any]) -> dict[str, Any]:
    sums = {} if row is None else row["sums"]
    for name, text in content:
        sums[name] = str(add(Decimal(sums.get(name, "0")), Decimal(text)))
    return {"sums": sums, "rows": 1 if row is None else row["rows"] + 1}


def _number(text: Any, column: str) -> str:
    if isinstance(text, str) and len(text) <= _MOST_DIGITS and _NUMBER.fullmatch(text):
        number = Decimal(text)
        if abs(number.adjusted()) <= _MOST_DIGITS:
            return str(number)
    raise Rejected(f"no number in {column!r}")


def sums_of(key: str, columns: Sequence[str]) -> Aggregation:
    """Return the sums of columns of the user's own rows.

    Args:
        key: The column of the key.
        columns: The columns of numbers.
    """

    def message(row: Sequence[Any]) -> Message:
        name, *numbers = row
        if not isinstance(name, str) or not name.strip():
            raise Rejected(f"no key in {key!r}")
        pairs = zip(columns, numbers, strict=True)
        return Message(name, [[column, _number(text, column)] for column, text in pairs])

    return Aggregation("totals", Totals, (key, *columns), message, _totals, _expected_totals)


#: Aggregations by name, for workers, which need neither the columns nor `message`.
AGGREGATIONS = {"flights": FLIGHTS, "sums": sums_of("", ())}
