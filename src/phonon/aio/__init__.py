"""Phonon for asyncio: the same library, with methods to await.

Each class corresponds to the one without ``Async`` in its name: it has the same methods, arguments
and errors, runs the same flows, and works together with it on the same resources.
"""

from phonon.aio.admin import AsyncAdmin
from phonon.aio.batch import AsyncBatch
from phonon.aio.cache import AsyncLruCache
from phonon.aio.collection import AsyncCollection
from phonon.aio.lock import AsyncLock, AsyncSemaphore
from phonon.aio.process import AsyncProcess
from phonon.aio.reference import AsyncReference
from phonon.aio.update import AsyncConflictFreeUpdate, AsyncUpdate

__all__ = [
    "AsyncAdmin",
    "AsyncBatch",
    "AsyncCollection",
    "AsyncConflictFreeUpdate",
    "AsyncLock",
    "AsyncLruCache",
    "AsyncProcess",
    "AsyncReference",
    "AsyncSemaphore",
    "AsyncUpdate",
]
