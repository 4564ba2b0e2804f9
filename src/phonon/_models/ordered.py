"""Fields that keep values by an order: the least and the greatest, the first and the latest."""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, Generic, TypeVar

from phonon._models.field import Field, FoldCode, set_or
from phonon._models.values import ValueType, place, precedes
from phonon.errors import ConfigurationError

T = TypeVar("T")

#: Values that are time stamps themselves.
_TIMES = frozenset({datetime, date})
#: The length of a pair of a rank and a value.
_PAIR = 2
#: Exact types whose values are compared with the plain operators.
_FAST = frozenset({int, str, bytes, date})


class Min(Field[T | None, T], Generic[T]):
    """The least value; None of no values.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     low: Min[int] = Min()
        >>> Visits("ada", low=3).low
        3
    """

    kind = "min"

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None or precedes(value, state) else state

    merge = fold

    def read(self, state: Any) -> Any:
        return state

    def is_state(self, state: Any) -> bool:
        return self.values.accepts(state)

    _operator = "<"

    def fold_code(self) -> FoldCode:
        if self.values.exact not in _FAST and self.value_type is not float:
            return super().fold_code()
        name, state = self.name, f"_record.{self.slot}"
        return FoldCode(
            [
                f"_state = {state}",
                f"if _state is None or {name} {self._operator} _state:",
                f"    {state} = {name}",
            ]
        )


class Max(Min[T], Generic[T]):
    """The greatest value; None of no values.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     high: Max[int] = Max()
        >>> Visits("ada", high=3).high
        3
    """

    kind = "max"
    _operator = ">"

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None or precedes(state, value) else state

    merge = fold


class Timestamp(Max[T], Generic[T]):
    """The time stamp of the message, which orders the values of `First`, `Latest`, `WindowedList`.

    A record has the time stamp of its latest message.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     at: Timestamp[int] = Timestamp()
        >>> Visits("ada", at=10).at
        10
    """

    kind = "timestamp"


class AnyOf(Field[bool, bool]):
    """True if any value was true.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     failed: AnyOf = AnyOf()
        >>> Visits("ada", failed=True).failed
        True
    """

    kind = "any_of"

    def make_values(self, annotation: Any) -> ValueType:
        del annotation
        return ValueType(bool)

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None else state or value

    merge = fold

    def read(self, state: Any) -> Any:
        return bool(state)

    def is_state(self, state: Any) -> bool:
        return type(state) is bool


class AllOf(AnyOf):
    """True if all values were true, and also of no values.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     done: AllOf = AllOf()
        >>> Visits("ada", done=True).done
        True
    """

    kind = "all_of"

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None else state and value

    merge = fold

    def read(self, state: Any) -> Any:
        return state is not False


class _Stamped(Field[T | None, T | tuple[Any, T]], Generic[T]):
    """A value with a time stamp: the message's, the value itself, or the first of a pair."""

    is_stamped = True

    def check(self, value: Any) -> Any:
        if self.value_type in _TIMES:
            value = self.values.check(value)
            return [value, value]
        stamp, value = _pair(value, self.values.name)
        return [stamp, self.values.check(value)]

    def check_stamped(self, value: Any, stamp: Any) -> Any:
        if stamp is None:
            raise ValueError("goes by the message's time stamp, and this message has none")
        return [stamp, self.values.check(value)]

    def read(self, state: Any) -> Any:
        return None if state is None else state[1]

    def is_state(self, state: Any) -> bool:
        return type(state) is list and len(state) == _PAIR and self.values.accepts(state[1])


def _pair(value: Any, name: str) -> Any:
    """Return the rank and the value of a pair.

    Raises:
        TypeError: The argument is not a pair.
    """
    if not isinstance(value, tuple | list) or len(value) != _PAIR or value[0] is None:
        raise TypeError(
            f"takes a pair of a time stamp and {name}, unless the model has a Timestamp field"
        )
    return _RANK.check(value[0]), value[1]


_RANK = ValueType(Any)


def _precedes(one: Any, other: Any) -> bool:
    """Return whether one stamped value comes before another: by time, then by value."""
    if one[0] == other[0] and type(one[0]) is type(other[0]):
        return precedes(one[1], other[1])
    return precedes(one[0], other[0])


class Latest(_Stamped[T], Generic[T]):
    """The value of the message with the latest time stamp; None of no values.

    Of two values with the same time stamp the greater one counts.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     page: Latest[str] = Latest()
        >>> Visits("ada", page=(10, "/")).page
        '/'
    """

    kind = "latest"

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None or _precedes(state, value) else state

    merge = fold


class First(_Stamped[T], Generic[T]):
    """The value of the message with the earliest time stamp; None of no values.

    Of two values with the same time stamp the lesser one counts.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     page: First[str] = First()
        >>> Visits("ada", page=(10, "/")).page
        '/'
    """

    kind = "first"

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None or _precedes(value, state) else state

    merge = fold


