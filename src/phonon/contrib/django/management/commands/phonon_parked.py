"""``manage.py phonon_parked``: parked batches."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from phonon.contrib.django import get_process, stop


class Command(BaseCommand):
    """Lists parked batches, or replays them all."""

    help = "List the batches that were given up on after too many failed attempts."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument("--replay", action="store_true", help="execute all of them after all")

    def handle(self, *_: Any, **options: Any) -> None:
        """List, or replay."""
        process = get_process()
        try:
            for batch in process.parked():
                self.stdout.write(f"{batch.resource} {batch.token} {batch.error}")
                if options["replay"]:
                    process.replay(batch.resource, batch.token)
        finally:
            stop()
