"""Gunicorn, in its configuration: ``from phonon.contrib.gunicorn import worker_exit``.

A `Process` that was made before the fork, with ``preload_app``, is another one in each worker, and
one that a worker makes is its own. Both end with the worker when this runs.
"""

from typing import Any

from phonon import _lifetime


def worker_exit(server: Any, worker: Any) -> None:
    """End the sessions of a worker that exits: a hook of Gunicorn's.

    It runs at a graceful stop, at a reload, and after ``max_requests``. After a kill, or a worker
    that Gunicorn aborts because it is silent for too long, the other workers take over.
    """
    del server, worker
    _lifetime.stop_all()
