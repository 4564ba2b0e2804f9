"""The demo's server: one of its own, or the user's, on which nothing may stay behind."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import redis

from phonon import PhononError, Process, embedded
from phonon.embedded import supervisor

#: Seconds for the server to stop; its folder is removed then.
STOP_TIMEOUT = 10.0
_SELDOM = 24 * 3600.0


def wait_until_stopped(folder: Path) -> None:
    """Wait until the server of a folder has stopped, and does not write into it any more."""
    # It stops when its last user has left. The table in phonon.embedded.supervisor has the locks.
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder / "phonon-server", os.O_RDONLY)
        try:
            supervisor.try_lock(descriptor, fcntl.LOCK_EX, STOP_TIMEOUT)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def private_server(folder: Path) -> Iterator[str]:
    """Yield the URL of an embedded server in a private folder, and wait for its end afterwards."""
    with embedded.start(folder) as server:
        yield f"unix://{server.socket_path}?db=1"
    wait_until_stopped(folder)


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
