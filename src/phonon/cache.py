"""A local cache of updates. It merges updates by key, and ends the sessions of those it drops."""

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from phonon._core.engine import Engine, errors_only
from phonon._core.flows import Flow, has_begun
from phonon._core.forks import notice
from phonon._core.parcels import Ending
from phonon._core.sessions import Sessions
from phonon.batch import EndingUpdate, end_all, raise_together
from phonon.errors import ConfigurationError
from phonon.settings import check_api, check_count, check_key
from phonon.update import Update

U = TypeVar("U")

#: The most frequent answer of `set`, with nothing that has left the cache.
_MERGED: tuple[bool, tuple[()]] = (False, ())
#: Sessions ended at a time. The garbage collector looks, again and again, at all that wait outside
#: of the cache: in pieces of 5,000 this takes an eighth more time.
PIECE = 1000


class BaseCache(Generic[U]):
    """The base of `LruCache` and `AsyncLruCache`: everything but the waiting.

    Args:
        max_entries: The number of keys to keep at the most.
    """

    def __init__(self, max_entries: int = 10000) -> None:
        self.max_entries = check_count("max_entries", max_entries)
        self._entries: OrderedDict[Hashable, U] = OrderedDict()
        self._lock = threading.RLock()
        self._last_failed: U | None = None
        self._known_to: Engine | None = None
        self.known = weakref.ref(self)

    def __repr__(self) -> str:
        size, most = len(self._entries), self.max_entries
        return f"<{self._package}.{type(self).__name__}: {size} of {most} entries>"

    #: The package from which users import the class, for its repr.
    _package = "phonon"
    #: Whether its methods are awaited.
    _is_async = False

    def size(self) -> int:
        """Return the number of keys in the cache."""
        notice()
        return len(self._entries)

    def __len__(self) -> int:
        return self.size()

    def __contains__(self, key: object) -> bool:
        notice()
        return key in self._entries

    def get_last_failed(self) -> U | None:
        """Return the update whose end raised last, if any did."""
        return self._last_failed

    # The part of the public methods that works on the entries. None of it waits.

    def _put(self, key: Hashable, update: U) -> tuple[bool | None, Sequence[tuple[Hashable, U]]]:
        """Add or merge an update. Return the answer of `set`, and the entries that have left."""
        lock = self._lock
        # Faster than a with statement, and as safe: a signal handler's exception can only come
        # right after a call, and there is no other call next to those of the lock.
        try:
            lock.acquire()
            entry: Any = self._entries.get(key)
            result: tuple[bool | None, Sequence[tuple[Hashable, U]]] = _MERGED
            if entry is None:
                result = True, self._insert(key, update)
            else:
                try:
                    direct = entry._lock_ is lock and entry._has_default_expiry_
                except AttributeError:
                    direct = False  # not an update of Phonon's
                if entry.absorb(update) if direct else _refresh(entry, update):
                    self._entries.pop(key, None)
                    result = None, ((key, entry),)
                else:
                    try:
                        self._entries.move_to_end(key)
                    except KeyError:
                        # A signal handler has ended the session meanwhile; the entry is left over.
                        result = None, ((key, entry),)
        except BaseException as error:
            if lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - interrupted while it waited
                lock.release()
            if isinstance(error, TypeError):
                check_key(key)
            raise
        lock.release()
        return result

    def _insert(self, key: Hashable, update: U) -> list[tuple[Hashable, U]]:
        if isinstance(update, Update):
            engine: Engine = update._engine_
            if engine is not self._known_to:
                check_api(type(self), process_is_async=engine.is_async, is_async=self._is_async)
            update.cached_under(self._lock)
            if engine is not self._known_to:
                engine.caches.add(self)
                self._known_to = engine
            # The block also stores an update that was made before it.
            batch = engine.batch if engine.batches else None
            if batch is not None and batch.durable:
                batch.keep(update)
                batch.add(update)
        elif not hasattr(update, "end_session"):
            raise ConfigurationError(
                f"a cache holds updates, not {update!r}: make a subclass of phonon.Update with "
                "merge(other) and execute(), or of phonon.ConflictFreeUpdate"
            )
        self._entries[key] = update
        self._watch(key, update)
        evicted = []
        while len(self._entries) > self.max_entries:
            evicted.append(self._entries.popitem(last=False))
        return evicted

    # For the worker that ends sessions when they are over

    def _watch(self, key: Hashable, update: Any) -> None:
        deadline = self._ends_at(update)
        if deadline < math.inf:
            update.process().engine.sessions.watch(self.known, key, deadline)

    def _ends_at(self, update: Any) -> float:
        return update.ends_at_() if isinstance(update, Update) else math.inf

    def deadline(self, key: Hashable) -> float:
        """Return when a key's session may be over, by the monotonic clock; never: infinity."""
        entry = self._entries.get(key)
        return math.inf if entry is None else self._ends_at(entry)

    def take_over(self, key: Hashable, now: float, sessions: Sessions) -> Any:
        """Remove and return the update of a key whose session is over; see `ExpiringCache`."""
        with self._lock:
            entry: Any = self._entries.get(key)
            if not isinstance(entry, Update) or entry.process().engine.sessions is not sessions:
                return None
            batch = entry._batch_
            if (batch is not None and batch.is_open) or not self._is_over(entry, now):
                return None
            del self._entries[key]
            return entry

    def _is_over(self, entry: Any, now: float) -> bool:
        # If the class has an is_expired of its own, that alone decides.
        return (entry.ends_at_() <= now or not entry._has_default_expiry_) and _is_expired(entry)

    def restore(self, key: Hashable, update: Any) -> None:
        """Take back an update whose data could not be sent."""
        self._failed(key, update)

    def _look_up(self, key: Hashable) -> tuple[U | None, list[tuple[Hashable, U]]]:
        check_key(key)
        notice()  # in a forked child the entries belong to the parent
        with self._lock:
            entry = self._entries[key]
            if not _is_expired(entry):
                self._entries.move_to_end(key)
                return entry, []
            del self._entries[key]
            return None, [(key, entry)]

    def _pop(self, key: Hashable) -> list[tuple[Hashable, U]]:
        check_key(key)
        notice()  # in a forked child the entries belong to the parent
        with self._lock:
            return [(key, self._entries.pop(key))]

    def _pop_oldest(self) -> list[tuple[Hashable, U]]:
        notice()  # in a forked child the entries belong to the parent
        with self._lock:
            return [self._entries.popitem(last=False)] if self._entries else []

    def _keys(self, *, expired: bool = False) -> list[Hashable]:
        notice()  # in a forked child the entries belong to the parent
        with self._lock:
            if not expired:
                return list(self._entries)
            return [key for key, entry in self._entries.items() if _is_expired(entry)]

    def _pop_some(self, keys: Sequence[Hashable], *, expired: bool) -> list[tuple[Hashable, U]]:
        evicted: list[tuple[Hashable, U]] = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and not (expired and not _is_expired(entry)):
                    del self._entries[key]
                    evicted.append((key, entry))
        return evicted

    # Entries that have left the cache

    def _sort(
        self, evicted: Sequence[tuple[Hashable, U]]
    ) -> tuple[list["Evictions"], list[tuple[Hashable, Any]]]:
        """Sort entries: some end in flows, some are foreign objects, some go to an open batch."""
        by_engine: dict[Engine, list[EndingUpdate]] = {}
        others: list[tuple[Hashable, Any]] = []
        for key, entry in evicted:
            if not isinstance(entry, Update):
                others.append((key, entry))
                continue
            engine: Engine = entry.process().engine
            eviction = _Eviction(self, key, entry)
            batch = engine.batch if engine.batches else None
            theirs = entry._batch_
            if (
                theirs is not None
                and theirs is not batch
                and theirs.ends_for_others(entry, eviction.failed)
            ):
                continue
            if batch is not None:
                batch.end(entry, eviction.failed)
            else:
                by_engine.setdefault(engine, []).append(eviction)
        return [Evictions(engine, endings) for engine, endings in by_engine.items()], others

    def _failed(self, key: Hashable, entry: Any) -> None:
        self._last_failed = entry
        if isinstance(entry, Update) and entry.has_unsent():
            # The data never left this process, so it has to be sent again. It does not become the
            # oldest entry, which would be the next to go, and fail again instead of all others.
            with self._lock:
                newer = self._entries.get(key)
                if isinstance(newer, Update):
                    entry.refresh(newer)
                self._entries[key] = entry  # type: ignore[assignment]  # it was here before
                self._entries.move_to_end(key)

    # For the process

    def endings_for(self, engine: Engine) -> list[tuple[Ending, Callable[[], object]]]:
        """Remove the updates of one process; return how their sessions end.

        Returns:
            Each ending, with the function to call if it has failed: that puts unsent data back.
        """
        with self._lock:
            found = [
                (key, entry)
                for key, entry in self._entries.items()
                if isinstance(entry, Update) and entry.process().engine is engine
            ]
            for key, _ in found:
                del self._entries[key]
        return [
            (Ending(entry.resource_id, entry, entry.forced), partial(self._failed, key, entry))
            for key, entry in found
        ]

    @property
    def excess(self) -> int:
        """Return how many entries it holds beyond its limit, because they could not be sent."""
        return max(0, len(self._entries) - self.max_entries)

    def forget_for(self, engine: Engine) -> None:
        """Drop the updates of one process: after a fork they are the parent's."""
        # The lock may have been held by a thread of the parent.
        self._lock = threading.RLock()
        for key, entry in list(self._entries.items()):
            if not isinstance(entry, Update):
                continue
            if entry.process().engine is engine:
                del self._entries[key]
            else:
                entry._lock_ = self._lock


