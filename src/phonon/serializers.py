"""Serializers turn values into the bytes that the server keeps, and back.

``ExactSerializer`` writes MessagePack: the native types of MessagePack (None, bool, int up to 64
bits, float, str, bytes, list, dict), and the types of this table as a list whose first element, its
head, is an extension without a body. Any other type is refused: it would come back as another one::

    0x01  int          str: hexadecimal (only of an int beyond 64 bits)
    0x02  bytearray    bytes
    0x03  complex      real part, imaginary part
    0x04  Decimal      str: digits, exponent and payload as they are
    0x05  UUID         str: hexadecimal; the value of ``is_safe``
    0x06  date         year, month, day
    0x07  time         hour, minute, second, microsecond, tzinfo, fold
    0x08  datetime     year, month, day, then as ``time``
    0x09  timedelta    days, seconds, microseconds
    0x0A  timezone     timedelta, the name if one was given
    0x0B  ZoneInfo     key
    0x10  tuple        the elements; as well 0x11 set and 0x12 frozenset
    0x13  deque        ``maxlen``, the elements
    0x14  OrderedDict  dict; as well 0x15 Counter
    0x16  defaultdict  the name of ``default_factory`` or None, dict

A code keeps its meaning for ever; another layout gets another code. Nothing is packed inside of an
extension, so that msgpack's own limit counts all levels and no nesting can exhaust the C stack.
"""

import hmac
import pickle
import reprlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Context, Decimal, InvalidOperation
from functools import partial
from operator import attrgetter
from typing import Any, Protocol
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

import msgpack
from msgpack import ExtType

from phonon.errors import ConfigurationError, NotStorableError, UndecodableError


class Serializer(Protocol):
    """The interface of a serializer, for ``Process(serializer=…)``; it must be thread-safe.

    Example:
        >>> class Json:
        ...     name = "json"
        ...     def dumps(self, value):
        ...         return json.dumps(value).encode()
        ...     def loads(self, data):
        ...         return json.loads(data)
        >>> Process(namespace="json", serializer=Json()).stop()
    """

    name: str
    """A short id, stored with the data, by which a reader detects another serializer."""

    def dumps(self, value: Any) -> bytes:
        """Return the bytes from which ``loads`` makes an equal value of the same type.

        Raises:
            NotStorableError: The value, or a part of it, would not come back unchanged.
        """

    def loads(self, data: bytes) -> Any:
        """Return the value that was given to ``dumps``.

        Raises:
            UndecodableError: ``dumps`` did not write this data, or it was damaged since.
        """


_FACTORY_TYPES = (bool, int, float, str, bytes, list, tuple, set, frozenset, dict)
_FACTORIES: dict[str | None, Any] = {None: None, **{kind.__name__: kind for kind in _FACTORY_TYPES}}
_STRICT = Context(traps=[InvalidOperation])  # the thread's own context may let "abc" pass as NaN
_ERRORS = "surrogatepass"  # text that came from os.fsdecode() may have lone surrogates
_DATE, _TIME = ("year", "month", "day"), ("hour", "minute", "second", "microsecond")


def _key(zone: ZoneInfo) -> str:
    try:
        zone.__reduce__()
    except pickle.PicklingError:  # from_file(): its rules may differ from those of its key
        raise NotStorableError("a ZoneInfo that was read from a file") from None
    return zone.key


def _factory(value: defaultdict[Any, Any]) -> str | None:
    for name, factory in _FACTORIES.items():
        if factory is value.default_factory:
            return name
    raise NotStorableError("a defaultdict whose default_factory is no builtin type")


def _plain(value: dict[Any, Any]) -> dict[Any, Any]:
    if getattr(value, "__dict__", None):  # OrderedDict and Counter can have attributes
        raise NotStorableError(f"a {type(value).__name__} with attributes of its own")
    return dict(value)


_WRITERS: dict[type, tuple[int, Callable[[Any], Iterable[Any]]]] = {
    int: (0x01, lambda v: [hex(v)]),
    bytearray: (0x02, lambda v: [bytes(v)]),
    complex: (0x03, attrgetter("real", "imag")),
    Decimal: (0x04, lambda v: [str(v)]),
    UUID: (0x05, lambda v: [v.hex, v.is_safe.value]),
    date: (0x06, attrgetter(*_DATE)),
    time: (0x07, attrgetter(*_TIME, "tzinfo", "fold")),
    datetime: (0x08, attrgetter(*_DATE, *_TIME, "tzinfo", "fold")),
    timedelta: (0x09, attrgetter("days", "seconds", "microseconds")),
    timezone: (0x0A, lambda v: v.__reduce__()[1]),  # tzname() invents a name if none was given
    ZoneInfo: (0x0B, lambda v: [_key(v)]),
    tuple: (0x10, iter),
    set: (0x11, iter),
    frozenset: (0x12, iter),
    deque: (0x13, lambda v: [v.maxlen, *v]),
    OrderedDict: (0x14, lambda v: [_plain(v)]),
    Counter: (0x15, lambda v: [_plain(v)]),
    defaultdict: (0x16, lambda v: [_factory(v), dict(v)]),
}

