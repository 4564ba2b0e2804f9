"""Fields of numbers: sums and statistics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from phonon._models import exact
from phonon._models.field import Field, FoldCode, set_or
from phonon._models.values import NUMBER, ValueType, precedes

N = TypeVar("N")
K = TypeVar("K")


def _numbers(annotation: Any) -> ValueType:
    return NUMBER if annotation is None or annotation is Any else ValueType(annotation)


class Sum(Field[N, N], Generic[N]):
    """Adds values up, exactly: ``int``, ``float`` or ``Decimal``.

    The sum of floats is the float nearest to the exact sum, so that it does not depend on the order
    of adding. Without a type the field takes integers and floats.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     views: Sum[int] = Sum()
        >>> Visits("ada", views=2).views
        2
    """

    kind = "sum"

    if not TYPE_CHECKING:

        def __init__(self, data_type: Any = None) -> None:
            super().__init__(data_type)

    def make_values(self, annotation: Any) -> ValueType:
        return _numbers(annotation)

    @property
    def _is_decimal(self) -> bool:
        return self.value_type is Decimal and self.values is not NUMBER

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None else exact.add_decimals(state, value)

    def merge(self, one: Any, other: Any) -> Any:
        return exact.add_decimals(one, other) if self._is_decimal else exact.merge(one, other)

    @property
    def seals(self) -> bool:
        return self.values.exact is not int and not self._is_decimal

    def seal(self, state: Any) -> Any:
        return exact.sealed(state)

    def read(self, state: Any) -> Any:
        if self._is_decimal:
            return Decimal(0) if state is None else state
        total = 0 if state is None else exact.number(state)
        return float(total) if self.value_type is float else total

    def is_state(self, state: Any) -> bool:
        return type(state) is Decimal if self._is_decimal else exact.is_total(state)

    def fold_code(self) -> FoldCode:
        if self._is_decimal:
            return super().fold_code()
        name, state = self.name, f"_record.{self.slot}"
        if self.values.exact is int:
            return FoldCode(_adding(state, name))
        if self.value_type is float:
            lines = [
                f"_state = {state}",
                "if _state.__class__ is _list:",
                f"    _state += [{name}]",
                "else:",
                f"    {state} = [_state or 0, {name}]",
            ]
            return FoldCode(lines, most=exact.BUFFER)
        lines = [
            f"_state = {state}",
            "if _state.__class__ is not _list:",
            f"    {state} = (_state or 0) + {name} if _is_int_{name} else [_state or 0, {name}]",
            f"elif _is_int_{name}:",
            f"    _state[0] += {name}",
            "else:",
            f"    _state += [{name}]",
        ]
        return FoldCode(
            lines, before=[f"_is_int_{name} = _type({name}) is _int"], most=exact.BUFFER
        )

    def tidy(self, state: Any) -> Any:
        state = list(state)
        exact.shorten(state)
        return state


def _adding(state: str, name: str) -> list[str]:
    return [f"_state = {state}", f"{state} = {name} if _state is None else _state + {name}"]


class Diff(Sum[N], Generic[N]):
    """Subtracts: 0 minus the sum of the values.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     stock: Diff[int] = Diff()
        >>> Visits("ada", stock=2).stock
        -2
    """

    kind = "diff"

    def read(self, state: Any) -> Any:
        return 0 - super().read(state)


class Count(Field[int, int]):
    """Counts messages. A message may give the number of messages that it stands for.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     visits: Count = Count()
        >>> Visits("ada").visits
        1
    """

    kind = "count"
    default = 1

    def make_values(self, annotation: Any) -> ValueType:
        del annotation
        return ValueType(int)

    def check(self, value: Any) -> Any:
        value = self.values.check(value)
        if value < 0:
            raise ValueError("takes how many messages one stands for, at least 0")
        return value

    def fold(self, state: Any, value: Any) -> Any:
        return value if state is None else state + value

    merge = fold

    def read(self, state: Any) -> Any:
        return state or 0

    def is_state(self, state: Any) -> bool:
        return type(state) is int and state >= 0

    def check_code(self, stamp: str | None) -> list[str]:
        return [f"if {self.name} != 1:", *(f"    {line}" for line in super().check_code(stamp))]

    def fold_code(self) -> FoldCode:
        return FoldCode(_adding(f"_record.{self.slot}", self.name))


class Counter(Field[dict[K, int], Mapping[K, int]], Generic[K]):
    """Sums by key: takes a mapping of integers and adds up the values of each key.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     pages: Counter[str] = Counter()
        >>> Visits("ada", pages={"/": 2}).pages
        {'/': 2}
    """

    kind = "counter"
    shows = (dict,)

    def check(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"takes a mapping of {self.values.name} to int")
        exact_type, check, checked = self.values.exact, self.values.check, {}
        for key, times in value.items():
            own = key if type(key) is exact_type else check(key)
            if type(times) is not int:
                times = _INTEGER.check(times)  # noqa: PLW2901 - numpy's integers, say
            checked[own] = times
        return checked

    def fold(self, state: Any, value: Any) -> Any:
        if state is None:
            return value
        state |= self.sums(state, value)
        return state

    merge = fold

    def sums(self, state: Any, value: Any) -> Any:
        """Return the new sums of a value's keys."""
        if state is None:
            return value
        return {key: state[key] + times if key in state else times for key, times in value.items()}

    def fold_code(self) -> FoldCode:
        name, state = self.name, f"_record.{self.slot}"
        return FoldCode(
            set_or(state, f"_new_{name}", f"|= _new_{name}"),
            [f"_new_{name} = _sums_{name}({state}, {name})"],
        )

    def read(self, state: Any) -> Any:
        return dict(state) if state else {}

    def is_state(self, state: Any) -> bool:
        return (
            type(state) is dict
            and all(type(times) is int for times in state.values())
            and all(map(self.values.accepts, state))
        )


