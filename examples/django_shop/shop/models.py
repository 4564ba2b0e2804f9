"""A table, and the record that Phonon adds to its rows."""

from django.db import models

from phonon.contrib.django.models import Counted
from phonon.contrib.django.sink import Upsert


class PageViews(Counted):
    """The number of views of each page."""

    page = models.CharField(max_length=200, unique=True)
    views = models.BigIntegerField(default=0)


class Views(Upsert, model=PageViews, key="page"):
    """The views of a page, which Phonon adds to the page's row."""
