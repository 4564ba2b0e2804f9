"""Many joins and partials in one exchange."""

from typing import TYPE_CHECKING, Any, Self

from phonon.drivers.sync import Task
from phonon.errors import PhononError
from phonon.protocol.effects import Flow

if TYPE_CHECKING:
    from types import TracebackType

    from phonon.engine import Engine
    from phonon.update import Update


class Batch:
    """Collects what one thread does with a process, and sends it together.

    Made by `Process.batch`.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._joins: dict[str, None] = {}
        self._dirty: dict[int, Update] = {}
        self._endings: dict[int, Update] = {}
        self._depth = 0

    def join(self, resource: str) -> None:
        """Become a member of a resource when the block ends."""
        self._joins[resource] = None

    def join_now(self, resource: str, base: bytes) -> None:
        """Somebody is about to leave a resource that was to be joined."""
        if resource in self._joins:
            del self._joins[resource]
            self._engine.join(resource, base)

    def add(self, update: "Update") -> None:
        """Store what the update has unsent when the block ends."""
        self._dirty[id(update)] = update

    def replace(self, spent: "Update", update: "Update") -> None:
        """One update was merged into another: that one is to be stored."""
        self._dirty.pop(id(spent), None)
        self._dirty[id(update)] = update

    def end(self, update: "Update") -> None:
        """End the update's session when the block ends."""
        self._dirty.pop(id(update), None)
        self._endings[id(update)] = update

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._engine.local.batch = self
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._engine.local.batch = None
        try:
            self._flush()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and storing what the block had set failed: {failure}")

    def _flush(self) -> None:
        engine = self._engine
        engine.ensure_alive()
        errors: list[Exception] = []
        unstored, engine.unstored = engine.unstored, []
        try:
            store(engine, [*unstored, *self._dirty.values()], self._joins)
        except* PhononError as group:
            errors += group.exceptions
        self._joins, self._dirty = {}, {}
        endings = list(self._endings.values())
        self._endings = {}
        tasks = [engine.ending(update.resource_id, update) for update in endings]
        engine.run_all(tasks)
        for task in tasks:
            errors += engine.errors_of(task)
        raise_together("not everything in the batch went well", errors)


def raise_together(message: str, errors: list[Exception]) -> None:
    """Raise errors: one as it is, several as a group."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{message}: {len(errors)} errors", errors)


def store(engine: "Engine", updates: "list[Update]", joins: dict[str, None] | None = None) -> None:
    """Store what updates have unsent, merged per resource, and join resources, in one exchange.

    Raises:
        ExceptionGroup: Some could not be stored; they are kept for the next time.
    """
    per_resource: dict[tuple[str, type], Update] = {}
    for update in updates:
        first = per_resource.setdefault((update.resource_id, type(update)), update)
        if first is not update:
            first.refresh(update)
    stored = {resource for resource, _ in per_resource}
    storing: list[tuple[Update, Task[None]]] = [
        (update, Task(engine.keys.base(update.resource_id), _storing(engine, update)))
        for update in per_resource.values()
    ]
    joining = [
        Task(base := engine.keys.base(resource), engine.joining(resource, base))
        for resource in joins or ()
        if resource not in stored
    ]
    tasks: list[Task[Any]] = [*(task for _, task in storing), *joining]
    engine.driver.run_all(tasks)
    engine.unstored += [update for update, task in storing if task.error is not None]
    errors = [task.error for task in tasks if isinstance(task.error, Exception)]
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(tasks)} could not be stored", errors)


def _storing(engine: "Engine", update: "Update") -> Flow[None]:
    # An update that has nothing to send any more may have been stored by another thread's batch.
    # Its flow still takes its turn, so that ours does not end before that one's has been answered.
    yield from engine.storing(update)