_INTEGER = ValueType(int)


class Mean(Field[float | None, float], Generic[N]):
    """The arithmetic mean, of exact sums; None of no values.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     load: Mean[float] = Mean()
        >>> Visits("ada", load=0.5).load
        0.5
    """

    kind = "mean"
    shows = ()

    def make_values(self, annotation: Any) -> ValueType:
        return _numbers(annotation)

    def fold_code(self) -> FoldCode:
        # The number of values, their sum, and then values that were not added up yet
        return _appending(self, ["0", "0"])

    def tidy(self, state: Any) -> Any:
        count, total, *values = state
        if type(total) is list:
            total = list(total)
        for value in values:
            total = exact.add(total, value)
        return [count + len(values), exact.sealed(total)]

    seal = tidy

    def merge(self, one: Any, other: Any) -> Any:
        one, other = self.tidy(one), self.tidy(other)
        return [one[0] + other[0], exact.merge(one[1], other[1])]

    def read(self, state: Any) -> Any:
        if state is None:
            return None
        count, total = self.tidy(state)
        return exact.nearest(exact.fraction_of(total) / count)

    def is_state(self, state: Any) -> bool:
        return (
            type(state) is list
            and len(state) == 2  # noqa: PLR2004 - how many, and their sum
            and type(state[0]) is int
            and state[0] > 0
            and exact.is_total(state[1])
        )


def _appending(field: Field[Any, Any], empty: Sequence[str]) -> FoldCode:
    """Return the lines that append a value to the state, to be added up later."""
    first, more = f"[{', '.join([*empty, field.name])}]", f"+= [{field.name}]"
    return FoldCode(set_or(f"_record.{field.slot}", first, more), most=exact.BUFFER)


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of `Stats`.

    Attributes:
        count: The number of values.
        sum: Their sum.
        min: The least; None of no values.
        max: The greatest; None of no values.
        mean: Their arithmetic mean; None of no values.
        variance: The variance of the values themselves, not the estimate for a population of which
            they are a sample; None of no values.

    Example:
        >>> Summary(count=2, sum=4, min=1, max=3, mean=2.0, variance=1.0).stdev
        1.0
    """

    count: int = 0
    sum: float = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    variance: float | None = None

    @property
    def stdev(self) -> float | None:
        """The standard deviation."""
        return None if self.variance is None else math.sqrt(self.variance)

    @property
    def sample_variance(self) -> float | None:
        """The estimated variance of the population; None of less than two values."""
        if self.variance is None or self.count < 2:  # noqa: PLR2004 - Bessel's n - 1
            return None
        return self.variance * self.count / (self.count - 1)


class Stats(Field[Summary, float], Generic[N]):
    """Count, sum, least, greatest, mean and variance, of exact sums of values and squares.

    Chan's parallel form of Welford's algorithm rounds at each merge, so that the result depends on
    the order of merges. Here nothing is rounded before it is read.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     load: Stats[float] = Stats()
        >>> Visits("ada", load=0.5).load.max
        0.5
    """

    kind = "stats"
    shows = ()

    def make_values(self, annotation: Any) -> ValueType:
        return _numbers(annotation)

    def fold_code(self) -> FoldCode:
        # Least, greatest, sum, integer and shift of the squares' sum, number of values; and then
        # values that were not added up yet
        return _appending(self, [self.name, self.name, "0", "0", "0", "0"])

    def tidy(self, state: Any) -> Any:
        least, greatest, total, squares, shift, count, *values = state
        if type(total) is list:
            total = list(total)
        shifted = squares, shift
        for value in values:
            if precedes(value, least):
                least = value
            if precedes(greatest, value):
                greatest = value
            total = exact.add(total, value)
            shifted = exact.add_shifted(shifted, exact.square(value))
        return [least, greatest, exact.sealed(total), *shifted, count + len(values)]

    seal = tidy

    def merge(self, one: Any, other: Any) -> Any:
        one, other = self.tidy(one), self.tidy(other)
        least = other[0] if precedes(other[0], one[0]) else one[0]
        greatest = other[1] if precedes(one[1], other[1]) else one[1]
        squares = exact.add_shifted((one[3], one[4]), (other[3], other[4]))
        total = exact.merge(one[2], other[2])
        return [least, greatest, total, *squares, one[5] + other[5]]

    def read(self, state: Any) -> Any:
        if state is None:
            return Summary()
        least, greatest, total, squares, shift, count = self.tidy(state)
        mean: Fraction = exact.fraction_of(total) / count
        variance = exact.fraction((squares, shift)) / count - mean * mean
        return Summary(
            count,
            exact.number(total),
            least,
            greatest,
            exact.nearest(mean),
            exact.nearest(variance),
        )

    def is_state(self, state: Any) -> bool:
        accepts = self.values.accepts
        return (
            type(state) is list
            and len(state) == 6  # noqa: PLR2004 - as in `fold`
            and accepts(state[0])
            and accepts(state[1])
            and exact.is_total(state[2])
            and all(type(part) is int and part >= 0 for part in state[3:])
            and state[4] <= 2 * _MOST_SHIFT
            and state[5] > 0
        )


#: The shift of the least float there is.
_MOST_SHIFT = 1074
