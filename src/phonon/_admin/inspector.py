"""Reads the content of a namespace: processes, locks, sessions, batches and sources."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from phonon._admin.content import read_partial
from phonon._admin.namespace import MOST_PROCESSES, Namespace, unpacked
from phonon._admin.pages import Page, Walk, next_page
from phonon._admin.records import (
    Act,
    BatchState,
    BatchStatus,
    LockStatus,
    Partial,
    ProcessStatus,
    ResourceStatus,
    SessionStatus,
    SourceStatus,
)
from phonon._admin.rows import (
    Row,
    act,
    add_holdings,
    batch_status,
    letters_of,
    lock_status,
    process_of,
    process_status,
    session_status,
)
from phonon._core.executor import TOKENS
from phonon._protocol.partitions import decode, encode_resource, encode_semaphore
from phonon._transport.steps import Steps
from phonon.errors import BatchMissingError

#: Entries in one answer of a partition, and partitions that are asked together: a server carries
#: out all requests of one client before it serves the next client.
PAGE = 64
AT_ONCE = 2
#: Partials read at once.
PIECE = 64


class Inspector:
    """Reads the content of a namespace, in pages.

    Args:
        namespace: The namespace to ask.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    # Processes

    def processes(self) -> Steps[list[ProcessStatus]]:
        """Return all processes, those that have been silent for the longest time first."""
        space = self._namespace
        now, roster = yield from space.roster()
        pids = list(roster)
        found: list[ProcessStatus] = []
        for first in range(0, len(pids), MOST_PROCESSES):
            page = pids[first : first + MOST_PROCESSES]
            totals = [[0, 0, 0, 0, 0, 0] for _ in page]
            for p in range(0, space.partitions.count, AT_ONCE):
                asked = range(p, min(p + AT_ONCE, space.partitions.count))
                replies = yield from space.ask(
                    [space.read(each, "admin_holdings", *page) for each in asked]
                )
                for reply in replies:
                    for i, sums in enumerate(totals):
                        add_holdings(sums, reply[8 * i : 8 * i + 8])
            found += [
                process_status(pid, now, roster[pid], sums)
                for pid, sums in zip(page, totals, strict=True)
            ]
        return sorted(found, key=lambda process: (process.state != "dead", -(process.lag or 0.0)))

    def sources(self) -> Steps[list[SourceStatus]]:
        """Return the sources that processes report, by name."""
        _, roster = yield from self._namespace.roster()
        found = []
        for pid, (_, _, report) in roster.items():
            for row in unpacked(report).get("sources", ()):
                name, kind, position, lag = row
                found.append(SourceStatus(str(name), decode(pid), str(kind), str(position), lag))
        return sorted(found, key=lambda source: (source.name, source.process))

    # Sessions, locks and batches

    def sessions(self, older: float | None, prefix: str) -> Walk[SessionStatus]:
        """Walk through the open sessions."""
        now, _ = yield from self._namespace.roster()
        before = b"" if older is None else b"%d" % int((now - older) * 1000)
        seen: set[bytes] = set()

        def make(rows: "Rows") -> Steps[list[SessionStatus]]:
            yield from ()
            fresh = [row for _, row in rows if not (row[6] and _was_seen(row[0], seen))]
            return [session_status(row, now) for row in fresh]

        yield from self._walk("admin_sessions", prefix, make, before)

    def oldest_sessions(
        self, most: int, older: float | None, prefix: str
    ) -> Steps[list[SessionStatus]]:
        """Return the oldest open sessions, the oldest first, without reading all of them.

        A registry is in the order of age, except for resources that its process has locked too, or
        of which it executes a batch: of those only the first page is read.
        """
        space = self._namespace
        now, _ = yield from space.roster()
        before = b"" if older is None else b"%d" % int((now - older) * 1000)
        start = encode_resource(prefix) if prefix else b""
        oldest: dict[str, SessionStatus] = {}
        for partition in range(space.partitions.count):
            ((owners, _),) = yield from space.ask([space.read(partition, "admin_owners")])
            for owner in owners:
                for score in (b"", b"0"):
                    at, member, count = score, b"", 0
                    while count < most:
                        size = b"%d" % min(most, PAGE)
                        words = owner, at, member, size, start, before
                        request = space.read(partition, "admin_sessions", *words)
                        ((at, member, rows),) = yield from space.ask([request])
                        count += len(rows)
                        for row in rows:
                            found = session_status(row, now)
                            oldest[found.resource] = found
                        if not at or not score:
                            break
                if len(oldest) > most + PAGE:
                    kept = heapq.nlargest(most, oldest.values(), key=_age)
                    oldest = {session.resource: session for session in kept}
        return heapq.nlargest(most, oldest.values(), key=_age)

    def locks(self, prefix: str) -> Walk[LockStatus]:
        """Walk through the locks that are held or waited for."""
        seen: set[bytes] = set()

        def make(rows: "Rows") -> Steps[list[LockStatus]]:
            fresh = [row for _, row in rows if not (row[5] and _was_seen(row[0], seen))]
            return (yield from self._locks(fresh))

        yield from self._namespace.roster()
        yield from self._walk("admin_locks", prefix, make)

    def lock(self, name: str, *, semaphore: bool = False) -> Steps[LockStatus | None]:
        """Return a lock with all its holders and waiters; None if it is free."""
        space = self._namespace
        yield from space.roster()
        encoded = encode_semaphore(name) if semaphore else encode_resource(name)
        partition = space.partitions.of(encoded)
        (reply,) = yield from space.ask([space.read(partition, "lockers", encoded)])
        holders, waiters = reply
        if not holders and not waiters:
            return None
        row = encoded, holders, len(holders) // 5, waiters, len(waiters), 0
        return (yield from self._locks([row]))[0]

    def batches(self, states: Sequence[BatchState], prefix: str) -> Walk[BatchStatus]:
        """Walk through the batches in some states."""
        now, roster = yield from self._namespace.roster()
        living = {pid for pid, (deadline, _, _) in roster.items() if deadline > 0}

        def make(rows: "Rows") -> Steps[list[BatchStatus]]:
            yield from ()
            found = [batch_status(owner, row, now, living) for owner, row in rows]
            return [batch for batch in found if batch.state in states]

        if set(states) != {"parked"}:
            yield from self._walk("admin_batches", prefix, make)
        if "parked" in states:
            yield from self._parked(prefix, now)

    def _walk(
        self,
        function: str,
        prefix: str,
        make: Callable[["Rows"], Steps[list[Any]]],
        *arguments: bytes,
    ) -> Walk[Any]:
        """Walk through the registries of all processes, some partitions at a time."""
        space = self._namespace
        start = encode_resource(prefix) if prefix else b""
        waiting = list(range(space.partitions.count))
        under_way: list[_WalkPosition] = []
        while waiting or under_way:
            fresh = [waiting.pop(0) for _ in range(min(AT_ONCE - len(under_way), len(waiting)))]
            owners = yield from space.ask([space.read(p, "admin_owners") for p in fresh])
            under_way += [
                _WalkPosition(p, [*lanes, *queues])
                for p, (lanes, queues) in zip(fresh, owners, strict=True)
                if lanes or queues
            ]
            asked = [
                space.read(
                    at.partition,
                    function,
                    at.owners[0],
                    at.score,
                    at.member,
                    b"%d" % PAGE,
                    start,
                    *arguments,
                )
                for at in under_way
            ]
            replies = yield from space.ask(asked)
            rows: Rows = []
            for at, (score, member, found) in zip(under_way, replies, strict=True):
                rows += [(at.owners[0], row) for row in found]
                at.go_on(score, member)
            under_way = [at for at in under_way if at.owners]
            if rows:
                entries = yield from make(rows)
                if entries:
                    yield Page(entries)

    def _parked(self, prefix: str, now: float) -> Walk[BatchStatus]:
        space = self._namespace
        start = encode_resource(prefix) if prefix else b""
        for partition in range(space.partitions.count):
            cursor = b"0"
            before: set[bytes] = set()
            while True:
                request = space.read(partition, "admin_parked", cursor, start)
                ((cursor, found),) = yield from space.ask([request])
                names = set()
                for name, entries, more in zip(found[::3], found[1::3], found[2::3], strict=True):
                    names.add(name)
                    if name in before:
                        continue  # the server's set was resized meanwhile
                    if entries:
                        yield Page(letters_of(name, entries, now))
                    if more != b"0":
                        yield from self._letters(partition, name, now)
                before = names
                if cursor == b"0":
                    break

    def _letters(self, partition: int, name: bytes, now: float) -> Walk[BatchStatus]:
        space = self._namespace
        cursor = b"0"
        seen: set[int] = set()
        while True:
            request = space.read(partition, "admin_letters", name, cursor)
            ((cursor, entries),) = yield from space.ask([request])
            found = [b for b in letters_of(name, entries, now) if b.token not in seen]
            seen.update(batch.token for batch in found)
            if found:
                yield Page(found)
            if cursor == b"0":
                return

    def _locks(self, rows: Sequence[Row]) -> Steps[list[LockStatus]]:
        names = [n for _, held, _, waiters, _, _ in rows for n in (*held[::5], *waiters)]
        places = yield from self._namespace.places(process_of(name) for name in names)
        return [lock_status(row, places) for row in rows]

    # One resource

    def resource(self, name: str) -> Steps[ResourceStatus]:
        """Return everything that the server knows about a resource."""
        space = self._namespace
        now, roster = yield from space.roster()
        encoded = encode_resource(name)
        partition = space.partitions.of(encoded)
        functions = ("admin_resource", "members", "modified")
        replies = yield from space.ask([space.read(partition, f, encoded) for f in functions])
        (run, partials, size, parties), members, modified = replies
        pids = members[::2]
        places = yield from space.places(pids)
        lock = yield from self.lock(name)
        batches: list[BatchStatus] = []
        if run[0]:
            numbers = [int(field or 0) for field in (run[2], run[3], run[5], run[6], run[7])]
            since, attempt, retry_at, crashes, due = numbers
            row = (encoded, run[1], since, attempt, run[4], retry_at, crashes, due, size, -1)
            living = {pid for pid, (deadline, _, _) in roster.items() if deadline > 0}
            batches.append(batch_status(run[0], row, now, living))
        walk = self._letters(partition, encoded, now)
        found = yield from _all_of(walk)
        times: dict[str, int] = {}
        for pid, count in zip(modified[::2], modified[1::2], strict=True):
            times[decode(pid)] = times.get(decode(pid), 0) + int(count)
        return ResourceStatus(
            resource=name,
            members=tuple(
                (decode(pid), *places[pid], since / 1000)
                for pid, since in zip(pids, members[1::2], strict=True)
            ),
            modifications={pid: count for pid, count in times.items() if count},
            parties=parties,
            partials=partials,
            lock=lock,
            batches=tuple(batches + sorted(found, key=lambda batch: batch.token)),
        )

    def content(self, name: str, token: int | None) -> Walk[Partial]:
        """Walk through the partials of a batch, or of the open session.

        Raises:
            BatchMissingError: The resource has no such batch.
        """
        space = self._namespace
        yield from space.roster()
        encoded = encode_resource(name)
        partition = space.partitions.of(encoded)
        kind = b"partials"
        if token is not None:
            (reply,) = yield from space.ask([space.read(partition, "admin_resource", encoded)])
            stored = token // TOKENS
            running = reply[0][1] == b"%d" % stored
            kind = b"batch" if running else b"dead:%d" % stored
        first = 0
        while True:
            words = kind, encoded, b"%d" % first, b"%d" % (first + PIECE - 1)
            (found,) = yield from space.ask([space.read(partition, "admin_content", *words)])
            if not found:
                break
            yield Page([read_partial(partial) for partial in found])
            first += len(found)
        if not first and token is not None:
            raise missing(name, token)

    # The log of acts

    def acts(self, most: int) -> Steps[list[Act]]:
        """Return the acts of operators, the latest first."""
        space = self._namespace
        yield from space.roster()
        asked = [space.read(None, "admin_acts", b"%d" % most)]
        found: list[Act] = []
        for request in (*asked, *space.everywhere("admin_acts", b"%d" % most)):
            (entries,) = yield from space.ask([request])
            found += [act(*entry) for entry in entries]
        return sorted(found, key=lambda act: -act.at)[:most]


