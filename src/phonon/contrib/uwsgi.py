"""uWSGI: has its workers end their sessions; `Worker` imports this by itself.

uWSGI runs no exit functions of the interpreter's, and no threads unless it is told to: a process
without threads has no heartbeat, and is taken for dead. Import this in a program that makes its own
`Process`; outside of uWSGI it does nothing.
"""

from typing import Any

from phonon import _lifetime
from phonon.errors import ConfigurationError


def _hook(server: Any) -> None:
    """Have a worker of uWSGI's end its sessions.

    Raises:
        ConfigurationError: It runs without threads.
    """
    if not (server.opt.get("enable-threads") or server.opt.get("threads")):
        raise ConfigurationError(
            "uWSGI runs without threads, so a Process would have no heartbeat: set "
            "enable-threads = true"
        )
    server.atexit = _lifetime.stop_all


try:
    import uwsgi
except ModuleNotFoundError:
    pass  # something else runs the program
else:
    _hook(uwsgi)