class _Eviction(NamedTuple):
    """An update that has left a cache. One object, because there may be thousands at a time."""

    cache: BaseCache[Any]
    key: Hashable
    update: Any

    def failed(self) -> None:
        """Take the update back, if it still has its data."""
        self.cache._failed(self.key, self.update)  # noqa: SLF001 - a class of this module


class Evictions:
    """Updates of one process that have left a cache, on their way to the server.

    Args:
        engine: The process's.
        endings: The updates.
    """

    def __init__(self, engine: Engine, endings: list[EndingUpdate]) -> None:
        self.engine = engine
        self._endings = endings
        self.flow: Flow[list[BaseException]] = end_all(engine, endings)

    def interrupted(self) -> None:
        """Put all back if the flow has not begun. Otherwise it goes on in the background."""
        if not has_begun(self.flow):
            for ending in self._endings:
                ending.failed()


class LruCache(BaseCache[U]):
    """Merges updates by key, least recently used out first.

    The session of an update ends when the update leaves the cache: because there are too many and
    it is the oldest, because it is expired, or by a call. Several threads may call all methods.

    Args:
        max_entries: The number of keys to keep at the most.

    Raises:
        ConfigurationError: ``max_entries`` is less than 1, or no whole number.

    Example:
        >>> class Clicks(ConflictFreeUpdate):
        ...     def execute(self):
        ...         print("write", self._id, self.doc["n"])
        >>> cache = LruCache(max_entries=1000)
        >>> with process.batch():  # stores all that is set, in one exchange
        ...     for page in ("/a", "/b", "/a"):
        ...         cache.set(page, Clicks(process, page, doc={"n": 1}))
        True
        True
        False
        >>> cache.size()
        2
        >>> cache.expire("/a")
        write /a 2
    """

    def set(self, key: Hashable, update: U) -> bool | None:
        """Add an update, or merge it into the one that is there.

        Args:
            key: The update's key, usually the record's.
            update: An `Update`, or anything with ``end_session``; to be merged it needs
                ``refresh``, and without ``is_expired`` its session never ends by time.

        Returns:
            True if the update is a new entry; False if it was merged into an entry; None if it was
            merged into an entry whose session was over, and that session has been ended.

        Raises:
            ConfigurationError: The key belongs to another record, or to another class. Nothing was
                merged.
            Exception: The error that ``merge`` raised; or an error from ending the session of an
                evicted or expired entry, and then the given update is in the cache, or merged.
        """
        result = self._put(key, update)
        if result is _MERGED:
            return False
        answer, evicted = result
        if evicted:
            raise_together("ending sessions failed", self._end(evicted))
        return answer

    def get(self, key: Hashable) -> U | None:
        """Return the update of a key, which counts as used now.

        Returns:
            The update; None if its session was over, which has been ended.

        Raises:
            KeyError: The key is not in the cache.
            Exception: The error that ending the session raised.
        """
        entry, evicted = self._look_up(key)
        raise_together("ending a session failed", self._end(evicted))
        return entry

    def expire(self, key: Hashable) -> None:
        """End the session of a key.

        Raises:
            KeyError: The key is not in the cache.
            Exception: The error that ending the session raised.
        """
        raise_together("ending a session failed", self._end(self._pop(key)))

    def expire_oldest(self) -> None:
        """End the session of the least recently used entry, if there is one.

        Raises:
            Exception: The error that ending the session raised.
        """
        raise_together("ending a session failed", self._end(self._pop_oldest()))

    def expire_all(self) -> None:
        """End all sessions, many at a time.

        Raises:
            ExceptionGroup: The errors that ending some of them raised; the others have ended.
        """
        self._end_keys(self._keys(), expired=False)

    def purge(self) -> None:
        """End the sessions that are over.

        Raises:
            ExceptionGroup: The errors that ending some of them raised; the others have ended.
        """
        self._end_keys(self._keys(expired=True), expired=True)

    def _end_keys(self, keys: Sequence[Hashable], *, expired: bool) -> None:
        errors: list[Exception] = []
        for first in range(0, len(keys), PIECE):
            errors += self._end(self._pop_some(keys[first : first + PIECE], expired=expired))
        raise_all(errors)

    def _end(self, evicted: Sequence[tuple[Hashable, U]]) -> list[Exception]:
        """End the sessions of entries that have left the cache. Return the errors."""
        if not evicted:
            return []
        errors: list[Exception] = []
        leaving, others = self._sort(evicted)
        del evicted  # its pairs, thousands of them, are not needed while the sessions end
        for key, entry in others:
            try:
                entry.end_session()
            except Exception as error:  # noqa: BLE001 - collected, and raised by the caller
                self._failed(key, entry)
                errors.append(error)
        for some in leaving:
            try:
                errors += errors_only(some.engine.run(some.flow))  # type: ignore[attr-defined]  # of threads
            except Exception as error:  # noqa: BLE001 - collected, and raised by the caller
                some.interrupted()
                errors.append(error)
            except BaseException:
                some.interrupted()
                raise
        return errors


def raise_all(errors: Sequence[Exception]) -> None:
    """Raise the errors of many sessions as a group."""
    if errors:
        raise ExceptionGroup(f"ending {len(errors)} of the sessions failed", errors)


def _refresh(entry: Any, update: Any) -> bool:
    """Merge into an entry that has methods of its own. Return whether its session was over."""
    over = _is_expired(entry)
    entry.refresh(update)
    return over


def _is_expired(entry: Any) -> bool:
    is_expired = getattr(entry, "is_expired", None)
    return is_expired is not None and is_expired()
