"""Sources of messages: offsets and ids are stored with a batch, so that a repeat changes nothing.

An ordered source has a position in each partition of the namespace. The operation that stores data
also writes the position, and only if the source is at the position that this reader expects and has
not been claimed since. So the operations of one source form a chain: a lost one breaks it, and none
is carried out twice.

An unordered source has ids, which are remembered for a window of time, in the partition of the data
of their messages.

After any failure the local view is in doubt, the batch's data is dropped, and the reader begins
again at the server's position. The outbox gets no data, because the broker still has it.
"""

import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from phonon._core.compaction import LongSession
from phonon._core.executor import Executor
from phonon._core.flows import Branch, Flow, Send, checked, read_all, single
from phonon._core.identity import Identity
from phonon._core.members import Members
from phonon._core.parcels import Parcel
from phonon._core.reports import Reports
from phonon._protocol import operations
from phonon._protocol.answers import Reply
from phonon._protocol.operations import Operation
from phonon._protocol.partitions import encode_resource
from phonon.errors import AlreadyStoredError, ForeignKeyError, PhononError, SourceLostError

_CLAIMED, _REFUSED, _INGESTED, _SEEN = (
    int(Reply.CLAIMED),
    int(Reply.REFUSED),
    int(Reply.INGESTED),
    int(Reply.SEEN),
)

#: Seconds after which partitions without messages are moved on, so that a reader that begins again
#: need not go far back.
MOVE_ON_AFTER = 1.0


class SourceClaim:
    """The state of an ordered source that this process reads.

    Attributes:
        name: The source's name.
        encoded: The server's name of it.
        epoch: The claim's number; a later claim has a greater one.
        positions: By partition, the first offset that is not stored; None before the first one.
        done: Everything before this offset has been stored under this claim, or before it.
        end: The first offset that the broker does not have yet, if the reader has reported it.
        in_doubt: Whether an error occurred, so that only the server knows the positions.
        moved_on: When all partitions were at the same position, by the monotonic clock.
    """

    __slots__ = (
        "__weakref__",
        "done",
        "encoded",
        "end",
        "epoch",
        "in_doubt",
        "moved_on",
        "name",
        "positions",
    )

    def __init__(self, name: str, epoch: int, positions: Sequence[int | None]) -> None:
        self.name = name
        self.encoded = encode_resource(name)
        self.epoch = epoch
        self.positions = list(positions)
        self.done = 0
        self.end: int | None = None
        self.in_doubt = False
        self.moved_on = time.monotonic()

    @property
    def position(self) -> int | None:
        """The first offset that some partition lacks; None for a new source."""
        return min((p for p in self.positions if p is not None), default=None)

    @property
    def lag(self) -> int | None:
        """The number of the broker's messages that are not stored; None if it is unknown."""
        if self.end is None:
            return None
        return max(0, self.end - max(self.done, self.position or 0))

    @property
    def is_behind(self) -> bool:
        """Return whether partitions without messages stand before the position that is done."""
        return any(p is not None and p < self.done for p in self.positions)

    def moves(self) -> list[Operation]:
        """Return the operations that move all partitions on to the position that is done."""
        self.moved_on = time.monotonic()
        return [
            operations.ingest(
                p, self.encoded, self.epoch, (b"%d" % position, b"%d" % self.done), []
            )
            for p, position in enumerate(self.positions)
            if position is not None and position < self.done
        ]

    def lost(self, why: str) -> SourceLostError:
        """Return the error for a claim that is not valid any more."""
        self.in_doubt = True
        return SourceLostError(
            f"source {self.name!r} {why}; nothing of the batch was stored that was not stored "
            "before. If this consumer is still assigned to it: claim() it again and read on from "
            "its position()",
            self.name,
        )


