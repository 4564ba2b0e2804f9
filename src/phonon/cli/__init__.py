"""The command line program, ``phonon`` or ``python -m phonon``.

`app` has the commands. `demo` is the one to begin with: it reads rows (`rows`), deals them out to
worker processes (`broker`, `pool`, `worker`), kills one of them (`deaths`), and checks (`check`)
what they have written (`sink`). `chaos` has them killed all the time (`killer`, `proxy`), and
audits every single message (`numbered`, `ledger`).
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
