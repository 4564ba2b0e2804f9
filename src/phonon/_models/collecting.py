"""The base of collections of a model's records: everything but the waiting."""

import math
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

from phonon._core.engine import Engine
from phonon._core.flows import Flow, read
from phonon._core.local import prefix_of
from phonon._core.sessions import SPREAD, share
from phonon._models.columns import PendingTables, Rows, rows_of
from phonon._models.messages import mapping_of
from phonon._models.record import DATABASE, ModelRecord
from phonon.errors import ConfigurationError, InvalidMessageError, UnknownClassError
from phonon.settings import (
    check_count,
    check_flag,
    check_has,
    check_iterable,
    check_key,
    check_seconds,
)

P = ParamSpec("P")
M = TypeVar("M")

#: Number of rows that are stored together if no batch is open.
TOGETHER = 10_000
#: Partials read at a time.
_PAGE = 1000
#: The most attempts to read data that other processes change meanwhile.
_ATTEMPTS = 5


class Rejected(NamedTuple):
    """A row that was not merged.

    Attributes:
        row: Its number, from 0.
        error: The reason.
    """

    row: int
    error: InvalidMessageError


class SessionLimits:
    """Decides when the sessions of a collection's records end; a part of its cache.

    Attributes:
        idle: Seconds without a message after which this process leaves the session; None: never.
        longest: Seconds after which the session ends although messages keep coming.
    """

    idle: float | None = None
    longest: float | None = None
    max_entries: int
    _entries: Any

    def _make_room(self) -> None:
        """Move records that were used since their last move to the end, as a clock does.

        Moving a record with each message would cost as much as the merge.
        """
        entries = self._entries
        for _ in range(len(entries)):
            if len(entries) < self.max_entries:
                return
            key = next(iter(entries))
            if not entries[key].is_used:
                return
            entries[key].is_used = False
            entries.move_to_end(key)

    def _ends_at(self, record: Any) -> float:
        return min(self._idle_at(record), self._ends_by(record))

    def _idle_at(self, record: Any) -> float:
        if self.idle is None:
            return math.inf
        part = 1 + SPREAD * share(record.resource_id)
        return float(record._touched_ + self.idle * part)

    def _ends_by(self, record: Any) -> float:
        if record.is_due:
            return 0.0
        if self.longest is None:
            return math.inf
        # Nothing may exceed these bounds, so the spread ends sessions before them.
        part = 1 - SPREAD * share(record.resource_id)
        return float(record._begun_ + self.longest * part)

    def _is_over(self, record: Any, now: float) -> bool:
        if self._ends_by(record) <= now:
            record.is_due = True  # even if other processes hold the resource
            return True
        return self._idle_at(record) <= now


