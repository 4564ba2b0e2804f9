"""Models: a base for tables that records are written into, and the admin's list."""

from typing import ClassVar

from django.db import models


class Counted(models.Model):
    """A table that `Upsert` writes into.

    Attributes:
        phonon_token: The token of the last batch that was added to the row. A batch that comes
            again, after a crash, has the same one, and is skipped.
    """

    phonon_token: "models.BigIntegerField[int, int]" = models.BigIntegerField(
        default=0, editable=False
    )

    class Meta:
        """Each subclass has a table of its own."""

        abstract = True


class ParkedBatch(models.Model):
    """Stands in the admin for the batches that were given up on; it has no table."""

    class Meta:
        """Django makes no table and no permissions but for looking."""

        managed = False
        default_permissions: ClassVar = ("view",)
        verbose_name = "parked batch"
        verbose_name_plural = "parked batches"

    def __str__(self) -> str:
        """Return the text that Django shows."""
        return "parked batch"
