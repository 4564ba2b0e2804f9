"""The messages that every contender gets, and their totals."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: The exponent of the zipf distribution of keys.
EXPONENT = 1.1
#: Messages that are acknowledged together.
BATCH = 1000


class Message(NamedTuple):
    """A message about a key: how many, which one, how high."""

    key: str
    times: int
    element: str
    height: int


#: The totals of the messages about a key: the sum, the union and the maximum.
Total = tuple[int, frozenset[str], int]


def zipf(messages: int, keys: int, seed: int) -> list[Message]:
    """A stream in which few keys are frequent and most are rare."""
    rng = random.Random(seed)  # noqa: S311 - repeatable, no secret
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(keys)]
    names = [f"user{i}" for i in range(keys)]
    return [
        Message(key, rng.randrange(5), f"page{rng.randrange(50)}", rng.randrange(1_000_000))
        for key in rng.choices(names, weights, k=messages)
    ]


def uniform(messages: int, keys: int) -> list[Message]:
    """A stream in which each key comes as often as any other."""
    return [Message(f"user{i % keys}", 1, "page", i) for i in range(messages)]


def totals(stream: Sequence[Message]) -> dict[str, Total]:
    """Return the totals of a stream."""
    sums: dict[str, tuple[int, set[str], int]] = {}
    for key, count, element, height in stream:
        old = sums.get(key, (0, set(), 0))
        old[1].add(element)
        sums[key] = old[0] + count, old[1], max(old[2], height)
    return {key: (n, frozenset(elements), high) for key, (n, elements, high) in sums.items()}


def batches(stream: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The stream in pieces that are acknowledged together."""
    for first in range(0, len(stream), BATCH):
        yield stream[first : first + BATCH]


def shares(stream: Sequence[Message], workers: int) -> list[list[Message]]:
    """The stream, dealt out without regard to keys."""
    return [list(itertools.islice(stream, i, None, workers)) for i in range(workers)]
