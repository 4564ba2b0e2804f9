"""Django: settings, a sink over the ORM's connection, a command, a page in the admin.

::

    INSTALLED_APPS = [..., "phonon.contrib.django"]
    PHONON = {"url": "redis://localhost/1"}  # arguments of phonon.Process

    class PageViews(Counted):              # in models.py
        page = models.CharField(max_length=200, unique=True)
        views = models.BigIntegerField(default=0)

    class Views(Upsert, model="shop.PageViews", key="page"):
        "Figures of a page."

    add(Views, request.path, doc={"views": 1})     # in a view
"""

import functools
from typing import TYPE_CHECKING, Any

from phonon.contrib.worker import Worker

if TYPE_CHECKING:
    from phonon.process import Process

try:
    from django.conf import settings
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"phonon.contrib.django needs {missing.name}: pip install 'phonon[django]'",
        name=missing.name,
    ) from missing

__all__ = ["add", "get_process", "stop", "worker"]


@functools.cache
def worker() -> Worker:
    """Return the process and the cache of this worker, made with ``settings.PHONON``."""
    return Worker(**getattr(settings, "PHONON", {}))


def get_process() -> "Process":
    """Return the process of this worker."""
    return worker().process


def add(kind: Any, key: Any, **content: Any) -> None:
    """Merge a message into its record, and store it; see `Worker.add`."""
    worker().add(kind, key, **content)


def stop() -> None:
    """End all sessions of this worker, for example at the end of your own management command."""
    worker().stop()
