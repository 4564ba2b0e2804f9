"""A local cache of updates, for tasks."""

from collections.abc import Hashable
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic

from phonon.aio.twin import call
from phonon.aio.update import AsyncUpdate
from phonon.cache import LruCache, U
from phonon.tasks import await_

if TYPE_CHECKING:
    from phonon.engine import Engine


class _Entries(LruCache[U]):
    """What is in the cache of an event loop."""

    @property
    def engine(self) -> "Engine | None":
        """That of the process whose updates are in here."""
        return self._known_to

    def _end_other(self, entry: Any) -> None:
        ending = entry.end_session()
        if isawaitable(ending):
            await_(ending)


class AsyncLruCache(Generic[U]):
    """Merges updates by key, least recently used out first; see `LruCache`.

    All methods may be called from several tasks of an event loop.

    Args:
        max_entries: The number of keys to keep at the most.

    Raises:
        ValueError: ``max_entries`` is less than 1.
    """

    def __init__(self, max_entries: int = 10000) -> None:
        self._sync: _Entries[U] = _Entries(max_entries)

    def __repr__(self) -> str:
        return repr(self._sync).replace("<phonon._Entries", "<phonon.aio.AsyncLruCache", 1)

    @property
    def max_entries(self) -> int:
        """The number of keys to keep at the most."""
        return self._sync.max_entries

    async def set(self, key: Hashable, update: U) -> bool | None:
        """Store an update, and add it or merge it into the one that is there.

        Args:
            key: The update's key, usually the record's.
            update: An `AsyncUpdate`, or anything with ``end_session``; see `LruCache.set`.

        Returns:
            True if the cache has grown, or would have but for an older entry that went; False if
            the update was merged; None if it was merged into one whose session was over, which
            has been ended.

        Raises:
            ConnectionLostError: The server does not answer; see `AsyncUpdate`. The update is not
                in the cache.
            Exception: What ending an evicted or expired entry's session raised. The update that
                was passed is in the cache, or merged, all the same.
        """
        if isinstance(update, AsyncUpdate) and update.is_to_be_opened:
            await call(update.process().engine, update.open_now)
        # What needs no server needs no greenlet either.
        answer, out = self._sync.put(key, update)
        if out:
            await call(self._sync.engine, self._sync.end, out)
        return answer

    async def get(self, key: Hashable) -> U | None:
        """The update of a key, which counts as used now; see `LruCache.get`."""
        return await call(self._sync.engine, self._sync.get, key)

    def size(self) -> int:
        """The number of keys in the cache."""
        return self._sync.size()

    def __len__(self) -> int:
        return len(self._sync)

    def __contains__(self, key: object) -> bool:
        return key in self._sync

    async def expire(self, key: Hashable) -> None:
        """End the session of a key; see `LruCache.expire`."""
        await call(self._sync.engine, self._sync.expire, key)

    async def expire_oldest(self) -> None:
        """End the session of the least recently used entry; see `LruCache.expire_oldest`."""
        await call(self._sync.engine, self._sync.expire_oldest)

    async def expire_all(self) -> None:
        """End all sessions, many at a time; see `LruCache.expire_all`."""
        await call(self._sync.engine, self._sync.expire_all)

    async def purge(self) -> None:
        """End the sessions that are over; see `LruCache.purge`."""
        await call(self._sync.engine, self._sync.purge)

    def get_last_failed(self) -> U | None:
        """The update whose end raised last, if any did."""
        return self._sync.get_last_failed()
