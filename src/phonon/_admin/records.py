"""The records that an `Admin` returns."""

from typing import Any, Literal, NamedTuple

#: A live process beats in time; a late one has missed its deadline, and nobody has marked it yet;
#: a dead one was marked, and survivors take over its resources.
ProcessState = Literal["alive", "late", "dead"]
#: The mode in which a lock is held or waited for.
LockMode = Literal["exclusive", "shared", "semaphore"]
#: ``waiting-for-class`` waits for a process that has imported its class, and
#: ``waiting-for-survivor`` for one that executes what dead processes have left.
BatchState = Literal["running", "retrying", "waiting-for-class", "waiting-for-survivor", "parked"]


class ProcessStatus(NamedTuple):
    """A process of the namespace.

    Attributes:
        id: Its id.
        state: Whether it beats.
        host: The name of its host; empty if that is not known.
        pid: Its number in its operating system; 0 if that is not known.
        version: The release of Phonon that it runs.
        since: When it started, seconds since the epoch by its own clock.
        lag: Seconds since its last heartbeat; None if it was declared dead.
        heartbeat_interval: Seconds between two of its heartbeats; 0 if that is not known.
        memberships: How many resources it is a member of.
        locks: How many resources it has locked, or waits for.
        batches: How many batches it executes, or is going to retry.
        left: The number of its resources that a survivor which executes no batches has left.
        oldest_batch: Since when it has the oldest of those batches, seconds since the epoch; None
            if it has none.
        calls: How many calls its lanes have carried.
        backlog: How much is unfinished in its outbox; None if it has not said.
        executes: Whether it executes batches of dead processes, and those that wait for a class.
        classes: The names of the classes that it can execute.
        counters: Its counters since it started; see `phonon.metrics`.
    """

    id: str
    state: ProcessState
    host: str
    pid: int
    version: str
    since: float
    lag: float | None
    heartbeat_interval: float
    memberships: int
    locks: int
    batches: int
    left: int
    oldest_batch: float | None
    calls: int
    backlog: int | None
    executes: bool
    classes: tuple[str, ...]
    counters: dict[str, Any]


class LockGrant(NamedTuple):
    """One acquisition of a lock.

    Attributes:
        process: The id of the process that has it.
        host: The name of its host; empty if that is not known.
        pid: Its number in its operating system; 0 if that is not known.
        thread: The name of the thread that took it.
        since: Since when, seconds since the epoch by the server's clock.
        token: The fencing token, as `Admin.break_lock` takes it.
        lease: Seconds left of a lease of its own; None if it lasts as long as its process.
    """

    process: str
    host: str
    pid: int
    thread: str
    since: float
    token: int
    lease: float | None


class LockWaiter(NamedTuple):
    """One that waits for a lock.

    Attributes:
        process: The id of its process.
        host: The name of its host; empty if that is not known.
        pid: Its number in its operating system; 0 if that is not known.
        mode: The mode that it waits for.
    """

    process: str
    host: str
    pid: int
    mode: LockMode


class LockStatus(NamedTuple):
    """A lock that is held or waited for.

    Attributes:
        name: The resource, or the semaphore.
        mode: The mode in which it is held, or for which the first in line waits.
        holders: Those that have it; in a listing 16 at the most.
        holding: How many have it.
        waiters: Those that wait, in order; in a listing 16 at the most.
        waiting: How many wait.
    """

    name: str
    mode: LockMode
    holders: tuple[LockGrant, ...]
    holding: int
    waiters: tuple[LockWaiter, ...]
    waiting: int


class SessionStatus(NamedTuple):
    """A session that is open.

    Attributes:
        resource: Its resource.
        since: When it began, seconds since the epoch by the server's clock. 0 if that is not known.
        age: Seconds since then.
        members: How many processes are members.
        modifications: How often it was modified; None if it has too many members to add that up.
        partials: How many partials it has on the server.
        bytes: How much memory they take there; None if the server does not tell.
    """

    resource: str
    since: float
    age: float
    members: int
    modifications: int | None
    partials: int
    bytes: int | None


class BatchStatus(NamedTuple):
    """A batch.

    Attributes:
        resource: Its resource.
        token: Its number. 0 if it has none yet: a session whose last member died.
        state: What it waits for, or is doing.
        owner: The id of the process that has it, or had it last.
        class_name: The class that it waits for; empty unless that is its state.
        attempts: How often its execution has failed.
        crashes: How many processes have died while they executed it.
        error: The error of the last attempt; empty if none has failed.
        next_attempt: When it is tried again, seconds since the epoch; None if that is not due.
        since: When its session ended, or when it was parked.
        age: Seconds since then.
        partials: How many partials it has.
        bytes: How much memory they take on the server; None if the server does not tell.
    """

    resource: str
    token: int
    state: BatchState
    owner: str
    class_name: str
    attempts: int
    crashes: int
    error: str
    next_attempt: float | None
    since: float
    age: float
    partials: int
    bytes: int | None


class SourceStatus(NamedTuple):
    """A source of messages, as one process reports it with its heartbeat.

    Attributes:
        name: Its name.
        process: The id of the process that reads it.
        kind: The check: ``"ordered"`` has offsets, ``"ids"`` has ids.
        position: Where an ordered one stands, as text.
        lag: How many messages are waiting behind that; None if that is not known.
    """

    name: str
    process: str
    kind: str
    position: str
    lag: int | None


class Partial(NamedTuple):
    """A partial, decoded without its class.

    Attributes:
        class_name: The class that it belongs to; empty if it cannot be read.
        serializer: How its content is encoded.
        bytes: Its size.
        id: The record's id.
        database: The record's database.
        collection: The record's collection.
        spec: Its ``spec``.
        doc: Its ``doc``.
        state: The attributes of its own, by name.
        error: Why it could not be read, or its content not be shown; empty if it was.
    """

    class_name: str
    serializer: str
    bytes: int
    id: Any
    database: str
    collection: str
    spec: Any
    doc: Any
    state: dict[Any, Any]
    error: str


class ResourceStatus(NamedTuple):
    """All that the server knows of one resource.

    Attributes:
        resource: Its name.
        members: Its members: the process's id, its host, its pid, and since when.
        modifications: How often each process has modified it in this session, by id.
        parties: For how many parties its session waits; 0 if those are not known.
        partials: How many partials its open session has.
        lock: Its lock; None if it is free.
        batches: Its running batch, if there is one, and its dead letters.
    """

    resource: str
    members: tuple[tuple[str, str, int, float], ...]
    modifications: dict[str, int]
    parties: int
    partials: int
    lock: LockStatus | None
    batches: tuple[BatchStatus, ...]


class Act(NamedTuple):
    """Something that an operator has done.

    Attributes:
        at: When, seconds since the epoch by the server's clock.
        who: As the `Admin` was told: user, host and process by default.
        act: ``"replay"``, ``"discard"``, ``"unlock"`` or ``"expire"``.
        resource: To which resource, or process.
        token: To which of its batches, or locks; 0 if that says nothing.
        detail: The new token of a batch, the number of its partials, or the holder of a lock.
    """

    at: float
    who: str
    act: str
    resource: str
    token: int
    detail: str