#: Rows of a walk: the process that has the entry, and the server's row about it.
Rows = list[tuple[bytes, Row]]


class _WalkPosition:
    """The position of a walk in one partition.

    Attributes:
        partition: The partition.
        owners: The processes and class queues whose registries are still to be read.
        score: With ``member``, the last entry that was read of the first owner.
    """

    __slots__ = ("member", "owners", "partition", "score")

    def __init__(self, partition: int, owners: list[bytes]) -> None:
        self.partition = partition
        self.owners = owners
        self.score = self.member = b""

    def go_on(self, score: bytes, member: bytes) -> None:
        """Note the position in the first registry; empty at its end."""
        self.score, self.member = score, member
        if not score:
            self.owners.pop(0)


def missing(resource: str, token: int) -> BatchMissingError:
    """Return the error for a batch that does not exist."""
    return BatchMissingError(
        f"{resource!r} has no batch {token}: it was completed, replayed or discarded; "
        "Admin.batches() lists those that there are"
    )


def _all_of(walk: Walk[Any]) -> Steps[list[Any]]:
    """Return all entries of a walk that is known to be short."""
    found: list[Any] = []
    while (page := (yield from next_page(walk))) is not None:
        found += page
    return found


def _age(session: SessionStatus) -> float:
    return session.age


def _was_seen(name: bytes, seen: set[bytes]) -> bool:
    if name in seen:
        return True
    seen.add(name)
    return False