class OrderedProgress:
    """A batch's progress on an ordered source.

    It is based on the source's positions at its begin. So the server refuses it if another batch of
    the same source was stored meanwhile, which may have some of the same messages.

    Args:
        claim: The source.
    """

    def __init__(self, claim: SourceClaim) -> None:
        self._claim = claim
        self._first: int | None = None
        self._offset = -1
        self._upto: int | None = None
        self._positions = list(claim.positions)
        known = [p for p in self._positions if p is not None]
        self._lowest, self._highest = min(known, default=0), max(known, default=0)
        #: Whether `skips` has to be asked about each update.
        self.asks = False

    def begin(self, mark: Any) -> bool:
        """Go on to the message with that offset. Return whether it has to be handled at all."""
        if type(mark) is not int or mark < 0:
            raise TypeError(f"an offset is an int of 0 or more, not {mark!r}")
        if self._upto is not None and mark < self._upto:
            raise ValueError(
                f"offset {mark} of source {self._claim.name!r} comes after {self._upto - 1}: give "
                "the messages of one source in growing order"
            )
        if self._first is None:
            self._first = mark
        self._offset, self._upto = mark, mark + 1
        self.asks = mark < self._highest
        return mark >= self._lowest

    def skips(self, partition: int) -> bool:
        """Return whether the message's data is in that partition already."""
        position = self._positions[partition]
        return position is not None and self._offset < position

    def preparing(self) -> list[Operation]:
        """Give a new source its first position, so that a crash in its first batch loses none."""
        claim, positions = self._claim, self._positions
        if self._first is None or None not in positions:
            return []
        # After a crash some partitions may have no position and no messages.
        start = min((p for p in positions if p is not None), default=self._first)
        return [
            operations.ingest(p, claim.encoded, claim.epoch, (b"", b"%d" % start), [])
            for p, position in enumerate(positions)
            if position is None
        ]

    def operations(self, items: dict[int, list[bytes]]) -> list[Operation]:
        """Return the operations that store items, and move the source on."""
        claim, upto = self._claim, self._upto
        if upto is None:
            return []
        partitions: Iterable[int] = items
        now = time.monotonic()
        if now - claim.moved_on >= MOVE_ON_AFTER:
            claim.moved_on = now
            partitions = range(len(claim.positions))
        sent = []
        for partition in partitions:
            position = self._positions[partition]
            if position is not None and position < upto:
                positions = b"%d" % position, b"%d" % upto
                sent.append(
                    operations.ingest(
                        partition, claim.encoded, claim.epoch, positions, items.get(partition, [])
                    )
                )
        return sent

    def stored(self, operation: Operation) -> None:
        """Note the position to which the operation has moved the source."""
        position = int(operation.words[4])
        self._positions[operation.partition] = position
        self._claim.positions[operation.partition] = position

    def refused(self, operation: Operation, answer: Any) -> PhononError:
        """Return the error: another claim, or an earlier operation was refused."""
        _, epoch, position = answer
        if epoch != operation.words[2]:
            return self._claim.lost("was claimed by another consumer")
        where = position.decode() or "nowhere"
        return self._claim.lost(f"stands at {where} in partition {operation.partition}")

    def failed(self) -> None:
        """Note that only the server knows the positions."""
        self._claim.in_doubt = True

    def finished(self) -> None:
        """Note that all earlier messages are stored, also for partitions without messages."""
        if self._upto is not None:
            self._claim.done = max(self._claim.done, self._upto)


class StoredIds:
    """The ids of a scope that this process knows to be stored, by partition: the latest ones.

    Args:
        scope: The name within which the ids are unique.
        window: Seconds for which the server remembers them.

    Attributes:
        lag: The number of messages of the scope that wait, if their reader has reported it.
    """

    #: The most ids to keep: those of a few batches, which may be delivered again.
    MOST = 65536

    def __init__(self, scope: str, window: float) -> None:
        self.scope = scope
        self.encoded = encode_resource(scope)
        self.window_ms = int(window * 1000)
        self.lag: int | None = None
        self.known: dict[tuple[int, bytes], None] = {}

    def learn(self, partition: int, ids: Iterable[bytes]) -> None:
        """Note that messages are stored in a partition."""
        known = self.known
        for each in ids:
            known[partition, each] = None
        while len(known) > self.MOST:
            del known[next(iter(known))]


class UnorderedProgress:
    """A batch's progress on a source with ids.

    Args:
        ids: Its known ids.
    """

    asks = True

    def __init__(self, ids: StoredIds) -> None:
        self._ids = ids
        self._id = b""
        self._begun: set[bytes] = set()
        self._new_ids: dict[int, list[bytes]] = {}

    def begin(self, mark: Any) -> bool:
        """Go on to the message with that id. Return whether it has to be handled at all."""
        if isinstance(mark, str):
            mark = mark.encode("utf-8", "surrogatepass")
        elif isinstance(mark, int):
            mark = b"%d" % mark
        if not isinstance(mark, bytes) or not mark:
            raise TypeError(f"a message's id is a str, bytes or int, not {mark!r}")
        self._id = mark
        if mark in self._begun:
            return False  # twice in one batch
        self._begun.add(mark)
        return True

    def skips(self, partition: int) -> bool:
        """Return whether a partition has the message's data already; if not, note that it will."""
        mark = self._id
        if (partition, mark) in self._ids.known:
            return True
        if mark:
            ids = self._new_ids.setdefault(partition, [])
            if not ids or ids[-1] is not mark:
                ids.append(mark)
        return False

    def preparing(self) -> list[Operation]:
        """Return no operations."""
        return []

    def operations(self, items: dict[int, list[bytes]]) -> list[Operation]:
        """Return the operations that store items with the ids of their messages."""
        ids, new_ids = self._ids, self._new_ids
        self._new_ids = {}
        return [
            operations.ingest_new(p, ids.encoded, ids.window_ms, new_ids.get(p, []), partials)
            for p, partials in items.items()
        ]

    def stored(self, operation: Operation) -> None:
        """Note the stored ids, in case other partitions of the batch refuse."""
        self._ids.learn(operation.partition, operation.words[3])

    def refused(self, operation: Operation, answer: Any) -> PhononError:
        """Return the error for messages that were stored before."""
        seen = answer[1]
        self._ids.learn(operation.partition, seen)
        return AlreadyStoredError(
            f"{len(seen)} of the batch's messages were stored before by another delivery, and the "
            "messages merged with them were not stored now: handle the same messages again (this "
            "process skips the stored ones from now on), or leave them to the broker to deliver",
            tuple(seen),
        )

    def failed(self) -> None:
        """Do nothing: the server tells which messages are stored when they are delivered again."""

    def finished(self) -> None:
        """Do nothing: there is no position."""


