"""The command ``top``: a live screen of the namespace's activity, by process."""

import itertools
import time
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from phonon.admin import Admin, BatchStatus, ProcessStatus
from phonon.cli import tables
from phonon.cli.options import WATCH, json_option, show, target, target_options

#: The most dead letters that are counted.
MOST = 1000


class Rates:
    """Rates of counters that only grow, between two looks."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], tuple[float, float]] = {}

    def of(self, process: str, name: str, value: float | None) -> float | None:
        """Return the growth of a counter per second; None if it is not known yet."""
        if value is None:
            return None
        now = time.monotonic()
        at, before = self._before.get((process, name), (now, value))
        if value != before or (process, name) not in self._before:
            # Counters come with heartbeats, so the rate is over the time between two changes.
            self._before[process, name] = now, value
        return (value - before) / (now - at) if now > at and value > before else None


class Screen:
    """Reads the figures, and remembers them for rates.

    Args:
        admin: The admin to read with.
    """

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._rates = Rates()
        self._last: dict[tuple[str, str], float] = {}

    def look(self) -> tuple[list[Any], RenderableType]:
        """Return the figures and their display."""
        processes = self._admin.processes()
        parked = list(itertools.islice(self._admin.batches("parked"), MOST))
        oldest = self._admin.oldest_sessions(1)
        waiting = min(
            (p.oldest_batch for p in processes if p.oldest_batch is not None), default=None
        )
        rows = [self._row(process) for process in processes]
        totals = {
            "processes": len(processes),
            "memberships": sum(p.memberships for p in processes),
            "backlog": sum(p.backlog or 0 for p in processes),
            "parked": len(parked),
            "oldest_session": oldest[0].age if oldest else None,
            "oldest_batch": time.time() - waiting if waiting is not None else None,
            "calls_per_second": _sum(row["calls_per_second"] for row in rows),
            "messages_per_second": _sum(row["messages_per_second"] for row in rows),
            "merge_ratio": _ratio(processes),
            "by_process": rows,
        }
        return [totals], Group(_head(totals, parked), "", self._table(processes, rows))

    def _row(self, process: ProcessStatus) -> dict[str, Any]:
        row: dict[str, Any] = {"id": process.id}
        for name, value in (
            ("calls", process.calls),
            ("messages", process.counters.get("messages")),
            ("stored", process.counters.get("stored")),
        ):
            rate = self._rates.of(process.id, name, value)
            if rate is None and value is not None:
                rate = self._last.get((process.id, name))
            if rate is not None:
                self._last[process.id, name] = rate
            row[f"{name}_per_second"] = rate
        row["merge_ratio"] = _ratio([process])
        return row

    def _table(self, processes: list[ProcessStatus], rows: list[dict[str, Any]]) -> RenderableType:
        table = tables.processes(processes)
        for label, name in (
            ("calls/s", "calls_per_second"),
            ("messages/s", "messages_per_second"),
            ("merged", "merge_ratio"),
        ):
            table.add_column(label, justify="right")
            # rich fills tables only by rows, and these rows differ only in three columns.
            table.columns[-1]._cells.extend(_rate(row[name]) for row in rows)  # noqa: SLF001
        return table


def _sum(rates: Any) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _ratio(processes: list[ProcessStatus]) -> float | None:
    """Return the number of messages for each stored partial."""
    messages = sum(p.counters.get("messages", 0) for p in processes)
    stored = sum(p.counters.get("stored", 0) for p in processes)
    return messages / stored if messages and stored else None


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"  # noqa: PLR2004 - digits that matter


def _head(totals: dict[str, Any], parked: list[BatchStatus]) -> Text:
    text = Text()
    for label, value in (
        ("sessions", f"{totals['memberships']:,}"),
        ("calls/s", _rate(totals["calls_per_second"])),
        ("messages/s", _rate(totals["messages_per_second"])),
        ("merge ratio", _rate(totals["merge_ratio"])),
        ("backlog", f"{totals['backlog']:,}"),
        ("oldest session", tables.span(totals["oldest_session"])),
        ("oldest batch", tables.span(totals["oldest_batch"])),
    ):
        text.append(f"{label} ")
        text.append(f"{value}   ", style="bold")
    text.append("parked ")
    text.append(str(len(parked)), style="bold red" if parked else "bold green")
    return text


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=WATCH,
    show_default=True,
    metavar="SECONDS",
    help="Time between two refreshes.",
)
@click.option("--once", is_flag=True, help="Print the figures of one interval, and exit.")
@target_options
@json_option
def top(interval: float, once: bool, as_json: bool, **where: Any) -> None:
    """Watch throughput, sessions and backlog, live.

    The screen also has the merge ratio, the oldest session and batch, and each process's figures.
    """
    with target(where).open() as admin:
        screen = Screen(admin)
        if once:
            screen.look()
            time.sleep(interval)
        show(screen.look, as_json=as_json, watch=None if once else interval)
