"""A source's loop in a thread, which counts messages by key."""

import threading
from typing import Any

from phonon import LruCache, Process
from support.counted import Count


class Consumer:
    """Runs a source. Subclasses say how it handles a message.

    Args:
        process: The process.
        kind: The class of the source.
        arguments: Its arguments behind the process.
        options: Its keyword arguments.
    """

    def __init__(self, process: Process, kind: Any, *arguments: Any, **options: Any) -> None:
        self.process = process
        self.cache: LruCache[Any] = LruCache(20)
        self.source: Any = kind(process, *arguments, sessions=self.cache, **options)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def handle(self, message: Any) -> None:
        raise NotImplementedError

    def count(self, key: int) -> None:
        self.cache.set(key, Count(self.process, key, doc={"n": 1}))

    def _run(self) -> None:
        try:
            self.source.run(self.handle)
        except BaseException as error:  # noqa: BLE001 - for the test to see
            self.error = error

    def stop(self) -> None:
        self.source.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