# Forged data may have parts of any type and number. join() accepts only bytes or str:
# bytearray(10**12) would take a terabyte, and Decimal of a long int hours. Indexing fails if there
# are too few parts: date(b"…") would make a date of four bytes without checking them.
_READERS: dict[int, Callable[[list[Any]], Any]] = {
    0x01: lambda p: int("".join(p), 16),
    0x02: lambda p: bytearray().join(p),
    0x03: lambda p: complex(p[0], p[1]),
    0x04: lambda p: Decimal("".join(p), _STRICT),
    0x05: lambda p: UUID("".join(p[:1]), is_safe=SafeUUID(p[1])),
    0x06: lambda p: date(p[0], p[1], p[2]),
    0x07: lambda p: time(p[0], p[1], p[2], p[3], p[4], fold=p[5]),
    0x08: lambda p: datetime.combine(date(*p[:3]), time(*p[3:8], fold=p[8])),
    0x09: lambda p: timedelta(p[0], p[1], p[2]),
    0x0A: lambda p: timezone(*p),
    0x0B: lambda p: ZoneInfo(p[0]),
    0x10: tuple,
    0x11: set,
    0x12: frozenset,
    0x13: lambda p: deque(p[1:], p[0]),
    0x14: lambda p: OrderedDict(p[0]),
    0x15: lambda p: Counter(p[0]),
    0x16: lambda p: defaultdict(_FACTORIES[p[0]], p[1]),
}

_HEADS = {code: ExtType(code, b"") for code in _READERS}
#: The head of a set.
SET_HEAD = _HEADS[_WRITERS[set][0]]
_HEAD_BYTE = 0xC7  # the first of each head in the data
_ATOMS = frozenset({type(None), bool, int, float, str, bytes})
#: The types of values that `ExactSerializer` writes.
STORABLE = frozenset({*_ATOMS, *_WRITERS, list, dict})


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _spell(value: Any) -> list[Any]:
    if type(value) not in _WRITERS:
        raise NotStorableError(f"a value of type {_name(type(value))}")
    code, write = _WRITERS[type(value)]
    return [_HEADS[code], *write(value)]


class _Writer:
    """A msgpack Packer that notices values which would not come back unchanged."""

    # msgpack calls no hook for bytearray, memoryview, ExtType and Timestamp, but writes data that
    # would come back as another type. Each of them leaves one of these bytes in the data.
    _MARKS = bytes((0xC4, 0xC5, 0xC6, _HEAD_BYTE, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8))

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=self._spell, strict_types=True)

    def _spell(self, value: Any) -> list[Any]:
        self._heads += 1
        # Sets are frequent in partials.
        return [SET_HEAD, *value] if type(value) is set else _spell(value)

    def pack(self, value: Any) -> bytes:
        self._heads = 0
        try:
            data: bytes = self._packer.pack(value)
        except UnicodeEncodeError:  # lone surrogates
            return _pack_carefully(value)
        # Bytes, a float of four bytes, and text in some scripts may contain these bytes as well.
        marks = len(data) - len(data.translate(None, self._MARKS))
        if marks == self._heads or _is_shallow(value, _SHALLOW):
            return data
        return _pack_carefully(value)


_SHALLOW = 4


def _is_shallow(value: Any, levels: int) -> bool:
    """Return whether a value has few levels, and only types that msgpack never confuses."""
    kind = type(value)
    if kind is dict:
        return _ATOMS.issuperset(map(type, value)) and _is_shallow(value.values(), levels)
    if kind in _ATOMS:
        return True
    if kind not in _ITERABLE:
        return False
    return _ATOMS.issuperset(map(type, value)) or (
        levels > 0 and all(_is_shallow(item, levels - 1) for item in value)
    )


_ITERABLE = frozenset({list, tuple, set, frozenset, type({}.values())})


@dataclass(eq=False, slots=True)
class _Wrapped:
    """Wraps a value in a type that msgpack does not know, so that it calls the hook."""

    value: Any


