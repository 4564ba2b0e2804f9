"""Compares every message with what is in SQLite.

If a worker dies before it has acknowledged a delivery, it is unknown whether it was stored. So the
message is delivered again under another number, and the old number may be in the database or not.
Every other difference is an error.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from chaos.jobs import Doc
from phonon_demo.demo import differences
from phonon_demo.models import FLIGHTS, Message, Table


class Verdict(NamedTuple):
    """The result of comparing the database with the messages.

    Attributes:
        acknowledged: Deliveries acknowledged.
        lost: Acknowledged deliveries that are not there, and messages never acknowledged.
        doubled: Deliveries that were added more than once.
        foreign: Deliveries in the row of another key.
        unacknowledged: Deliveries that are there although they were never acknowledged, which is
            allowed.
        keys: Keys that should be there, or are.
        differing: Keys whose figures differ from a plain loop over the deliveries that are there.
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


def audit(sent: Sequence[Message], acknowledged: Collection[str], found: dict[str, Doc]) -> Verdict:
    """Compare the database with the messages.

    Args:
        sent: The messages, by their numbers.
        acknowledged: The numbers of acknowledged deliveries; they begin with that of the message.
        found: The rows of the database by key, with the numbers of their deliveries.
    """
    times = Counter(number for doc in found.values() for number in doc["numbers"])
    known = {number: message_of(sent, number) for number in times}
    present = [message for message in known.values() if message is not None]
    foreign = [
        number
        for key, doc in found.items()
        for number in doc["numbers"]
        if (message := known[number]) is None or message.key != key
    ]
    never = set(range(len(sent))) - {_index(number) for number in acknowledged}
    expected: Table = {}
    FLIGHTS.add_up(expected, [Message(key, content[:-1]) for key, content in present])
    figures = {
        key: {name: doc[name] for name in doc if name != "numbers"} for key, doc in found.items()
    }
    return Verdict(
        acknowledged=len(acknowledged),
        lost=sum(number not in times for number in acknowledged) + len(never),
        doubled=sum(count > 1 for count in times.values()),
        foreign=len(foreign),
        unacknowledged=len(times.keys() - set(acknowledged)),
        keys=len(expected.keys() | figures.keys()),
        differing=len(differences(expected, figures)),
    )


def message_of(sent: Sequence[Message], number: str) -> Message | None:
    """Return the message of a delivery."""
    index = _index(number)
    return sent[index] if index < len(sent) else None


def _index(number: str) -> int:
    return int(number.partition("/")[0])
