"""A table, and the record that is added to its rows."""

from django.db import models

from phonon.contrib.django.models import Counted
from phonon.contrib.django.sink import Upsert


class PageViews(Counted):
    """How often each page was seen."""

    page = models.CharField(max_length=200, unique=True)
    views = models.BigIntegerField(default=0)


class Views(Upsert, model=PageViews, key="page"):
    """Figures of a page, which are added to its row."""
