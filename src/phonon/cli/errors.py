"""What the command line program says in one line."""


class InputError(Exception):
    """The input or an option cannot be used as it is; the message names the remedy."""


class WorkerError(Exception):
    """A worker has ended before its time; the message says which, and why."""
