"""Models: a base for tables of records, and the admin's list."""

from typing import ClassVar

from django.db import models


class Counted(models.Model):
    """A table for `Upsert`.

    Attributes:
        phonon_token: The token of the row's last batch. A batch that comes again after a crash has
            the same token, and is skipped.
    """

    phonon_token: "models.BigIntegerField[int, int]" = models.BigIntegerField(
        default=0, editable=False
    )

    class Meta:
        """Each subclass has its own table."""

        abstract = True


class ParkedBatch(models.Model):
    """Represents the parked batches in the admin; it has no table."""

    class Meta:
        """Django makes no table, and only the permission to view."""

        managed = False
        default_permissions: ClassVar = ("view",)
        verbose_name = "parked batch"
        verbose_name_plural = "parked batches"

    def __str__(self) -> str:
        """Return the text that Django shows."""
        return "parked batch"
