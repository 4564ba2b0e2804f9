"""``python -m chaos``: the options of the chaos run."""

import secrets
import sys

import click

from chaos import run as chaos_
from phonon.cli.app import SETTINGS
from phonon.cli.errors import one_line_errors
from phonon_demo.demo import end_on_signals


@click.command(context_settings=SETTINGS)
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
    help="The seed of the random strikes. The same number gives the same strikes, but the "
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
@click.option("--asyncio", is_flag=True, help="The workers have an event loop each.")
def main(
    workers: int,
    seconds: float | None,
    kills: int | None,
    seed: int | None,
    cut: bool,
    restart_server: bool,
    verbose: bool,
    asyncio: bool,
) -> None:
    """Kill and pause workers all the time, and check that nothing is lost or doubled.

    The workers read the flights of ``phonon demo`` from a stream, over and over, on a server of
    their own, and add them up in an Update. Some three times a second one of them is killed with
    SIGKILL, and others are stopped for so long that they are believed dead and taken over, and
    then go on. In the end SQLite is audited.

    Every delivery of a message has a number, and every session in the database has the numbers of
    all that was added to it. An acknowledged delivery must be there exactly once. A message that a
    worker had not acknowledged when it was killed is delivered again under another number; the old
    number may be there or not, because it is unknown whether it was stored. The figures of every
    key must equal those of a plain loop over the deliveries that are there, so none is there in
    part.

    \b
    Examples:
      python -m chaos
      python -m chaos --kills 200 --cut --restart-server --seed 1

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
    end_on_signals()
    options = chaos_.Options(workers, seconds, kills, seed, cut, restart_server, verbose, asyncio)
    sys.exit(chaos_.run(options))


if __name__ == "__main__":
    with one_line_errors():
        main()
