"""The demo's server: one of its own, or the user's, on which nothing may stay behind."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import redis

from phonon import PhononError, Process
from phonon import _embedded_supervisor as supervisor

#: Seconds for the server to stop; its folder is removed then.
STOP_TIMEOUT = 10.0


@contextlib.contextmanager
def private_server(folder: Path) -> Iterator[str]:
    """The URL of an embedded server that nobody else uses.

    Args:
        folder: A private folder, to be removed afterwards.
    """
    try:
        yield f"embedded://{quote(str(folder))}"
    finally:
        # It goes when its last user has left; until then it writes into the folder. See the table
        # in phonon._embedded_supervisor for the lock that says so.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder / "phonon-server", os.O_RDONLY)
            try:
                supervisor.try_lock(descriptor, fcntl.LOCK_EX, STOP_TIMEOUT)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def forgetting(process: Process) -> Iterator[None]:
    """Should the block fail, remove all keys of the process's namespace.

    A worker that was killed leaves sessions behind, and nobody will ever come for those of a
    namespace that was made for one run.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(redis.RedisError, PhononError):
            for key in process.client.scan_iter(match=f"{process.namespace}:*", count=1000):
                process.client.unlink(key)
        raise
