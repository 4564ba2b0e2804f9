"""Runs the command line as ``python -m phonon``."""

from phonon.cli import main

if __name__ == "__main__":
    main()