def _hold(value: Any) -> Any:
    return value if type(value) in _ATOMS else _Wrapped(value)


def _spell_held(held: Any) -> Any:
    value = held.value if type(held) is _Wrapped else held  # an int beyond 64 bits is not wrapped
    if type(value) is list:
        return [_hold(item) for item in value]
    if type(value) is dict:
        return {_hold(key): _hold(item) for key, item in value.items()}
    head, *parts = _spell(value)
    return [head, *map(_hold, parts)]


def _pack_carefully(value: Any) -> bytes:
    packer = msgpack.Packer(default=_spell_held, strict_types=True, unicode_errors=_ERRORS)
    return bytes(packer.pack(_hold(value)))


_show = partial(reprlib.aRepr.repr_instance, level=0)  # survives a broken __repr__
_DEEPEST = 500  # every version of msgpack takes it, with some levels to spare for heads
_STORABLE = "None, bool, float, str, bytes, list, dict, " + ", ".join(k.__name__ for k in _WRITERS)


def _steps(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value, each with its step of the path."""
    if type(value) in {OrderedDict, Counter, defaultdict}:
        yield "", dict(value)
    elif type(value) is dict:
        for key, item in value.items():
            yield f"[key {_show(key)}]", key
            yield f"[{_show(key)}]", item
    elif isinstance(value, (set, frozenset)):
        yield from ((f"[element {_show(item)}]", item) for item in value)
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (datetime, time)):
        yield ".tzinfo", value.tzinfo


def _refusal(value: Any, where: str, error: Exception) -> NotStorableError:
    """Walk like msgpack up to the value at which it failed, to find the value's path."""
    fault = f"{where}: {error}, so it"
    walk = [(where, iter([("", value)]))]
    while walk and not isinstance(error, RecursionError):
        path, parts = walk[-1]
        step, part = next(parts, (None, None))
        if step is None:
            walk.pop()
        elif len(walk) - 1 > _DEEPEST:  # not a level later: a list may contain itself twice
            fault = f"{walk[4][0]}…: a value that holds itself or is nested too deep"
            break
        elif type(part) not in _ATOMS:
            try:
                _ = type(part) in {list, dict} or _spell(part)
            except TypeError as reason:
                fault = f"{path}{step}: {reason}"
                break
            walk.append((path + step, _steps(part)))
    remedy = f"turn it into one of {_STORABLE}, or give Process another serializer="
    return NotStorableError(f"{fault} cannot be stored; {remedy}")


class _HeadReader:
    """Reads data with heads, and checks that each head is the first item of a list."""

    _heads = 0

    def head(self, code: int, body: bytes) -> ExtType:
        self._heads += 1
        return _HEADS[code] if not body else _no_head(code, body)

    def array(self, items: list[Any]) -> Any:
        if items and type(items[0]) is ExtType:
            self._heads -= 1
            return _READERS[items[0].code](items[1:])
        return items

    def unpack(self, data: bytes) -> Any:
        value = _unpack(data, self.head, self.array)
        if self._heads:  # it would reach the user in place of a value
            raise ValueError("an extension that does not start a list")
        return value


def scan(data: bytes) -> None:
    """Skip over data before it is decoded, which takes no memory.

    Nested lists that each claim the length of all data would get the memory before they turn out to
    be short.

    Raises:
        Exception: It ends too early.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    unpacker.skip()


def _no_head(code: int, body: bytes) -> Any:
    raise ValueError(f"extension {code} with {len(body)} bytes")


#: The options for reading. timestamp=3: msgpack calls no hook for its own extension, so it becomes
#: a datetime here.
UNPACKING: Mapping[str, Any] = {
    "strict_map_key": False, "timestamp": 3, "unicode_errors": _ERRORS
}  # fmt: skip
#: A Packer's buffer never shrinks, so one that wrote more is dropped.
KEPT = 256 * 1024
#: False lengths in shorter data do no harm.
SCANNED = 1024


def _unpack(data: bytes, head: Callable[[int, bytes], Any], array: Any = None) -> Any:
    return msgpack.unpackb(data, ext_hook=head, list_hook=array, **UNPACKING)


def loads_plain(data: bytes) -> Any:
    """Read what has values of MessagePack's own types, and sets, as lists behind `SET_HEAD`.

    Raises:
        Exception: There is something else, or the data is damaged.
    """
    if len(data) > SCANNED:
        scan(data)
    return msgpack.unpackb(data, ext_hook=_set_head, **UNPACKING)


def _set_head(code: int, body: bytes) -> Any:
    return SET_HEAD if code == SET_HEAD.code and not body else _no_head(code, body)


class ExactSerializer:
    """Writes values so that they come back unchanged, type for type, or refuses them.

    It takes the types of the table at the top of this module. It refuses their subclasses, because
    those are other types: enums, named tuples, numpy's floats. A dict's keys may have any hashable
    type in the table; a ZoneInfo comes back as ``ZoneInfo(key)``; 500 levels may be nested.

    Reading runs no code, imports nothing and takes memory in proportion to the data, even for
    hostile data. A user with the right to write to the server can choose keys that collide in a
    dict, which takes time.

    Example:
        >>> serializer = ExactSerializer()
        >>> serializer.loads(serializer.dumps({("a", 1): {2.0, 3}})) == {("a", 1): {2.0, 3}}
        True
    """

    name = "x1"

    def __init__(self) -> None:
        # Making a Packer takes longer than packing a small dict. It is removed while in use,
        # because a signal handler or a finalizer must not write into its buffer meanwhile.
        self._writers: list[_Writer] = []

    def dumps(self, value: Any, where: str = "value") -> bytes:
        """Return a value's bytes, see ``Serializer``; errors start with ``where``, like ``doc``."""
        try:
            writer = self._writers.pop()
        except IndexError:
            writer = _Writer()
        try:
            data = writer.pack(value)
        except (TypeError, ValueError, OverflowError, BufferError, RecursionError) as error:
            raise _refusal(value, where, error) from None
        if len(data) <= KEPT:
            self._writers.append(writer)
        return data

    def loads(self, data: bytes) -> Any:
        """Return the value of the output of ``dumps``, see ``Serializer``."""
        try:
            if len(data) > SCANNED:
                scan(data)
            return _HeadReader().unpack(data) if _HEAD_BYTE in data else _unpack(data, _no_head)
        except MemoryError:
            raise  # the cause is this machine, not the data
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:100].encode("ascii", "replace").decode()
            raise UndecodableError(
                f"stored data cannot be read back ({reason}): ExactSerializer did not write it so"
            ) from error


