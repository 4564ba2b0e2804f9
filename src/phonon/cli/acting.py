"""Commands that change something: ``replay``, ``discard``, ``unlock``, ``expire``."""

import sys
from collections.abc import Callable
from typing import Any

import click

from phonon._core.shown import counted
from phonon.admin import Admin
from phonon.cli import tables
from phonon.cli.completing import complete_parked
from phonon.cli.options import confirm, target, target_options, yes_option
from phonon.errors import PhononError


def _each(admin: Admin, resource: str, token: int | None, *, every: bool) -> list[int]:
    """Return the tokens of the batches to act on."""
    if token is not None:
        return [token]
    tokens = [b.token for b in admin.resource(resource).batches if b.state == "parked"]
    if len(tokens) > 1 and not every:
        listed = ", ".join(map(str, tokens))
        raise click.UsageError(
            f"{resource} has {len(tokens)} parked batches ({listed}): give TOKEN, or --all"
        )
    if not tokens:
        raise click.UsageError(f"{resource} has no parked batch; phonon batches lists them")
    return tokens


def _do_all(tokens: list[int], act: Callable[[int], str]) -> None:
    failed = False
    for token in tokens:
        try:
            click.echo(act(token))
        except PhononError as error:
            click.echo(f"phonon: {error}", err=True)
            failed = True
    sys.exit(2 if failed else 0)


def _for_parked(act: Callable[[Admin, str, int], str], question: str, text: str) -> click.Command:
    """Return a command that acts on parked batches.

    Args:
        act: Acts on one batch, and returns the result in words.
        question: The question to ask first, about their number and resource.
        text: The command's help.
    """

    @click.command(help=text)
    @click.argument("resource", shell_complete=complete_parked)
    @click.argument("token", required=False, type=int)
    @click.option("--all", "every", is_flag=True, help="All parked batches of RESOURCE.")
    @yes_option
    @target_options
    def command(resource: str, token: int | None, every: bool, yes: bool, **where: Any) -> None:
        with target(where).open() as admin:
            tokens = _each(admin, resource, token, every=every)
            parked = counted(len(tokens), "parked batch", "parked batches")
            confirm(question.format(f"{parked} of {resource}"), yes=yes)
            _do_all(tokens, lambda each: act(admin, resource, each))

    return command


replay = _for_parked(
    Admin.replay,
    "Execute {} again?",
    "Execute a parked batch of RESOURCE again.\n\n"
    "A live process that knows the batch's class executes it, under a new token. RESOURCE is the "
    "full name, as phonon batches prints it. TOKEN is needed if several batches are parked.",
)
discard = _for_parked(
    Admin.discard,
    "Delete {}, with the data?",
    "Delete a parked batch of RESOURCE, with its data.\n\n"
    "RESOURCE is the full name, as phonon batches prints it. TOKEN is needed if several batches "
    "are parked.",
)


@click.command()
@click.argument("name")
@click.argument("token", required=False, type=int)
@click.option("--semaphore", is_flag=True, help="NAME is a semaphore.")
@yes_option
@target_options
def unlock(name: str, token: int | None, semaphore: bool, yes: bool, **where: Any) -> None:
    """Release a lock for its holder, and wake a waiter.

    The lock NAME is released only if its holder still has TOKEN. The holder believes that it has
    the lock until it checks or releases it.
    """
    with target(where).open() as admin:
        lock = admin.lock(name, semaphore=semaphore)
        if lock is None or not lock.holders:
            raise click.UsageError(f"{name} is not held")
        grants = [g for g in lock.holders if token in (None, g.token)]
        if len(grants) > 1:
            raise click.UsageError(
                f"{len(grants)} hold {name}: give the TOKEN of one; phonon locks shows them"
            )
        if grants:
            (grant,) = grants
            confirm(
                f"Release {name}, which {grant.process} at {tables.place(grant.host, grant.pid)} "
                f"has held since {tables.moment(grant.since)}? The holder believes that it has the "
                "lock until it checks.",
                yes=yes,
            )
            token = grant.token
        click.echo(admin.break_lock(name, token or 0, semaphore=semaphore))


@click.command()
@click.argument("process")
@yes_option
@target_options
def expire(process: str, yes: bool, **where: Any) -> None:
    """Declare PROCESS dead, so that others take over.

    PROCESS is its id, or the beginning of it. If the process lives, it continues under another id,
    without its locks.
    """
    if not process:  # every id begins with it: a variable of a script that is not set
        raise click.UsageError("PROCESS is empty; phonon ps lists the ids")
    with target(where).open() as admin:
        found = [p for p in admin.processes() if p.id.startswith(process)]
        if len(found) > 1:
            raise click.UsageError(f"{len(found)} processes' ids begin with {process}")
        if found:
            (one,) = found
            confirm(
                f"Declare process {one.id} at {tables.place(one.host, one.pid)} dead? It is "
                f"{one.state}, its last heartbeat was {tables.span(one.lag)} ago.",
                yes=yes,
            )
            process = one.id
        click.echo(admin.expire(process))
