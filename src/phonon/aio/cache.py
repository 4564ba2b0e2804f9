"""A local cache of updates, for tasks."""

from collections.abc import Hashable, Sequence
from inspect import isawaitable

from phonon._core.engine import errors_only
from phonon.aio.update import AsyncUpdate
from phonon.batch import raise_together
from phonon.cache import PIECE, BaseCache, U, raise_all


class AsyncLruCache(BaseCache[U]):
    """Merges updates by key, least recently used out first; see `LruCache`.

    Several tasks of an event loop may call all methods.

    Args:
        max_entries: The number of keys to keep at the most.

    Raises:
        ConfigurationError: ``max_entries`` is less than 1, or no whole number.

    Example:
        >>> class Clicks(AsyncConflictFreeUpdate):
        ...     async def execute(self):
        ...         print("write", self._id, self.doc["n"])
        >>> cache = AsyncLruCache(max_entries=1000)
        >>> async with process.batch():  # stores all that is set, in one exchange
        ...     for page in ("/a", "/b", "/a"):
        ...         await cache.set(page, Clicks(process, page, doc={"n": 1}))
        True
        True
        False
        >>> cache.size()
        2
        >>> await cache.expire("/a")
        write /a 2
    """

    _package = "phonon.aio"
    _is_async = True

    async def set(self, key: Hashable, update: U) -> bool | None:
        """Store an update, and add it to the cache or merge it into the present entry.

        Args:
            key: The update's key, usually the record's.
            update: An `AsyncUpdate`, or anything with ``end_session``; see `LruCache.set`.

        Returns:
            True if the update is a new entry; False if it was merged into an entry; None if it was
            merged into an entry whose session was over, and that session has been ended.

        Raises:
            ConnectionLostError: The server does not answer; see `AsyncUpdate`. The update is not
                in the cache.
            ConfigurationError: The key belongs to another record, or to another class. Nothing was
                merged.
            Exception: The error that ``merge`` raised; or an error from ending the session of an
                evicted or expired entry, and then the given update is in the cache, or merged.
        """
        if isinstance(update, AsyncUpdate) and update.is_to_be_opened:
            await update.open_now()
        answer, evicted = self._put(key, update)
        if evicted:
            raise_together("ending sessions failed", await self._end(evicted))
        return answer

    async def get(self, key: Hashable) -> U | None:
        """Return the update of a key, which counts as used now; see `LruCache.get`."""
        self._check()
        entry, evicted = self._look_up(key)
        raise_together("ending a session failed", await self._end(evicted))
        return entry

    async def expire(self, key: Hashable) -> None:
        """End the session of a key; see `LruCache.expire`."""
        self._check()
        raise_together("ending a session failed", await self._end(self._pop(key)))

    async def expire_oldest(self) -> None:
        """End the session of the least recently used entry; see `LruCache.expire_oldest`."""
        self._check()
        raise_together("ending a session failed", await self._end(self._pop_oldest()))

    async def expire_all(self) -> None:
        """End all sessions, many at a time; see `LruCache.expire_all`."""
        await self._end_keys(self._keys(), expired=False)

    async def purge(self) -> None:
        """End the sessions that are over; see `LruCache.purge`."""
        await self._end_keys(self._keys(expired=True), expired=True)

    def _check(self) -> None:
        """Refuse a call in another event loop, or in a forked child, unless the cache is empty.

        A cache may serve the processes of several loops, one after the other.
        """
        engine = self._known_to
        if engine is not None and self._entries and not engine.stopped:
            engine.driver.check()

    async def _end_keys(self, keys: Sequence[Hashable], *, expired: bool) -> None:
        self._check()
        errors: list[Exception] = []
        for first in range(0, len(keys), PIECE):
            errors += await self._end(self._pop_some(keys[first : first + PIECE], expired=expired))
        raise_all(errors)

    async def _end(self, evicted: Sequence[tuple[Hashable, U]]) -> list[Exception]:
        """End the sessions of entries that have left the cache. Return the errors."""
        if not evicted:
            return []
        errors: list[Exception] = []
        leaving, others = self._sort(evicted)
        del evicted  # see LruCache._end
        for key, entry in others:
            try:
                ending = entry.end_session()
                if isawaitable(ending):
                    await ending
            except Exception as error:  # noqa: BLE001 - collected, and raised by the caller
                self._failed(key, entry)
                errors.append(error)
        for some in leaving:
            try:
                errors += errors_only(await some.engine.run(some.flow))  # type: ignore[attr-defined]  # of tasks
            except Exception as error:  # noqa: BLE001 - collected, and raised by the caller
                some.interrupted()
                errors.append(error)
            except BaseException:
                some.interrupted()
                raise
        return errors
