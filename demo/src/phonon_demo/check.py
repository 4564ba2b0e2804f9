"""The check: what is in SQLite against a plain loop in one process.

The loop over the flights shares no code with the demo but the csv module's.
"""

import csv
import gzip
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from phonon_demo import exact
from phonon_demo.flights import MISSING
from phonon_demo.jobs import Job, Message, Totals


class Check(Protocol):
    """Finds out what the figures ought to be."""

    def see(self, message: Message) -> None:
        """Take note of a message that is dealt."""

    def totals(self) -> Totals:
        """What the figures ought to be."""


class FlightsCheck:
    """A loop over the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def see(self, message: Message) -> None:
        """Do nothing: the file is read again."""

    def totals(self) -> Totals:
        """Go through the file."""
        flights: dict[str, int] = {}
        miles: dict[str, int] = {}
        airports: dict[str, set[str]] = {}
        delays: dict[str, int] = {}
        minutes: dict[str, int] = {}
        with gzip.open(self._path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                aircraft = row["tailnum"]
                if aircraft == MISSING:
                    continue
                flights[aircraft] = flights.get(aircraft, 0) + 1
                miles[aircraft] = miles.get(aircraft, 0) + int(row["distance"])
                airports.setdefault(aircraft, set()).update((row["origin"], row["dest"]))
                if row["dep_delay"] != MISSING:
                    delay = int(row["dep_delay"])
                    delays[aircraft] = max(delays.get(aircraft, delay), delay)
                if row["air_time"] != MISSING:
                    minutes[aircraft] = minutes.get(aircraft, 0) + int(row["air_time"])
        return {
            aircraft: (
                flights[aircraft],
                miles[aircraft],
                frozenset(airports[aircraft]),
                delays.get(aircraft),
                minutes.get(aircraft, 0),
            )
            for aircraft in flights
        }


class SumsCheck:
    """A loop beside the dealing: a pipe can be read only once."""

    def __init__(self) -> None:
        self._totals: Totals = {}

    def see(self, message: Message) -> None:
        """Add up."""
        key, *numbers = message
        before = self._totals.get(key)
        row = (1, *numbers)
        self._totals[key] = row if before is None else tuple(map(exact.add, before, row))

    def totals(self) -> Totals:
        """What was added up."""
        return self._totals


class Difference(NamedTuple):
    """A key whose figures are not equal.

    Attributes:
        key: Which.
        expected: What the loop has; None if it has no such key.
        found: What SQLite has; None if it has no such key.
    """

    key: str
    expected: tuple[Any, ...] | None
    found: tuple[Any, ...] | None


def read(database: sqlite3.Connection, job: Job) -> Totals:
    """What is in SQLite."""
    found: Totals = {}
    for key, *stored in database.execute(job.table.select):
        try:
            found[key] = job.figures(stored)
        except (ArithmeticError, TypeError, ValueError):
            found[key] = tuple(stored)  # not what a worker wrote: it will not be equal
    return found


def compare(expected: Totals, found: Totals) -> list[Difference]:
    """All keys of either side whose figures differ, in the order of the keys."""
    return [
        Difference(key, expected.get(key), found.get(key))
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
