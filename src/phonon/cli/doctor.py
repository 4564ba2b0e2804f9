"""The command ``doctor``: problems and their remedies."""

import sys
from typing import Any

import click
from rich.console import Group
from rich.text import Text

from phonon.cli.options import console, json_option, print_json, target, target_options

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}


@click.command()
@click.option("--quiet", is_flag=True, help="Print only problems and notes.")
@target_options
@json_option
def doctor(quiet: bool, as_json: bool, **where: Any) -> None:
    """Find problems, and name the remedy for each.

    It checks the server, the namespace and this host. The exit status is 1 if there is a problem.
    """
    with target(where).open() as admin:
        found = [f for f in admin.examine() if f.level != "ok" or not quiet]
    if as_json:
        print_json(found)
    else:
        lines = []
        for finding in found:
            mark, style = MARKS[finding.level]
            line = Text(f"{mark:8}", style=style)
            line.append(f"{finding.subject}: {finding.text}", style="not bold default")
            if finding.remedy:
                line.append(f"\n        → {finding.remedy}", style="not bold cyan")
            lines.append(line)
        console().print(Group(*lines) if lines else "nothing is wrong")
    sys.exit(any(finding.level == "problem" for finding in found))
