"""The group of commands.

A command of this package is imported when it is used. Entry points find the commands of other
distributions.
"""

import contextlib
import io
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import click
import rich  # noqa: F401 - part of the extra: a missing package is reported before a command begins

from phonon.cli.errors import one_line_errors
from phonon.cli.init import init
from phonon.cli.once import once

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 96}
#: The group of entry points by which other distributions add commands.
ENTRY_POINTS = "phonon.commands"


#: The commands of this package, with module and name.
COMMANDS = {
    "batches": "listing:batches",
    "completion": "completing:completion",
    "discard": "acting:discard",
    "doctor": "doctor:doctor",
    "expire": "acting:expire",
    "locks": "listing:locks",
    "log": "listing:log",
    "ps": "listing:ps",
    "replay": "acting:replay",
    "sessions": "listing:sessions",
    "show": "showing:show_command",
    "sources": "listing:sources",
    "top": "top:top",
    "unlock": "acting:unlock",
    "web": "web:web",
}


class Commands(click.Group):
    """A group that finds commands of other distributions, and prints errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, those of other distributions included."""
        found = {point.name for point in entry_points(group=ENTRY_POINTS)}
        return sorted({*super().list_commands(ctx), *COMMANDS, *found})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, and import it if it belongs to another distribution."""
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in COMMANDS:
            module, _, name = COMMANDS[cmd_name].partition(":")
            found: click.Command = getattr(import_module(f"phonon.cli.{module}"), name)
            return found
        if command is None:
            for point in entry_points(group=ENTRY_POINTS, name=cmd_name):
                loaded: click.Command = point.load()
                return loaded
            if cmd_name == "demo":
                raise click.UsageError(
                    "the demo is a distribution of its own: pip install 'phonon[demo]'", ctx
                )
        return command

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program."""
        try:
            return super().main(*args, **extra)
        except OSError as error:
            sys.stderr.write(f"phonon: {error.strerror or error}\n")
            # Python would report the same once more when it flushes the output at its exit.
            with contextlib.suppress(OSError):  # it may be no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # it may be unable to encode a name
                stream.reconfigure(errors="backslashreplace")
        with one_line_errors():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(package_name="phonon", prog_name="phonon")
def phonon() -> None:
    """Distributed references, locks and session-aggregated updates over Redis or Valkey."""


phonon.add_command(init)
phonon.add_command(once)
