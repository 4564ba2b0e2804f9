"""The connection of the original Phonon: `connect` makes one process for the program."""

import threading
from collections.abc import Sequence
from typing import Any

from phonon.errors import ConfigurationError
from phonon.process import Process
from phonon.settings import check_hosts

__all__ = ["connect", "process"]

_lock = threading.Lock()
_process: Process | None = None


def connect(
    hosts: Sequence[str] | None = None, port: int = 6379, db: int = 1, **options: Any
) -> Process:
    """Return the program's process. The first call makes it, and any call after its stop.

    Args:
        hosts: One host of a server, or several nodes of a cluster.
        port: The server's port, for hosts without one.
        db: The server's database.
        options: The options of `Process`.

    Raises:
        ConfigurationError: An argument is invalid.
        ServerUnreachableError: There is no server.
    """
    global _process  # noqa: PLW0603 - the original's interface is a module
    with _lock:
        if _process is None or _process.engine.stopped:
            if hosts is not None:
                check_hosts(hosts)
            if hosts and len(hosts) > 1:
                options["hosts"] = [host if ":" in host else f"{host}:{port}" for host in hosts]
            elif hosts:
                host, _, own_port = hosts[0].partition(":")
                options.update(host=host, port=int(own_port or port), db=db)
            _process = Process(**options)
        return _process


def process() -> Process:
    """Return the process that `connect` has made.

    Raises:
        ConfigurationError: `connect` was not called.
    """
    with _lock:
        if _process is None:
            raise ConfigurationError(
                "there is no connection: call phonon.connections.connect(hosts=[...]) first"
            )
        return _process
