"""The update behind a model: the merged data of one key in this process.

Its ``doc`` has the states of the model's fields by name. So the record is stored, taken over, put
back, merged and executed like any other update.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable, iscoroutinefunction
from typing import Any, ClassVar, Self

from phonon._core import codec
from phonon._core.classes import name_of
from phonon._core.local import EMPTY
from phonon._models.compiled import Compiled
from phonon.serializers import ExactSerializer
from phonon.update import Update

#: The database in the names of records' resources; the model's name is the collection.
DATABASE = "model"


class ModelRecord(Update):
    """The merged data of one key of a model.

    Attributes:
        model: The model's class.
        compiled: The model's compiled code.
        messages: The number of messages that were merged here since the session began.
        is_due: Whether the session is over although others may hold the resource.
        is_used: Whether a message has come since the collection last made room; None before the
            first message.
    """

    __slots__ = (
        "arguments_",
        "is_due",
        "is_used",
        "messages",
        "moved_",
        "odd_",
        "pending_",
        "version_",
    )

    model: ClassVar[Any]
    compiled: ClassVar[Compiled]
    #: The model's name in the names of its resources.
    resource_collection: ClassVar[str]
    #: The sink that gets records in this interpreter, in place of ``on_complete``.
    sink: ClassVar[Any] = None
    is_folded_: ClassVar[bool] = True
    messages: int
    #: Grows when the states change, so that a result computed from old states can be dropped.
    version_: int
    #: States on their way to the server. There are several if a signal handler stores as well.
    moved_: tuple[dict[str, Any], ...]
    #: Tables with rows for this record that are not merged yet.
    pending_: Any
    #: The decoded doc, if it is not valid for this model.
    odd_: Any
    is_due: bool
    is_used: bool | None
    #: The arguments of ``on_complete``, in programs that were written for the original.
    arguments_: tuple[tuple[Any, ...], dict[str, Any]] | None

    @property
    def doc(self) -> Any:
        """The states by field. Each state has an attribute, which is faster than a dict."""
        if self.pending_ is not None:
            self.pending_.merge_all()
        return self.compiled.doc_of(self) if self.odd_ is None else self.odd_

    @doc.setter
    def doc(self, doc: Any) -> None:
        self.odd_ = None if self.compiled.knows(doc) else doc
        self.compiled.fill(self, doc if self.odd_ is None else {})

    def merge(self, other: Self) -> None:
        """Merge the fields."""
        doc = self.doc
        self.compiled.merge(doc, other.doc)
        self.doc = doc

    def execute(self) -> Any:
        """Run the model's ``on_complete``."""
        if self.executes_many():
            return super().execute()
        return self._complete()

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> Any:
        """Run the model's ``on_complete_many``, or give the records to its sink."""
        shown = [update.shown() for update in updates]
        if cls.sink is None:
            return _failed(cls.model.on_complete_many(shown), shown, updates)
        for record, update in zip(shown, updates, strict=True):
            # A sink may have to merge the states with stored ones.
            record.__dict__["_states_"] = update.doc
        result = cls.sink.write(shown)
        return (
            _awaited(result, shown, updates)
            if isawaitable(result)
            else _failed(result, shown, updates)
        )

    @classmethod
    def executes_many(cls) -> bool:
        """Return whether the model has an ``on_complete_many`` of its own, or a sink."""
        return cls.sink is not None or bool(cls.model.completes_many())

    @classmethod
    def missing_requirement_(cls) -> str:
        """Return the requirement that this interpreter lacks to execute the records, or ""."""
        model = getattr(cls, "model", None)
        if model is None or cls.sink is not None or model.completes_many():
            return ""
        # The on_complete of `Model` itself only raises.
        if model.on_complete.__module__ != "phonon.model":
            return ""
        return "a sink: call process.collect(model, sink=...) here, too"

    def shown(self) -> Any:
        """Return the record as users see it."""
        return self.model.from_states(self._id, self.doc, self.token)

    def _complete(self) -> Any:
        arguments, named = self.arguments_ or (self.model.no_arguments(), {})
        return self.shown().on_complete(*arguments, **named)

    def begin_execution(self, merged: Self, token: int) -> Self:
        """Return the instance that executes a merged record, with this one's arguments."""
        instance = super().begin_execution(merged, token)
        instance.arguments_ = self.arguments_
        return instance

    def attach(self, process: Any) -> None:
        """Give the record a process."""
        super().attach(process)
        self.messages, self.moved_, self.pending_ = 0, (), None
        self.is_due, self.is_used = False, None
        self.arguments_ = None

    def _has_changed_(self) -> bool:
        """Return whether it has changed since it was emptied."""
        if self.pending_ is not None:
            return True
        if self._emptied_ != EMPTY:
            return super()._has_changed_()
        return self.compiled.has_states(self)

    def take(self) -> bytes | None:
        """Move the unsent data out, as one partial; None if there is none.

        Raises:
            NotStorableError: A value has a type that cannot be stored; nothing was moved.
            ForkedError: The data is the parent process's.
        """
        engine, lock = self._engine_, self._lock_
        if lock is not None and self._generation_ is engine.identity.generation:
            with lock:
                if lock is self._lock_:
                    return self._take_(engine, keep=False)[0]
        return super().take()

    def _take_(self, engine: Any, *, keep: bool) -> tuple[bytes | None, Any]:
        if not (self._unsent_ or self.has_unsent()):
            self.version_ += 1  # makes a message that is being folded look for its record again
            return None, None
        depth, serializer = len(self.moved_), engine.codec.serializer
        if self.pending_ is not None:
            self.pending_.merge_all()
        try:
            # Messages that come after this, from a signal handler say, go into the next partial.
            content = self.compiled.packing.take(self, serializer)
            doc = self.moved_[-1]
            if content is not None:
                partial = codec.enveloped(type(self), serializer, content)
            else:
                partial = codec.pack(self._with(doc), serializer)
            if len(partial) > engine.most_bytes:
                raise codec.too_large(self, len(partial), engine.most_bytes)  # noqa: TRY301 - handled like the errors of pack
        except BaseException:
            if len(self.moved_) > depth:
                self._move_back()
            raise
        self.moved_ = self.moved_[:-1]
        return partial, (None, doc, {}) if keep else None

    @classmethod
    def merge_stored_(cls, bodies: Sequence[bytes], serializer: Any) -> Self | None:
        """Merge contents of one record; None if there is anything unusual about them."""
        if type(serializer) is not ExactSerializer:
            return None
        merged = cls.compiled.packing.merge(bodies, serializer)
        if merged is None:
            return None
        record = object.__new__(cls)
        record._id, record.database, record.collection, doc = merged
        record.spec, record.odd_ = None, None
        cls.compiled.fill(record, doc)
        return record

    def _with(self, doc: dict[str, Any]) -> Self:
        """Return a record of the same key with given states, for storing."""
        record = object.__new__(type(self))
        record._id, record.database, record.collection = self._id, self.database, self.collection
        record.spec, record.odd_, record.pending_ = None, doc, None
        return record

    def _move_back(self) -> None:
        *rest, doc = self.moved_
        newer = self.doc
        if newer:
            self.compiled.merge(doc, newer)
        self.doc, self.moved_, self._unsent_ = doc, tuple(rest), True

    def cached_under(self, lock: Any) -> None:
        """Become a new entry of a cache, whose lock protects this record from now on."""
        self._lock_ = lock

    def _discard_(self) -> bool:
        if self.pending_ is not None:
            self.pending_.merge_all()
        had = super()._discard_()
        # Messages are folded into the present states, and are unsent data wherever there are any.
        self.doc, self._emptied_ = {}, EMPTY
        return had

    def is_expired(self) -> bool:
        """Return whether the session is over; the collection decides."""
        return self.is_due

    @classmethod
    def upgraded_(cls, content: list[Any], version: int) -> list[Any]:
        """Convert decoded content of an earlier version to this version of the model."""
        doc = cls.model.upgrade(content[4], version)
        if type(doc) is not dict:
            raise TypeError(
                f"{cls.model.__qualname__}.upgrade() returned {doc!r}: it returns what is kept of "
                "each field, as a dict"
            )
        return [*content[:4], doc, content[5]]

    def fault_(self) -> str:
        """Return the fault of decoded content; empty if it is a record of this model."""
        identifier = self.compiled.id
        if not identifier.is_state(self._id):
            return f"its ID is not of the type of {self.compiled.model}.{identifier.name}"
        return self.compiled.fault_of(self.doc)