class WindowedList(Field[list[T], Any], Generic[T]):
    """The values with the highest ranks of all processes, the highest first.

    Messages have one value or a list of them. In a model with a `Timestamp` the time stamp is the
    rank; in other models each value is a pair of the rank and the value.

    Args:
        window_length: The number of values to keep.
        data_type: The type of the values, if no annotation gives it.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     last: WindowedList[str, 2] = WindowedList(2)
        >>> Visits("ada", last=[(1, "a"), (3, "c"), (2, "b")]).last
        ['c', 'b']
    """

    kind = "windowed_list"
    shows = (list,)
    is_stamped = True

    def __init__(self, window_length: int = 10, data_type: Any = None) -> None:
        super().__init__(data_type)
        self.window_length = _size(self, window_length)

    def annotate(self, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == _PAIR:
            *arguments, size = arguments  # type: ignore[assignment]  # a list is as good
            self.window_length = _size(self, size)
        super().annotate(tuple(arguments))

    def __class_getitem__(cls, arguments: Any) -> Any:
        return SizedAnnotation.make(cls, arguments) or super().__class_getitem__(arguments)  # type: ignore[misc]  # typing's

    def check(self, value: Any) -> Any:
        if isinstance(value, tuple):
            value = [value]
        if not isinstance(value, list | set | frozenset):
            raise TypeError(
                f"takes pairs of a rank and {self.values.name}, or the model has a Timestamp field"
            )
        pairs = (_pair(pair, self.values.name) for pair in value)
        return self._best([[rank, self.values.check(item)] for rank, item in pairs])

    def check_stamped(self, value: Any, stamp: Any) -> Any:
        if stamp is None:
            raise ValueError("goes by the message's time stamp, and this message has none")
        items = value if isinstance(value, list | set | frozenset | tuple) else [value]
        return self._best([[stamp, self.values.check(item)] for item in items])

    def _best(self, pairs: list[Any]) -> list[Any]:
        if len(pairs) > 1:
            pairs.sort(key=_place_of_pair, reverse=True)
            del pairs[self.window_length :]
        return pairs

    def merge(self, one: Any, other: Any) -> Any:
        return self._best(one + other)

    def fold_code(self) -> FoldCode:
        lines = set_or(f"_record.{self.slot}", self.name, f"+= {self.name}")
        return FoldCode(lines, most=2 * self.window_length)

    def tidy(self, state: Any) -> Any:
        return self._best(list(state))

    def seal(self, state: Any) -> Any:
        return self._best(state)

    def read(self, state: Any) -> Any:
        return [item for _, item in self._best(list(state or ()))]

    def is_state(self, state: Any) -> bool:
        return type(state) is list and all(
            type(pair) is list and len(pair) == _PAIR and self.values.accepts(pair[1])
            for pair in state
        )


def _place_of_pair(pair: Any) -> Any:
    return place(pair[0]), place(pair[1])


class TopK(Field[dict[T, Any], Mapping[T, Any]], Generic[T]):
    """The keys with the highest scores, each with its highest score; the highest first.

    A message's value is a mapping of scores by key, as for a leaderboard. For the most *frequent*
    keys use ``Counter``: a sketch of them (space-saving, Misra-Gries) would depend on the order of
    merging.

    Args:
        size: The number of keys to keep.
        data_type: The type of the keys, if no annotation gives it.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     best: TopK[str, 1] = TopK(1)
        >>> Visits("ada", best={"x": 3, "y": 5}).best
        {'y': 5}
    """

    kind = "top_k"
    shows = (dict,)

    def __init__(self, size: int = 10, data_type: Any = None) -> None:
        super().__init__(data_type)
        self.size = _size(self, size)

    def annotate(self, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == _PAIR:
            *arguments, size = arguments  # type: ignore[assignment]  # a list is as good
            self.size = _size(self, size)
        super().annotate(tuple(arguments))

    def __class_getitem__(cls, arguments: Any) -> Any:
        return SizedAnnotation.make(cls, arguments) or super().__class_getitem__(arguments)  # type: ignore[misc]  # typing's

    def check(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"takes a mapping of {self.values.name} to scores")
        return {self.values.check(key): _RANK.check(score) for key, score in value.items()}

    def merge(self, one: Any, other: Any) -> Any:
        return self.tidy(one | self.better(one, other))

    def better(self, state: Any, value: Any) -> Any:
        """Return the keys of a value that are new or have a higher score than before."""
        if state is None:
            return value
        return {
            key: score
            for key, score in value.items()
            if key not in state or precedes(state[key], score)
        }

    def fold_code(self) -> FoldCode:
        name, state = self.name, f"_record.{self.slot}"
        return FoldCode(
            set_or(state, f"_new_{name}", f"|= _new_{name}"),
            [f"_new_{name} = _better_{name}({state}, {name})"],
            most=2 * self.size,
        )

    def _best(self, state: dict[Any, Any]) -> dict[Any, Any]:
        pairs = sorted(state.items(), key=lambda pair: (place(pair[1]), place(pair[0])))
        return dict(pairs[: -self.size - 1 : -1])

    tidy = seal = _best

    def read(self, state: Any) -> Any:
        return self._best(state or {})

    def is_state(self, state: Any) -> bool:
        return type(state) is dict and all(map(self.values.accepts, state))


class SizedAnnotation:
    """An annotation with a size in its brackets: ``Window[str, 10]``."""

    def __init__(self, origin: Any, arguments: tuple[Any, ...]) -> None:
        self.__origin__ = origin
        self.__args__ = arguments

    @classmethod
    def make(cls, origin: Any, arguments: Any) -> "SizedAnnotation | None":
        """Return an annotation with a size, or None: typing allows only types in brackets."""
        if isinstance(arguments, tuple) and len(arguments) == _PAIR:
            return cls(origin, arguments)
        return None


def _size(field: Field[Any, Any], value: Any) -> int:
    value = getattr(value, "__args__", (value,))[0]  # Literal[10]
    if type(value) is not int or value < 1:
        raise ConfigurationError(
            f"{type(field).__name__} keeps a number of values, at least 1, not {value!r}"
        )
    return value
