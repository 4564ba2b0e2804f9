"""``phonon once``: cron starts a command on many machines, and one of them runs it."""

import signal
import subprocess
import sys
from contextlib import suppress

import click

from phonon import Process
from phonon.cli.errors import CommandError
from phonon.contrib.schedule import Turn


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--every",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds between two runs, so that a machine whose clock is late does not run it again.",
)
@click.option(
    "--url",
    metavar="URL",
    help="The server.  [env var: PHONON_URL; default: redis://localhost:6379/1]",
)
def once(name: str, command: tuple[str, ...], every: float | None, url: str | None) -> None:
    """Run COMMAND on one of many machines.

    COMMAND runs unless another machine runs the job NAME now, or has run it in this interval.

    \b
    Example, in the crontab of every machine:
      0 3 * * *  phonon once nightly --every 86400 -- python report.py

    \b
    Exit status: that of the command; 0 if another machine runs it or has run it; 2 if the
    server cannot be used.
    """  # noqa: D301 - click wants the control character, in front of what it must not wrap
    process = Process(url=url, recover_failed_processes=False)
    try:
        turn = Turn(process, name, every)
        if not turn.take():
            return
        try:
            status = _run(turn, command)
        except FileNotFoundError as error:
            turn.fail()
            raise CommandError(f"{command[0]} cannot be started: {error.strerror}") from error
        if status == 0:
            turn.done()
        else:
            turn.fail()
    finally:
        process.stop()
    sys.exit(status)


def _run(turn: Turn, command: tuple[str, ...]) -> int:
    """Run the command, and end it if another process may run it too."""
    with subprocess.Popen(command) as running:  # noqa: S603 - the user's own
        turn.lock.on_lost = lambda _: running.terminate()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, lambda got, _: running.send_signal(got))
        status = running.wait()
    return status if status >= 0 else 128 - status
