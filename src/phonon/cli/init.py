"""``phonon init``: a worker to start from."""

from importlib import resources
from pathlib import Path

import click

from phonon.cli.errors import CommandError

NEXT = """\
{path} is a worker that counts messages by key, with a bundled server and SQLite. Next:
  python {path} produce 100000
  python {path} & python {path} &      # two workers; kill one, with kill -9
  python {path} show"""


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="worker.py")
def init(path: Path) -> None:
    """Write a worker to start from into a file.

    PATH is worker.py by default. The worker is a whole program: it takes messages from a queue,
    merges them by key, and writes one row per key and session to SQLite. An existing file is not
    changed.
    """
    text = resources.files("phonon.cli").joinpath("worker_template.py").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandError(
            f"{path} is there already: name another file, as in phonon init other.py"
        ) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(NEXT.format(path=path))
