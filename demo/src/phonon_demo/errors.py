"""Errors that the demo prints in one line."""

from phonon.cli.errors import CommandError


class InputError(CommandError):
    """The input or an option is unusable; the message names the remedy."""

    status = 2


class WorkerError(CommandError):
    """A worker has ended before its time; the message names it and the reason."""
