"""Options that all operator's commands share."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment

from phonon._admin.plain import plain
from phonon.admin import Admin
from phonon.cli.tables import CONTROL

#: Seconds between two looks, unless ``--watch`` gives a number.
WATCH = 2.0


class Target(NamedTuple):
    """The namespace and the server of a command.

    Attributes:
        url: The server; None for the default.
        namespace: The namespace.
        timeout: Seconds to wait for a server that does not answer.
    """

    url: str | None
    namespace: str
    timeout: float

    def open(self) -> Admin:
        """Return an `Admin`."""
        return Admin(self.url, namespace=self.namespace, timeout=self.timeout)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for server and namespace."""
    for option in (
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=5.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait for the server.",
        ),
        click.option(
            "-n",
            "--namespace",
            envvar="PHONON_NAMESPACE",
            default="phonon",
            show_default=True,
            show_envvar=True,
            help="The namespace.",
        ),
        click.option(
            "-u",
            "--url",
            envvar="PHONON_URL",
            show_envvar=True,
            metavar="URL",
            help="The server.  [default: redis://localhost:6379/1]",
        ),
    ):
        command = option(command)
    return command


def target(arguments: dict[str, Any]) -> Target:
    """Take the target out of a command's arguments."""
    return Target(arguments.pop("url"), arguments.pop("namespace"), arguments.pop("timeout"))


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object per line, instead of a table."
)
watch_option = click.option(
    "--watch",
    is_flag=False,
    flag_value=WATCH,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Repeat every 2 seconds, or every SECONDS, until Ctrl-C.",
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
prefix_option = click.option(
    "--prefix", default="", metavar="TEXT", help="Only names that begin with this."
)


class _Console(Console):
    """Prints names and errors as they are: the terminal obeys nothing that is in them."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                # A segment of a folded cell has several lines.
                lines = segment.text.split("\n")
                text = "\n".join(CONTROL.sub("\ufffd", line) for line in lines)
                yield Segment(text, segment.style)


def console() -> Console:
    """Return the console to print on."""
    return _Console(highlight=False, markup=False, emoji=False)


def print_json(entries: Iterable[Any]) -> None:
    """Print entries as JSON, one a line."""
    for entry in entries:
        sys.stdout.write(json.dumps(plain(entry), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def show(
    look: Callable[[], tuple[list[Any], RenderableType]],
    *,
    as_json: bool,
    watch: float | None,
) -> list[Any]:
    """Print the result of a look, once or again and again.

    Args:
        look: Returns entries, and their table.
        as_json: Whether to print the entries as JSON.
        watch: Seconds between two looks; None for a single one.

    Returns:
        The entries of the last look.
    """
    live = None
    if watch is not None and not as_json:
        live = Live(console=console(), auto_refresh=False, screen=sys.stdout.isatty())
    entries: list[Any] = []
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        while True:
            entries, shown = look()
            if as_json:
                print_json(entries)
            elif live is not None:
                live.update(shown, refresh=True)
            else:
                console().print(shown)
            if watch is None:
                break
            time.sleep(watch)
    return entries


def confirm(question: str, *, yes: bool) -> None:
    """Ask before an act that cannot be undone.

    Raises:
        click.Abort: The answer is no, or there is no terminal (then use ``--yes``).
    """
    if yes:
        return
    click.confirm(question, abort=True, err=True)
