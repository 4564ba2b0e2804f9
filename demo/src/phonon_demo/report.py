"""What the demo shows: how it goes, and what came out."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phonon_demo.check import Difference
from phonon_demo.deaths import Death, Watch
from phonon_demo.jobs import Message
from phonon_demo.pool import Worker
from phonon_demo.rows import Rejections, Rows

#: Keys that are not equal, as many as are listed.
LISTED = 20
#: Seconds between two lines of progress where there is no terminal.
LINE_INTERVAL = 5.0

_BAR_WIDTH = 36


class Display:
    """How it goes: live on a terminal, as lines of text elsewhere. A context manager.

    Args:
        rows: The input.
        watch: Looks on as survivors take over from the dead.
    """

    def __init__(self, rows: Rows[Any], watch: Watch) -> None:
        self._rows = rows
        self._watch = watch
        self._console = Console(stderr=True, soft_wrap=True)
        self._workers: Sequence[Worker] = ()
        self._phase = "starting"
        self._begun = self._said = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                refresh_per_second=10,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def started(self, workers: Sequence[Worker], server: str) -> None:
        """The workers are at work."""
        self._workers = workers
        pids = ", ".join(str(worker.pid) for worker in workers)
        self._enter("reading", f"{len(workers)} worker processes on {server}, their pids: {pids}")

    def taking_over(self) -> None:
        """All messages have been dealt, and somebody who died has not been taken over yet."""
        self._enter("waiting for the takeover", f"input read to its end; {self._counts()}")

    def ending(self) -> None:
        """All messages have been dealt, and the dead taken over."""
        self._enter("ending sessions", f"ending all sessions; {self._counts()}")

    def progressed(self, workers: Sequence[Worker]) -> None:
        """A worker has done something."""
        self._workers = workers
        self.look()
        if time.monotonic() - self._said > LINE_INTERVAL:
            self._say(self._counts())

    def acknowledged(self, messages: list[Message]) -> None:
        """Do nothing: the counts say it."""

    def died(self, worker: Worker) -> None:
        """A worker has ended before its time."""
        death = self._watch.died(worker)
        left = sum(map(len, worker.unacknowledged))
        rest = f", and {left:,} messages unacknowledged, which are dealt again" if left else ""
        self.log(
            f"{worker.name} {worker.fate}; it had acknowledged {worker.progress.messages:,} "
            f"messages and held {death.sessions:,} open sessions{rest}"
        )

    def look(self) -> None:
        """Say of whom all has been taken over."""
        for death in self._watch.look():
            self.log(
                f"all of worker {death.worker.number} is taken over, {death.seconds:.1f} s after "
                "its death"
            )

    def log(self, text: str) -> None:
        """Something happened that one should know of."""
        self._console.print(Text(text))

    def _enter(self, phase: str, line: str) -> None:
        self._phase = phase
        self._say(line)

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if not self._live:
            self.log(line)

    def _counts(self) -> str:
        messages = sum(worker.progress.messages for worker in self._workers)
        writes = sum(worker.progress.writes for worker in self._workers)
        return (
            f"{messages:,} messages acknowledged, {self._rows.rejections.total:,} rejected, "
            f"{writes:,} sessions written"
        )

    def _picture(self) -> RenderableType:
        """What the terminal shows right now. Called by rich's own thread."""
        text = self._rows.text
        known = text.size is not None and self._phase == "reading"
        bar = ProgressBar(
            total=text.size or None, completed=text.position, width=_BAR_WIDTH, pulse=not known
        )
        head = Table.grid(padding=(0, 2))
        seconds = time.monotonic() - self._begun
        head.add_row(f"{self._phase:15}", bar, f"{seconds:.1f} s")
        body = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "right"):
            body.add_column(justify=justify)
        for worker in self._workers:
            body.add_row(
                f"worker {worker.number}",
                f"[dim]pid {worker.pid}",
                f"{worker.progress.messages:,} messages",
                f"{worker.progress.writes:,} sessions written",
                Text(worker.fate, style="red"),
            )
        return Group(head, body, Text(self._counts(), style="bold"))


