"""The base of all fields."""

import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, overload

from phonon._models.values import ValueType
from phonon.errors import ConfigurationError

R = TypeVar("R")
W = TypeVar("W")


class FoldCode(NamedTuple):
    """The lines that fold a checked value into a record's state.

    Attributes:
        commit: Lines that change the state, and call nothing. CPython runs signal handlers, and
            other threads, only after calls and at the end of a loop's round. So all states of a
            message change at once, even if a handler raises or merges a message itself.
        prepare: Lines that may call anything, and change nothing. They run again if the state has
            changed meanwhile.
        before: Lines that may call anything, and read only the value.
        most: The field's ``tidy`` shortens a state of more elements than this. Its result is
            dropped if the state has changed meanwhile. 0: never.
        usual: Lines that do what ``commit`` does, for a value that needed no check.
    """

    commit: list[str]
    prepare: Sequence[str] = ()
    before: Sequence[str] = ()
    most: int = 0
    usual: Sequence[str] = ()


def set_or(state: str, first: str, change: str) -> list[str]:
    """Return the lines that set a state if it is None, and change it otherwise.

    Args:
        state: The expression of the state.
        first: The expression of the first state.
        change: Operator and operand that change a state in place.
    """
    return [f"if {state} is None:", f"    {state} = {first}", "else:", f"    {state} {change}"]


class Field(Generic[R, W]):
    """A field of a model: the state of its values, and how two states are merged.

    A field's state is plain data that can be stored. A record without a state of a field has had no
    value for it, which is equivalent to `zero`. Merging is associative and commutative, so that
    values may be merged anywhere and in any order.

    Args:
        data_type: The type of the values, where no annotation says it.

    Attributes:
        kind: The kind of field, in lower case: ``"sum"``, ``"latest"``.
        name: The field's name in its model.
        values: The type of the values, as a `ValueType` that checks them.
        value_type: The same as an annotation; ``typing.Any`` if none was given.
        model: The qualified name of the model, for messages.

    Example:
        >>> Sum(int).value_type, Sum(int).zero
        (<class 'int'>, 0)
    """

    kind: ClassVar[str] = ""
    #: Whether its values are ordered by the time stamp of the message.
    is_stamped: ClassVar[bool] = False
    #: The value of a message without a value for the field; None for no value.
    default: ClassVar[Any] = None
    #: The containers in which a record can show the values; (): a record does not show the values.
    shows: ClassVar[tuple[type, ...] | None] = None
    name: str = ""
    model: str = ""

    def __init__(self, data_type: Any = None) -> None:
        if data_type is not None and not isinstance(data_type, type):
            raise ConfigurationError(
                f"{type(self).__name__}() takes the type of its values, not {data_type!r}: "
                f"write {type(self).__name__}(int)"
            )
        self.values = self.make_values(data_type)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model}.{self.name}: {self.values.name}>"

    @classmethod
    def from_annotation(cls, arguments: tuple[Any, ...]) -> Self:
        """Return a field as an annotation describes it."""
        field = cls()
        field.annotate(arguments)
        return field

    def annotate(self, arguments: tuple[Any, ...]) -> None:
        """Take the type of the values from an annotation's brackets."""
        if len(arguments) == 1:
            self.values = self.make_values(arguments[0])
        elif arguments:
            raise ConfigurationError(
                f"{type(self).__name__} takes one type in brackets, not {arguments!r}"
            )

    def annotate_plainly(self, annotation: Any) -> None:
        """Take the type of the values from the shown type, as in ``tags: list[str]``."""
        if self.shows is not None and typing.get_origin(annotation) in self.shows:
            annotation = typing.get_args(annotation)[0]
        if self.shows != ():
            self.annotate((annotation,))

    def make_values(self, annotation: Any) -> ValueType:
        """Return the type of the values in messages."""
        return ValueType(Any if annotation is None else annotation)

    @property
    def value_type(self) -> Any:
        """The type that the values in messages have."""
        return self.values.annotation

    # As a descriptor of the model's: records are read by attribute

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: Any) -> Self: ...

        @overload
        def __get__(self, instance: object, owner: Any) -> R: ...

    def __get__(self, instance: Any, owner: Any) -> Any:
        """Return the field from its class, and the merged value from a record."""
        if instance is None:
            return self
        return instance.__dict__[self.name]

    def __set__(self, instance: Any, value: W) -> None:
        """Raise, because a record is made of messages."""
        raise AttributeError(
            f"{self.model}.{self.name} cannot be set to {value!r}: a record shows the "
            "result of its messages; add another message instead"
        )

    def __delete__(self, instance: Any) -> None:
        """Raise, because a record has all of its model's fields."""
        raise AttributeError(f"{self.model}.{self.name} cannot be deleted: a record has all fields")

    # States. None stands for the neutral element.

    @property
    def zero(self) -> Any:
        """The value of a record without messages: the neutral element, as users read it."""
        return self.read(None)

    def check(self, value: Any) -> Any:
        """Return a message's value in the form to keep.

        Raises:
            TypeError: The value has another type.
            ValueError: The value cannot be kept.
        """
        return self.values.check(value)

    def check_stamped(self, value: Any, stamp: Any) -> Any:
        """Do what `check` does, given the time stamp of the message as well."""
        raise NotImplementedError

    def fold(self, state: Any, value: Any, /) -> Any:
        """Add a checked value to a state, and return it. The argument may be changed."""
        raise NotImplementedError

    def merge(self, one: Any, other: Any, /) -> Any:
        """Return the merge of two states. Both arguments may be changed."""
        raise NotImplementedError

    @property
    def seals(self) -> bool:
        """Return whether the field has a `seal` of its own."""
        return type(self).seal is not Field.seal

    def seal(self, state: Any) -> Any:
        """Return a state in its stored form, which is the same for the same values."""
        return state

    def read(self, state: Any) -> Any:
        """Return the value of a state that users see. The state is not changed, and may be None."""
        raise NotImplementedError

    def is_state(self, state: Any) -> bool:
        """Return whether a decoded value is a state: it may be forged, or from another model."""
        raise NotImplementedError

    # Code for `phonon._models.compiled`, which saves a call for each value of a message

    def check_code(self, stamp: str | None) -> list[str]:
        """Return the lines that check the value, a variable of the field's name."""
        name = self.name
        if self.is_stamped and stamp is not None:
            return [f"{name} = _check_{name}({name}, {stamp})"]
        exact = self.values.exact
        if type(self).check is Field.check and exact is not None:
            return [
                f"if _type({name}) is not _{exact.__name__}:",
                f"    {name} = _check_{name}({name})",
            ]
        return [f"{name} = _check_{name}({name})"]

    @property
    def slot(self) -> str:
        """The attribute of a record that holds the state. No user's attribute ends like it."""
        return f"{self.name}_state_"

    def fold_code(self) -> FoldCode:
        """Return the lines that fold the checked value into ``_record``.

        This version is for fields whose `fold` does not change the old state.
        """
        name, state = self.name, f"_record.{self.slot}"
        return FoldCode(
            [f"{state} = _new_{name}"], [f"_new_{name} = _fold_{name}({state}, {name})"]
        )
