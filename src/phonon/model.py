"""Models: records whose fields say how they are merged."""

import copy
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, dataclass_transform

from phonon._core.classes import no_generator
from phonon._models.compiled import FOLD, Compiled
from phonon._models.field import Field
from phonon._models.record import ModelRecord, make_record_class
from phonon.errors import ConfigurationError

#: The attributes of `Model` itself, whose names no field can have.
_RESERVED = frozenset(
    {"completes_many", "fields", "from_states", "no_arguments", "on_complete", "on_complete_many",
     "source", "token", "upgrade"}
)  # fmt: skip


@dataclass_transform(eq_default=False)
class Model:
    """A record whose fields say how they are merged: subclass it, and annotate the fields.

    The first field is the `ID <phonon.fields.ID>`, the record's key. Messages about it are added to
    the collection that `Process.collect` returns, in any process and any order; when the session
    ends, `on_complete` gets the merged record. It is called in one process, once, unless it raises
    or the process dies, as `Update.execute` is.

    Instances are records, whose attributes show the merged messages. A record that you make,
    ``PageViews("ada", views=1)``, shows one message.

    Args:
        name: The server's name of the class; by default its module and qualified name. A class with
            a given name can be moved and renamed while its data is on the server. (A class keyword,
            like the following ones.)
        aliases: Former names, under which the server may still have data.
        version: The version of the fields. Data of earlier ones goes through `upgrade`.

    Attributes:
        token: The batch's token while `on_complete` runs, an int that grows strictly per resource
            and is the same in every attempt at the batch; else None.

    Raises:
        ConfigurationError: The class is not a valid model.
        InvalidMessageError: The arguments are not a valid message of this model.

    Example:
        >>> from phonon.fields import ID, Counter, Sum
        >>> class PageViews(Model, name="page_views"):
        ...     user: ID[str]
        ...     views: Sum[int] = Sum()
        ...     pages: Counter[str] = Counter()
        ...     def on_complete(self):
        ...         print(self.user, self.views, self.pages, self.token)
        >>> PageViews("ada", views=1).pages
        {}
    """

    _compiled: ClassVar[Compiled | None] = None
    _record: ClassVar[type[ModelRecord]]
    _fields: ClassVar[dict[str, Field[Any, Any]]] = {}
    token: ClassVar[int | None] = None

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        version: int = 1,
        **keywords: Any,
    ) -> None:
        super().__init_subclass__(**keywords)
        _check_methods(cls)
        cls._fields = _fields_of(cls)
        cls._compiled = None
        kinds = [field.kind for field in cls._fields.values()]
        if "id" not in kinds:
            if name is not None or aliases or version != 1:
                raise ConfigurationError(
                    f"{cls.__qualname__} has a name and no ID: add a field that is its key, as in "
                    "id: ID[str]"
                )
            return  # a base class of models
        if kinds.index("id") or kinds.count("id") > 1:
            raise ConfigurationError(
                f"a model has one ID, which is its first field; those of {cls.__qualname__} are "
                f"{', '.join(kinds)}"
            )
        cls._compiled = Compiled(cls.__qualname__, cls._fields)
        cls._record = make_record_class(
            cls, cls._compiled, name=name, aliases=aliases, version=version
        )

    def __init__(self, *values: Any, **named: Any) -> None:
        compiled = self._code()
        doc: dict[str, Any] = {}
        try:
            identifier = compiled.fold(doc, *values, **named)
        except TypeError as error:
            name = type(self).__qualname__
            raise TypeError(str(error).replace("fold()", f"{name}()")) from None
        self._show(identifier, doc, None)
        self.__dict__["_message_"] = dict(zip(compiled.fields, values, strict=False)) | named

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.__dict__.get(name)!r}" for name in self._fields)
        return f"{type(self).__qualname__}({shown})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(self.__dict__[name] == other.__dict__[name] for name in self._fields)

    __hash__ = None  # type: ignore[assignment]  # equality is by content, which may change

    # To override

    def on_complete(self) -> Any:
        """Write the record to the database, because its session is over.

        It may run again if it raises or if its process dies before it could report back. A
        database has every batch exactly once if it stores `token` beside the record, in the same
        transaction, and skips a token that is not greater than the stored one.

        It may be a coroutine function; then the model needs an `AsyncProcess`. It may have
        arguments, which `phonon.registry.register` takes; they are None if another process took
        them.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define on_complete()")

    @classmethod
    def on_complete_many(cls, records: Sequence[Self]) -> Any:
        """Write many records to the database at once, if it is overridden.

        Args:
            records: Up to 250 of them, each of another key and with its `token`.

        Returns:
            Pairs of a failed record and its error; None if all succeeded. See
            `Update.execute_many`.
        """
        raise NotImplementedError(f"{cls.__qualname__} must define on_complete_many()")

    @classmethod
    def upgrade(cls, old: dict[str, Any], version: int) -> dict[str, Any]:
        """Convert data that an earlier version of the class has stored.

        Args:
            old: The state of each field, by name; yours to change. A field may be missing.
            version: The version that has stored it.

        Returns:
            The states of this version's fields. A missing field has no value.
        """
        raise NotImplementedError(f"{cls.__qualname__} must define upgrade(old, version)")

    # To use

    @classmethod
    def fields(cls) -> Mapping[str, Field[Any, Any]]:
        """Return the fields by name, the ID first.

        A field has a ``kind`` (``"sum"``), a ``value_type`` (``int``) and a ``zero``, the value of
        a record without messages.
        """
        return dict(cls._fields)

    @classmethod
    def source(cls) -> str:
        """Return the code that checks a message and folds it into a record, for inspection."""
        return cls._code().source(FOLD)

    # Machinery

    @classmethod
    def _code(cls) -> Compiled:
        if cls._compiled is None:
            raise ConfigurationError(
                f"{cls.__qualname__} has no ID: add a field that is its key, as in id: ID[str]"
            )
        return cls._compiled

    @classmethod
    def completes_many(cls) -> bool:
        """Return whether the class has an `on_complete_many` of its own."""
        method: Any = cls.on_complete_many
        return method.__func__ is not Model.on_complete_many.__func__  # type: ignore[attr-defined]  # of classmethods

    @classmethod
    def no_arguments(cls) -> tuple[None, ...]:
        """Return the default arguments of `on_complete`: all None."""
        parameters = list(inspect.signature(cls.on_complete).parameters.values())[1:]
        return (None,) * sum(
            p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
            for p in parameters
        )

    @classmethod
    def from_states(cls, identifier: Any, states: Mapping[str, Any], token: int | None) -> Self:
        """Return the record that shows the states of its fields, which are not changed.

        Args:
            identifier: The record's key.
            states: The states, by field.
            token: The batch's token.
        """
        record = cls.__new__(cls)
        record._show(identifier, states, token)  # noqa: SLF001 - of this class
        return record

    def _show(self, identifier: Any, states: Mapping[str, Any], token: int | None) -> None:
        values = self.__dict__
        for name, field in self._fields.items():
            values[name] = field.read(states.get(name))
        values[self._code().id.name] = identifier
        if token is not None:
            values["token"] = token


def _check_methods(cls: type[Model]) -> None:
    for name in ("on_complete", "on_complete_many"):
        no_generator(cls, name)
    method = cls.__dict__.get("on_complete_many")
    if method is not None and not isinstance(method, classmethod):
        raise TypeError(
            f"{cls.__qualname__}.on_complete_many is called on the class: make it a classmethod"
        )


def _fields_of(cls: type[Model]) -> dict[str, Field[Any, Any]]:
    """Return copies of the bases' fields, and those of the class, each set as its attribute."""
    found = _inherited(cls)
    annotations = inspect.get_annotations(cls)
    own: dict[str, Field[Any, Any]] = {}
    for name, annotation in annotations.items():
        field = _field(cls, name, annotation)
        if field is not None:
            own[name] = field
    for name, value in list(vars(cls).items()):
        if isinstance(value, type) and issubclass(value, Field):
            raise ConfigurationError(
                f"{cls.__qualname__}.{name} is the class {value.__name__}: write {value.__name__}()"
            )
        if isinstance(value, Field) and name not in own:
            own[name] = copy.copy(value)
    for name in found.keys() & vars(cls).keys() - own.keys():
        raise ConfigurationError(
            f"{cls.__qualname__}.{name} is a field of its base class: call {vars(cls)[name]!r} "
            "something else"
        )
    found.update(own)
    # The order of attributes without annotations is not known.
    first = [n for n, field in own.items() if field.kind == "id" and n not in annotations]
    if first:
        found = {first[0]: found[first[0]], **found}
    for name, field in found.items():
        _check_field_name(cls, name)
        field.name, field.model = name, cls.__qualname__
        setattr(cls, name, field)
    return found


