"""Flights per aircraft, with the number of every message: what is lost or doubled can be named."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phonon import Process, Update
from phonon_demo.flights import Flights, FlightUpdate
from phonon_demo.formats import Values
from phonon_demo.jobs import Message, for_process
from phonon_demo.sink import Sink, Table


class NumberedUpdate(FlightUpdate):
    """Data about one aircraft, and the numbers of the messages that it came from."""

    def __init__(self, process: Process, message: Message) -> None:
        tailnum, origin, dest, distance, delay, minutes, number = message
        self.numbers = [number]
        super().__init__(process, tailnum, {origin, dest}, distance, delay, minutes or 0)

    def merge(self, other: FlightUpdate) -> None:
        """Add what another update knows."""
        super().merge(other)
        if isinstance(other, NumberedUpdate):
            self.numbers = self.numbers + other.numbers

    def execute(self) -> None:
        """Write the session to the database, with the numbers of its messages."""
        row = (*self.row(), " ".join(map(str, self.numbers)))
        Sink.current.write(self._id, row, self.token)

    def state(self) -> dict[str, Any]:
        """The figures."""
        return super().state() | {"numbers": self.numbers}

    def reset_states(self) -> dict[str, Any]:
        """No flights."""
        return super().reset_states() | {"numbers": []}


@dataclass(frozen=True)
class Numbered:
    """Flights per aircraft, of messages that end with a number."""

    flights: Flights = field(default_factory=Flights)

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the file that are looked at."""
        return self.flights.columns

    @property
    def table(self) -> Table:
        """One row an aircraft; the numbers of all messages that were ever added to it."""
        plain = self.flights.table
        return Table(plain.name, plain.key, plain.figures | {"numbers": "{old} || ' ' || {new}"})

    @property
    def model(self) -> None:
        """Updates only: there is one class for what is executed, and it is a class of updates."""

    def row(self, message: Message) -> tuple[Any, ...]:
        """Return a message's values."""
        return message

    def message(self, values: Values) -> Message:
        """A message that is yet to be numbered."""
        return self.flights.message(values)

    def update(self, process: Process, message: Message) -> Update:
        """One flight."""
        return for_process(NumberedUpdate, process)(process, message)

    def figures(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """The figures, and the numbers as a tuple."""
        *plain, numbers = stored
        return *self.flights.figures(plain), tuple(map(int, numbers.split()))
