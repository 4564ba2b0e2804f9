"""Signals that want a program to end, which has workers and a server to look after."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from phonon.cli.errors import CommandInterrupt


class Interrupted(CommandInterrupt):
    """The user, or the system, wants the program to end.

    Attributes:
        status: The exit status that says so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; the workers have ended too")
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first signal into `Interrupted`. Further ones do not disturb the tidying up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        for ours in before:
            signal.signal(ours, signal.SIG_IGN)
        raise Interrupted(number)

    # nohup, say, has reasons to ignore one.
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
