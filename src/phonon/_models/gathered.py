"""Fields that gather values: lists, sets, estimates of their number, and custom fields."""

import copy
import hashlib
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from phonon._models.field import Field, FoldCode, set_or
from phonon._models.values import in_order
from phonon.errors import ConfigurationError
from phonon.serializers import ExactSerializer

T = TypeVar("T")

_COLLECTIONS = (list, set, frozenset, tuple)


class ID(Field[T, T], Generic[T]):
    """The key of the record. A model has one, as its first field.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        >>> Visits("ada").id
        'ada'
    """

    kind = "id"

    def fold(self, state: Any, value: Any) -> Any:
        return state or value

    def merge(self, one: Any, other: Any) -> Any:
        del other
        return one

    def read(self, state: Any) -> Any:
        return state

    def is_state(self, state: Any) -> bool:
        return self.values.accepts(state)


class ListAppend(Field[list[T], Any], Generic[T]):
    """All values, with repetitions, in ascending order.

    Their order of arrival is not kept, because it differs between processes. Messages have one
    value or a list of them.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     tags: ListAppend[str] = ListAppend()
        >>> Visits("ada", tags=["b", "a", "b"]).tags
        ['a', 'b', 'b']
    """

    kind = "list_append"
    shows = (list,)

    def check(self, value: Any) -> Any:
        items = value if isinstance(value, _COLLECTIONS) else (value,)
        check, kind = self.values.check, self.values.exact
        return [item if type(item) is kind else check(item) for item in items]

    def merge(self, one: Any, other: Any) -> Any:
        one += other
        return one

    def fold_code(self) -> FoldCode:
        return FoldCode(set_or(f"_record.{self.slot}", self.name, f"+= {self.name}"))

    def seal(self, state: Any) -> Any:
        return in_order(state)

    def read(self, state: Any) -> Any:
        return in_order(state or [])

    def is_state(self, state: Any) -> bool:
        return type(state) is list and all(map(self.values.accepts, state))


class SetAppend(Field[set[T], Any], Generic[T]):
    """The different values. Messages have one value or a collection of them.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     tags: SetAppend[str] = SetAppend()
        >>> Visits("ada", tags=["a", "a"]).tags
        {'a'}
    """

    kind = "set_append"
    shows = (set, frozenset)

    def check(self, value: Any) -> Any:
        items = value if isinstance(value, _COLLECTIONS) else (value,)
        check, kind = self.values.check, self.values.exact
        return {item if type(item) is kind else check(item) for item in items}

    def merge(self, one: Any, other: Any) -> Any:
        one |= other
        return one

    def read(self, state: Any) -> Any:
        return set(state or ())

    def is_state(self, state: Any) -> bool:
        return type(state) is set and all(map(self.values.accepts, state))

    def check_code(self, stamp: str | None) -> list[str]:
        kind = self.values.exact
        if kind is None:
            return super().check_code(stamp)
        name = self.name
        return [f"if _type({name}) is not _{kind.__name__}:", f"    {name} = _check_{name}({name})"]

    def fold_code(self) -> FoldCode:
        name, state = self.name, f"_record.{self.slot}"
        many = set_or(state, name, f"|= {name}")
        kind = self.values.exact
        if kind is None:
            return FoldCode(many)
        # A single value, which is usually in the set already, needs no set of its own.
        one = [
            f"_state = {state}",
            "if _state is None:",
            f"    {state} = {{{name}}}",
            f"elif {name} not in _state:",
            f"    _state |= {{{name}}}",
        ]
        indented = [*(f"    {line}" for line in one), "else:", *(f"    {line}" for line in many)]
        return FoldCode(
            [f"if _is_one_{name}:", *indented],
            before=[f"_is_one_{name} = _type({name}) is _{kind.__name__}"],
            usual=one,
        )


