"""``phonon demo --updates``: flights as an `Update` with a `merge` of its own."""

from collections.abc import Sequence
from typing import Any, ClassVar

import sqlalchemy as sa

from phonon import Update
from phonon.sinks import once
from phonon.sinks.sql import table_of
from phonon_demo.aggregations import FLIGHTS, Aircraft

AIRCRAFT = table_of(Aircraft, FLIGHTS.table)


def flight(content: list[Any]) -> dict[str, Any]:
    """Return the data of one message about its aircraft."""
    origin, dest, miles, delay, minutes = content
    return {
        "airports": {origin, dest},
        "miles": miles,
        "worst_delay": delay,
        "air_minutes": minutes or 0,
        "flights": 1,
    }


def added(one: Any, other: Any) -> dict[str, Any]:
    """Return the sum of two messages, sessions or rows."""
    delays = [each["worst_delay"] for each in (one, other) if each["worst_delay"] is not None]
    return {
        "airports": {*one["airports"], *other["airports"]},
        "worst_delay": max(delays, default=None),
        **{name: one[name] + other[name] for name in ("miles", "air_minutes", "flights")},
    }


class FlightUpdate(Update, name="phonon_demo_flights"):
    """The flights of one aircraft."""

    engine: ClassVar[sa.Engine]
    written: ClassVar[int] = 0

    def merge(self, other: "FlightUpdate") -> None:
        """Add another update's data."""
        self.doc = added(self.doc, other.doc)

    @classmethod
    def execute_many(cls, updates: Sequence["FlightUpdate"]) -> None:
        """Add sessions to their rows, in one transaction and always in the same order."""
        with cls.engine.begin() as connection:
            for update in sorted(updates, key=lambda update: update.resource_id):
                update.add_to_row(connection)
        cls.written += len(updates)

    def add_to_row(self, connection: sa.Connection) -> None:
        """Add the session to its row, unless its token shows that this was done before."""
        with once(connection, self) as is_new:
            if not is_new:
                return
            here = AIRCRAFT.c.tailnum == self._id
            row = connection.execute(sa.select(AIRCRAFT).where(here)).mappings().first()
            total = self.doc if row is None else added(self.doc, row)
            write = sa.insert(AIRCRAFT) if row is None else sa.update(AIRCRAFT).where(here)
            airports = sorted(total["airports"])
            connection.execute(
                write.values({**total, "airports": airports, "tailnum": self._id, "token": 0})
            )
