"""uWSGI: ends the sessions of its workers; `Worker` imports this module.

uWSGI does not run the interpreter's exit functions, and runs threads only if configured to. A
process without threads has no heartbeat and would be declared dead. Import this module in a program
that makes its own `Process`; outside of uWSGI it does nothing.
"""

from typing import Any

from phonon import _lifetime
from phonon.errors import ConfigurationError


def _hook(server: Any) -> None:
    """Make a worker of uWSGI end its sessions.

    Raises:
        ConfigurationError: uWSGI runs without threads.
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
