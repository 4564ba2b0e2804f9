"""Sources of messages: a batch is stored together with its offsets or ids."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from phonon._core.checks import is_number
from phonon._core.engine import Engine, errors_only
from phonon._core.flows import Flow, has_begun
from phonon._core.sources import (
    OrderedProgress,
    Progress,
    SourceClaim,
    StoredIds,
    UnorderedProgress,
)
from phonon.batch import (
    BaseBatch,
    Batch,
    Closing,
    end_all,
    merge_updates,
    raise_together,
)
from phonon.errors import ConfigurationError
from phonon.settings import check_callable, check_iterable, check_name

if TYPE_CHECKING:
    from phonon.process import Process

M = TypeVar("M")

#: The most records of one partition in one operation, which blocks the server for about two
#: milliseconds. A larger batch is stored in pieces, each of whole messages.
MOST_RECORDS = 512
#: Seconds for which ids of messages are remembered by default.
WINDOW = 3600.0


class _CheckedUpdates(list[Any]):
    """The updates of a batch that checks each new one."""

    __slots__ = ("_takes",)

    def __init__(self, updates: Iterable[Any], takes: Callable[[Any], bool]) -> None:
        super().__init__(updates)
        self._takes = takes

    def append(self, update: Any) -> None:
        """Add a new update, unless its partition has the message already."""
        if self._takes(update):
            super().append(update)


class BaseMessages(BaseBatch, Generic[M]):
    """The base of `Messages` and `AsyncMessages`: everything but the waiting.

    Args:
        engine: The process's.
        progress: The offsets or ids that are stored with the batch.
        messages: The messages.
        mark: Returns a message's offset, or its id.
    """

    def __init__(
        self,
        engine: Engine,
        progress: Progress,
        messages: Iterable[M],
        mark: Callable[[M], Any],
    ) -> None:
        check_iterable("messages", messages)
        check_callable("message_id", mark, is_async=False)
        super().__init__(engine)
        self._progress = progress
        self._messages = messages
        self._mark = mark
        self._has_begun = False
        #: Whether all data of the messages is on the server. A later error, such as from executing
        #: a session that has ended, does not concern the messages.
        self.is_stored = False
        self._measure_at = MOST_RECORDS
        self.asks = progress.asks
        if self.asks:
            self.fresh = _CheckedUpdates((), self._takes)

    def passes_over(self, resource: str) -> bool:
        """Return whether the message in hand is stored already for a resource."""
        if not self._has_begun:
            raise self._outside()
        partition, _ = self._engine.members.place(resource)
        return self._progress.skips(partition)

    def ends_for_others(self, update: Any, failed: Callable[[], None]) -> bool:
        """End another thread's session when the block ends, if it ends while the block is open.

        Ending it at once would store data of messages without their offsets or ids.

        Returns:
            Whether the block will end it. If not, the block has ended already.
        """
        self.end(update, failed)
        return self.is_open or self._endings.pop(id(update), None) is None

    # Collecting

    def add_new(self, update: Any) -> None:
        """Store a new update when the block ends, unless it is stored already."""
        if self._takes(update):
            self.add(update)

    def add(self, update: Any) -> None:
        """Store the update's unsent data when the block ends."""
        if update._batch_ is not self:
            update._batch_ = self
            list.append(self.fresh, update)

    def replace(self, spent: Any, update: Any) -> None:
        """Store an update instead of another one that was merged into it."""
        fresh = self.fresh
        if fresh and fresh[-1] is spent and spent is not update:
            fresh.pop()
        self.add(update)

    def shrink(self) -> None:
        """Merge updates of the same record and class if only the batch refers to them."""
        watched = isinstance(self.fresh, _CheckedUpdates)
        self.fresh = list(self.fresh)
        super().shrink()
        if watched:
            self.fresh = _CheckedUpdates(self.fresh, self._takes)

    def _takes(self, update: Any) -> bool:
        if not self.asks or not self.passes_over(update.resource_id):
            return True
        update.mark_sent()
        return False

    def _outside(self) -> ConfigurationError:
        return ConfigurationError(
            "an update was made in the block that belongs to no message: loop over the batch, as "
            "in `for message in batch:`, and make the updates of a message there"
        )

    # Going on from message to message

    def _begin(self, message: M) -> bool:
        """Go on to a message. Return whether it has to be handled."""
        if not self.is_open:
            raise ConfigurationError("loop over the batch inside of its with block")
        wanted = self._progress.begin(self._mark(message))
        self._has_begun = True
        self.asks = self._progress.asks
        if self.asks and not isinstance(self.fresh, _CheckedUpdates):
            self.fresh = _CheckedUpdates(self.fresh, self._takes)
        return wanted

    @property
    def _is_full(self) -> bool:
        """Return whether the collected data is stored before the next message."""
        if len(self.fresh) < self._measure_at:
            return False
        place = self._engine.members.place
        records: dict[int, set[str]] = {}
        for update in self.fresh:
            resource = update.resource_id
            records.setdefault(place(resource)[0], set()).add(resource)
        room = MOST_RECORDS - max(map(len, records.values()), default=0)
        self._measure_at = len(self.fresh) + room
        return room <= 0

    def _piece(self) -> Flow[list[BaseException]]:
        """Return the flow that stores the data collected so far."""
        fresh, self.fresh = list(self.fresh), self.fresh[:0]
        self.fresh = _CheckedUpdates((), self._takes) if self.asks else []
        self._measure_at = MOST_RECORDS
        return _storing(self._engine, self, self._progress, fresh)

    # The end

    def _closing(self) -> "MessagesClosing | None":
        self.is_open = False
        endings = [self._endings.pop(key) for key in list(self._endings)]
        fresh, joins = list(self.fresh), self.joins
        self.fresh, self.joins = [], {}
        self._engine.close_batch(self, self._outer)
        self._return_aside()
        if not self.is_complete:
            drop(self, fresh)
            fresh = []
        elif fresh and not self._has_begun:
            drop(self, fresh)
            raise self._outside()
        stores = self.is_complete and self._has_begun
        if not (stores or joins or endings):
            return None
        return MessagesClosing(self, joins, fresh, endings, stores=stores)


