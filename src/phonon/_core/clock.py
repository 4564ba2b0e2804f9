"""The local clock."""

import time

#: Goes on while the machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return seconds, from a clock that is never set."""
    return time.clock_gettime(_CLOCK)
