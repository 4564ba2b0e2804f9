"""The registry of the original Phonon: one collection for each model, in the process of `connect`.

It serves programs that were written for the original. Others make a `Process`, and call `collect`.
"""

import threading
from typing import Any

from phonon import connections
from phonon.collection import Collection
from phonon.model import Model
from phonon.settings import check_count, check_seconds

__all__ = ["Registry", "configure", "register"]


class Registry:
    """The collections of a process, by model.

    Args:
        max_entries: Keys to keep of each model at the most.
        idle: Seconds without a message after which a session ends.
        longest: Seconds after which it ends although messages keep coming.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self, max_entries: int = 10_000, idle: float | None = 1800, longest: float | None = None
    ) -> None:
        for name, seconds in (("idle", idle), ("longest", longest)):
            if seconds is not None:
                check_seconds(name, seconds)
        self.max_entries = check_count("max_entries", max_entries)
        self.idle = idle
        self.longest = longest
        self._lock = threading.Lock()
        self._collections: dict[type[Model], Collection[Any, Any]] = {}

    def collection(self, model: type[Model]) -> Collection[Any, Any]:
        """Return the collection of a model."""
        process = connections.process()
        with self._lock:
            found = self._collections.get(model)
            if found is None or found.engine is not process.engine:
                found = process.collect(
                    model, self.max_entries, idle=self.idle, longest=self.longest
                )
                self._collections[model] = found
            return found

    def register(self, model: Model, *args: Any, **kwargs: Any) -> None:
        """Merge a record of one message.

        Args:
            model: The record.
            args: The arguments of ``on_complete``, such as a broker's message to acknowledge.
                ``on_complete`` is called for each message that this process has registered.
            kwargs: The same arguments by name.

        Raises:
            InvalidMessageError: The model refuses the message. Nothing was merged.
            ConnectionLostError: The server does not answer; the data is kept, and stored once.
        """
        self.collection(type(model)).add_record(model, args, kwargs)


_registry = Registry()


def configure(
    max_entries: int = 10_000, idle: float | None = 1800, longest: float | None = None
) -> None:
    """Set the limits of models that are registered later; see `Registry`."""
    global _registry  # noqa: PLW0603 - the original's interface is a module
    _registry = Registry(max_entries, idle, longest)


def register(model: Model, *args: Any, **kwargs: Any) -> None:
    """Merge a record of one message; see `Registry.register`."""
    _registry.register(model, *args, **kwargs)
