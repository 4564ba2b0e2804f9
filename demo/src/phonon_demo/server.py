"""The demo's server: one of its own, or the user's, on which nothing may stay behind."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import redis

from phonon import PhononError, Process, embedded
from phonon.embedded import supervisor

#: Seconds for the server to stop; its folder is removed then.
STOP_TIMEOUT = 10.0
_SELDOM = 24 * 3600.0


def _wait_until_stopped(folder: Path) -> None:
    # It stops when its last user has left; until then it writes into the folder. The table in
    # phonon.embedded.supervisor explains the lock that shows it.
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder / "phonon-server", os.O_RDONLY)
        try:
            supervisor.try_lock(descriptor, fcntl.LOCK_EX, STOP_TIMEOUT)
        finally:
            os.close(descriptor)


class MortalServer:
    """An embedded server that nobody else uses and that can be killed; a context manager.

    Args:
        folder: A private folder, to be removed afterwards.
        sync: Whether all that it has answered to is on the disk.
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
        _wait_until_stopped(self._folder)

    @property
    def url(self) -> str:
        """Its URL."""
        return f"unix://{self.socket}?db=1"

    @property
    def socket(self) -> str:
        """The path of its socket; the same after every start."""
        assert self._hold is not None  # noqa: S101 - for the type checker
        return self._hold.socket_path

    def restart(self) -> None:
        """Kill it with SIGKILL, and start it again with the data it has saved."""
        os.kill(self._pid, signal.SIGKILL)
        self._start()

    def _start(self) -> None:
        # A new hold before the old one is let go of: the last to do so would stop it.
        old, self._hold = self._hold, embedded.start(self._folder)
        if old is not None:
            old.close()
        with redis.Redis(unix_socket_path=self.socket) as client:
            self._pid = int(client.info("server")["process_id"])
            if self._sync:
                client.config_set("appendfsync", "always")


def onlooker(url: str, namespace: str) -> Process:
    """Return a process that only looks on.

    It beats when it starts, and not again in any run: a beat would make it release what dead
    workers held, which is the survivors' business, and is shown as theirs.
    """
    return Process(
        url=url,
        namespace=namespace,
        session_length=2 * _SELDOM,
        heartbeat_interval=_SELDOM,
        recover_failed_processes=False,
    )


def keys_of(process: Process) -> Iterator[bytes]:
    """Yield all keys of a process's namespace, a name without characters that have a meaning."""
    # The keys of the namespace itself begin with {name}, those of its partitions with {name/
    pattern = f"{{{process.namespace}[}}/]*"
    found: Iterator[bytes] = process.client.scan_iter(match=pattern, count=1000)
    return found


@contextlib.contextmanager
def forgetting(process: Process) -> Iterator[None]:
    """Stop a process after the block, and remove all keys of its namespace.

    The namespace was made for one run: nobody will ever come for what is left in it, be it the
    sessions of a worker that was killed, or the number of its partitions.
    """
    try:
        yield
    finally:
        client = process.client
        with contextlib.suppress(redis.RedisError, PhononError):
            process.stop()
        with contextlib.suppress(redis.RedisError):
            for key in keys_of(process):
                client.unlink(key)
