"""Turns the server's rows into the records that an `Admin` returns."""

from collections.abc import Container, Sequence
from typing import Any

from phonon._admin.namespace import unpacked
from phonon._admin.records import (
    Act,
    BatchState,
    BatchStatus,
    LockGrant,
    LockMode,
    LockStatus,
    LockWaiter,
    ProcessStatus,
    SessionStatus,
)
from phonon._core.dead_letters import parse_entry
from phonon._core.executor import TOKENS
from phonon._core.heartbeat import DEAD_AFTER
from phonon._core.shown import counted
from phonon._protocol.operations import class_of_queue, is_shared
from phonon._protocol.partitions import decode, is_semaphore

Row = Sequence[Any]


def add_holdings(sums: list[int], row: Sequence[int]) -> None:
    """Add a process's figures in one partition to those in others."""
    locks, memberships, batches, left, _, oldest, calls, _ = row
    for i, number in enumerate((locks, memberships, batches, left)):
        sums[i] += number
    if oldest and (not sums[4] or oldest < sums[4]):
        sums[4] = oldest
    sums[5] += calls


def process_status(
    pid: bytes, now: float, listed: tuple[int, bytes, bytes], sums: Sequence[int]
) -> ProcessStatus:
    """Return a process, given its report and its holdings."""
    deadline, card_bytes, report_bytes = listed
    card, report = unpacked(card_bytes), unpacked(report_bytes)
    interval = float(card.get("interval", 0))
    locks, memberships, batches, left, oldest, calls = sums
    lag: float | None = None
    if deadline and interval:
        lag = max(0.0, now - (deadline / 1e6 - DEAD_AFTER * interval))
    late = deadline / 1e6 < now
    os_pid = card.get("pid", 0)
    return ProcessStatus(
        id=decode(pid),
        state="dead" if not deadline else "late" if late else "alive",
        host=str(card.get("host", "")),
        pid=os_pid if isinstance(os_pid, int) else 0,
        version=str(card.get("version", "")),
        since=_float(card.get("start", 0)),
        lag=lag,
        heartbeat_interval=interval,
        memberships=memberships,
        locks=locks,
        batches=batches,
        left=left,
        oldest_batch=oldest / 1000 if oldest else None,
        calls=calls,
        backlog=report.get("backlog"),
        executes=bool(report.get("executes", False)),
        classes=tuple(map(str, report.get("classes", ()))),
        counters=dict(report.get("counters", {})),
    )


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def session_status(row: Row, now: float) -> SessionStatus:
    """Return an open session."""
    name, since_ms, members, modifications, partials, size, _ = row
    since = since_ms / 1000
    age = max(0.0, now - since) if since else 0.0
    return SessionStatus(
        decode(name),
        since,
        age,
        members,
        None if modifications < 0 else modifications,
        partials,
        None if size < 0 else size,
    )


def batch_status(owner: bytes, row: Row, now: float, living: Container[bytes]) -> BatchStatus:
    """Return a batch that is not parked."""
    name, token, since_ms, attempts, error, retry_ms, crashes, _, partials, size = row
    class_name = class_of_queue(owner)
    state: BatchState = "running"
    if class_name is not None:
        state = "waiting-for-class"
    elif owner not in living or not int(token):
        state = "waiting-for-survivor"
    elif retry_ms:
        state = "retrying"
    since = since_ms / 1000
    return BatchStatus(
        resource=decode(name),
        token=int(token) * TOKENS,
        state=state,
        owner="" if class_name is not None else decode(owner),
        class_name=class_name or "",
        attempts=attempts,
        crashes=crashes,
        error=error.decode("utf-8", "replace"),
        next_attempt=retry_ms / 1000 if retry_ms else None,
        since=since,
        age=max(0.0, now - since) if since else 0.0,
        partials=partials,
        bytes=None if size < 0 else size,
    )


def letters_of(name: bytes, entries: Sequence[Any], now: float) -> list[BatchStatus]:
    """Return a resource's dead letters."""
    found = []
    rows = zip(entries[::4], entries[1::4], entries[2::4], entries[3::4], strict=True)
    for token, entry, partials, size in rows:
        letter = parse_entry(name, token, entry, partials)
        found.append(
            BatchStatus(
                resource=letter.resource,
                token=letter.token,
                state="parked",
                owner=letter.owner,
                class_name="",
                attempts=letter.attempts,
                crashes=0,
                error=letter.error,
                next_attempt=None,
                since=letter.parked_at,
                age=max(0.0, now - letter.parked_at) if letter.parked_at else 0.0,
                partials=partials,
                bytes=None if size < 0 else size,
            )
        )
    return found


def process_of(holder: bytes) -> bytes:
    """Return the id of the process that a holder or waiter belongs to."""
    return holder.rpartition(b"/")[0]


def _mode(name: bytes, holder: bytes) -> LockMode:
    if is_semaphore(name):
        return "semaphore"
    return "shared" if is_shared(decode(holder)) else "exclusive"


def lock_status(row: Row, places: dict[bytes, tuple[str, int]]) -> LockStatus:
    """Return a lock."""
    name, held, holding, waiting_names, waiting, _ = row
    holders = []
    for holder, token, since_ms, left_ms, thread in zip(
        held[::5], held[1::5], held[2::5], held[3::5], held[4::5], strict=True
    ):
        pid = process_of(holder)
        lease = left_ms / 1000 if left_ms >= 0 else None
        holders.append(
            LockGrant(
                decode(pid), *places[pid], decode(thread), since_ms / 1000, token * TOKENS, lease
            )
        )
    waiters = []
    for holder in waiting_names:
        pid = process_of(holder)
        waiters.append(LockWaiter(decode(pid), *places[pid], _mode(name, holder)))
    first = held[0] if held else waiting_names[0] if waiting_names else b""
    mode: LockMode = _mode(name, first)
    if holding and not held:
        mode = "semaphore" if is_semaphore(name) else "shared"  # too many sharers to list
    return LockStatus(decode(name), mode, tuple(holders), holding, tuple(waiters), waiting)


def act(entry: bytes, fields: Sequence[bytes]) -> Act:
    """Return an act of an operator's."""
    known = dict(zip(fields[::2], fields[1::2], strict=True))
    token, kind = known.get(b"token", b""), known.get(b"act", b"").decode()
    detail = known.get(b"detail", b"").decode("utf-8", "replace")
    if kind == "replay":
        detail = f"under token {int(detail) * TOKENS}"
    elif kind == "discard":
        detail = counted(int(detail), "partial")
    return Act(
        at=int(entry.partition(b"-")[0]) / 1000,
        who=known.get(b"who", b"").decode("utf-8", "replace"),
        act=kind,
        resource=decode(known.get(b"resource", b"")),
        token=int(token) * TOKENS if token.isdigit() else 0,
        detail=detail,
    )
