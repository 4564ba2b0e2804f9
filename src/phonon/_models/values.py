"""The types of values in messages, and a total order of values of any types.

A model's annotations are compiled into `ValueType` objects once, so that a message costs one
comparison of types for each of its values.
"""

import math
import operator
import types
import typing
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Union
from uuid import UUID

from phonon.errors import ConfigurationError, NotStorableError
from phonon.serializers import STORABLE, ExactSerializer

_SERIALIZER = ExactSerializer()
#: Immutable types, whose instances are kept without a copy.
_CONSTANT = (bool, int, float, Decimal, str, bytes, date, datetime, time, timedelta, UUID)
#: Types with a total order by < whose equal values are identical in form.
_PLAINLY_ORDERED = frozenset({int, str, bytes, bool, date, timedelta})
#: The range of IEEE 754's decimal128: exponents beyond it would make exact sums of any length.
_MOST_EXPONENT = 6144


class ValueType:
    """A type that values must have.

    Args:
        annotation: The model's annotation: ``int``, ``str | None``, ``list[str]``, ``Any``.

    Attributes:
        annotation: The same.
        exact: The only type whose instances need no further check; None if there is none.
        name: The type's name in error messages.
    """

    __slots__ = ("_checks", "annotation", "exact", "name")

    def __init__(self, annotation: Any = Any) -> None:
        self.annotation = annotation
        kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
        self.name = " | ".join(_name_of(kind) for kind in kinds) or "None"
        self._checks: list[Callable[[Any], Any]] = [_check_for(kind) for kind in kinds]
        only = kinds[0] if len(kinds) == 1 else None
        # A float may not be a number, and a Decimal may be of any length: those need a check.
        self.exact: Any = only if only in {int, str, bytes, bool, date, UUID, timedelta} else None

    def __repr__(self) -> str:
        return f"<ValueType {self.name}>"

    def check(self, value: Any) -> Any:
        """Return a value in the form to keep.

        Raises:
            TypeError: The value has another type.
            ValueError: The value has the type but cannot be kept; it is not a number, say.
        """
        if type(value) is self.exact:
            return value
        for check in self._checks:
            found = check(value)
            if found is not _NO:
                return found
        raise TypeError(f"takes {self.name}")

    def accepts(self, value: Any) -> bool:
        """Return whether `check` would return the value unchanged."""
        try:
            found = self.check(value)
        except (TypeError, ValueError):
            return False
        return type(found) is type(value)


#: Returned by a check that does not apply to a value.
_NO: Any = object()


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in {Union, types.UnionType}:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return tuple({type(value) for value in typing.get_args(annotation)})
    if isinstance(annotation, typing.TypeVar):
        return (Any,)
    return (annotation,)


def _name_of(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def _check_for(kind: Any) -> Callable[[Any], Any]:
    special = _SPECIAL.get(kind)
    if special is not None:
        return special
    if kind is Any or kind is object:
        return storable
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type):
        raise ConfigurationError(
            f"{kind!r} is no type that values of a field can be checked against: give a class, "
            "or Any"
        )
    if not any(issubclass(storable_type, origin) for storable_type in STORABLE):
        raise ConfigurationError(
            f"values of {_name_of(kind)} cannot be stored: give the field the type of what stands "
            "for them, such as str for the value of an Enum"
        )
    if origin in _CONSTANT:
        return lambda value: _constant(value, origin)
    return lambda value: storable(value) if isinstance(value, origin) else _NO


def _constant(value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    if not isinstance(value, kind) or (kind is date and isinstance(value, datetime)):
        return _NO
    return storable(value)


def _integer(value: Any) -> Any:
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return _NO
    if isinstance(value, int):
        return int(value)
    # numpy's and Arrow's integers; a str or a float has no __index__
    return operator.index(value) if hasattr(type(value), "__index__") else _NO


def _float(value: Any) -> Any:
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, float | int):
            return _NO
        value = float(value)
    if not math.isfinite(value):
        raise ValueError("takes numbers, and this one is not finite")
    return value + 0.0  # turns -0.0 into 0.0, or the greater one would depend on the order


def _decimal(value: Any) -> Any:
    if type(value) is not Decimal:
        if isinstance(value, bool) or not isinstance(value, Decimal | int):
            return _NO
        value = Decimal(value)
    if not value.is_finite():
        raise ValueError("takes numbers, and this one is not finite")
    exponent = value.as_tuple().exponent
    if abs(value.adjusted()) > _MOST_EXPONENT or abs(exponent) > _MOST_EXPONENT:
        raise ValueError(f"takes exponents of up to {_MOST_EXPONENT}, as in IEEE 754's decimal128")
    return value


def _text(value: Any) -> Any:
    if type(value) is str:
        return value
    return str.__str__(value) if isinstance(value, str) else _NO


def _boolean(value: Any) -> Any:
    return value if type(value) is bool else _NO


_SPECIAL: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _float,
    Decimal: _decimal,
    str: _text,
    bool: _boolean,
}


def number(value: Any) -> Any:
    """Return an int or a finite float in the form to keep, or `_NO` for other values."""
    found = _integer(value)
    return found if found is not _NO else _float(value)


NUMBER = ValueType(int | float)
NUMBER._checks = [number]  # noqa: SLF001 - no annotation stands for this type


def storable(value: Any) -> Any:
    """Return a value of any type in the form to keep: a copy, if the caller could change it.

    Raises:
        TypeError: The value cannot be stored.
    """
    if value is None or type(value) in _CONSTANT:
        if type(value) is float:
            return _float(value)
        return _decimal(value) if type(value) is Decimal else value
    try:
        return _SERIALIZER.loads(_SERIALIZER.dumps(value))
    except NotStorableError as error:
        raise TypeError(f"takes values that can be stored: {error}") from None


# Order


def precedes(one: Any, other: Any) -> bool:
    """Return whether one value comes before another in a total order of values of any types.

    Numbers are ordered by value, time stamps by instant, text by code points. Values that are equal
    but differ in form (1 and 1.0, one instant in two time zones) are ordered by form: otherwise the
    one that stays would depend on the order of merging.
    """
    if type(one) is type(other) and type(one) in _PLAINLY_ORDERED:
        return bool(one < other)
    return bool(place(one) < place(other))


def place(value: Any) -> tuple[Any, ...]:
    """Return a key by which values of any types can be sorted."""
    kind = type(value)
    if kind in {int, float, Decimal}:
        return "", value, kind.__name__, repr(value)
    if kind is datetime or kind is time:
        return f"{kind.__name__}{value.utcoffset() is not None}", value, repr(value)
    if kind in _PLAINLY_ORDERED or kind is UUID:
        return kind.__name__, value
    return f"~{kind.__name__}", _SERIALIZER.dumps(value)


def in_order(values: list[Any]) -> list[Any]:
    """Return values sorted by `place`."""
    kinds = set(map(type, values))
    if len(kinds) <= 1 and kinds <= _PLAINLY_ORDERED:
        return sorted(values)
    return sorted(values, key=place)
