"""The command line program, ``phonon`` or ``python -m phonon``.

`app` has the group of commands. Other distributions add commands with an entry point of the group
``phonon.commands``; ``phonon demo`` comes with ``phonon-demo``.
"""

import sys


def main() -> None:
    """Run the program."""
    try:
        from phonon.cli.app import phonon  # noqa: PLC0415 - click and rich are an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        sys.stderr.write(
            f"phonon: the program needs {error.name}, which is not installed: "
            "pip install 'phonon[cli]'\n"
        )
        sys.exit(2)
    phonon()
