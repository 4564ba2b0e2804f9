"""``manage.py import_views FILE``: counts the pages of a file, one per line."""

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from phonon.contrib.django import add, stop, worker
from shop.models import Views


class Command(BaseCommand):
    """Imports a file."""

    def add_arguments(self, parser: CommandParser) -> None:
        """Take the file's name."""
        parser.add_argument("file", type=Path)

    def handle(self, *_: Any, **options: Any) -> None:
        """Count the lines, and write one row per page."""
        with worker().batch(), options["file"].open() as lines:
            for line in lines:
                add(Views, line.strip(), doc={"views": 1})
        stop()
