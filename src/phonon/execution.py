"""How batches are executed: merged, then one after the other, or many of a class at once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from phonon.drivers.sync import Portion, by_itself, run_user_code
from phonon.partials import class_of, merge_batch, merge_stored
from phonon.protocol.effects import Execute, Outcome
from phonon.protocol.messages import Batch
from phonon.runtime import Runtime

if TYPE_CHECKING:
    from phonon.engine import Engine
    from phonon.update import Update

#: Records that ``execute_many`` is given at once, at the most.
MOST_TOGETHER = 250


class Record(NamedTuple):
    """What a batch comes to for one class.

    Attributes:
        update: The instance that executes it.
        merged: Its content.
        token: Its token.
        runtime: What runs its ``execute``.
    """

    update: "Update"
    merged: "Update"
    token: int
    runtime: Runtime

    def execute(self) -> None:
        """Execute it by itself."""
        with self.update.executing(self.merged, self.token) as instance:
            self.runtime.call(instance.execute)


class Execution:
    """The user's code, about one resource.

    Args:
        engine: The process's.
        resource: Which.
        local: The update whose session ended here; it executes what is of its class.
    """

    __slots__ = ("engine", "local", "resource")

    def __init__(self, engine: "Engine", resource: str, local: "Update | None") -> None:
        self.engine = engine
        self.resource = resource
        self.local = local

    def __call__(self, batch: Batch) -> None:
        """Merge a batch's partials and execute the result, class by class."""
        for record in self.records(batch):
            record.execute()

    def merge(self, partials: list[bytes]) -> list[bytes]:
        """Merge partials into fewer."""
        return merge_stored(self.engine, self.resource, partials)

    def may_go_together(self, batch: Batch) -> bool:
        """Whether it is worth while to merge it in advance."""
        cls = class_of(batch.partials[0])
        return cls is not None and cls.executes_many()

    def records(self, batch: Batch) -> list[Record]:
        """What a batch comes to."""
        local = self.local
        merged = merge_batch(self.engine, self.resource, batch)
        return [
            # Each class has a token of its own, all below the next batch's.
            Record(
                local if type(local) is cls else update,
                update,
                batch.token + i,
                self.engine.runtime,
            )
            for i, (cls, update) in enumerate(merged.items())
        ]


def together(effects: Sequence[Execute]) -> Iterator[Portion]:
    """Put together what can be executed together."""
    by_class: dict[type[Update], list[tuple[int, Record]]] = {}
    for i, effect in enumerate(effects):
        execution: Any
        batch: Any
        execution, batch = effect.batch or (None, None)
        if isinstance(execution, Execution) and execution.may_go_together(batch):
            outcome = run_user_code(partial(execution.records, batch))
            if outcome.error is not None:
                yield Portion([i], partial(list, [outcome]))
                continue
            cls = type(outcome.value[0].update)
            if len(outcome.value) == 1 and cls.executes_many():
                by_class.setdefault(cls, []).append((i, outcome.value[0]))
                continue
        yield by_itself(i, effect)
    for cls, all_of_it in by_class.items():
        for first in range(0, len(all_of_it), MOST_TOGETHER):
            positions, records = zip(*all_of_it[first : first + MOST_TOGETHER], strict=True)
            yield Portion(positions, partial(execute_many, cls, records))


def execute_many(cls: "type[Update]", records: Sequence[Record]) -> list[Outcome]:
    """Execute many records of a class.

    If that raises it is not known for which of them, so each is executed by itself: what is at
    fault holds up nothing else.
    """
    outcome = run_user_code(partial(_execute_many, cls, records))
    if outcome.error is None:
        return [Outcome(error=error) for error in outcome.value]
    if len(records) == 1 or not isinstance(outcome.error, Exception):
        return [outcome for _ in records]
    return [outcome for record in records for outcome in execute_many(cls, [record])]


def _execute_many(cls: "type[Update]", records: Sequence[Record]) -> list[Exception | None]:
    """Returns which of them failed, and why."""
    with ExitStack() as stack:
        instances = [
            stack.enter_context(record.update.executing(record.merged, record.token))
            for record in records
        ]
        failed = {
            id(update): error
            for update, error in records[0].runtime.call(cls.execute_many, instances) or ()
        }
        return [failed.get(id(instance)) for instance in instances]
