"""A local cache of updates that merges what it is given and ends the session of what it drops."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from phonon.batch import end_all, raise_together
from phonon.drivers.sync import LOCK_STEP
from phonon.update import Update

if TYPE_CHECKING:
    from phonon.batch import Ending
    from phonon.engine import Engine

U = TypeVar("U")


class LruCache(Generic[U]):
    """Merges updates by key, least recently used out first.

    An update that leaves the cache, because it is the oldest of too many, expired, or told to,
    ends its session. All methods may be called from several threads.

    Args:
        max_entries: The number of keys to keep at the most.

    Raises:
        ValueError: ``max_entries`` is less than 1.
    """

    def __init__(self, max_entries: int = 10000) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, not {max_entries}")
        self.max_entries = max_entries
        self._entries: OrderedDict[Hashable, U] = OrderedDict()
        self._lock = threading.RLock()
        self._last_failed: U | None = None
        self._known_to: Engine | None = None

    def __repr__(self) -> str:
        return f"<phonon.LruCache: {len(self._entries)} of {self.max_entries} entries>"

    def set(self, key: Hashable, update: U) -> bool | None:
        """Add an update, or merge it into the one that is there.

        Args:
            key: The update's key, usually the record's.
            update: An `Update`, or anything with ``end_session``; to be merged it needs
                ``refresh``, and without ``is_expired`` its session is never over by itself.

        Returns:
            True if the cache has grown, or would have but for an older entry that went; False if
            the update was merged; None if it was merged into one whose session was over, which
            has been ended.

        Raises:
            Exception: What ending an evicted or expired entry's session raised. The update that
                was passed is in the cache, or merged, all the same.
        """
        answer, out = self.put(key, update)
        if out:
            self.end(out)
        return answer

    def put(self, key: Hashable, update: U) -> tuple[bool | None, list[tuple[Hashable, U]]]:
        """What `set` does with the cache itself; never waits.

        Returns:
            The answer, and the entries whose sessions are to be ended.
        """
        out: list[tuple[Hashable, U]] = []
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._entries[key] = update
                while len(self._entries) > self.max_entries:
                    out.append(self._entries.popitem(last=False))
                answer: bool | None = True
                self._register(update)
            else:
                expired = _is_expired(entry)
                entry.refresh(update)  # type: ignore[attr-defined]  # duck-typed: see set
                if expired:
                    del self._entries[key]
                    out.append((key, entry))
                    answer = None
                else:
                    self._entries.move_to_end(key)
                    answer = False
        return answer, out

    def end(self, out: list[tuple[Hashable, U]]) -> None:
        """End the sessions of entries that have left the cache; raises what that raised."""
        raise_together("ending sessions failed", self._end(out))

    def get(self, key: Hashable) -> U | None:
        """The update of a key, which counts as used now.

        Returns:
            The update; None if its session was over, which has been ended.

        Raises:
            KeyError: The key is not in the cache.
            Exception: What ending the session raised.
        """
        with self._lock:
            entry = self._entries[key]
            if not _is_expired(entry):
                self._entries.move_to_end(key)
                return entry
            del self._entries[key]
        raise_together("ending a session failed", self._end([(key, entry)]))
        return None

    def size(self) -> int:
        """The number of keys in the cache."""
        return len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def expire(self, key: Hashable) -> None:
        """End the session of a key.

        Raises:
            KeyError: The key is not in the cache.
            Exception: What ending the session raised.
        """
        with self._lock:
            entry = self._entries.pop(key)
        raise_together("ending a session failed", self._end([(key, entry)]))

    def expire_oldest(self) -> None:
        """End the session of the entry that was not used for the longest time, if there is one.

        Raises:
            Exception: What ending the session raised.
        """
        with self._lock:
            if not self._entries:
                return
            oldest = self._entries.popitem(last=False)
        raise_together("ending a session failed", self._end([oldest]))

    def expire_all(self) -> None:
        """End all sessions, many at a time.

        Raises:
            ExceptionGroup: What ending some of them raised; the others have been ended.
        """
        with self._lock:
            keys = list(self._entries)
        self._expire(keys)

    def purge(self) -> None:
        """End the sessions that are over.

        Raises:
            ExceptionGroup: What ending some of them raised; the others have been ended.
        """
        with self._lock:
            keys = [key for key, entry in self._entries.items() if _is_expired(entry)]
        self._expire(keys)

    def get_last_failed(self) -> U | None:
        """The update whose end raised last, if any did."""
        return self._last_failed

    # For the process

    def end_for(self, engine: "Engine") -> list[Exception]:
        """End the sessions of one process's updates; return what went wrong."""
        with self._lock:
            keys = [
                key
                for key, entry in self._entries.items()
                if isinstance(entry, Update) and entry.process().engine is engine
            ]
        return self._end_keys(keys)

    @property
    def surplus(self) -> int:
        """How many more it holds than it should, because they could not be sent."""
        return max(0, len(self._entries) - self.max_entries)

    def forget_for(self, engine: "Engine") -> None:
        """Drop them: after a fork they are the parent's."""
        # The lock may have been held by a thread of the parent.
        self._lock = threading.RLock()
        for key, entry in list(self._entries.items()):
            if isinstance(entry, Update) and entry.process().engine is engine:
                del self._entries[key]

    def _register(self, update: U) -> None:
        """Make the process know this cache, so that its ``stop`` ends what is in here."""
        if isinstance(update, Update):
            engine = update.process().engine
            if engine is not self._known_to:
                engine.caches.add(self)
                self._known_to = engine

    def _expire(self, keys: Iterable[Hashable]) -> None:
        errors = self._end_keys(keys)
        if errors:
            raise ExceptionGroup(f"ending {len(errors)} of the sessions failed", errors)

    def _end_keys(self, keys: Iterable[Hashable]) -> list[Exception]:
        """End sessions, a number at a time, so that no more than those are held twice."""
        errors: list[Exception] = []
        out: list[tuple[Hashable, U]] = []
        for key in keys:
            with self._lock:
                entry = self._entries.pop(key, None)
            if entry is not None:
                out.append((key, entry))
            if len(out) == LOCK_STEP:
                errors += self._end(out)
                out = []
        return errors + self._end(out)

    def _end(self, out: list[tuple[Hashable, U]]) -> list[Exception]:
        """End the sessions of entries that have left the cache. Returns what went wrong."""
        errors: list[Exception] = []
        by_engine: dict[Engine, list[Ending]] = {}
        for key, entry in out:
            failed = partial(self._failed, key, entry)
            if isinstance(entry, Update):
                engine = entry.process().engine
                if engine.batch is not None:
                    engine.batch.end(entry, failed)
                else:
                    by_engine.setdefault(engine, []).append((entry, failed))
                continue
            try:
                self._end_other(entry)
            except Exception as error:  # noqa: BLE001 - collected, and raised by the caller
                failed()
                errors.append(error)
        for engine, endings in by_engine.items():
            errors += end_all(engine, endings)
        return errors

    def _end_other(self, entry: Any) -> None:
        """End the session of what is no update of ours."""
        entry.end_session()

    def _failed(self, key: Hashable, entry: U) -> None:
        self._last_failed = entry
        if isinstance(entry, Update) and entry.has_unsent():
            # It never left this process: it is still ours to send. Not as the oldest, which would
            # be the next to go, and fail again in place of all others.
            with self._lock:
                newer = self._entries.get(key)
                if isinstance(newer, Update):
                    entry.refresh(newer)
                self._entries[key] = entry
                self._entries.move_to_end(key)


def _is_expired(entry: Any) -> bool:
    is_expired = getattr(entry, "is_expired", None)
    return is_expired is not None and is_expired()
