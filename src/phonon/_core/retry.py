"""The policy for batches whose execution failed."""

import math
import random
from typing import NamedTuple, Self

from phonon._core.checks import check_whole, is_number
from phonon.errors import ConfigurationError


class _Values(NamedTuple):
    attempts: int
    first_delay: float
    longest_delay: float
    jitter: float
    crashes: int


class RetryPolicy(_Values):
    """The times at which a batch whose execution failed is tried again, or parked.

    Attributes:
        attempts: The number of attempts before it is parked.
        first_delay: Seconds before the second attempt; each further one waits twice as long.
        longest_delay: Seconds; the delays grow no further.
        jitter: The share of a delay, 0 to 1, up to which it is shortened at random, so that batches
            that failed together are not tried again together.
        crashes: The number of processes that may die while they execute it. After one more it is
            parked, so that a batch that kills its process does not kill all processes in turn.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> Process(retry=RetryPolicy(attempts=3, first_delay=0.5)).stop()
    """

    __slots__ = ()

    def __new__(
        cls,
        attempts: int = 8,
        first_delay: float = 1.0,
        longest_delay: float = 300.0,
        jitter: float = 0.5,
        crashes: int = 10,
    ) -> Self:
        for name, least, count in (("attempts", 1, attempts), ("crashes", 0, crashes)):
            if check_whole(name, count) < least:
                raise ConfigurationError(
                    f"{name} is at least {least}, not {count!r}: see phonon.RetryPolicy"
                )
        for name, limit, expected, number in (
            ("first_delay", math.inf, "a number of seconds from 0", first_delay),
            ("longest_delay", math.inf, "a number of seconds from 0", longest_delay),
            ("jitter", 1, "a share from 0 to 1", jitter),
        ):
            if not is_number(number) or not (0 <= number <= limit and number < math.inf):
                raise ConfigurationError(
                    f"{name} is {expected}, not {number!r}: see phonon.RetryPolicy"
                )
        return super().__new__(cls, attempts, first_delay, longest_delay, jitter, crashes)

    def delay(self, failed: int) -> float:
        """Return the seconds to wait after so many failed attempts, at the most."""
        return float(min(self.longest_delay, self.first_delay * 2 ** min(failed - 1, 60)))

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after so many failed attempts."""
        return self.delay(failed) * (1 - self.jitter * random.random())  # noqa: S311 - no secret
