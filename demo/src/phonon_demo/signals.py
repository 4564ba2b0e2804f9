"""Turns signals into an exception, so that a program can end its workers and its server."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from phonon.cli.errors import CommandInterrupt


class Interrupted(CommandInterrupt):
    """A signal of the user or the system to end the program.

    Attributes:
        status: The exit status: 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; the workers have ended too")
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first signal into `Interrupted`, and ignore further ones during the cleanup."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        for ours in before:
            signal.signal(ours, signal.SIG_IGN)
        raise Interrupted(number)

    # A signal that is ignored, by nohup for example, stays ignored.
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