class BaseCollection(Generic[P, M]):
    """The base of `Collection` and `AsyncCollection`.

    Args:
        process: The process.
        model: The model.
        max_entries: The number of keys to keep in this process at the most.
        idle: Seconds without a message after which the session ends here; None: it does not.
        longest: Seconds after which the session ends although messages keep coming.
        largest: The number of messages from this process after which it ends.
        ignore_unknown: Whether to ignore a message's fields that the model does not have.
        sink: The sink of the model's records, in place of its ``on_complete``.
    """

    def __init__(
        self,
        process: Any,
        model: Callable[P, M],
        max_entries: int = 10_000,
        *,
        idle: float | None = None,
        longest: float | None = None,
        largest: int | None = None,
        ignore_unknown: bool = False,
        sink: Any = None,
    ) -> None:
        self.model = cast("Any", model)
        self._check_model(sink)
        for name, value in (("idle", idle), ("longest", longest)):
            if value is not None:
                check_seconds(name, value)
        if largest is not None:
            check_count("largest", largest)
        self.idle, self.longest, self.largest = idle, longest, largest
        self.ignore_unknown = check_flag("ignore_unknown", ignore_unknown)
        self._process = process
        self._engine: Engine = process.engine
        self._record: type[ModelRecord] = self.model._record  # noqa: SLF001 - a model of ours
        self._compiled = self._record.compiled
        if self._record.is_async and not self._engine.is_async:
            raise ConfigurationError(
                f"{self.model.__qualname__}.on_complete is a coroutine function, and this process "
                "has no event loop: use phonon.aio.AsyncProcess"
            )
        self._collection = self._record.resource_collection
        self._cache = self._make_cache(max_entries)
        self._cache.idle, self._cache.longest = idle, longest
        self._engine.caches.add(self._cache)
        self._build()

    def _check_model(self, sink: Any) -> None:
        from phonon.model import Model  # noqa: PLC0415 - phonon.model imports this module

        model = self.model
        if not isinstance(model, type) or not issubclass(model, Model):
            raise ConfigurationError(
                f"model is a subclass of phonon.Model, not {model!r}: give collect() the class"
            )
        model._code()  # noqa: SLF001 - it raises if there is no ID
        if sink is not None:
            check_has(
                "sink", sink, ["prepare", "write"], "a phonon.sinks.Sink, such as an SqlTable"
            )
            sink.prepare(model)
            model._record.sink = sink  # noqa: SLF001 - a model of ours
        elif not model.completes_many() and model.on_complete is Model.on_complete:
            raise ConfigurationError(
                f"{model.__qualname__} must define on_complete() or on_complete_many(), or "
                "collect() must be given a sink"
            )

    def _make_cache(self, max_entries: int) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        cache, name = self._cache, self.model.__qualname__
        return f"<phonon.{type(self).__name__} of {name}: {len(cache)} of {cache.max_entries} keys>"

    def size(self) -> int:
        """Return the number of keys in this process."""
        return len(self._cache)

    def __len__(self) -> int:
        return len(self._cache)

    def __contains__(self, key: object) -> bool:
        return key in self._cache

    def get(self, key: Any) -> M | None:
        """Return a key's data that is not on the server yet, as a record; None if there is none.

        Inside a batch this is the batch's data. The call does not count as a message.
        """
        check_key(key)
        cache = self._cache
        with cache._lock:  # noqa: SLF001 - a cache of ours
            record = cache._entries.get(key)  # noqa: SLF001
            return None if record is None else record.shown()

    # Code that is compiled for each collection

    def _build(self) -> None:
        """Compile the functions that take messages; anew in a forked child, whose locks differ."""
        cache, engine = self._cache, self._engine
        counts = self.largest is not None
        namespace = {
            "_batches": engine.batches,
            "_local": engine.local,
            "_measures": engine.identity.measures,
            "_entries": cache._entries,  # noqa: SLF001
            "_KeyError": KeyError,
            "_ready": self._ready,
            "_left": cache.left,
            "_drain": cache.drain,
            "_passes_over": self._passes_over,
            "_outbox": engine.outbox,
            "_wait_for_room": self._wait_for_room,
            "_clock": time.monotonic,
            "_largest": self.largest,
            "_grown": self._grown,
            "_ignore_unknown": self.ignore_unknown,
            "_mapping_of": mapping_of,
            "_dict": dict,
            "_InvalidMessageError": InvalidMessageError,
            "_Rejected": Rejected,
            "_finish": self._finish,
        }
        parts = {
            "@TOUCH": "_record._touched_ = _clock()" if self.idle is not None else "",
            "@SEEN": "_record._touched_ = _now" if self.idle is not None else "",
            "@COUNT": _COUNT if counts else "",
        }
        self._pending_tables = PendingTables(self._compiled, cache._lock)  # noqa: SLF001
        build = self._compiled.build
        self._fold_one = build("add", _filled(_PUT, parts), namespace)
        self._fold_rows = build("put_rows", _filled(_PUT_ROWS, parts), namespace)
        if not _HAS_GIL:
            self._lock_folds(_filled(_PUT, parts), namespace)

    def _lock_folds(self, template: str, namespace: Mapping[str, Any]) -> None:
        """Make the compiled functions run under the lock, which is never held across a wait."""
        cache, put_rows = self._cache, self._fold_rows
        unlocked: dict[str, Any] = {"_finish": lambda *rest: rest, "_wait_for_room": lambda: None}
        put = self._compiled.build("add", template, {**namespace, **unlocked})

        def add(*values: Any, **named: Any) -> Any:
            if self._engine.outbox.full:
                self._wait_for_room()
            with cache._lock:  # noqa: SLF001 - a cache of ours
                rest = put(*values, **named)
            return None if rest is None else self._finish(*rest)

        def add_rows(*arguments: Any) -> Any:
            with cache._lock:  # noqa: SLF001 - a cache of ours
                return put_rows(*arguments)

        self._fold_one, self._fold_rows = add, add_rows

    # Called by compiled code, not for each message

    def _ready(self, key: Any, batch: Any, target: Any) -> ModelRecord | None:
        """Make the record of a key ready for a message.

        Args:
            key: The message's key.
            batch: The open batch of this thread or task, if there is one.
            target: The same batch if it is durable; else None.

        Returns:
            None if the collection has the record, unless it has left meanwhile. Otherwise a record
            for this message alone.
        """
        alone = None
        with self._cache._lock:  # noqa: SLF001 - a cache of ours
            record = self._cache._entries.get(key)  # noqa: SLF001
            if record is None:
                record = self._new(key, target)
                self._cache.insert(key, record)
                if batch is not None and target is None:
                    record._is_left_to_others_(self._engine, init_cache=False)
            other_batch = record._batch_
            if other_batch is not None and other_batch is not target and other_batch.is_open:
                # Another thread's batch stores the record. Our caller does not hear of that batch's
                # end but must know when all is stored, so this message is stored separately.
                alone = self._new(key, target)
                if target is None and batch is not None:
                    other_batch.put_aside(record, alone)
                record = alone
            if target is not None:
                target.keep(record)
                target.add(record)
                record._unsent_ = True
            elif alone is None:
                record._batch_ = None  # a batch that is being closed
        return alone

    def _passes_over(self, batch: Any, key: Any) -> bool:
        """Return whether a message is stored already; see `phonon.source`."""
        resource = f"{prefix_of(self._engine, DATABASE, self._collection)}{key}"
        return bool(batch.passes_over(resource))

    def _new(self, key: Any, target: Any = None) -> ModelRecord:
        self._engine.ensure_alive()  # type: ignore[attr-defined]  # of threads or tasks
        record = object.__new__(self._record)
        record._id = key
        record.database, record.collection = DATABASE, self._collection
        record.spec = record.odd_ = None
        self._compiled.fill(record, _NOTHING)
        record.attach(self._process)
        if target is not None:
            target.add(record)  # before it is kept: it had no content before the block
        return record

    def _wait_for_room(self) -> None:
        """Wait until new messages are taken in."""
        raise NotImplementedError

    def _grown(self, key: Any, record: ModelRecord) -> None:
        """End a session that has reached its largest size."""
        if not record.is_due:
            record.is_due = True
            self._engine.sessions.watch(self._cache.known, key, 0.0)

    # Flows

    def _storing(self, record: ModelRecord) -> Flow[list[BaseException]]:
        """Store a message that was folded outside of a batch."""
        return record.storing(self._engine)

    def _reading(self, key: Any) -> Flow[M | None]:
        """Read the data that all processes have stored of a key in its open session."""
        engine = self._engine
        resource = f"{prefix_of(engine, DATABASE, self._collection)}{key}"
        partials = yield from self._partials(resource)
        found: Any = None
        for partial in partials:
            try:
                record = engine.codec.decode(resource, partial, "the open session")
            except UnknownClassError:
                continue  # of a later release, say
            if type(record) is not self._record:
                continue
            if found is None:
                found = record
            else:
                found.merge(record)
        return None if found is None else found.shown()

    def _partials(self, resource: str) -> Flow[list[bytes]]:
        engine = self._engine
        partition, name = engine.members.place(resource)

        def page(at: int) -> Flow[list[bytes]]:
            words = b"%d" % at, b"%d" % (at + _PAGE - 1)
            found = yield from read(
                engine.identity.in_partition(partition, "session", name, *words)
            )
            return list(found)

        partials: list[bytes] = []
        for _ in range(_ATTEMPTS):
            first = yield from page(0)
            partials, more = list(first), first
            while more and len(partials) % _PAGE == 0:
                more = yield from page(len(partials))
                partials += more
            # Other processes may merge the partials, or take them all, in between.
            if len(partials) == len(first) or (yield from page(0)) == first:
                break
        return partials

    # Messages

    def _finish(self, record: Any, evicted: Sequence[tuple[Hashable, Any]], alone: bool) -> Any:
        """Go on with a message that was folded.

        Args:
            record: Its record.
            evicted: The records that have left the collection for it.
            alone: Whether no batch stores it.
        """
        raise NotImplementedError

    def _folded_record(self, record: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Fold a user's record of one message, whose ``on_complete`` is given arguments."""
        message = mapping_of(record)
        if message is None:
            raise self._compiled.no_mapping(record)
        cache = self._cache
        with cache._lock:  # noqa: SLF001 - a cache of ours
            rest = self._fold_one(**message)
            key = message.get(self._compiled.id.name)
            found = cache._entries.get(key)  # noqa: SLF001
            if found is not None:
                found.arguments_ = arguments, named
        return rest

    def _rows_of(self, table: Any) -> Rows:
        return rows_of(table, self._compiled, ignore_unknown=self.ignore_unknown)

    def _put_table(self, rows: Rows) -> list[tuple[Hashable, Any]]:
        """Merge a table in the open batch. Return the entries that have left the collection."""
        batch = self._engine.batch
        target = batch if batch is not None and batch.durable else None
        if not rows.table.num_rows:
            return []
        with self._cache._lock:  # noqa: SLF001 - a cache of ours
            records = self._records(self._pending_tables.keys(rows), batch, target)
            self._pending_tables.add(rows, records)
            if self.largest is not None:
                self._pending_tables.merge_all()
        self._engine.identity.measures.folded += rows.table.num_rows
        left: list[tuple[Hashable, Any]] = self._cache.drain()
        return left

    def _records(self, keys: Sequence[Any], batch: Any, target: Any) -> dict[Any, ModelRecord]:
        """Return the records of keys, and mark them as used."""
        entries, now = self._cache._entries, time.monotonic()  # noqa: SLF001 - a cache of ours
        records: dict[Any, ModelRecord] = {}
        for key in keys:
            record = entries.get(key)
            if record is None or record._batch_ is not target:
                record = self._ready(key, batch, target) or entries[key]
            record._touched_ = now
            record.is_used = record.is_used is not None
            records[key] = record
        return records

    @property
    def engine(self) -> Engine:
        """The process's parts, which are private."""
        return self._engine

    def _pieces(self, rows: Iterable[Any], size: int) -> Iterable[tuple[int, list[Any]]]:
        iterator, first = iter(rows), 0
        while piece := list(islice(iterator, size)):
            yield first, piece
            first += len(piece)

    def _check_rows(self, rows: Any) -> None:
        """Refuse a single message in place of many.

        Raises:
            ConfigurationError: The argument is a single message.
        """
        if isinstance(rows, str | bytes) or mapping_of(rows) is not None:
            raise ConfigurationError(f"rows are several messages, not {rows!r}: put it into a list")
        check_iterable("rows", rows)

    def _put_rows(
        self, rows: Iterable[Any], first: int, rejected: list[Rejected]
    ) -> list[tuple[Hashable, Any]]:
        """Merge rows in the open batch. Return the entries that have left the collection."""
        batch = self._engine.batch
        target = batch if batch is not None and batch.durable else None
        refused = len(rejected)
        last = self._fold_rows(rows, first - 1, batch, target, rejected)
        folded = last + 1 - first - (len(rejected) - refused)
        self._engine.identity.measures.folded += folded
        left: list[tuple[Hashable, Any]] = self._cache.drain()
        return left


#: The doc of a new record.
_NOTHING: dict[str, Any] = {}


#: With the GIL compiled functions need no lock; see `phonon._models.field.FoldCode`.
_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with its marks replaced by lines; an empty part removes its line."""
    lines: list[str] = []
    for line in template.splitlines():
        mark = next((mark for mark in parts if mark in line), None)
        if mark is None:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        filled = line.strip().replace(mark, parts[mark])
        lines += [indent + part for part in filled.splitlines()]
    return "\n".join(lines)


#: Finds the record for a message, and prepares the fold.
_FIND = """\
while True:
    try:
        _record = _entries[@ID]
    except _KeyError:
        _record = None
    if _record is None or _record._batch_ is not _target:
        if _record is not None and @IDLE:
            # The first message in the block of a record that has nothing. No call: see FoldCode.
            _record._batch_ = _target
            _record._unsent_ = True
            _fresh = _target.fresh
            _fresh += [_record]
        else:
            _record = _ready(@ID, _batch, _target)
            if _record is None:
                continue
    @PREPARE
    break
"""

_COUNT = """\
_record.messages += 1
if _record.messages >= _largest:
    _grown(@ID, _record)
"""

_PARTS = {"@FIND": _FIND}

_PUT = _filled(
    """\
def add(@PARAMETERS, **_unknown):
    if _unknown and not _ignore_unknown:
        raise _refuse(_unknown, _unknown)
    @CHECKS
    if _outbox.full:
        _wait_for_room()
    _batch = _target = None
    if _batches:
        _batch = _local.batch
        if _batch is not None:
            if not _batch.is_open:
                _batch = None
            elif _batch.durable:
                _target = _batch
                if _batch.asks and _passes_over(_batch, @ID):
                    return None
    @FIND
    @FOLD
    if not _record.is_used:
        _record.is_used = _record.is_used is not None
    _measures.folded += 1
    @TOUCH
    @TIDY
    @COUNT
    if _left or _batch is None:
        return _finish(_record, _drain(), _batch is None)
    return None
""",
    _PARTS,
)

_PUT_ROWS = _filled(
    """\
def put_rows(_rows, _number, _batch, _target, _rejected):
    _asks = _target is not None and _target.asks
    _now = _clock()
    for _row in _rows:
        _number += 1
        try:
            if _type(_row) is not _dict:
                _given = _row
                _row = _mapping_of(_given)
                if _row is None:
                    raise _no_mapping(_given)
            @ROW
            @CHECKS
        except _InvalidMessageError as _error:
            _rejected.append(_Rejected(_number, _error))
            continue
        if _asks and _passes_over(_target, @ID):
            continue
        @FIND
        @FOLD
        @SEEN
        if not _record.is_used:
            _record.is_used = _record.is_used is not None
        @TIDY
        @COUNT
    return _number
""",
    _PARTS,
)
