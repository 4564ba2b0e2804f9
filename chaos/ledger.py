"""Keeps books on every message, and compares them with SQLite.

If a dead worker has not acknowledged a message, the broker does not know whether it was stored. So
the message is dealt again under another number, and the old number may be in the database or not.
Every other difference is an error.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from chaos.jobs import Message, Totals
from phonon_demo.demo import differences


class Verdict(NamedTuple):
    """The result of comparing the database with the books.

    Attributes:
        acknowledged: Messages acknowledged.
        lost: Acknowledged messages that are not there.
        doubled: Messages that were added more than once.
        foreign: Messages in the row of another key.
        unacknowledged: Messages that are there although they were never acknowledged, which is
        allowed.
        keys: Keys that should be there, or are.
        differing: Keys whose figures differ from a plain loop over the messages that are there.
    """

    acknowledged: int
    lost: int
    doubled: int
    foreign: int
    unacknowledged: int
    keys: int
    differing: int

    @property
    def exact(self) -> bool:
        """Return whether there is no error."""
        return not (self.lost or self.doubled or self.foreign or self.differing)


class Ledger:
    """The books of one run."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._acknowledged = bytearray()

    def __len__(self) -> int:
        return len(self._messages)

    def enter(self, message: Message) -> Message:
        """Give a message its number."""
        numbered = (*message, len(self._messages))
        self._messages.append(numbered)
        self._acknowledged.append(0)
        return numbered

    def again(self, message: Message) -> Message:
        """Give another number to a message that is dealt again."""
        return self.enter(message[:-1])

    def acknowledge(self, messages: Iterable[Message]) -> None:
        """Note that a worker has acknowledged messages."""
        for message in messages:
            self._acknowledged[message[-1]] = 1

    def audit(self, found: Totals) -> Verdict:
        """Compare the database's rows, by key and with the numbers last, with the books."""
        times: Counter[int] = Counter()
        foreign = 0
        for key, (*_, numbers) in found.items():
            times.update(numbers)
            foreign += sum(not self._is_of(key, number) for number in numbers)
        known = range(len(self._messages))
        present = [self._messages[number] for number in times if number in known]
        figures: Totals = {key: tuple(row[:-1]) for key, row in found.items()}
        expected = add_up(present)
        return Verdict(
            acknowledged=sum(self._acknowledged),
            lost=sum(done and n not in times for n, done in enumerate(self._acknowledged)),
            doubled=sum(count > 1 for count in times.values()),
            foreign=foreign,
            unacknowledged=sum(not self._acknowledged[message[-1]] for message in present),
            keys=len(expected.keys() | figures.keys()),
            differing=len(differences(expected, figures)),
        )

    def _is_of(self, key: str, number: int) -> bool:
        return number < len(self._messages) and self._messages[number][0] == key


def add_up(messages: Iterable[Message]) -> Totals:
    """Add messages up in a plain loop, which shares no code with the checked program."""
    flights: Counter[str] = Counter()
    miles: Counter[str] = Counter()
    air: Counter[str] = Counter()
    airports: dict[str, set[str]] = {}
    delays: dict[str, int | None] = {}
    for key, origin, dest, distance, delay, minutes, _ in messages:
        flights[key] += 1
        miles[key] += distance
        air[key] += minutes or 0
        airports.setdefault(key, set()).update((origin, dest))
        worst = delays.setdefault(key, delay)
        if delay is not None and (worst is None or delay > worst):
            delays[key] = delay
    return {
        key: (flights[key], miles[key], frozenset(airports[key]), delays[key], air[key])
        for key in flights
    }
