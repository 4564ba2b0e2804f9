"""Errors that the command line program prints in one line."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from phonon.errors import PhononError


class CommandError(Exception):
    """A command failed; the message says why, and names the remedy.

    Attributes:
        status: The exit status of the program.
    """

    status = 1


class CommandInterrupt(BaseException):
    """A signal ended a command, which has tidied up behind itself.

    Args:
        number: The number of the signal.

    Attributes:
        status: The exit status of the program: 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; the workers have ended too")
        self.status = 128 + number


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error of the block in one line, and exit with its status.

    Raises:
        SystemExit: The block raised a `PhononError`, `CommandError` or `CommandInterrupt`.
    """
    try:
        yield
    except PhononError as error:
        status, text = 2, str(error)
    except (CommandError, CommandInterrupt) as error:
        status, text = error.status, str(error)
    else:
        return
    sys.stderr.write(f"phonon: {text}\n")
    sys.exit(status)
