"""gunicorn's configuration: a worker that exits ends its sessions."""

from phonon.contrib.gunicorn import worker_exit

__all__ = ["worker_exit"]
preload_app = True
