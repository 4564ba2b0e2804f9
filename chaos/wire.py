"""The messages between the program and its workers, over one pair of sockets a worker.

The program sends `WorkerSettings`, then lists of messages, and None when there are no more. A
worker acknowledges a list when all of it is on the server.
"""

from dataclasses import dataclass

from chaos.jobs import Job
from phonon.settings import Durability


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a worker, sent to it.

    Attributes:
        job: The job.
        url: The URL of Phonon's server.
        namespace: The namespace of this run.
        database: The SQLite file.
        max_entries: The size of the worker's cache, keys.
        heartbeat: Seconds between two heartbeats.
        durability: The safety of data before it is acknowledged.
        patience: Seconds for which a server that is not there at the start is tried again.
        asyncio: Whether the worker is a program with an event loop.
    """

    job: Job
    url: str
    namespace: str
    database: str
    max_entries: int
    heartbeat: float
    durability: Durability | None = None
    patience: float = 0.0
    asyncio: bool = False


@dataclass(frozen=True)
class Ready:
    """From a worker: it is connected.

    Attributes:
        process: The id of its `phonon.Process`.
    """

    process: str


@dataclass(frozen=True)
class Progress:
    """From a worker: its progress so far.

    Attributes:
        lists: Lists acknowledged.
        messages: Messages acknowledged.
        writes: Sessions written to the database.
        repeats: Sessions that were there already, and were skipped.
        reborn: The number of times that it was believed dead, and took a new id.
        done: Whether all its sessions have ended and it has left.
    """

    lists: int = 0
    messages: int = 0
    writes: int = 0
    repeats: int = 0
    reborn: int = 0
    done: bool = False


@dataclass(frozen=True)
class TookOver:
    """From a worker: it has taken over from a dead one.

    Attributes:
        dead: The id of the dead one's `phonon.Process`.
        sessions: The resources that it has released.
        batches: The number of these with a batch, which this worker has executed.
    """

    dead: str
    sessions: int
    batches: int


@dataclass(frozen=True)
class Log:
    """From a worker: a line of the library's log."""

    text: str


@dataclass(frozen=True)
class Failed:
    """From a worker: it gives up.

    Attributes:
        text: The reason in one line.
        traceback: The traceback, unless the reason is outside of the program.
    """

    text: str
    traceback: str = ""
