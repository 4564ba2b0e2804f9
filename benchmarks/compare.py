"""Phonon beside its peers: ``python benchmarks/compare.py --help``."""

from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console

from comparison import report, run
from comparison.contenders import WrongError
from phonon.cli.errors import one_line_errors


@click.command()
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
def main(messages: int, rounds: int, workers: int, json_: Path | None, chart: Path | None) -> None:
    """Measure beside peers, on a server of its own; exit 1 if any totals are wrong.

    Peers that are not installed are left out: pip install 'phonon[bench]' brings them.
    """
    if chart is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--chart needs matplotlib: pip install 'phonon[bench]'")
    notes = Console(stderr=True)
    try:
        results = run.run(messages, rounds, workers, lambda text: notes.print(text, style="dim"))
    except WrongError as error:
        raise click.ClickException(str(error)) from error
    report.show(results, Console())
    if json_ is not None:
        report.write(results, json_)
    if chart is not None:
        report.draw(results, chart)


if __name__ == "__main__":
    with one_line_errors():
        main()