class Distinct(Field[int, Any], Generic[T]):
    """The number of different values, estimated by a HyperLogLog of 4,096 registers.

    The standard error is 1.6 per cent; up to some hundred values only hash collisions are errors.
    Messages have one value or a collection of them. After P. Flajolet et al. 2007, with the
    estimator of O. Ertl 2017, which needs no tables of corrections.

    Example:
        >>> class Visits(Model):
        ...     id: ID[str]
        ...     pages: Distinct[str] = Distinct()
        >>> Visits("ada", pages=["/", "/x", "/"]).pages
        2
    """

    kind = "distinct"
    shows = ()

    #: Bits of a hash that number the registers.
    _BITS = 12
    #: Up to so many registers other than 0 are kept by number; more of them as an array.
    _SPARSE = 512
    _DIGEST = 8

    def check(self, value: Any) -> Any:
        items = value if isinstance(value, _COLLECTIONS) else (value,)
        return [_register(self.values.check(item)) for item in items]

    def fold(self, state: Any, value: Any) -> Any:
        state = {} if state is None else state.copy()
        for register, rank in value:
            if type(state) is dict:
                if state.get(register, 0) < rank:
                    state[register] = rank
                    if len(state) > self._SPARSE:
                        state = self._dense(state)
            elif state[register] < rank:
                state[register] = rank
        return state

    def fold_code(self) -> FoldCode:
        # Most values are in the state already, so that it need not be copied.
        name, state = self.name, f"_record.{self.slot}"
        return FoldCode(
            [f"if _new_{name} is not None:", f"    {state} = _new_{name}"],
            [f"_new_{name} = _changed_{name}({state}, {name})"],
        )

    def changed(self, state: Any, value: Any) -> Any:
        """Return the state with a value added; None if it has the value already."""
        if state is not None:
            known = state.get if type(state) is dict else state.__getitem__
            value = [pair for pair in value if (known(pair[0]) or 0) < pair[1]]
        return self.fold(state, value) if value or state is None else None

    @classmethod
    def _dense(cls, state: Any) -> bytearray:
        registers = bytearray(1 << cls._BITS)
        for register, rank in state.items():
            registers[register] = rank
        return registers

    def merge(self, one: Any, other: Any) -> Any:
        if type(other) is dict:
            return self.fold(one, other.items())
        if type(one) is dict:
            return self.fold(other, one.items())
        return bytearray(map(max, one, other))

    def seal(self, state: Any) -> Any:
        return dict(sorted(state.items())) if type(state) is dict else state

    def read(self, state: Any) -> Any:
        if not state:
            return 0
        ranks = state.values() if type(state) is dict else state
        most = 8 * self._DIGEST - self._BITS + 1
        counts = [0] * (most + 1)
        for rank in ranks:
            counts[rank] += 1
        size = 1 << self._BITS
        counts[0] = size - sum(counts[1:])
        total = size * _tau(1 - counts[most] / size)
        for count in reversed(counts[1:most]):
            total = 0.5 * (total + count)
        total += size * _sigma(counts[0] / size)
        return round(size * size / (2 * math.log(2)) / total)

    def is_state(self, state: Any) -> bool:
        most = 8 * self._DIGEST - self._BITS + 1
        if type(state) is bytearray:
            return len(state) == 1 << self._BITS and max(state) <= most
        return type(state) is dict and all(
            type(register) is int
            and 0 <= register < 1 << self._BITS
            and type(rank) is int
            and 0 < rank <= most
            for register, rank in state.items()
        )


_dumps = ExactSerializer().dumps


def _register(value: Any) -> tuple[int, int]:
    """Return a value's register, and 1 plus the number of leading zeros in the rest of its hash."""
    if type(value) is str:
        data = b"s" + value.encode("utf-8", "surrogatepass")
    else:
        data = b"m" + _dumps(value)
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=Distinct._DIGEST).digest())  # noqa: SLF001
    rest = 8 * Distinct._DIGEST - Distinct._BITS  # noqa: SLF001 - the field's own numbers
    return digest >> rest, rest - (digest & ((1 << rest) - 1)).bit_length() + 1


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    y, z = 1.0, x
    while True:
        x *= x
        before = z
        z += x * y
        y += y
        if z == before:
            return z


def _tau(x: float) -> float:
    if x in {0, 1}:
        return 0.0
    y, z = 1.0, 1 - x
    while True:
        x = math.sqrt(x)
        before = z
        y *= 0.5
        z -= (1 - x) ** 2 * y
        if z == before:
            return z / 3


class Custom(Field[T, T], Generic[T]):
    """A field of your own. Its values and its state are of one type, which can be stored.

    Args:
        merge: A function that returns the merge of two values, without changing them. It is
            associative and commutative, which `phonon.testing.assert_mergeable` tests.
        zero: The neutral element: its merge with any value is that value.
        data_type: The type of the values, if no annotation gives it.

    Example:
        >>> flags = Custom(merge=lambda a, b: a | b, zero=0)
    """

    kind = "custom"

    def __init__(self, *, merge: Callable[[T, T], T], zero: T, data_type: Any = None) -> None:
        super().__init__(data_type)
        if not callable(merge):
            raise ConfigurationError(f"Custom(merge=...) takes a function, not {merge!r}")
        self._merge = merge
        self._zero = zero

    @classmethod
    def from_annotation(cls, arguments: tuple[Any, ...]) -> Any:
        raise ConfigurationError(
            f"Custom[{', '.join(map(str, arguments))}] needs a merge function: write "
            "field: Custom[...] = Custom(merge=..., zero=...)"
        )

    def fold(self, state: Any, value: Any) -> Any:
        return self.merge(copy.deepcopy(self._zero) if state is None else state, value)

    def merge(self, one: Any, other: Any) -> Any:
        return self._merge(one, other)

    def read(self, state: Any) -> Any:
        return copy.deepcopy(self._zero if state is None else state)

    def is_state(self, state: Any) -> bool:
        return self.values.accepts(state)
