"""The local clock."""

import time
from collections.abc import Callable
from functools import partial

#: Returns seconds, from a clock that is never set. It goes on while the machine sleeps, if the
#: system has such a clock.
clock: Callable[[], float] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