class AsyncModelRecord(ModelRecord):
    """A `ModelRecord` for a model whose ``on_complete`` is a coroutine function."""

    __slots__ = ()

    is_async: ClassVar[bool] = True

    async def execute(self) -> None:
        """Run the model's ``on_complete``."""
        if self.executes_many():
            for _, error in await self.execute_many([self]) or ():
                raise error
        else:
            await self._complete()

    @classmethod
    async def execute_many(cls, updates: Sequence[Self]) -> Any:
        """Run the model's ``on_complete_many``."""
        shown = [update.shown() for update in updates]
        return _failed(await cls.model.on_complete_many(shown), shown, updates)


async def _awaited(result: Any, shown: Sequence[Any], updates: Sequence[Any]) -> Any:
    return _failed(await result, shown, updates)


def _failed(result: Any, shown: Sequence[Any], updates: Sequence[Any]) -> Any:
    """Return updates of failed records, and their errors, from the user's return value."""
    if not isinstance(result, Iterable):
        return result
    update_of = {id(record): update for record, update in zip(shown, updates, strict=True)}
    return [(update_of.get(id(record), record), error) for record, error in result]


def make_record_class(model: Any, compiled: Compiled, **keywords: Any) -> type[ModelRecord]:
    """Return the class of a model's records. The server knows it by the model's name.

    Args:
        model: The model.
        compiled: The model's compiled code.
        keywords: Those of the class statement of an update: ``name``, ``aliases``, ``version``.
    """
    methods: list[Callable[..., Any]] = [model.on_complete, model.on_complete_many]
    base = AsyncModelRecord if any(map(iscoroutinefunction, methods)) else ModelRecord

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __slots__=compiled.slots[:-1],
            __module__=model.__module__,
            __qualname__=model.__qualname__,
            __doc__=f"The merged data of one key of {model.__qualname__}.",
            model=model,
            compiled=compiled,
        )

    cls: type[ModelRecord] = types.new_class(model.__name__, (base,), keywords, body)
    # The oldest name, so that processes of the earlier and this release use the same resources.
    aliases = keywords.get("aliases") or ()
    cls.resource_collection = aliases[-1] if aliases else name_of(cls).partition("@")[0]
    return cls
