"""What the demo and its workers tell each other, over one pair of sockets a worker.

The demo sends a `Setup`, then lists of messages, and None when there are no more. A worker
acknowledges a list when all of it is on the server.
"""

from dataclasses import dataclass

from phonon.cli.jobs import Job


@dataclass(frozen=True)
class Setup:
    """To a worker: what to do.

    Attributes:
        job: What to add up.
        url: Phonon's server.
        namespace: This run's.
        database: The SQLite file.
        max_entries: The size of the worker's cache, keys.
    """

    job: Job
    url: str
    namespace: str
    database: str
    max_entries: int


@dataclass(frozen=True)
class Ready:
    """From a worker: it is connected."""


@dataclass(frozen=True)
class Progress:
    """From a worker: what it has done so far.

    Attributes:
        lists: Lists acknowledged.
        messages: Messages acknowledged.
        writes: Sessions written to the database.
        repeats: Sessions that were there already, and were skipped.
        done: Whether all its sessions have ended and it has left.
    """

    lists: int = 0
    messages: int = 0
    writes: int = 0
    repeats: int = 0
    done: bool = False


@dataclass(frozen=True)
class Log:
    """From a worker: a line of the library's log."""

    text: str


@dataclass(frozen=True)
class Failed:
    """From a worker: it gives up.

    Attributes:
        text: Why, in one line.
        traceback: Where, unless the reason is outside of the program.
    """

    text: str
    traceback: str = ""