class MessagesClosing(Closing):
    """The contents of messages on their way to the server.

    Args:
        batch: The batch.
        contents: The other arguments of a `Closing`.
        stores: Whether there is anything to store, if only the source's position.
    """

    _batch: BaseMessages[Any]

    def __init__(self, batch: BaseMessages[Any], *contents: Any, stores: bool) -> None:
        super().__init__(batch._engine, batch, *contents)  # noqa: SLF001 - a class of this module
        self._stores = stores

    def _sending(self) -> Flow[list[BaseException]]:
        engine = self._engine
        errors: list[BaseException] = []
        if self._stores:
            progress = self._batch._progress  # noqa: SLF001 - a class of this module
            errors += yield from _storing(engine, self._batch, progress, self._fresh)
        if self._joins:
            errors += yield from engine.outbox.store((), list(self._joins))
        self._batch.is_stored = self._batch.is_complete and not errors
        # Only now: their last data has to be stored with the books, not by the end of a session.
        errors += yield from end_all(engine, self._endings)
        return errors

    def interrupted(self) -> None:
        """Drop all if the flow has not begun. Calls that have begun go on in the background."""
        self._batch._progress.failed()  # noqa: SLF001 - a class of this module
        if not has_begun(self.flow):
            drop(self._batch, self._fresh)
            for ending in self._endings:
                ending.failed()


def drop(batch: BaseBatch, updates: Iterable[Any]) -> None:
    """Drop the updates' unsent data, because the broker delivers its messages again."""
    for update in updates:
        if update._batch_ is batch:
            update._batch_ = None
        if update.has_unsent():
            try:
                update._locked_(update._empty_)
            except Exception:  # noqa: BLE001 - the user's `clear`
                update.discard()


def _storing(
    engine: Engine, batch: BaseBatch, progress: Progress, fresh: list[Any]
) -> Flow[list[BaseException]]:
    # A collection has one record a key, so its records need no merge. A record that was merged into
    # another one would keep its states, and the next message would be folded into them.
    cached = [update for update in fresh if update.is_folded_]
    loose = merge_updates(update for update in fresh if not update.is_folded_)
    try:
        errors: list[BaseException] = yield from engine.sources.ingest(progress, [*cached, *loose])
    finally:
        # What the next batch has by now is not of this one, which may have lost its caller.
        own = [update for update in fresh if update._batch_ is batch]
        for update in own:
            update._batch_ = None
    if errors:
        drop(batch, own)
    return errors


class Messages(BaseMessages[M], Batch):
    """A batch of messages, stored together with its offsets or ids.

    Loop over it inside its ``with`` block, and make the updates of each message there. The loop
    skips messages that are stored already. When the block ends, everything is on the server, and
    the messages can be acknowledged. If the block raises, no data of it is stored.

    Made by `Source.batch`, and by `Process.batch` with ``dedupe``.
    """

    def __iter__(self) -> Iterator[M]:
        for message in self._messages:
            if self._is_full:
                self._store_piece()
            if self._begin(message):
                yield message

    def _store_piece(self) -> None:
        try:
            errors = self._engine.run(self._piece())  # type: ignore[attr-defined]  # of threads
        except BaseException:
            self._progress.failed()
            raise
        for error in errors:
            raise error


