"""Flights per aircraft, with the numbers of all messages, so that a lost or doubled one shows."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chaos.sink import Sink, Table
from phonon import Process, Update
from phonon.aio import AsyncUpdate
from phonon_demo.updates import added, flight

#: A key, the flight's columns, and the message's number.
Message = tuple[Any, ...]
#: The figures of each key, in the order of the table's columns.
Totals = dict[str, tuple[Any, ...]]

_SUM = "{old} + {new}"
_UNION = (
    "(SELECT json_group_array(value) FROM (SELECT value FROM json_each({old}) "
    "UNION SELECT value FROM json_each({new}) ORDER BY value))"
)
_FIGURES = {
    "flights": _SUM,
    "miles": _SUM,
    "airports": _UNION,
    "worst_delay": "max(coalesce({old}, {new}), coalesce({new}, {old}))",
    "air_minutes": _SUM,
    "numbers": "{old} || ' ' || {new}",
}


class NumberedUpdate(Update):
    """Data about one aircraft, and the numbers of its messages."""

    def __init__(self, process: Process, message: Message) -> None:
        tailnum, *content, number = message
        super().__init__(process, tailnum, doc=flight(content) | {"numbers": [number]})

    def merge(self, other: "NumberedUpdate") -> None:
        """Add the data and the numbers of another update."""
        numbers = self.doc["numbers"] + other.doc["numbers"]
        self.doc = added(self.doc, other.doc) | {"numbers": numbers}

    def execute(self) -> None:
        """Write the session to the database, with the numbers of its messages."""
        row = dict(self.doc)
        row["airports"] = json.dumps(sorted(row["airports"]))
        row["numbers"] = " ".join(map(str, row["numbers"]))
        Sink.current.write(self._id, [row[name] for name in _FIGURES], self.token)


class AsyncNumberedUpdate(NumberedUpdate, AsyncUpdate):
    """A `NumberedUpdate` for workers with an event loop. A thread writes to SQLite."""

    async def execute(self) -> None:  # type: ignore[override]  # as an AsyncUpdate does
        """Write the session to the database."""
        await asyncio.to_thread(super().execute)


@dataclass(frozen=True)
class Job:
    """Makes updates of messages. It is sent to the workers."""

    @property
    def table(self) -> Table:
        """One row an aircraft; the numbers of all messages that were ever added to it."""
        return Table("aircraft", "tailnum", _FIGURES)

    def update(self, process: Any, message: Message) -> Update:
        """Make an update of one flight."""
        kind: Any = NumberedUpdate if isinstance(process, Process) else AsyncNumberedUpdate
        made: Update = kind(process, message)
        return made

    def figures(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """Return a row's figures, with the airports as a set and the numbers as a tuple."""
        flights, miles, airports, delay, minutes, numbers = stored
        numbered = tuple(map(int, numbers.split()))
        return flights, miles, frozenset(json.loads(airports)), delay, minutes, numbered
