"""SIGALRM in tests, which pytest-timeout uses too."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def alarm_handler(handler: Callable[..., None]) -> Iterator[None]:
    """Handle SIGALRM in the block, then give the timer back to pytest-timeout.

    Without that a test that uses the timer has no time limit any more, and can hang a whole run.

    Args:
        handler: The handler; the block itself sets the timer.
    """
    began = time.monotonic()
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if remaining:
            left = remaining - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))


@contextlib.contextmanager
def alarms(handler: Callable[[], None], interval: float) -> Iterator[None]:
    """Call a handler in the main thread again and again during the block.

    Args:
        handler: The handler; it may raise.
        interval: Seconds between two calls.
    """
    with alarm_handler(lambda *_: handler()):
        signal.setitimer(signal.ITIMER_REAL, interval, interval)
        yield