@dataclass(frozen=True)
class Lost:
    """A worker that has ended before its time.

    Attributes:
        death: Its death.
        takers: Who has taken over how many of its sessions.
    """

    death: Death
    takers: dict[Worker, int]


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        title: Of what.
        messages: Messages dealt, each to one worker.
        redealt: Messages dealt once more, because a worker ended without acknowledging them.
        rejections: Rows that made no message.
        sessions: Sessions that are in the database.
        writes: Upserts by which they came there.
        repeats: Sessions that came twice, and were skipped the second time.
        seconds: From the first message until the last session was written.
        keys: Keys in the database or in the plain loop.
        differences: Those whose figures are not equal.
        lost: Workers that have ended before their time.
    """

    title: str
    messages: int
    redealt: int
    rejections: Rejections
    sessions: int
    writes: int
    repeats: int
    seconds: float
    keys: int
    differences: Sequence[Difference]
    lost: Sequence[Lost] = ()


def show(outcome: Outcome, figures: Sequence[str]) -> None:
    """Print the outcome.

    Args:
        outcome: What came out.
        figures: The names of the figures.
    """
    console = Console()
    console.print(Text(outcome.title, style="bold"))
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _lines(outcome):
        table.add_row(Text(name), Text(value))
    console.print(table)
    equal = outcome.keys - len(outcome.differences)
    verdict = f"{equal:,} of {outcome.keys:,} keys equal"
    style = "bold red" if outcome.differences else "bold green"
    console.print(Text.assemble("SQLite against a plain loop in one process: ", (verdict, style)))
    if outcome.differences:
        if outcome.redealt:
            console.print(
                f"A worker died with {outcome.redealt:,} messages unacknowledged. They were dealt "
                "again, and those that it had stored count twice: that is at-least-once."
            )
        _show_differences(console, outcome.differences, figures)


def _lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "messages", f"{outcome.messages:,}"
    yield "rejected rows", f"{outcome.rejections.total:,}"
    for reason, count in outcome.rejections.reasons.items():
        yield f"  {reason}, first in line {outcome.rejections.first[reason]:,}", f"{count:,}"
    yield "sessions", f"{outcome.sessions:,}"
    yield "database writes", f"{outcome.writes:,}"
    if outcome.repeats:
        yield "repeated sessions, skipped", f"{outcome.repeats:,}"
    yield "messages per write", f"{outcome.messages / max(outcome.writes, 1):,.1f}"
    yield "messages per second", f"{outcome.messages / outcome.seconds:,.0f}"
    yield "seconds", f"{outcome.seconds:.1f}"
    for lost in outcome.lost:
        yield from _lost_lines(lost)
    if outcome.redealt:
        yield "unacknowledged messages, dealt again", f"{outcome.redealt:,}"


def _lost_lines(lost: Lost) -> Iterator[tuple[str, str]]:
    death, worker = lost.death, lost.death.worker
    yield f"{worker.name} {worker.fate} after", f"{worker.progress.messages:,} messages"
    yield "  open sessions that it left", f"{death.sessions:,}"
    for taker, sessions in lost.takers.items():
        yield f"  taken over by worker {taker.number}", f"{sessions:,}"
    if death.seconds is not None:
        yield "  all taken over after", f"{death.seconds:.1f} s"


def _show_differences(
    console: Console, differences: Sequence[Difference], figures: Sequence[str]
) -> None:
    listed = differences[:LISTED]
    more = f", the first {len(listed)} of {len(differences):,}" if len(differences) > LISTED else ""
    console.print(f"Keys that are not equal{more}:")
    table = Table()
    for heading in ("key", "figure", "plain loop", "SQLite"):
        table.add_column(heading, overflow="fold")
    for key, expected, found in listed:
        if expected is None or found is None:
            missing = Text("no such key", style="red")
            table.add_row(
                Text(repr(key)),
                "",
                missing if expected is None else _value(expected),
                missing if found is None else _value(found),
            )
            continue
        for figure, ours, theirs in zip(figures, expected, found, strict=True):
            if ours != theirs:
                table.add_row(Text(repr(key)), Text(figure), _value(ours), _value(theirs))
    console.print(table)


def _value(value: Any) -> Text:
    if isinstance(value, frozenset):
        return Text(" ".join(sorted(map(str, value))))
    if isinstance(value, tuple):
        return Text(", ").join(map(_value, value))
    return Text(str(value))
