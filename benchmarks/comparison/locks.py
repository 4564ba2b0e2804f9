"""Locks of Phonon and of others, for the same use of them.

Each function imports what it needs, and returns what makes a lock of a client (of a `Process` for
Phonon's) and a name. Their other settings are those of redis-py by default.
"""

from collections.abc import Callable
from typing import Any

#: Makes a lock.
Maker = Callable[[Any, str], Any]

#: Seconds that one lasts.
LEASE = 60


def phonon() -> Maker:
    """Phonon's."""
    return lambda process, name: process.lock(name)


def redis_py() -> Maker:
    """Make locks of redis-py."""
    return lambda client, name: client.lock(name, timeout=LEASE)


def python_redis_lock() -> Maker:
    """Make locks of python-redis-lock."""
    from redis_lock import Lock  # noqa: PLC0415 - a peer, which need not be installed

    return lambda client, name: Lock(client, name, expire=LEASE)


def pottery() -> Maker:
    """Pottery's Redlock, with one server."""
    from pottery import Redlock  # noqa: PLC0415 - a peer, which need not be installed

    return lambda client, name: Redlock(key=name, masters={client}, auto_release_time=LEASE)
