"""Commands that only look: ``ps``, ``locks``, ``sessions``, ``batches``, ``sources``, ``log``."""

import itertools
import sys
from typing import Any

import click
from rich.console import RenderableType

from phonon.admin import STATES, BatchState
from phonon.cli import tables
from phonon.cli.options import (
    json_option,
    prefix_option,
    print_json,
    show,
    target,
    target_options,
    watch_option,
)

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many to list at the most.",
)


@click.command()
@target_options
@json_option
@watch_option
def ps(as_json: bool, watch: float | None, **where: Any) -> None:
    """List the processes: host, state, and the number of their resources."""
    with target(where).open() as admin:

        def look() -> tuple[list[Any], RenderableType]:
            found = admin.processes()
            return found, tables.processes(found)

        show(look, as_json=as_json, watch=watch)


@click.command()
@click.argument("name", required=False)
@click.option("--semaphore", is_flag=True, help="NAME is a semaphore's.")
@prefix_option
@limit_option
@target_options
@json_option
@watch_option
def locks(
    name: str | None,
    semaphore: bool,
    prefix: str,
    limit: int,
    as_json: bool,
    watch: float | None,
    **where: Any,
) -> None:
    """List the locks that are held or waited for; or who holds NAME, and who waits, in order."""
    with target(where).open() as admin:

        def look() -> tuple[list[Any], RenderableType]:
            if name is None:
                found = list(itertools.islice(admin.locks(prefix), limit))
                return found, tables.locks(found)
            lock = admin.lock(name, semaphore=semaphore)
            if lock is None:
                return [], f"{name} is not locked, and has no waiters"
            return [lock], tables.lock(lock)

        show(look, as_json=as_json, watch=watch)


@click.command()
@click.option(
    "--older", type=click.FloatRange(min=0), metavar="SECONDS", help="Only those as old as this."
)
@click.option("--all", "all_", is_flag=True, help="All of them, in no order; with --json.")
@prefix_option
@limit_option
@target_options
@json_option
@watch_option
def sessions(
    older: float | None,
    all_: bool,
    prefix: str,
    limit: int,
    as_json: bool,
    watch: float | None,
    **where: Any,
) -> None:
    """List the open sessions, the oldest first."""
    if all_ and not as_json:
        raise click.UsageError("--all lists too many for a table: give --json as well")
    with target(where).open() as admin:
        if all_:
            print_json(admin.sessions(older, prefix))
            return

        def look() -> tuple[list[Any], RenderableType]:
            found = admin.oldest_sessions(limit, older, prefix)
            total = None
            if not prefix and older is None and len(found) == limit:
                total = sum(process.memberships for process in admin.processes())
            return found, tables.sessions(found, total)

        show(look, as_json=as_json, watch=watch)


@click.command()
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="Only those in this state; may be given several times.",
)
@prefix_option
@limit_option
@target_options
@json_option
@watch_option
def batches(
    states: tuple[BatchState, ...],
    prefix: str,
    limit: int,
    as_json: bool,
    watch: float | None,
    **where: Any,
) -> None:
    """List the batches that run, are retried, wait for a class or a survivor, or are parked.

    The exit status is 1 if any of those listed is parked.
    """
    with target(where).open() as admin:

        def look() -> tuple[list[Any], RenderableType]:
            # Dead letters first: they wait for an operator.
            wanted = states or STATES
            others = [state for state in wanted if state != "parked"]
            walks = [admin.batches("parked", prefix)] if "parked" in wanted else []
            walks += [admin.batches(others, prefix)] if others else []
            found = list(itertools.islice(itertools.chain(*walks), limit))
            return found, tables.batches(found)

        found = show(look, as_json=as_json, watch=watch)
    sys.exit(any(batch.state == "parked" for batch in found))


@click.command()
@target_options
@json_option
@watch_option
def sources(as_json: bool, watch: float | None, **where: Any) -> None:
    """List the sources of messages, and where they stand."""
    with target(where).open() as admin:

        def look() -> tuple[list[Any], RenderableType]:
            found = admin.sources()
            return found, tables.sources(found)

        show(look, as_json=as_json, watch=watch)


@click.command()
@limit_option
@target_options
@json_option
def log(limit: int, as_json: bool, **where: Any) -> None:
    """List the acts of operators: replayed, discarded, unlocked, expired."""
    with target(where).open() as admin:
        found = admin.acts(limit)
        show(lambda: (found, tables.acts(found)), as_json=as_json, watch=None)
