"""Phonon for asyncio: the same library, to be awaited.

Each class is the twin of the one without ``Async`` in its name: it has the same methods, arguments
and errors, runs the same code, and works together with it on the same resources.
"""

try:
    import greenlet  # noqa: F401 - to say what is missing, and how to get it
except ImportError as error:  # pragma: no cover - an installation without the extra
    raise ImportError("phonon.aio needs greenlet: pip install 'phonon[aio]'") from error

from phonon.aio.batch import AsyncBatch
from phonon.aio.cache import AsyncLruCache
from phonon.aio.lock import AsyncLock, AsyncSemaphore
from phonon.aio.process import AsyncProcess
from phonon.aio.reference import AsyncReference
from phonon.aio.update import AsyncConflictFreeUpdate, AsyncUpdate

__all__ = [
    "AsyncBatch",
    "AsyncConflictFreeUpdate",
    "AsyncLock",
    "AsyncLruCache",
    "AsyncProcess",
    "AsyncReference",
    "AsyncSemaphore",
    "AsyncUpdate",
]
