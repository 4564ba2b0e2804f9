"""Flights out of New York, added up per aircraft."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phonon import Model, Process, Update
from phonon.fields import ID, Count, Max, SetAppend, Sum
from phonon_demo.formats import Rejected, Values
from phonon_demo.jobs import Message, for_process
from phonon_demo.sink import Sink, Table

#: What the file has where a value is missing.
MISSING = "NA"


class Aircraft(Model, name="phonon_demo_aircraft"):
    """The flights of one aircraft."""

    tailnum: ID[str]
    airports: SetAppend[str]
    miles: Sum[int]
    worst_delay: Max[int]
    air_minutes: Sum[int]
    flights: Count = Count()

    def on_complete(self) -> None:
        """Write the session to the database."""
        airports = json.dumps(sorted(self.airports))
        row = self.flights, self.miles, airports, self.worst_delay, self.air_minutes
        Sink.current.write(self.tailnum, row, self.token)


class FlightUpdate(Update):
    """The same as an update: what it takes without fields."""

    def __init__(
        self,
        process: Process,
        tailnum: str,
        airports: set[str],
        miles: int,
        delay: int | None,
        air_minutes: int,
    ) -> None:
        self.flights = 1
        self.miles = miles
        self.airports = airports
        self.worst_delay = delay
        self.air_minutes = air_minutes
        super().__init__(process, tailnum, database="demo", collection="aircraft")

    def merge(self, other: "FlightUpdate") -> None:
        """Add what another update knows."""
        self.flights += other.flights
        self.miles += other.miles
        self.airports |= other.airports
        delays = [d for d in (self.worst_delay, other.worst_delay) if d is not None]
        self.worst_delay = max(delays, default=None)
        self.air_minutes += other.air_minutes

    def execute(self) -> None:
        """Write the session to the database."""
        Sink.current.write(self._id, self.row(), self.token)

    def row(self) -> tuple[Any, ...]:
        """The columns of the table."""
        airports = json.dumps(sorted(self.airports))
        return self.flights, self.miles, airports, self.worst_delay, self.air_minutes

    def state(self) -> dict[str, Any]:
        """The figures."""
        return {
            "flights": self.flights,
            "miles": self.miles,
            "airports": self.airports,
            "worst_delay": self.worst_delay,
            "air_minutes": self.air_minutes,
        }

    def reset_states(self) -> dict[str, Any]:
        """No flights."""
        return {
            "flights": 0,
            "miles": 0,
            "airports": set(),
            "worst_delay": None,
            "air_minutes": 0,
        }


_SUM = "{old} + {new}"
_MAX = "max(coalesce({old}, {new}), coalesce({new}, {old}))"
_UNION = (
    "(SELECT json_group_array(value) FROM (SELECT value FROM json_each({old}) "
    "UNION SELECT value FROM json_each({new}) ORDER BY value))"
)


@dataclass(frozen=True)
class Flights:
    """Flights per aircraft."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the file that are looked at."""
        return "tailnum", "origin", "dest", "distance", "dep_delay", "air_time"

    @property
    def table(self) -> Table:
        """One row an aircraft."""
        return Table(
            "aircraft",
            "tailnum",
            {
                "flights": _SUM,
                "miles": _SUM,
                "airports": _UNION,
                "worst_delay": _MAX,
                "air_minutes": _SUM,
            },
        )

    def message(self, values: Values) -> Message:
        """Make numbers of what are numbers; a gap is None."""
        tailnum, origin, dest, distance, delay, minutes = values
        if tailnum == MISSING:
            raise Rejected("no tail number")
        try:
            return tailnum, origin, dest, int(distance), _int(delay), _int(minutes)
        except ValueError:
            raise Rejected("not a number where one should be") from None

    @property
    def model(self) -> type[Model]:
        """One record an aircraft."""
        return Aircraft

    def row(self, message: Message) -> tuple[Any, ...]:
        """One flight."""
        tailnum, origin, dest, *rest = message
        return tailnum, (origin, dest), *rest

    def update(self, process: Process, message: Message) -> Update:
        """One flight."""
        tailnum, origin, dest, distance, delay, minutes = message
        kind = for_process(FlightUpdate, process)
        return kind(process, tailnum, {origin, dest}, distance, delay, minutes or 0)

    def figures(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """The airports are a set."""
        flights, miles, airports, delay, minutes = stored
        return flights, miles, frozenset(json.loads(airports)), delay, minutes


def _int(value: str) -> int | None:
    return None if value == MISSING else int(value)