class SignedPickleSerializer:
    """Stores any object that can be pickled, for programs that trust all who have the key.

    Warning:
        Unpickling runs code that the data chooses. Anyone who knows the key and can write to the
        server runs any program in every process with this serializer: keep the key off the server
        and out of logs. Without it, they can still put back data that was signed earlier or
        elsewhere.

    Args:
        key: At least 16 secret bytes, the same in all processes; of a str, its UTF-8.

    Raises:
        ConfigurationError: The key is too short, or neither bytes nor str.

    Example:
        >>> serializer = SignedPickleSerializer(key="sixteen bytes or more")
        >>> serializer.loads(serializer.dumps(ValueError("any object")))
        ValueError('any object')
    """

    name = "p1"
    _SHORTEST_KEY = 16  # bytes

    def __init__(self, key: bytes | str) -> None:
        self._key = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
        if not isinstance(self._key, bytes) or len(self._key) < self._SHORTEST_KEY:
            raise ConfigurationError(
                f"SignedPickleSerializer needs a key of at least {self._SHORTEST_KEY} bytes, the "
                "same in all processes; make one with secrets.token_bytes(32)"
            )

    def dumps(self, value: Any, where: str = "value") -> bytes:
        """Return a value's bytes, see ``Serializer``; errors start with ``where``, like ``doc``."""
        try:
            pickled = pickle.dumps(value, protocol=5)
        except Exception as error:
            raise NotStorableError(
                f"{where}: a value of type {_name(type(value))} cannot be pickled "
                f"({type(error).__name__}: {error}); store its parts instead"
            ) from error
        return hmac.digest(self._key, pickled, "sha256") + pickled

    def loads(self, data: bytes) -> Any:
        """Read the output of ``dumps`` with the same key, see ``Serializer``."""
        signature, pickled = data[:32], data[32:]
        if not hmac.compare_digest(signature, hmac.digest(self._key, pickled, "sha256")):
            raise UndecodableError(
                "stored data does not carry our signature: check that all processes give "
                "SignedPickleSerializer the same key; if they do, it was damaged or forged"
            )
        try:
            return pickle.loads(pickled)  # noqa: S301 - verified just above
        except Exception as error:
            raise UndecodableError(
                f"stored data with our signature cannot be unpickled ({type(error).__name__}: "
                f"{error}): check that all processes have the same version of its classes"
            ) from error
