"""Many joins and partials in one exchange."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from phonon.drivers.sync import Task
from phonon.protocol.effects import Flow

if TYPE_CHECKING:
    from types import TracebackType

    from phonon.engine import Engine
    from phonon.update import Update

    #: An update whose session is to end, and what is called if that raises.
    Ending = tuple[Update, Callable[[], None]]


class Batch:
    """Collects what one thread does with a process, and sends it together.

    Made by `Process.batch`.

    Args:
        engine: The process's.
        durable: Whether to store the data of updates that are made with ``init_cache=False``.
    """

    def __init__(self, engine: "Engine", *, durable: bool = True) -> None:
        self.durable = durable
        self._engine = engine
        self._joins: dict[str, None] = {}
        self._dirty: dict[int, Update] = {}
        self._endings: dict[int, Ending] = {}
        self._depth = 0
        self._outer: Batch | None = None
        self._pid = 0

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
        if self._dirty.pop(id(spent), None) is not None or self.durable:
            self._dirty[id(update)] = update

    def end(self, update: "Update", failed: Callable[[], None] | None = None) -> None:
        """End the update's session when the block ends.

        Args:
            update: The update.
            failed: Called if that raises.
        """
        self._dirty.pop(id(update), None)
        self._endings[id(update)] = update, failed or (lambda: self._keep(update))

    def close(self) -> list[Exception]:
        """Send everything, and collect no more. Returns what went wrong."""
        self._engine.local.batch = self._outer
        self._engine.batches.discard(self)
        return self._flush()

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._engine.ensure_alive()
            self._outer = self._engine.batch
            self._engine.local.batch = self
            self._engine.batches.add(self)
            self._pid = os.getpid()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        self._depth -= 1
        if self._depth or self._pid != os.getpid():  # forked inside the block: the parent's
            return
        try:
            raise_together("not everything in the batch went well", self.close())
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and storing what the block had set failed: {failure}")

    def _flush(self) -> list[Exception]:
        engine = self._engine
        joins, dirty = self._joins, list(self._dirty.values())
        endings = list(self._endings.values())
        self._joins, self._dirty, self._endings = {}, {}, {}
        if engine.stopped and not joins:
            # stop() has ended what it knew of, so there may be nothing to complain about.
            dirty = [update for update in dirty if update.has_unsent()]
            endings = [ending for ending in endings if ending[0].has_unsent()]
            if not dirty and not endings:
                return []
        engine.ensure_alive()
        errors: list[Exception] = []
        unstored, engine.unstored = engine.unstored, []
        try:
            store(engine, [*unstored, *dirty], joins)
        except ExceptionGroup as group:
            errors += group.exceptions
        except BaseException:
            for _, failed in endings:
                failed()
            raise
        return errors + end_all(engine, endings)

    def _keep(self, update: "Update") -> None:
        if update.has_unsent():
            self._engine.unstored.append(update)


def raise_together(message: str, errors: list[Exception]) -> None:
    """Raise errors: one as it is, several as a group."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{message}: {len(errors)} errors", errors)


def end_all(engine: "Engine", endings: "Sequence[Ending]") -> list[Exception]:
    """End sessions together. Returns what went wrong."""
    tasks = [engine.ending(update.resource_id, update) for update, _ in endings]
    try:
        engine.run_all(tasks)
    except BaseException as error:
        for _, failed in endings:
            failed()
        if isinstance(error, Exception):
            return [error]
        raise
    errors: list[Exception] = []
    interrupt: BaseException | None = None
    for (_, failed), task in zip(endings, tasks, strict=True):
        try:
            raised = engine.errors_of(task)
        except BaseException as error:  # noqa: BLE001 - raised when all have been looked at
            interrupt = error
            failed()
            continue
        if raised:
            failed()
            errors += raised
    if interrupt is not None:
        raise interrupt
    return errors


def store(engine: "Engine", updates: "list[Update]", joins: dict[str, None] | None = None) -> None:
    """Store what updates have unsent, merged per resource, and join resources, in one exchange.

    Raises:
        ExceptionGroup: Some could not be stored; they are kept for the next time.
    """
    per_resource: dict[tuple[str, type], Update] = {}
    apart: list[Update] = []
    for update in updates:
        first = per_resource.setdefault((update.resource_id, type(update)), update)
        if first is not update:
            try:
                first.refresh(update)
            except Exception:  # noqa: BLE001 - merging raises again when the batch is executed
                apart.append(update)
    stored = {resource for resource, _ in per_resource}
    storing: list[tuple[Update, Task[None]]] = [
        (update, Task(engine.keys.base(update.resource_id), _storing(engine, update)))
        for update in (*per_resource.values(), *apart)
    ]
    joining = [
        Task(base := engine.keys.base(resource), engine.joining(resource, base))
        for resource in joins or ()
        if resource not in stored
    ]
    tasks: list[Task[Any]] = [*(task for _, task in storing), *joining]
    try:
        engine.driver.run_all(tasks)
    except BaseException:
        # Interrupted (Ctrl-C): what had not begun is still here.
        engine.unstored += [update for update, _ in storing if update.has_unsent()]
        raise
    engine.unstored += [update for update, task in storing if task.error is not None]
    engine.backlog.look()
    errors = [task.error for task in tasks if isinstance(task.error, Exception)]
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(tasks)} could not be stored", errors)


def _storing(engine: "Engine", update: "Update") -> Flow[None]:
    # An update that has nothing to send any more may have been stored by another thread's batch.
    # Its flow still takes its turn, so that ours does not end before that one's has been answered.
    yield from engine.storing(update)