#: The progress that is stored with a batch of messages.
Progress = OrderedProgress | UnorderedProgress


class Sources:
    """Claims sources, and stores their messages' data.

    Args:
        identity: The identity of this process.
        members: Its memberships.
        executor: Merges partials of long sessions.
        reports: Reports data that had to be put aside.
    """

    def __init__(
        self, identity: Identity, members: Members, executor: Executor, reports: Reports
    ) -> None:
        self._identity = identity
        self._members = members
        self._executor = executor
        self._reports = reports
        self._claims: weakref.WeakSet[SourceClaim] = weakref.WeakSet()
        self._ids: dict[tuple[str, float], StoredIds] = {}

    def ids(self, scope: str, window: float) -> StoredIds:
        """Return the known ids of a scope."""
        return self._ids.setdefault((scope, window), StoredIds(scope, window))

    def claim(self, name: str, position: int | None = None) -> Flow[SourceClaim]:
        """Become the only reader of an ordered source, in all partitions.

        Args:
            name: The source.
            position: The new position; None keeps the present one.

        Raises:
            SourceLostError: Another consumer has claimed it meanwhile.
            PhononError: The server does not answer, or refuses.
        """
        encoded = encode_resource(name)
        where = b"" if position is None else b"%d" % position
        partitions = self._identity.partitions
        own_partition = partitions.of(encoded)
        first = yield from single(operations.claim(own_partition, encoded, 0, where))
        others = [p for p in range(partitions.count) if p != own_partition]
        epoch = first[1]
        answers = yield Send([operations.claim(p, encoded, epoch, where) for p in others])
        positions: list[int | None] = [None] * partitions.count
        claim = SourceClaim(name, epoch, positions)
        for partition, answer in zip(
            [own_partition, *others], [first, *checked(answers)], strict=True
        ):
            if answer[0] == _REFUSED:
                raise claim.lost("was claimed by another consumer meanwhile")
            claim.positions[partition] = int(answer[2]) if answer[2] else None
        self._claims.add(claim)
        return claim

    def listed(self) -> list[tuple[str, str, str, int | None]]:
        """Return the facts that operators see about the sources that this process reads."""
        claims = [claim for claim in list(self._claims) if not claim.in_doubt]
        return [
            *((claim.name, "ordered", str(claim.position), claim.lag) for claim in claims),
            *((ids.scope, "ids", "", ids.lag) for ids in list(self._ids.values())),
        ]

    def position(self, name: str) -> Flow[int | None]:
        """Return a source's position, without claiming it."""
        encoded = encode_resource(name)
        replies = yield from read_all(self._identity.everywhere("source", encoded))
        return min((int(reply[1]) for reply in replies if reply[1]), default=None)

    def drop(self, claim: SourceClaim) -> Flow[None]:
        """Delete a source's position in all partitions."""
        count = range(self._identity.partitions.count)
        answers = yield Send([operations.drop_source(p, claim.encoded, claim.epoch) for p in count])
        claim.in_doubt = True
        if any(answer[0] == _REFUSED for answer in checked(answers)):
            raise claim.lost("was claimed by another consumer")

    def ingest(self, progress: Progress, parcels: Sequence[Parcel]) -> Flow[list[BaseException]]:
        """Store the data of messages together with their offsets or ids.

        Args:
            progress: The offsets or ids to store.
            parcels: The updates, of different resources or classes.

        Returns:
            The errors. After an error the data is dropped, because the broker still has it.
        """
        errors: list[BaseException] = []
        items: dict[int, list[bytes]] = {}
        parcels_of: dict[int, list[Parcel]] = {}
        place = self._members.place
        for parcel in parcels:
            try:
                partial = parcel.take()
            except Exception as error:  # noqa: BLE001 - the user's `state`, or a value that cannot be stored
                errors.append(error)
                continue
            if partial is None:
                continue
            partition, name = place(parcel.resource_id)
            items.setdefault(partition, []).extend((name, partial))
            parcels_of.setdefault(partition, []).append(parcel)
        if errors:
            progress.failed()
            return errors
        # Before anything is sent: a caller that goes away must not trust its view.
        preparing = progress.preparing()
        if preparing:
            errors += yield from self._send(progress, preparing, {}, {})
        if not errors:
            errors += yield from self._send(progress, progress.operations(items), items, parcels_of)
        if not errors:
            progress.finished()
        return _together(errors)

    def move_on(self, claim: SourceClaim) -> Flow[list[BaseException]]:
        """Store a source's position in partitions without messages as well."""
        errors = yield from self._send(OrderedProgress(claim), claim.moves(), {}, {})
        return _together(errors)

    def _send(
        self,
        progress: Progress,
        sent: list[Operation],
        items: dict[int, list[bytes]],
        parcels_of: dict[int, list[Parcel]],
    ) -> Flow[list[BaseException]]:
        if not sent:
            return []
        errors: list[BaseException] = []
        held = self._members.held
        resources = [
            [parcel.resource_id for parcel in parcels_of.get(o.partition, ())] for o in sent
        ]
        entries = [self._members.entering(names) for names in resources]
        for parcels in parcels_of.values():
            for parcel in parcels:
                if held.get(parcel.resource_id) is None:
                    held[parcel.resource_id] = weakref.ref(parcel)
        try:
            answers = yield Send(sent)
        except BaseException:
            progress.failed()
            raise
        long_sessions: list[LongSession] = []
        partials = size = 0
        for operation, answer, names, entered in zip(
            sent, answers, resources, entries, strict=True
        ):
            code = answer[0] if isinstance(answer, list) else answer
            if code == _INGESTED:
                progress.stored(operation)
                taken = items.get(operation.partition, ())[1::2]
                partials += len(taken)
                size += sum(map(len, taken))
                if answer is not _INGESTED and isinstance(answer, list):
                    sent_items = items[operation.partition]
                    long_sessions += _pairs(operation.partition, sent_items, answer[1])
                    self._put_aside(operation.partition, sent_items, answer[2])
                    partials -= len(answer[2]) // 2
                    size -= sum([len(sent_items[2 * place + 1]) for place in answer[2][::2]])
            else:
                errors.append(_error(progress, operation, answer))
            for name, entry in zip(names, entered, strict=True):
                self._members.entered(name, entry, failed=code != _INGESTED)
        yield from self._members.settle_doubts()
        self._identity.measures.add_stored(partials, size)
        if long_sessions:
            yield Branch(self._executor.compact(long_sessions))
        return errors

    def _put_aside(self, partition: int, items: Sequence[bytes], wrong: Sequence[Any]) -> None:
        for place, error in zip(wrong[::2], wrong[1::2], strict=True):
            text = error.decode("utf-8", "replace")
            self._reports.report_error(
                ForeignKeyError(
                    f"a message's data for {items[2 * place]!r} in partition {partition} could not "
                    f"be stored, and was parked: {text}; see Process.parked()"
                )
            )


def _together(errors: list[BaseException]) -> list[BaseException]:
    """Return one error of each kind, if several partitions have the same."""
    seen = [error for error in errors if isinstance(error, AlreadyStoredError)]
    if len(seen) > 1:
        ids = tuple({each: None for error in seen for each in error.ids})
        seen = [AlreadyStoredError(str(seen[0]), ids)]
    lost = [error for error in errors if isinstance(error, SourceLostError)][:1]
    rest = [e for e in errors if not isinstance(e, AlreadyStoredError | SourceLostError)]
    return [*rest, *lost, *seen]


def _error(progress: Progress, operation: Operation, answer: Any) -> PhononError | Exception:
    if isinstance(answer, list) and answer[0] in (_REFUSED, _SEEN):
        return progress.refused(operation, answer)
    progress.failed()
    if isinstance(answer, Exception):
        return answer
    return PhononError(f"the server answered {answer!r} to {operation!r}")


def _pairs(partition: int, items: Sequence[bytes], many: Sequence[int]) -> list[LongSession]:
    return [
        LongSession(partition, items[2 * place], count)
        for place, count in zip(many[::2], many[1::2], strict=True)
    ]
