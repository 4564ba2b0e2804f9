"""Tables for the terminal."""

import re
import time
from collections.abc import Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from phonon._core.shown import counted
from phonon.admin import (
    Act,
    BatchStatus,
    LockStatus,
    ProcessStatus,
    SessionStatus,
    SourceStatus,
)

#: The colour of a batch's state.
COLOURS = {
    "running": "green",
    "retrying": "yellow",
    "waiting-for-class": "magenta",
    "waiting-for-survivor": "yellow",
    "parked": "red",
    "alive": "green",
    "late": "yellow",
    "dead": "red",
}
_SHORT_ID = 8
#: Characters that a terminal would obey.
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
_KIB = 1024


def span(seconds: float | None) -> str:
    """Return a time span for people to read."""
    if seconds is None:
        return "-"
    if seconds < 10:  # noqa: PLR2004 - digits that matter
        return f"{seconds:.1f} s"
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < size * most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def moment(at: float | None) -> str:
    """Return a point in time for people to read, in their time zone."""
    if not at:
        return "-"
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count: int | None) -> str:
    """Return a number of bytes for people to read."""
    if count is None:
        return "-"
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < _KIB:
            return f"{number:.0f} {unit}"
        number /= _KIB
    return f"{number:.1f} GiB"


def short(process: str) -> str:
    """Return the beginning of a process's id."""
    return process[:_SHORT_ID]


def place(host: str, pid: int) -> str:
    """Return where a process runs."""
    return f"{host}:{pid}" if host else "-"


def visible(text: str) -> Text:
    """Return a name, or another text of unknown origin, as one line."""
    return Text(CONTROL.sub("\ufffd", text))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removesuffix(">")
        right = column.endswith(">")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def processes(found: Sequence[ProcessStatus]) -> Table:
    """Return a table of processes."""
    table = _table(
        counted(len(found), "process", "processes"),
        *("process", "state", "where", "version", "up>", "beat>", "members>", "locks>"),
        *("batches>", "left>", "backlog>", "calls>"),
    )
    now = time.time()
    for p in found:
        table.add_row(
            short(p.id),
            _state(p.state),
            place(p.host, p.pid),
            p.version or "-",
            span(max(0.0, now - p.since)) if p.since else "-",
            span(p.lag),
            f"{p.memberships:,}",
            f"{p.locks:,}",
            f"{p.batches:,}",
            f"{p.left:,}",
            "-" if p.backlog is None else f"{p.backlog:,}",
            f"{p.calls:,}",
        )
    return table


def locks(found: Sequence[LockStatus]) -> Table:
    """Return a table of locks."""
    table = _table(
        counted(len(found), "lock"),
        "lock",
        "mode",
        "held by",
        "thread",
        "for>",
        "token>",
        "waiting>",
    )
    now = time.time()
    for lock in found:
        first = lock.holders[0] if lock.holders else None
        others = f" and {lock.holding - 1} more" if lock.holding > 1 else ""
        table.add_row(
            visible(lock.name),
            lock.mode,
            f"{short(first.process)} {place(first.host, first.pid)}{others}" if first else "nobody",
            first.thread if first else "-",
            span(max(0.0, now - first.since)) if first else "-",
            str(first.token) if first else "-",
            f"{lock.waiting:,}",
        )
    return table


def lock(found: LockStatus) -> Table:
    """Return a table of one lock's holders and waiters."""
    table = _table(
        f"{found.name}: {found.mode}, held by {found.holding}, {found.waiting} waiting",
        *("", "process", "where", "thread", "since", "token>", "lease left>"),
    )
    for grant in found.holders:
        table.add_row(
            "holds",
            grant.process,
            place(grant.host, grant.pid),
            grant.thread,
            moment(grant.since),
            str(grant.token),
            "as its process" if grant.lease is None else span(grant.lease),
        )
    for number, waiter in enumerate(found.waiters, 1):
        table.add_row(
            f"waits, {number}", waiter.process, place(waiter.host, waiter.pid), "", "", "", ""
        )
    return table


def sessions(found: Sequence[SessionStatus], total: int | None) -> Table:
    """Return a table of sessions."""
    some = counted(len(found), "open session")
    table = _table(
        some if total is None else f"{len(found):,} of about {total:,} open sessions",
        *("resource", "age>", "members>", "modified>", "partials>", "memory>"),
    )
    for session in found:
        modified = session.modifications
        table.add_row(
            visible(session.resource),
            span(session.age),
            f"{session.members:,}",
            "-" if modified is None else f"{modified:,}",
            f"{session.partials:,}",
            size(session.bytes),
        )
    return table


def batches(found: Sequence[BatchStatus]) -> Table:
    """Return a table of batches."""
    table = _table(
        counted(len(found), "batch", "batches"),
        *("resource", "token>", "state", "owner", "tries>", "next", "age>", "partials>", "error"),
    )
    for batch in found:
        table.add_row(
            visible(batch.resource),
            str(batch.token),
            _state(batch.state),
            Text(batch.class_name or short(batch.owner)),
            f"{batch.attempts}",
            moment(batch.next_attempt)[11:] if batch.next_attempt else "-",
            span(batch.age),
            f"{batch.partials:,}",
            visible(batch.error.splitlines()[0][:120] if batch.error else ""),
        )
    return table


def sources(found: Sequence[SourceStatus]) -> Table:
    """Return a table of sources."""
    table = _table(counted(len(found), "source"), "source", "kind", "process", "position", "lag>")
    for source in found:
        lag = "-" if source.lag is None else f"{source.lag:,}"
        table.add_row(
            visible(source.name), source.kind, short(source.process), source.position, lag
        )
    return table


def acts(found: Sequence[Act]) -> Table:
    """Return a table of the acts of operators."""
    table = _table(counted(len(found), "act"), "when", "who", "act", "what", "token>", "detail")
    for act in found:
        table.add_row(
            moment(act.at),
            visible(act.who),
            act.act,
            visible(act.resource),
            str(act.token or ""),
            visible(act.detail),
        )
    return table
