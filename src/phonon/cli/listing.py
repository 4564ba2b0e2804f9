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
    help="List at most this many.",
)


@click.command()
@target_options
@json_option
@watch_option
def ps(as_json: bool, watch: float | None, **where: Any) -> None:
    """List the processes, with state and resources."""
    with target(where).open() as admin:

        def look() -> tuple[list[Any], RenderableType]:
            found = admin.processes()
            return found, tables.processes(found)

        show(look, as_json=as_json, watch=watch)


@click.command()
@click.argument("name", required=False)
@click.option("--semaphore", is_flag=True, help="NAME is a semaphore.")
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
    """List locks, or the holders and waiters of NAME.

    Waiters are listed in the order in which they will get the lock.
    """
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
    "--older",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Only sessions at least this old.",
)
@click.option("--all", "all_", is_flag=True, help="All sessions, in no order; needs --json.")
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
    help="Only batches in this state; may be given several times.",
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
    """List the batches, with state and error.

    A batch runs, is to be retried, waits for a process that knows its class or for a survivor of
    its dead owner, or is parked. The exit status is 1 if a listed batch is parked.
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
    """List the sources of messages and their positions."""
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
    """List what operators did, and when.

    Listed are replay, discard, unlock and expire.
    """
    with target(where).open() as admin:
        found = admin.acts(limit)
        show(lambda: (found, tables.acts(found)), as_json=as_json, watch=None)
