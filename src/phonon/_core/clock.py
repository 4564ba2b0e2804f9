"""The local clock."""

import time

#: A clock that goes on while the machine sleeps, if the system has one.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return seconds, from a clock that is never set."""
    return time.clock_gettime(_CLOCK)
