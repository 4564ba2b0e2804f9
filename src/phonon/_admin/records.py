"""The records that an `Admin` returns."""

from typing import Any, Literal, NamedTuple

#: A live process beats in time; a late one has missed its deadline and is not marked yet; a dead
#: one is marked, and survivors take over its resources.
ProcessState = Literal["alive", "late", "dead"]
#: The mode in which a lock is held or waited for.
LockMode = Literal["exclusive", "shared", "semaphore"]
#: A batch in ``waiting-for-class`` waits for a process that has imported its class, and one in
#: ``waiting-for-survivor`` for a process that executes the batches of dead ones.
BatchState = Literal["running", "retrying", "waiting-for-class", "waiting-for-survivor", "parked"]


class ProcessStatus(NamedTuple):
    """A process of the namespace.

    Attributes:
        id: The process's id.
        state: Whether the process beats.
        host: The name of its host; empty if that is not known.
        pid: Its number in its operating system; 0 if that is not known.
        version: The release of Phonon that it runs.
        since: When it started, seconds since the epoch by its own clock.
        lag: Seconds since its last heartbeat; None if it was declared dead.
        heartbeat_interval: Seconds between two of its heartbeats; 0 if that is not known.
        memberships: The number of resources that it is a member of.
        locks: The number of resources that it has locked, or waits for.
        batches: The number of batches that it executes, or is going to retry.
        left: The number of its resources that were left by a survivor without execution.
        oldest_batch: Since when it has the oldest of its batches, seconds since the epoch; None if
            it has none.
        calls: The number of calls that its lanes have carried.
        backlog: The unfinished work in its outbox; None if it has not reported it.
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
        process: The id of the process that holds the lock.
        host: The name of its host; empty if that is not known.
        pid: Its number in its operating system; 0 if that is not known.
        thread: The name of the thread that took it.
        since: When it was acquired, seconds since the epoch by the server's clock.
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
    """A waiter for a lock.

    Attributes:
        process: The id of the waiter's process.
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
        mode: The mode in which it is held, or for which the first waiter waits.
        holders: The holders; in a listing 16 at the most.
        holding: The number of holders.
        waiters: The waiters, in order; in a listing 16 at the most.
        waiting: The number of waiters.
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
        resource: The session's resource.
        since: When it began, seconds since the epoch by the server's clock; 0 if that is unknown.
        age: Seconds since then.
        members: The number of processes that are members.
        modifications: The number of its modifications; None if it has too many members to add up.
        partials: The number of its partials on the server.
        bytes: The memory that they take there; None if the server does not tell.
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
        resource: The batch's resource.
        token: The batch's number; 0 before it has one: a session whose last member died.
        state: The batch's state.
        owner: The id of the process that has it, or had it last.
        class_name: The class that it waits for; empty in other states.
        attempts: The number of failed executions.
        crashes: The number of processes that have died while they executed it.
        error: The error of the last attempt; empty if none has failed.
        next_attempt: When it is tried again, seconds since the epoch; None if no retry is due.
        since: When its session ended, or when it was parked.
        age: Seconds since then.
        partials: The number of its partials.
        bytes: The memory that they take on the server; None if the server does not tell.
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
    """A source of messages, as a process reports it with its heartbeats.

    Attributes:
        name: The source's name.
        process: The id of the process that reads it.
        kind: The check: ``"ordered"`` has offsets, ``"ids"`` has ids.
        position: The position of an ordered source, as text.
        lag: The number of messages behind the position; None if it is unknown.
    """

    name: str
    process: str
    kind: str
    position: str
    lag: int | None


class Partial(NamedTuple):
    """A partial, decoded without its class.

    Attributes:
        class_name: The name of its class; empty if it cannot be read.
        serializer: The name of the serializer of its content.
        bytes: The partial's size.
        id: The record's id.
        database: The record's database.
        collection: The record's collection.
        spec: The record's ``spec``.
        doc: The record's ``doc``.
        state: The attributes of the class's ``state``, by name.
        error: The reason why the partial or its content could not be read; empty if it could.
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
    """Everything that the server knows about one resource.

    Attributes:
        resource: The resource's name.
        members: The members: process id, host, pid, and since when.
        modifications: Each process's number of modifications in this session, by id.
        parties: The number of parties that its session waits for; 0 if it has no known parties.
        partials: The number of partials of its open session.
        lock: The resource's lock; None if it is free.
        batches: The running batch, if there is one, and the dead letters.
    """

    resource: str
    members: tuple[tuple[str, str, int, float], ...]
    modifications: dict[str, int]
    parties: int
    partials: int
    lock: LockStatus | None
    batches: tuple[BatchStatus, ...]


class Act(NamedTuple):
    """An act of an operator.

    Attributes:
        at: The time, seconds since the epoch by the server's clock.
        who: The operator's name, as given to `Admin`: user, host and process by default.
        act: ``"replay"``, ``"discard"``, ``"unlock"`` or ``"expire"``.
        resource: The resource, or the process.
        token: The token of its batch or lock; 0 if there is none.
        detail: The new token of a batch, the number of its partials, or the holder of a lock.
    """

    at: float
    who: str
    act: str
    resource: str
    token: int
    detail: str
