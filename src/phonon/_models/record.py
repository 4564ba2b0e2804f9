"""The update behind a model: the merged data of one key in this process.

Its ``doc`` has the states of the model's fields by name. So it is stored, taken over, put back,
merged and executed like any other update.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable, iscoroutinefunction
from typing import Any, ClassVar, Self

from phonon._core.classes import name_of
from phonon._models.compiled import Compiled
from phonon.update import Update

#: The database of records; with the model's name as the collection it names their resources.
DATABASE = "model"


class ModelRecord(Update):
    """The merged data of one key of a model.

    Attributes:
        model: The model's class.
        compiled: Its code.
        messages: How many messages have been merged here since the session began.
        is_due: Whether the session is over although others may hold the resource.
        is_used: Whether a message has come since the collection last made room.
    """

    __slots__ = ("arguments_", "is_due", "is_used", "messages")

    model: ClassVar[Any]
    compiled: ClassVar[Compiled]
    #: Stands for the model in the names of its resources.
    resource_collection: ClassVar[str]
    #: Where records are written to in this interpreter, in place of ``on_complete``.
    sink: ClassVar[Any] = None
    folds_: ClassVar[bool] = True
    messages: int
    is_due: bool
    is_used: bool
    #: The argument of ``on_complete`` in programs that were written for the original.
    arguments_: tuple[tuple[Any, ...], dict[str, Any]] | None

    def merge(self, other: Self) -> None:
        """Merge the fields."""
        self.compiled.merge(self.doc, other.doc)

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
            # A sink may have to merge them with what it has.
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
    def lacks_(cls) -> str:
        """Return the missing part that executing records needs; empty if none is missing."""
        model = getattr(cls, "model", None)
        if model is None or cls.sink is not None or model.completes_many():
            return ""
        # A base has one that only raises.
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
        """Belong to a process."""
        super().attach(process)
        self.messages = 0
        self.is_due = self.is_used = False
        self.arguments_ = None

    def _take_(self, engine: Any, *, keep: bool) -> tuple[bytes | None, Any]:
        if self.doc:
            self.compiled.seal(self.doc)
        return super()._take_(engine, keep=keep)

    def is_expired(self) -> bool:
        """Return whether the session is over; the collection decides."""
        return self.is_due

    @classmethod
    def upgraded_(cls, content: list[Any], version: int) -> list[Any]:
        """Return decoded content as this version of the model stores it."""
        doc = cls.model.upgrade(content[4], version)
        return [*content[:4], doc, content[5]]

    def fault_(self) -> str:
        """Return the fault of decoded content; empty if it is a record of this model."""
        identifier = self.compiled.id
        if not identifier.is_state(self._id):
            return f"its ID is not of the type of {self.compiled.model}.{identifier.name}"
        return self.compiled.fault_of(self.doc)


class AsyncModelRecord(ModelRecord):
    """The same for a model whose ``on_complete`` is a coroutine function."""

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
    """Return the class of a model's records, known to the server by the model's name.

    Args:
        model: The model.
        compiled: Its code.
        keywords: Those of the class statement of an update: ``name``, ``aliases``, ``version``.
    """
    methods: list[Callable[..., Any]] = [model.on_complete, model.on_complete_many]
    base = AsyncModelRecord if any(map(iscoroutinefunction, methods)) else ModelRecord

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __slots__=(),
            __module__=model.__module__,
            __qualname__=model.__qualname__,
            __doc__=f"What has come together for one key of {model.__qualname__}.",
            model=model,
            compiled=compiled,
        )

    cls: type[ModelRecord] = types.new_class(model.__name__, (base,), keywords, body)
    # The oldest name: processes of the release before meet those of this one in the same resources.
    aliases = keywords.get("aliases") or ()
    cls.resource_collection = aliases[-1] if aliases else name_of(cls).partition("@")[0]
    return cls
