"""Many joins and partials in one exchange."""

import os
import sys
import time
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from phonon._core import codec
from phonon._core.blocks import BlockEnd
from phonon._core.copies import UNREFERENCED
from phonon._core.engine import Engine, errors_only
from phonon._core.flows import Flow, has_begun
from phonon._core.parcels import Ending

if TYPE_CHECKING:
    from types import TracebackType

    from phonon.update import Update

#: Number of updates from which on those of one record are merged, if only the batch has them.
MANY = 1024


class EndingUpdate(Protocol):
    """An update whose session is to end."""

    @property
    def update(self) -> Any:
        """The update."""

    def failed(self) -> None:
        """Handle a failed end; the update may still have its data then."""


class _BatchedEnding(NamedTuple):
    """An update whose session ends with a batch.

    Attributes:
        update: The update.
        failed: Called if the end fails; the update may still have its data then.
        has_left_cache: Whether a cache has removed the update; other threads may have filled it.
    """

    update: Any
    failed: Callable[[], None]
    has_left_cache: bool = False


class BaseBatch:
    """The base of `Batch` and `AsyncBatch`: everything but the waiting.

    Args:
        engine: The process's.
        durable: Whether to store the data of updates that are made with ``init_cache=False``.

    Attributes:
        is_open: Whether the batch collects.
        joins: Resources to join, each with the update that opens its session, if there is one.
        fresh: Updates to store. One that was merged into another may be among them.
        merge_at: The number of updates above which `shrink` is called.
        is_failed: Whether the block's body has raised, so that nothing of it is stored.
        is_complete: Whether the block's body has reached its end.
    """

    #: Whether `passes_over` has to be asked about each new message of a record.
    asks: bool = False

    def passes_over(self, resource: str) -> bool:
        """Return whether the data of a message for a resource is stored already."""
        del resource
        return False

    def ends_for_others(self, update: "Update", failed: Callable[[], None]) -> bool:
        """Let another thread's block end a session, if it is ending one; return whether it will."""
        del update, failed
        return False

    def __init__(self, engine: Engine, *, durable: bool = True) -> None:
        self.durable = durable
        self.is_open = False
        self.joins: dict[str, Any] = {}
        self.fresh: list[Any] = []
        self.merge_at = MANY
        self.is_failed = self.is_complete = False
        self._engine = engine
        self._opened = 0.0
        # For undoing the block if its body raises: the content that updates had before it, and
        # the updates that other threads had for the same records.
        self._before: dict[int, tuple[Any, bytes]] = {}
        self._aside: list[tuple[Any, Any]] = []
        self._endings: dict[int, _BatchedEnding] = {}
        self._depth = 0
        self._block: weakref.ref[Any] | None = None
        self._outer: Any = None
        self._pid = 0

    # Collecting

    def join(self, resource: str) -> None:
        """Become a member of a resource when the block ends."""
        self.joins.setdefault(resource)

    def take_join(self, resource: str) -> bool:
        """Remove a resource from those to be joined. Return whether it was present."""
        if resource not in self.joins:
            return False
        del self.joins[resource]
        return True

    def add(self, update: "Update") -> None:
        """Store the update's unsent data when the block ends."""
        if update._batch_ is not self:
            update._batch_ = self
            self.fresh.append(update)

    def add_new(self, update: "Update") -> None:
        """Store an update that was made in the block, when the block ends."""
        self.add(update)

    def replace(self, spent: "Update", update: "Update") -> None:
        """Store an update instead of another one that was merged into it."""
        fresh = self.fresh
        last = bool(fresh) and fresh[-1] is spent and spent is not update
        if update._batch_ is not self:
            update._batch_ = self
            if last:
                fresh[-1] = update
            else:
                fresh.append(update)
        elif last:
            fresh.pop()

    def keep(self, update: "Update") -> None:
        """Remember an update's unsent data before anything of the block is merged into it.

        Raises:
            NotStorableError: A value has a type that cannot be stored.
        """
        if update._batch_ is not self and update.has_unsent():
            partial = codec.pack(update, self._engine.codec.serializer)
            self._before[id(update)] = update, partial

    def put_aside(self, update: "Update", other: Any) -> None:
        """Keep an update apart that another thread would merge into one of this block's."""
        self._aside.append((update, other))

    def shrink(self) -> None:
        """Merge updates of the same record and class if only the batch refers to them."""
        waiting, self.fresh = self.fresh, []
        waiting.reverse()  # in place: a copy would be one more reference to each update
        firsts: dict[tuple[str, type], Any] = {}
        kept: list[Any] = []
        while waiting:
            update = waiting.pop()
            first = firsts.setdefault((update.resource_id, type(update)), update)
            # The user may still change an update that the user refers to.
            if first is not update and sys.getrefcount(update) <= UNREFERENCED:
                try:
                    first.refresh(update)
                except Exception:  # noqa: BLE001 - the merge raises again when the batch is executed
                    kept.append(update)
            else:
                kept.append(update)
        self.fresh = kept + self.fresh
        self.merge_at = max(MANY, 2 * len(self.fresh))

    def end(self, update: "Update", failed: Callable[[], None] | None = None) -> None:
        """End the update's session when the block ends.

        Args:
            update: The update.
            failed: Called if that fails.
        """
        leaves = failed is not None
        self._endings[id(update)] = _BatchedEnding(
            update, failed or (lambda: self._keep(update)), leaves
        )

    def _keep(self, update: "Update") -> None:
        if update.has_unsent():
            self._engine.outbox.unsent.append(update)

    # Opening and closing

    def _begins(self, end: object) -> bool:
        """Note that a block begins. Return whether it is the outermost; see `BlockEnd`."""
        if self.is_open:
            return False
        self._block = weakref.ref(end)
        return True

    @property
    def _is_left(self) -> bool:
        return self._block is not None and self._block() is None

    def lives(self) -> bool:
        """Return whether it collects.

        An exception out of a signal handler may have left its block without the block's end. Then
        what is in it is kept, as if it had come in the middle of the end.
        """
        if self.is_open and not self._is_left:
            return True
        self.is_complete = False
        closing = self._closing()
        if closing is not None and self._pid == os.getpid():
            closing.interrupted()
            self._engine.outbox.wake()
        return False

    def _open(self) -> None:
        """Collect the actions of this thread or task from now on."""
        if not self.is_open:
            if self._is_left:
                self._block = None
            self._depth = 0
            self._engine.ensure_alive()  # type: ignore[attr-defined]  # of threads or tasks
            self._outer = self._engine.batch
            self._engine.open_batch(self)
            self._pid = os.getpid()
            self._opened = time.monotonic()
            self.is_open = True
        self._depth += 1

    def _leaves(self, error: BaseException | None, *, outermost: bool) -> bool:
        """Leave a block. Return whether it was the outermost one, so that the batch is closed."""
        self._depth -= 1
        # After a fork inside the block it belongs to the parent, and `stop` closes a batch itself.
        if (self._depth and not outermost) or not self.is_open or self._pid != os.getpid():
            return False
        self.is_failed = error is not None
        self.is_complete = error is None
        return True

    def _closing(self) -> "Closing | None":
        """Stop collecting.

        Returns:
            The contents to send; None if the batch is empty.
        """
        self.is_open = False
        self._engine.close_batch(self, self._outer)
        joins, fresh, endings = self.joins, self.fresh, list(self._endings.values())
        self.joins, self.fresh, self._endings = {}, [], {}
        aside, self._aside = self._aside, []
        if self.is_failed:
            own = {id(update) for update in fresh}
            self._undo(fresh, aside)
            endings = [ending for ending in endings if self._ends_all_the_same(ending, own)]
            joins, fresh = ({} if self.durable else joins), []
        fresh += [other for _, other in aside if other.has_unsent()]
        self._before = {}
        if self._engine.stopped and not joins:
            # `stop` has ended the sessions that it knew of, so possibly nothing is left to store.
            fresh = [update for update in fresh if update.has_unsent()]
            endings = [ending for ending in endings if ending.update.has_unsent()]
        if not (joins or fresh or endings):
            return None
        return Closing(self._engine, self, joins, fresh, endings)

    def _ends_all_the_same(self, ending: _BatchedEnding, own: Container[int]) -> bool:
        """Return whether a session ends although the block has failed, as its cache has decided.

        It does if it began before the block, or has another thread's data.
        """
        update = ending.update
        if update._begun_ < self._opened:
            return True
        return ending.has_left_cache and (id(update) not in own or update.has_unsent())

    def _undo(self, fresh: Iterable[Any], aside: Iterable[tuple[Any, Any]]) -> None:
        """Restore all updates to their content from before the block."""
        for update in fresh:
            update._batch_ = None
            update.discard()
            before = self._before.pop(id(update), None)
            if before is not None:
                update.put_back(before[1])
        for update, other in aside:
            update.refresh(other)

    def _return_aside(self) -> None:
        """Store the updates of other threads by themselves."""
        aside, self._aside = self._aside, []
        if aside:
            self._engine.outbox.unsent += [other for _, other in aside if other.has_unsent()]
            self._engine.outbox.wake()


