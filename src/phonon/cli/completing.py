"""Completion for shells."""

import itertools
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from phonon.cli.options import Target
from phonon.errors import PhononError

#: Seconds to wait for the server when the user presses Tab.
PATIENCE = 1.0
#: Completions that are worth listing.
MOST = 50


def complete_parked(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001 - click passes it
    incomplete: str,
) -> list[CompletionItem]:
    """Return the resources that have dead letters."""
    return [CompletionItem(name) for name in _parked(context, incomplete)]


def _parked(context: click.Context, prefix: str) -> list[str]:
    known = context.params
    where = Target(known.get("url"), known.get("namespace") or "phonon", PATIENCE)
    try:
        with where.open() as admin:
            found = itertools.islice(admin.batches("parked", prefix), MOST)
            return list(dict.fromkeys(batch.resource for batch in found))
    except PhononError:
        return []


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    For bash: phonon completion bash > ~/.local/share/bash-completion/completions/phonon
    """
    cls: Any = get_completion_class(shell)
    from phonon.cli.app import phonon  # noqa: PLC0415 - that module imports this one

    click.echo(cls(phonon, {}, "phonon", "_PHONON_COMPLETE").source())
