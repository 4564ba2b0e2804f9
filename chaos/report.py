"""Prints the progress of a chaos run, and the verdict."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from chaos.jobs import Message
from chaos.killer import Strikes
from chaos.ledger import Ledger, Verdict
from chaos.pool import Worker

#: Seconds between two updates of the progress, on a terminal and elsewhere.
LIVE_INTERVAL, LINE_INTERVAL = 0.1, 5.0
#: The most leftovers that are listed.
LISTED = 10


class Watcher:
    """Keeps the books and shows the progress; a context manager.

    Args:
        ledger: The books.
        verbose: Whether to show what the workers' libraries log.

    Attributes:
        deaths: Workers that have ended before their time.
        strikes: The strikes so far.
    """

    def __init__(self, ledger: Ledger, *, verbose: bool) -> None:
        self.deaths = 0
        self.strikes = Strikes()
        self._ledger = ledger
        self._verbose = verbose
        self._acknowledged = 0
        self._said = self._begun = time.monotonic()
        self._console = Console(stderr=True, soft_wrap=True)
        self._status: Status | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._status = Status("starting", console=self._console)

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def started(self, workers: Sequence[Worker]) -> None:
        """Note that the first workers are at work."""
        self._begun = time.monotonic()
        self._say(f"{len(workers)} worker processes; the killer is loose")

    def finishing(self) -> None:
        """Note that there are no more strikes."""
        self._say(f"{self._counts()}; no more strikes, waiting for the takeover of the last")

    def progressed(self, workers: Sequence[Worker]) -> None:
        """Show the progress now and then."""
        del workers
        now = time.monotonic()
        if now - self._said < (LIVE_INTERVAL if self._status else LINE_INTERVAL):
            return
        self._said = now
        if self._status:
            self._status.update(Text(self._counts()))
        else:
            self._say(self._counts())

    def acknowledged(self, messages: list[Message]) -> None:
        """Enter acknowledged messages into the books."""
        self._acknowledged += len(messages)
        self._ledger.acknowledge(messages)

    def died(self, worker: Worker) -> None:
        """Count it."""
        self.deaths += 1
        if self._verbose:
            self._say(f"{worker.name} {worker.fate}")

    def log(self, text: str) -> None:
        """Show a worker's line, if that is wanted: there are hundreds of warnings."""
        if self._verbose:
            self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(Text(text))

    def _counts(self) -> str:
        strikes = self.strikes
        return (
            f"{time.monotonic() - self._begun:.0f} s: {self._acknowledged:,} messages "
            f"acknowledged, {strikes.kills:,} kills, {strikes.pauses:,} pauses, "
            f"{strikes.cuts:,} connections cut, {strikes.restarts:,} server restarts"
        )


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        seconds: The time of the run.
        strikes: The killer's strikes.
        died: Workers that have ended before their time by themselves.
        dealt: Messages dealt, including those that were dealt again.
        redealt: Messages dealt again, under another number, because their worker died.
        verdict: The books against the database.
        sessions: Sessions in the database.
        taken_over: Open sessions taken over from dead workers, if reported before a further death.
        batches: Batches executed in these takeovers.
        reborn: The number of times that a worker was believed dead, and took a new id.
        repeats: Batches that came twice, and were skipped by their token.
        parked: Parked batches.
        leftovers: Keys that should not be on the server any more.
    """

    seconds: float
    strikes: Strikes
    died: int
    dealt: int
    redealt: int
    verdict: Verdict
    sessions: int
    taken_over: int
    batches: int
    reborn: int
    repeats: int
    parked: int
    leftovers: Sequence[str]

    @property
    def exact(self) -> bool:
        """Return whether every promise was kept."""
        return self.verdict.exact and not self.parked and not self.leftovers


def show(result: RunResult) -> None:
    """Print the result."""
    console = Console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _lines(result):
        table.add_row(Text(name), Text(value))
    console.print(table)
    verdict = result.verdict
    equal = f"{verdict.keys - verdict.differing:,} of {verdict.keys:,} keys equal"
    console.print(Text(f"SQLite against a plain loop over the messages there: {equal}"))
    for leftover in result.leftovers[:LISTED]:
        console.print(Text(f"left on the server: {leftover}"))
    if result.exact:
        console.print(Text("EXACT: nothing acknowledged was lost, nothing doubled", "bold green"))
    else:
        console.print(Text("NOT EXACT", "bold red"))


def _lines(result: RunResult) -> Iterator[tuple[str, str]]:
    strikes, verdict = result.strikes, result.verdict
    counts = {
        "workers killed with SIGKILL": strikes.kills,
        "workers paused until believed dead": strikes.pauses,
        "connections cut": strikes.cuts,
        "server killed and started again": strikes.restarts,
        "workers that died by themselves": result.died,
        "messages dealt": result.dealt,
        "  dealt again, their worker having died": result.redealt,
        "messages acknowledged": verdict.acknowledged,
        "  lost": verdict.lost,
        "messages unacknowledged, but stored": verdict.unacknowledged,
        "messages doubled": verdict.doubled,
        "messages in the wrong row": verdict.foreign,
        "sessions written": result.sessions,
        "sessions taken over": result.taken_over,
        "  batches executed in doing so": result.batches,
        "zombies that went on under a new id": result.reborn,
        "repeats skipped by token": result.repeats,
        "batches parked": result.parked,
        "leftovers on the server": len(result.leftovers),
    }
    for name, count in counts.items():
        yield name, f"{count:,}"
    yield "seconds", f"{result.seconds:.1f}"