class Closing:
    """The contents of a batch on their way to the server.

    Args:
        engine: The process's.
        batch: The batch.
        joins: Resources to join, each with the update that opens its session.
        fresh: Updates to store.
        endings: Updates whose sessions are to end.
    """

    def __init__(
        self,
        engine: Engine,
        batch: BaseBatch,
        joins: dict[str, Any],
        fresh: list[Any],
        endings: Sequence[EndingUpdate],
    ) -> None:
        self._engine = engine
        self._batch = batch
        self._joins = joins
        self._fresh = fresh
        self._endings = endings
        self.flow: Flow[list[BaseException]] = self._sending()

    def _sending(self) -> Flow[list[BaseException]]:
        engine = self._engine
        outbox, held = engine.outbox, engine.members.held
        ending_ids = {id(ending.update) for ending in self._endings}
        unsent, outbox.unsent = outbox.unsent, []
        parcels = [*unsent, *merge_updates(u for u in self._fresh if id(u) not in ending_ids)]
        try:
            errors = list((yield from outbox.store(parcels, list(self._joins))))
        finally:
            for update in self._fresh:
                if update._batch_ is self._batch:
                    update._batch_ = None
        for resource, opener in self._joins.items():
            if opener is not None and resource in held and held[resource] is None:
                held[resource] = weakref.ref(opener)
        errors += yield from end_all(engine, self._endings)
        return errors

    def interrupted(self) -> None:
        """Keep the data if the flow has not begun. Otherwise it goes on in the background."""
        if has_begun(self.flow):
            return
        for update in self._fresh:
            update._batch_ = None
        unsent = [update for update in self._fresh if update.has_unsent()]
        if not self._engine.stopped:
            self._engine.outbox.unsent += unsent
        for ending in self._endings:
            ending.failed()


