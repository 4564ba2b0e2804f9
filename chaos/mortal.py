"""Servers that are killed and started again: Phonon's, and the database's."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Self

import redis

from phonon import embedded
from phonon_demo.postgres import PostgreSQL
from phonon_demo.server import wait_until_stopped

#: Seconds within which a PostgreSQL that was shut down has gone.
TIMEOUT = 20.0


class MortalServer:
    """A private embedded server; a context manager.

    Args:
        folder: A private folder, to be removed afterwards.
        sync: Whether the server answers only when its data is on the disk.
    """

    def __init__(self, folder: Path, *, sync: bool = False) -> None:
        self._folder = folder
        self._sync = sync
        self._hold: embedded.EmbeddedServer | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hold is not None:
            self._hold.close()
        wait_until_stopped(self._folder)

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"unix://{self.socket}?db=1"

    @property
    def socket(self) -> str:
        """The path of its socket; the same after every start."""
        assert self._hold is not None
        return self._hold.socket_path

    def restart(self) -> None:
        """Kill the server with SIGKILL, and start it again with the data that it has saved."""
        os.kill(self._pid, signal.SIGKILL)
        self._start()

    def _start(self) -> None:
        # A new hold before the old one is released: the last release would stop the server.
        old, self._hold = self._hold, embedded.start(self._folder)
        if old is not None:
            old.close()
        with redis.Redis(unix_socket_path=self.socket) as client:
            self._pid = int(client.info("server")["process_id"])
            if self._sync:
                client.config_set("appendfsync", "always")


class MortalPostgreSQL(PostgreSQL):
    """A PostgreSQL that can crash, and whose clients can go through a proxy."""

    #: The name of the socket that clients expect in a folder.
    SOCKET = ".s.PGSQL.5432"

    @property
    def socket(self) -> str:
        """The path of its socket."""
        return f"{self._folder.name}/{self.SOCKET}"

    def restart(self) -> None:
        """Shut it down at once, as after a crash (``immediate``), and start it again."""
        pid = self._server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        give_up = time.monotonic() + TIMEOUT
        while _is_running(pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        self._server.ensure_postgres_running()


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
