"""The policy for batches whose execution failed."""

import random
from typing import NamedTuple


class RetryPolicy(NamedTuple):
    """When a batch whose execution failed is tried again, and when it is parked.

    Attributes:
        attempts: How often it is tried before it is parked.
        first_delay: Seconds before the second attempt; each further one waits twice as long.
        longest_delay: Seconds; the delays grow no further.
        jitter: The share of a delay, 0 to 1, up to which it is shortened at random, so that batches
            that failed together are not tried again together.
        crashes: How many processes may die while they execute it; with one more it is parked, so
            that a batch that kills its process does not kill all of them in turn.

    Example:
        >>> Process(retry=RetryPolicy(attempts=3, first_delay=0.5)).stop()
    """

    attempts: int = 8
    first_delay: float = 1.0
    longest_delay: float = 300.0
    jitter: float = 0.5
    crashes: int = 10

    def delay(self, failed: int) -> float:
        """Return the seconds to wait after so many failed attempts, at the most."""
        return float(min(self.longest_delay, self.first_delay * 2 ** min(failed - 1, 60)))

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after so many failed attempts."""
        return self.delay(failed) * (1 - self.jitter * random.random())  # noqa: S311 - no secret