class Batch(BaseBatch):
    """Collects the actions of one thread with a process, and sends them together.

    Made by `Process.batch`.

    Args:
        engine: The process's.
        durable: Whether to store the data of updates that are made with ``init_cache=False``.
    """

    def close(self) -> list[BaseException]:
        """Send everything, and stop collecting. Return the errors."""
        closing = self._closing()
        if closing is None:
            return []
        try:
            return list(self._engine.run(closing.flow))  # type: ignore[attr-defined]  # of threads
        except BaseException:
            closing.interrupted()
            raise

    def __enter__(self) -> Self:
        self._open()
        return self

    @BlockEnd
    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        traceback: "TracebackType | None",
        *,
        block: bool = False,
    ) -> None:
        if not self._leaves(error, outermost=block):
            return
        try:
            raise_together("not everything in the batch went well", errors_only(self.close()))
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"phonon: and ending sessions from before the block failed: {failure}")


def raise_together(message: str, errors: Sequence[Exception]) -> None:
    """Raise errors: one as it is, several as a group."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{message}: {len(errors)} errors", errors)


def end_all(engine: Engine, endings: Sequence[EndingUpdate]) -> Flow[list[BaseException]]:
    """End sessions, many at a time.

    Returns:
        The errors.
    """
    errors: list[BaseException] = []
    while endings:
        now: dict[str, EndingUpdate] = {}
        later = [
            each for each in endings if now.setdefault(each.update.resource_id, each) is not each
        ]
        results = yield from engine.outbox.end(
            [Ending(name, each.update, each.update.forced) for name, each in now.items()]
        )
        for ending, result in zip(now.values(), results, strict=True):
            if result.errors:
                ending.failed()
                errors += result.errors
        endings = later
    return errors


def merge_updates(updates: Iterable[Any]) -> list[Any]:
    """Merge updates of the same record and class; one that does not merge stays separate.

    An update in a cache stays separate too: other threads may merge into it, or take its data.
    """
    firsts: dict[tuple[str, type], Any] = {}
    apart: list[Any] = []
    for update in updates:
        if update._lock_ is not None:
            apart.append(update)
            continue
        first = firsts.setdefault((update.resource_id, type(update)), update)
        if first is not update:
            try:
                first.refresh(update)
            except Exception:  # noqa: BLE001 - the merge raises again when the batch is executed
                apart.append(update)
    return [*firsts.values(), *apart]
