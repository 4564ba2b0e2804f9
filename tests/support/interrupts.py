"""Interrupts of a call: SIGALRM, which pytest-timeout uses too, and exceptions."""

import contextlib
import inspect
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import phonon

PACKAGE = str(Path(phonon.__file__).parent)


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


def at_call(number: int, work: Callable[[], object], then: Callable[[], object]) -> bool:
    """Do something at the entry of one of Phonon's functions, in the middle of some work.

    That is where a signal handler runs, among other places; what ``then`` raises is raised there.

    Args:
        number: The entry's number, from 1.
        work: The work to do.
        then: The interruption.

    Returns:
        Whether there were so many.
    """
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        code = frame.f_code
        # A generator that goes on is not entered: no signal handler runs there, and what a trace
        # function raises there ends it without its except clauses.
        is_entered = event == "call" and not code.co_flags & inspect.CO_GENERATOR
        if is_entered and code.co_filename.startswith(PACKAGE):
            left -= 1
            if left == 0:
                sys.settrace(None)
                then()

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return left <= 0