class BaseSource:
    """The base of `Source` and `AsyncSource`: everything but the waiting."""

    def __init__(self, process: Any, claim: SourceClaim) -> None:
        self._process = process
        self._claim = claim

    def __repr__(self) -> str:
        where = "in doubt" if self._claim.in_doubt else f"at {self._claim.position}"
        return f"<phonon source {self.name!r} {where}>"

    @property
    def name(self) -> str:
        """Its name."""
        return self._claim.name

    @property
    def in_doubt(self) -> bool:
        """True after an error: the source has to be claimed again."""
        return self._claim.in_doubt

    def position(self) -> int | None:
        """Return the first offset that is not stored everywhere, from which to read on.

        Returns:
            The offset; None if nothing was ever stored, so that the reader may begin anywhere.

        Raises:
            SourceLostError: There was an error: call `claim` first.
        """
        self._check()
        return self._claim.position

    def report_end(self, offset: int) -> None:
        """Report the end of the broker's messages, so that operators see how many wait.

        Args:
            offset: The first offset without a message.
        """
        self._claim.end = offset

    def _check(self) -> None:
        if self._claim.in_doubt:
            raise self._claim.lost("is in doubt after an error")

    def _progress(self) -> OrderedProgress:
        self._check()
        return OrderedProgress(self._claim)


class Source(BaseSource):
    """An ordered source of messages, like a partition of a Kafka topic, that this process reads.

    Phonon stores the offset up to which messages are stored, in the same atomic step as their data.
    So a message that is delivered again is skipped, and offsets need not be committed anywhere
    else. As soon as the source is claimed, no other process can store its messages.

    Made by `Process.source`.

    Example:
        >>> source = process.source("orders/3")  # doctest: +SKIP
        >>> consumer.seek(source.position() or 0)  # doctest: +SKIP
        >>> with source.batch(consumer.read(1000)) as batch:  # doctest: +SKIP
        ...     for message in batch:
        ...         cache.set(message.key, Visits(process, message.key, doc={"n": 1}))
    """

    _process: "Process"

    def batch(self, messages: Iterable[M], offset: Callable[[M], int] | None = None) -> Messages[M]:
        """Collect the data of messages, and store it with the source's position.

        Args:
            messages: The messages, in growing order of offsets. Stored ones are skipped.
            offset: Returns a message's offset. None: its attribute or method ``offset``, or the
                first item of a tuple.

        Returns:
            A context manager to loop over in its block. Leaving the block raises `SourceLostError`
            if another consumer has claimed the source: then nothing is stored. After this or any
            other error, `claim` the source again, and read on from its `position`.
        """
        return Messages(self._process.engine, self._progress(), messages, offset or offset_of)

    def claim(self, position: int | None = None) -> None:
        """Claim the source again: after an error, or when the broker has assigned it again.

        Args:
            position: A new position for the source, so that messages are stored again, or
                skipped. None keeps its position.

        Raises:
            SourceLostError: Another consumer was faster.
            ConnectionLostError: The server does not answer.
        """
        engine = self._process.engine
        self._claim = engine.run(engine.sources.claim(self.name, position))

    def settle(self) -> None:
        """Store the position in all partitions, for a source that falls silent or is handed over.

        Batches do this about once a second. Without it the next reader may begin a little earlier
        than necessary.

        Raises:
            SourceLostError: Another consumer has claimed it.
            ConnectionLostError: The server does not answer.
        """
        self._check()
        if not self._claim.is_behind:
            return
        engine = self._process.engine
        try:
            errors = engine.run(engine.sources.move_on(self._claim))
        except BaseException:
            self._claim.in_doubt = True
            raise
        raise_together("not everything was stored", errors_only(errors))

    def forget(self) -> None:
        """Delete the source's position, so that it is a new source when it is claimed again."""
        engine = self._process.engine
        engine.run(engine.sources.drop(self._claim))


def offset_of(message: Any) -> Any:
    """Return the offset of a message, as the usual clients have it."""
    if isinstance(message, tuple):
        return message[0]
    offset = message.offset
    return offset() if callable(offset) else offset


def id_of(message: Any) -> Any:
    """Return the id of a message, as the usual clients have it."""
    if isinstance(message, tuple):
        return message[0]
    if isinstance(message, dict):
        return message["MessageId"]
    found = message.id
    return found() if callable(found) else found


def unordered(engine: Engine, dedupe: Any, window: float) -> UnorderedProgress:
    """Return the progress of a batch whose messages have ids.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    if dedupe is None:
        raise ConfigurationError(
            "messages, message_id and window are for batches that remember ids: give dedupe= as "
            "well, or leave them out"
        )
    check_name("dedupe", dedupe)
    if not is_number(window) or not 1 <= window < math.inf:
        raise ConfigurationError(
            f"window is a number of seconds, at least 1, not {window!r}: give one that is longer "
            "than the broker takes to deliver a message again"
        )
    ids: StoredIds = engine.sources.ids(dedupe, window)
    return UnorderedProgress(ids)
