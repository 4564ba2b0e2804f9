"""A process and a cache for each worker of a server."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from phonon.batch import BaseBatch
from phonon.cache import LruCache
from phonon.contrib import uwsgi as _uwsgi  # noqa: F401 - the import adds hooks to uWSGI
from phonon.errors import AlreadyStoredError
from phonon.process import Process
from phonon.settings import check_name
from phonon.update import Update

U = TypeVar("U", bound=Update)


class Worker:
    """A process, made at its first use, and a cache, in each worker of a program.

    It may be made at import: it connects at the first use, and after a fork each child has its own
    process.

    Args:
        url: The server's URL; None: as for `Process`.
        max_entries: The most records that a worker keeps.
        options: Arguments of `Process`.
    """

    def __init__(
        self, url: str | None = None, *, max_entries: int = 10_000, **options: Any
    ) -> None:
        self._url = None if url is None else check_name("url", url)
        self._options = options
        self._max_entries = max_entries
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._cache: LruCache[Any] = LruCache(self._max_entries)

    @property
    def process(self) -> Process:
        """The process of this worker."""
        if os.getpid() != self._pid:
            self._begin()  # a process from before the fork belongs to the parent
        with self._lock:
            if self._process is None:
                self._process = Process(url=self._url, **self._options)
            return self._process

    def add(self, kind: Callable[..., U], key: Any, **content: Any) -> None:
        """Merge a message into its record, and store it.

        When this returns, the data is on the server. Inside `once` or ``process.batch()`` the data
        is on the server when that block ends.

        Args:
            kind: A subclass of `Update`.
            key: The record's key.
            content: Further arguments of the update, such as ``doc``.
        """
        update = kind(self.process, key, **content)
        self._cache.set((kind, update.resource_id), update)

    @contextlib.contextmanager
    def batch(self) -> Iterator[BaseBatch]:
        """Store all data of the ``with`` block together, when it ends."""
        with self.process.batch() as batch:
            yield batch

    def once(self, message_id: str, handle: Callable[[], Any], *, of: str) -> Any:
        """Handle a message, unless its data and its id were stored already in the last hour.

        Args:
            message_id: The message's id.
            handle: Adds the message's data. If it raises, nothing is stored.
            of: The scope of the ids: the name of a queue.

        Returns:
            The result of ``handle``; None if the message was stored already.
        """
        result = None
        while True:
            try:
                with self.process.batch([message_id], dedupe=of, message_id=str) as batch:
                    for _ in batch:
                        result = handle()
            except AlreadyStoredError:
                continue  # another delivery was stored meanwhile; now its id is known here
            return result

    def stop(self) -> None:
        """End all sessions, and stop the process. The next use makes another one."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.stop()