def _inherited(cls: type[Model]) -> dict[str, Field[Any, Any]]:
    """Return copies of the bases' fields, with types in place of type variables."""
    found: dict[str, Field[Any, Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        if not issubclass(base, Model) and any(isinstance(v, Field) for v in vars(base).values()):
            raise ConfigurationError(
                f"{base.__qualname__} has fields, and {cls.__qualname__} cannot inherit them: make "
                f"it a model, as in class {base.__name__}(Model)"
            )
        for name, field in getattr(base, "_fields", {}).items():
            found[name] = copy.copy(field)
    bound = _bound(cls)
    for field in found.values():
        if field.value_type in bound:
            field.annotate((bound[field.value_type],))
    return found


def _check_field_name(cls: type[Model], name: str) -> None:
    if name in _RESERVED or name.startswith("_"):
        raise ConfigurationError(
            f"{cls.__qualname__}.{name} cannot be a field: the name is a model's own; call it "
            "something else"
        )


def _field(cls: type[Model], name: str, annotation: Any) -> Field[Any, Any] | None:
    """Return the field that an annotation stands for, if any."""
    value = vars(cls).get(name)
    if isinstance(annotation, str):
        annotation = _evaluated(cls, name, annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    _check_annotation(cls, name, annotation)
    origin = getattr(annotation, "__origin__", None) or annotation
    arguments = typing.get_args(annotation) or getattr(annotation, "__args__", ())
    kind = origin if isinstance(origin, type) and issubclass(origin, Field) else None
    if isinstance(value, Field):
        value = copy.copy(value)
        if kind is None:  # views: int = Sum()
            if annotation is not None:
                value.annotate_plainly(annotation)
        elif kind is not type(value):
            raise ConfigurationError(
                f"{cls.__qualname__}.{name} is annotated as {kind.__name__} and is a "
                f"{type(value).__name__}: make them the same"
            )
        elif arguments:
            value.annotate(arguments)
        return value
    if kind is None:
        return None
    if name in vars(cls):
        raise ConfigurationError(
            f"{cls.__qualname__}.{name} is a field, and has the value {value!r}: write "
            f"{name}: {kind.__name__}[...] = {kind.__name__}() if messages need not have it"
        )
    made: Field[Any, Any] = kind.from_annotation(arguments)
    return made


def _bound(cls: type[Model]) -> dict[Any, Any]:
    """Return the types that replace the type variables of generic bases."""
    bound: dict[Any, Any] = {}
    for base in getattr(cls, "__orig_bases__", ()):
        origin = typing.get_origin(base)
        if origin is not None and origin is not typing.Generic:
            bound |= zip(origin.__parameters__, typing.get_args(base), strict=False)
    return bound


def _check_annotation(cls: type[Model], name: str, annotation: Any) -> None:
    """Refuse an annotation that type checkers take for a field, although it is none.

    Raises:
        ConfigurationError: The annotation is of this kind.
    """
    origin = typing.get_origin(annotation)
    inner = [part for part in typing.get_args(annotation) if _is_field(part)]
    if inner and (origin in {typing.Union, types.UnionType, typing.Final, typing.ClassVar}):
        field = getattr(inner[0], "__origin__", None) or inner[0]
        raise ConfigurationError(
            f"{cls.__qualname__}.{name} is annotated as {annotation}: a field stands alone; if "
            f"messages need not have it, write {name}: {field.__name__}[...] = {field.__name__}()"
        )
    is_plain = isinstance(annotation, type) or origin in {typing.Union, types.UnionType}
    if is_plain and not _is_field(annotation) and not isinstance(vars(cls).get(name), Field):
        raise ConfigurationError(
            f"{cls.__qualname__}.{name} is annotated as {_name_of(annotation)}, which says nothing "
            f"of how it merges: make it a field, as in {name}: Latest[{_name_of(annotation)}], or "
            f"annotate it as ClassVar[{_name_of(annotation)}] if it is none"
        )


def _is_field(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", None) or annotation
    return isinstance(origin, type) and issubclass(origin, Field)


def _name_of(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _evaluated(cls: type[Model], name: str, annotation: str) -> Any:
    """Return the type that an annotation names; annotations may be text."""
    module = inspect.getmodule(cls)
    names = {**vars(module or typing), **vars(cls)}
    try:
        return eval(annotation, names)  # noqa: S307 - the class's own source
    except (NameError, AttributeError) as error:
        head = annotation.partition("[")[0]
        known: Any = names.get(head.rpartition(".")[2], names.get(head))
        if isinstance(known, type) and issubclass(known, Field):
            raise ConfigurationError(
                f"{cls.__qualname__}.{name}: {error}, in {annotation!r}: import it at the top of "
                "the module, at run time"
            ) from error
        return None
