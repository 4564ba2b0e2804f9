"""The command ``show``: everything about one resource, and the data of its batches."""

import itertools
import sys
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from phonon._admin.plain import plain
from phonon._core.shown import counted
from phonon.admin import Partial, ResourceStatus
from phonon.cli import tables
from phonon.cli.completing import complete_parked
from phonon.cli.options import json_option, print_json, show, target, target_options


@click.command("show")
@click.argument("resource", shell_complete=complete_parked)
@click.argument("token", required=False, type=int)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Show at most this many partials.",
)
@target_options
@json_option
def show_command(resource: str, token: int | None, limit: int, as_json: bool, **where: Any) -> None:
    """Show a resource's members, lock, batches and data.

    RESOURCE is the full name, as phonon batches and phonon sessions print it:
    test.test.order-1 for a record "order-1" without a database and a collection. The data is that
    of the open session, or of the batch TOKEN; it is decoded without its class, so none of your
    code runs. The exit status is 1 if the resource has a parked batch.
    """
    with target(where).open() as admin:
        found = admin.resource(resource)
        if token is None and not found.partials and found.batches:
            token = found.batches[0].token  # no session is open, so the batch is shown
        partials = list(itertools.islice(admin.content(resource, token), limit))
    if as_json:
        print_json([{**plain(found), "content": plain(partials)}])
    else:
        show(lambda: ([], _shown(found, partials, token)), as_json=False, watch=None)
    sys.exit(any(batch.state == "parked" for batch in found.batches))


def _shown(found: ResourceStatus, partials: Iterable[Partial], token: int | None) -> RenderableType:
    parts: list[RenderableType] = [Text(found.resource, style="bold")]
    for process, host, pid, since in found.members:
        times = found.modifications.get(process, 0)
        parts.append(
            f"  member {process} at {tables.place(host, pid)} since {tables.moment(since)}, "
            f"modified it {times} times"
        )
    if not found.members:
        parts.append("  no process is a member")
    if found.parties:
        parts.append(f"  its session waits for {found.parties} parties")
    if found.lock is not None:
        parts += ["", tables.lock(found.lock)]
    if found.batches:
        # Their errors follow in full, so they are not in the table.
        parts += ["", tables.batches([batch._replace(error="") for batch in found.batches])]
        parts += [
            Text(f"  {batch.token}: {batch.error}", style="red")
            for batch in found.batches
            if batch.error
        ]
    whose = "the open session" if token is None else f"batch {token}"
    listed = list(partials)
    parts += ["", Text(f"data of {whose}: {counted(len(listed), 'partial')}", style="bold")]
    parts += [_partial(number, partial) for number, partial in enumerate(listed, 1)]
    return Group(*parts)


def _partial(number: int, partial: Partial) -> Text:
    head = f"  {number}. {partial.class_name or 'unknown class'}, {tables.size(partial.bytes)}"
    if partial.error:
        return Text(f"{head}: {partial.error}", style="red")
    lines = [f"{head}, {partial.database}.{partial.collection}, id {partial.id!r}"]
    named = {"spec": partial.spec, "doc": partial.doc, **partial.state}
    lines += [f"     {name}: {value!r}" for name, value in named.items() if value is not None]
    return Text("\n".join(lines))
