"""Gunicorn, in its configuration: ``from phonon.contrib.gunicorn import worker_exit``.

A `Process` that was made before the fork, with ``preload_app``, becomes another process in each
worker. This hook stops it, and also a process that the worker has made.
"""

from typing import Any

from phonon import _lifetime


def worker_exit(server: Any, worker: Any) -> None:
    """End the sessions of a worker that exits: a hook of Gunicorn's.

    It runs at a graceful stop, at a reload, and after ``max_requests``. If a worker is killed, or
    Gunicorn aborts it because it is silent for too long, the other workers take over.
    """
    del server, worker
    _lifetime.stop_all()
