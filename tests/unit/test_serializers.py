"""Values come back as they were, or are refused by name; foreign bytes do no harm."""

import dataclasses
import enum
import functools
import itertools
import random
import re
import struct
import sys
import threading
import tracemalloc
from array import array
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from io import BytesIO
from typing import Any
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phonon import serializers
from phonon.errors import ConfigurationError, NotStorableError, UndecodableError
from phonon.serializers import ExactSerializer, Serializer, SignedPickleSerializer
from support.examples import examples

EXACT = ExactSerializer()
PARIS = ZoneInfo("Europe/Paris")
KEY = b"sixteen bytes..."

# -- Strict comparison ----------------------------------------------------------------------------


def form(value: Any) -> Any:
    """Gives what is equal for two values only if nobody can tell them apart."""
    return type(value), FORMS.get(type(value), lambda same: same)(value)


def form_of_items(value: Any) -> list[Any]:
    return [form(item) for item in value]


def form_of_moment(value: Any) -> Any:
    return value.replace(tzinfo=None).isoformat(), value.fold, form(value.tzinfo)


def form_of_mapping(value: Any) -> list[Any]:
    return [(form(key), form(item)) for key, item in value.items()]


FORMS: dict[type, Callable[[Any], Any]] = {
    float: struct.Struct(">d").pack,
    complex: lambda value: (form(value.real), form(value.imag)),
    Decimal: lambda value: value.as_tuple(),
    UUID: lambda value: (value.int, value.is_safe),
    timezone: repr,  # == looks only at the offset
    ZoneInfo: id,
    datetime: form_of_moment,
    time: form_of_moment,
    list: form_of_items,
    tuple: form_of_items,
    deque: lambda value: (value.maxlen, form_of_items(value)),
    set: lambda value: sorted(repr(form(item)) for item in value),
    frozenset: lambda value: sorted(repr(form(item)) for item in value),
    dict: form_of_mapping,
    OrderedDict: form_of_mapping,
    Counter: form_of_mapping,
    defaultdict: lambda value: (value.default_factory, form_of_mapping(value)),
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (0j, complex(0, -0.0)),
        (b"a", bytearray(b"a")),
        ([1], [1.0]),
        ([1], [True]),
        ({1}, frozenset({1})),
        ({1}, {1.0}),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
        ({1: 2}, {True: 2}),
        ({1: 2}, OrderedDict({1: 2})),
        ({1: 2}, Counter({1: 2})),
        (defaultdict(int), defaultdict(list)),
        (deque([1]), deque([1], 1)),
        (Decimal("1.0"), Decimal("1.00")),
        (Decimal(0), Decimal("-0")),
        (UTC, timezone(timedelta(0), "UTC")),
        (UTC, timezone(timedelta(0), "Zulu")),
        (datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, 1, tzinfo=PARIS)),
        (datetime(2024, 1, 1, tzinfo=PARIS), datetime(2024, 1, 1, tzinfo=PARIS, fold=1)),
        (UUID(int=1), UUID(int=1, is_safe=SafeUUID.safe)),
    ],
)
def test_the_comparison_tells_apart_what_is_equal_and_not_the_same(one: Any, other: Any) -> None:
    assert one == other
    assert form(one) != form(other)


def test_the_comparison_knows_that_a_nan_is_the_same_nan() -> None:
    assert form([float("nan"), Decimal("sNaN7")]) == form([float("nan"), Decimal("sNaN7")])


# -- Values of all types --------------------------------------------------------------------------

DAY = timedelta(days=1) - timedelta.resolution
zone_names = st.text(st.characters(exclude_categories=()), max_size=8)
offsets = st.timedeltas(-DAY, DAY)
zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(timezone, offsets),
    st.builds(timezone, offsets, zone_names),
    st.sampled_from(["UTC", "Europe/Paris", "America/New_York", "Asia/Kathmandu"]).map(ZoneInfo),
)
folds = st.integers(0, 1)
hashable_atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**4000), 2**4000),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.decimals().filter(lambda number: not number.is_snan()),
    st.builds(UUID, int=st.integers(0, 2**128 - 1), is_safe=st.sampled_from(SafeUUID)),
    st.dates(),
    st.timedeltas(),
    st.builds(lambda v, z, f: v.replace(tzinfo=z, fold=f), st.times(), zones, folds),
    st.builds(lambda v, z, f: v.replace(tzinfo=z, fold=f), st.datetimes(), zones, folds),
)
hashables = st.recursive(
    hashable_atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)
    ),
    max_leaves=5,
)
FACTORIES = [None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict]


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    dicts = st.dictionaries(hashables, inner, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.builds(deque, lists, st.none() | st.integers(0, 5)),
        dicts,
        dicts.map(OrderedDict),
        dicts.map(Counter),
        st.builds(defaultdict, st.sampled_from(FACTORIES), dicts),
    )


values = st.recursive(
    hashables | st.binary().map(bytearray) | st.decimals() | st.sets(hashables, max_size=4),
    containers,
    max_leaves=12,
)


@settings(max_examples=examples(600), deadline=None)
@given(values)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert form(EXACT.loads(EXACT.dumps(value))) == form(value)


@pytest.mark.parametrize(
    "value",
    [
        *(float("inf"), float("-inf"), float("nan"), -0.0, 5e-324, 1.7976931348623157e308),
        *(10**5000, -(10**5000), 2**64, -(2**63) - 1),
        *("", "\udc80", "\ud83d\ude00", "ключ \U0001f600", "a" * 70_000),
        *(b"", b"\xc7\x00\x10", bytearray(), bytearray(b"\xc4")),
        *(timedelta.min, timedelta.max, timedelta(-1, 1, 1), timedelta.resolution),
        *(date.min, date.max, time.min, time.max),
        *(datetime.min, datetime.max),  # noqa: DTZ901 - the naive ones are under test
        *map(Decimal, ("NaN", "-sNaN123", "Infinity", "-0", "1.500", "0E+7", "1E-999999")),
        Decimal("9.99E+999999999999999999"),
        datetime(2024, 10, 27, 2, 30, tzinfo=PARIS, fold=1),
        datetime(2024, 1, 1, tzinfo=timezone(-timedelta(seconds=1, microseconds=1), "")),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1), "UTC+01:00")),
        time(23, 59, tzinfo=timezone(timedelta(hours=5, minutes=30), "\udc80")),
        {(1, (b"k", frozenset({None}))): 1, None: 2, b"": 3, date.min: 4, 2**70: 5, -0.0: 6},
        {"b": 1, "a": 2, 0: 3},
        [(), set(), frozenset(), {}, [], deque(maxlen=0), OrderedDict(), Counter()],
        [[bytearray(b"1"), {"k": (bytearray(b"2"), "\udc80")}], deque([bytearray()])],
        defaultdict(list, {"a": [defaultdict(None, {1: bytearray(b"x")})]}),
        Counter({"a": -1, "b": 2.5, "c": 0}),
        {float("nan"), float("nan")},
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_extreme_value_comes_back_as_it_was(value: Any) -> None:
    assert form(EXACT.loads(EXACT.dumps(value))) == form(value)


def test_the_decimal_context_of_neither_side_matters() -> None:
    value = [Decimal("1.23456789E+99"), Decimal("sNaN12345")]
    with localcontext(Context(prec=2, Emax=5, Emin=-5, capitals=0, traps=[])):
        assert form(EXACT.loads(EXACT.dumps(value))) == form(value)


def test_one_type_has_one_layout_for_ever() -> None:
    """Data outlives the process that wrote it: a red test here asks for a new code or name."""
    value = [
        2**64,
        bytearray(b"a"),
        1 + 2j,
        Decimal("1.50"),
        UUID(int=1),
        date(2024, 2, 29),
        time(1, 2, 3, 4),
        datetime(2024, 2, 29, 1, 2, 3, 4, timezone(timedelta(1, 2, 3) / 2, "x"), fold=1),
        timedelta(1, 2, 3),
        datetime(2024, 2, 29, tzinfo=ZoneInfo("UTC")),
        (1,),
        {1},
        frozenset({1}),
        deque([1], 2),
        OrderedDict(a=1),
        Counter(a=1),
        defaultdict(int, a=1),
    ]
    data = bytes.fromhex(
        "dc0011"
        "92c70001b33078" + b"10000000000000000".hex() + "92c70002c40161"
        "93c70003cb3ff0000000000000cb4000000000000000"
        "92c70004a4312e3530"
        "93c70005d920" + b"00000000000000000000000000000001".hex() + "c0"
        "94c70006cd07e8021d"
        "97c7000701020304c000"
        "9ac70008cd07e8021d0102030493c7000a94c7000900cda8c102a17801"
        "94c70009010203"
        "9ac70008cd07e8021d0000000092c7000ba355544300"
        "92c7001001"
        "92c7001101"
        "92c7001201"
        "93c700130201"
        "92c7001481a16101"
        "92c7001581a16101"
        "93c70016a3696e7481a16101"
    )
    assert EXACT.name == "x1"
    assert EXACT.dumps(value) == data
    assert form(EXACT.loads(data)) == form(value)


def test_a_plain_value_is_plain_messagepack() -> None:
    value = {"flights": 3, "miles": 1200.5, "airports": ["JFK", "LGA"], "raw": b"\xc4", "no": None}
    assert EXACT.dumps(value) == msgpack.packb(value)


# -- Values that are refused ----------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    A = "a"


class Flag(enum.IntFlag):
    A = 1


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the untyped kind is under test


@dataclasses.dataclass(frozen=True)
class Record:
    x: int = 1


class Unshowable:
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        raise RuntimeError


class Zone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(0)

    tzname = dst = utcoffset  # type: ignore[assignment]  # nobody asks


def subclass(base: type) -> Any:
    return type("Special", (base,), {})()


def with_attribute(value: Any) -> Any:
    value.note = 1
    return value


def from_file() -> ZoneInfo:
    header = b"TZif" + bytes(16) + struct.pack(">6l", 0, 0, 0, 0, 1, 4)
    zone = header + struct.pack(">lbb", 0, 0, 0) + b"UTC\0"
    return ZoneInfo.from_file(BytesIO(zone), key="UTC")


SUBCLASSES = [int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict]
SUBCLASSES += [OrderedDict, Counter, defaultdict, deque, Decimal, timedelta]
REFUSED: list[tuple[Any, str]] = [
    *((subclass(base), f"a value of type {__name__}.Special") for base in SUBCLASSES),
    (Color.RED, f"a value of type {__name__}.Color"),
    (Level.LOW, f"a value of type {__name__}.Level"),
    (Word.A, f"a value of type {__name__}.Word"),
    (Flag.A, f"a value of type {__name__}.Flag"),
    (Point(1, 2), f"a value of type {__name__}.Point"),
    (Record(), f"a value of type {__name__}.Record"),
    (Unshowable(), f"a value of type {__name__}.Unshowable"),
    (object(), "a value of type object"),
    (object, "a value of type type"),
    (Color, "a value of type enum.EnumType"),
    (..., "a value of type ellipsis"),
    (len, "a value of type builtin_function_or_method"),
    (range(3), "a value of type range"),
    (iter([1]), "a value of type list_iterator"),
    (Fraction(1, 2), "a value of type fractions.Fraction"),
    (SafeUUID.safe, "a value of type uuid.SafeUUID"),
    (ValueError(), "a value of type ValueError"),
    (re.compile("a"), "a value of type re.Pattern"),
    (ChainMap(), "a value of type collections.ChainMap"),
    (array("b", b"a"), "a value of type array.array"),
    # msgpack would write these without a question and read another type.
    (memoryview(b"a"), "a value of type memoryview"),
    (memoryview(b"abcd")[::2], "a value of type memoryview"),
    (msgpack.ExtType(0x10, b""), "a value of type msgpack.ext.ExtType"),
    (msgpack.ExtType(0x55, b"abc"), "a value of type msgpack.ext.ExtType"),
    *((msgpack.ExtType(1, bytes(n)), "a value of type msgpack.ext.ExtType") for n in (1, 2, 4)),
    *((msgpack.ExtType(1, bytes(n)), "a value of type msgpack.ext.ExtType") for n in (8, 16, 300)),
    (msgpack.ExtType(1, bytes(70_000)), "a value of type msgpack.ext.ExtType"),
    (msgpack.Timestamp(1), "a value of type msgpack.ext.Timestamp"),
    (msgpack.Timestamp(2**40, 1), "a value of type msgpack.ext.Timestamp"),
    (defaultdict(lambda: 1), "a defaultdict whose default_factory is no builtin type"),
    (defaultdict(Decimal), "a defaultdict whose default_factory is no builtin type"),
    (with_attribute(OrderedDict(a=1)), "a OrderedDict with attributes of its own"),
    (with_attribute(Counter(a=1)), "a Counter with attributes of its own"),
    (from_file(), "a ZoneInfo that was read from a file"),
]


@pytest.mark.parametrize("company", [[], [b"", (1, 2), "\udc80"]], ids=["alone", "in company"])
@pytest.mark.parametrize(("value", "what"), REFUSED, ids=lambda x: x if type(x) is str else "")
def test_any_other_type_is_refused_by_its_path(value: Any, what: str, company: list[Any]) -> None:
    doc = {"tags": [1, "b", value], "company": company}
    expected = f"doc['tags'][2]: {what} cannot be stored; turn it into one of None, bool, "
    with pytest.raises(NotStorableError) as caught:
        EXACT.dumps(doc, "doc")
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith(", or give Process another serializer=")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Color.RED, "doc"),
        ((0, Color.RED), "doc[1]"),
        (deque([0, Color.RED], 9), "doc[1]"),
        ({"a": {1: Color.RED}}, "doc['a'][1]"),
        (OrderedDict(a=Counter({"b": [Color.RED]})), "doc['a']['b'][0]"),
        (defaultdict(int, {(1, 2): Color.RED}), "doc[(1, 2)]"),
        ({"a": {Color.RED: 1}}, "doc['a'][key <Color.RED: 1>]"),
        ({(1, Color.RED): 1}, "doc[key (1, <Color.RED: 1>)][1]"),
        ({"a": {Color.RED}}, "doc['a'][element <Color.RED: 1>]"),
        ([frozenset({(Color.RED,)})], "doc[0][element (<Color.RED: 1>,)][0]"),
        ([{memoryview(b"a")}], "doc[0][element <memory at 0x"),
        ({"at": datetime(2024, 1, 1, tzinfo=Zone())}, "doc['at'].tzinfo"),
        ([time(1, tzinfo=from_file())], "doc[0].tzinfo"),
    ],
    ids=lambda x: x if type(x) is str else "",
)
def test_the_path_leads_through_every_container(value: Any, path: str) -> None:
    with pytest.raises(NotStorableError) as caught:
        EXACT.dumps(value, "doc")
    assert str(caught.value).startswith(path if "memory" in path else f"{path}: ")


@pytest.mark.parametrize("key", [memoryview(b"a"), msgpack.ExtType(1, b""), msgpack.Timestamp(1)])
def test_no_key_is_written_as_another_type(key: Any) -> None:
    with pytest.raises(NotStorableError, match=r"^value\['a'\]\[key .*: a value of type "):
        EXACT.dumps({"a": {key: 1}})


def test_the_path_survives_a_key_that_cannot_be_shown() -> None:
    with pytest.raises(NotStorableError, match=r"^value\[key <Unshowable instance at \w+>\]: "):
        EXACT.dumps({Unshowable(): 1})


def test_the_path_shows_no_more_than_the_start_of_a_long_key() -> None:
    with pytest.raises(NotStorableError) as caught:
        EXACT.dumps({"a" * 10**6: object(), 10**6000: 1})
    assert len(str(caught.value)) < 600


def test_a_refusal_leaves_nothing_behind_for_the_next_value() -> None:
    serializer = ExactSerializer()
    for bad in (["lost", object()], ["lost", memoryview(b"a")], ["lost", [[object()]]]):
        with pytest.raises(NotStorableError):
            serializer.dumps(bad)
        assert serializer.loads(serializer.dumps("\udc80")) == "\udc80"
        assert serializer.dumps([1]) == b"\x91\x01"


# -- Depth ----------------------------------------------------------------------------------------

WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "deque": lambda inner: deque([inner]),
    "OrderedDict": lambda inner: OrderedDict(a=inner),
    "defaultdict": lambda inner: defaultdict(int, a=inner),
    "frozenset": lambda inner: frozenset([inner]),
    "list in tuple": lambda inner: ([inner],),
}


def nest(wrap: Callable[[Any], Any], depth: int, core: Any = 1) -> Any:
    return functools.reduce(lambda inner, _: wrap(inner), range(depth), core)


def unnest(value: Any) -> Iterator[type]:
    while not isinstance(value, int):
        yield type(value)
        value = next(iter(value.values() if isinstance(value, dict) else value))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_what_can_be_written_can_be_read_up_to_the_deepest_level(wrap: Callable[..., Any]) -> None:
    for depth in itertools.count(200):
        value = nest(wrap, depth)
        try:
            data = EXACT.dumps(value)
        except NotStorableError as error:
            refusal = str(error)
            break
        assert list(unnest(EXACT.loads(data))) == list(unnest(value))
    assert depth >= 250
    assert re.match(r"value.{4,}…: a value that holds itself or is nested too deep", refusal)


@pytest.mark.parametrize("core", [1, b"a", "\udc80", bytearray(b"a"), memoryview(b"a")])
@pytest.mark.parametrize("depth", [5_000, 200_000])
def test_what_is_nested_far_too_deep_is_refused(depth: int, core: Any) -> None:
    with pytest.raises(NotStorableError, match=r"^doc\[0\]\[0\]\[0\]…: a value .* nested too deep"):
        EXACT.dumps(nest(WRAPS["list"], depth, core), "doc")


def test_deep_levels_are_no_matter_when_the_interpreter_has_few_frames_left() -> None:
    def dive(frames: int) -> bytes:
        return dive(frames - 1) if frames else EXACT.dumps(value)

    value = nest(WRAPS["list in tuple"], 200)
    assert dive(sys.getrecursionlimit() - 200) == EXACT.dumps(value)


def rings() -> Iterator[Any]:
    a: Any = []
    a.append(a)
    yield a
    a = []
    a += [a, a, a]
    yield a
    a = {}
    a["a"] = a["b"] = a
    yield a
    a = deque()
    a += [a, a]
    yield a
    a = OrderedDict()
    a["a"] = a["b"] = a
    yield a
    a = defaultdict(list)
    a["a"] = (b"", {"a": a})
    yield a
    yield nest(lambda inner: [inner, inner], 5_000)


@pytest.mark.parametrize("value", list(rings()), ids=lambda value: type(value).__name__)
def test_what_holds_itself_is_refused_at_once(value: Any) -> None:
    with pytest.raises(
        NotStorableError, match=r"^value.*…: a value that holds itself or is nested"
    ):
        EXACT.dumps(value)


# -- Foreign bytes --------------------------------------------------------------------------------


def check_reading(data: bytes) -> None:
    """Reads bytes, which may fail in one way only, and must else give a value of our types."""
    try:
        value = EXACT.loads(data)
    except UndecodableError as error:
        message = str(error)
    else:
        assert form(EXACT.loads(EXACT.dumps(value))) == form(value)
        return
    assert message.startswith("stored data cannot be read back (")
    assert message.isprintable()
    assert message.isascii()


@settings(max_examples=examples(1000), deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_do_no_harm(data: bytes) -> None:
    check_reading(data)


@settings(max_examples=examples(600), deadline=None)
@given(values, st.data())
def test_damaged_data_does_no_harm(value: Any, data: st.DataObject) -> None:
    damaged = bytearray(EXACT.dumps(value))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(start, min(start + 3, len(damaged))))
        damaged[start:end] = data.draw(st.binary(max_size=3))
    check_reading(bytes(damaged))


@pytest.mark.slow
def test_every_byte_replaced_by_every_other_does_no_harm() -> None:
    aware = datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1), "x"))
    good = EXACT.dumps([aware, {(1,): Decimal(1)}, {2**70}, deque([1], 2), defaultdict(int, a=1j)])
    for at, byte in itertools.product(range(len(good)), range(256)):
        check_reading(good[:at] + bytes([byte]) + good[at + 1 :])


@settings(max_examples=examples(200), deadline=None)
@given(values, st.binary(min_size=1, max_size=3))
def test_data_is_refused_when_it_is_cut_or_continued(value: Any, more: bytes) -> None:
    good = EXACT.dumps(value)
    for bad in (*(good[:cut] for cut in range(min(len(good), 50))), good[:-1], good + more):
        with pytest.raises(UndecodableError, match="stored data cannot be read back"):
            EXACT.loads(bad)


def ext(code: int, *parts: Any) -> list[Any]:
    return [msgpack.ExtType(code, b""), *parts]


HEAD = msgpack.ExtType(0x10, b"")
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "the unused byte": b"\xc1",
    "text": b"hello, world",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a dict of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a str of 4 billion": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 billion": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 billion": b"\xc9\xff\xff\xff\xff\x01",
    "100,000 levels": b"\x91" * 100_000 + b"\xc0",
    "100,000 levels of tuples": b"\x92\xc7\x00\x10" * 100_000 + b"\xc0",
    "no utf-8": b"\xa1\xff",
    "a list as a key": b"\x81\x90\x01",
    "a dict as a key": b"\x81\x80\x01",
    **{
        name: msgpack.packb(value)
        for name, value in {
            "a list in a set": ext(0x11, []),
            "a set in a frozenset": ext(0x12, ext(0x11, 1)),
            "a tuple of a list in a set": ext(0x11, ext(0x10, [])),
            "a bytearray in a set": ext(0x11, ext(0x02, b"a")),
            "a signalling NaN in a set": ext(0x11, ext(0x04, "sNaN")),
            "a head alone": HEAD,
            "a head in second place": [1, HEAD],
            "a head after a head": ext(0x10, HEAD),
            "a head as a value": {"a": HEAD},
            "a head as a key": {HEAD: 1},
            "two heads as one key": {msgpack.ExtType(0x10, b""): 1, HEAD: 2},
            "a head in a set": ext(0x11, HEAD),
            "a head beside a tuple": [HEAD, ext(0x10, 1), HEAD],
            "an unknown code": ext(0x55, 1),
            "an unknown code, alone": msgpack.ExtType(0x55, b""),
            "a body": [msgpack.ExtType(0x10, b"body"), 1],
            "a body of three": [msgpack.ExtType(0x10, b"abc"), 1],
            "a body, alone": msgpack.ExtType(0x55, b"body"),
            "bytes for an int": ext(0x01, b"\x01"),
            "no digits": ext(0x01, "0xz"),
            "a bytearray of a terabyte": ext(0x02, 10**12),
            "a bytearray of a tuple": ext(0x02, ext(0x10, 1)),
            "a complex of text": ext(0x03, "1", "2"),
            "a Decimal of an int": ext(0x04, 1),
            "a Decimal of a float": ext(0x04, 0.5),
            "a Decimal of a word": ext(0x04, "abc"),
            "a UUID too short": ext(0x05, "00", None),
            "a UUID of unknown safety": ext(0x05, "0" * 32, 7),
            "a date from its pickle": ext(0x06, b"\x07\xe8\x01\xff"),
            "the 30th of February": ext(0x06, 2024, 2, 30),
            "a time from its pickle": ext(0x07, b"\xff" * 6),
            "a zone that is none": ext(0x07, 1, 2, 3, 4, "UTC", 0),
            "a fold of 2": ext(0x07, 1, 2, 3, 4, None, 2),
            "a datetime from its pickle": ext(0x08, b"\x07\xe8\x01\xff\xff\xff\xff\xff\xff\xff"),
            "the same with a zone": ext(0x08, b"\x07\xe8\x01\xff\xff\xff\xff\xff\xff\xff", None),
            "a timedelta too long": ext(0x09, 10**9, 0, 0),
            "a timedelta of nan": ext(0x09, float("nan"), 0, 0),
            "a timezone of a day": ext(0x0A, ext(0x09, 1, 0, 0)),
            "a timezone of nothing": ext(0x0A),
            "an unknown ZoneInfo": ext(0x0B, "Mars/Olympus"),
            "a ZoneInfo outside": ext(0x0B, "../../../../etc/passwd"),
            "a ZoneInfo at the root": ext(0x0B, "/etc/passwd"),
            "a ZoneInfo of no text": ext(0x0B, 1),
            "a ZoneInfo with a NUL": ext(0x0B, "UTC\0"),
            "a ZoneInfo of 10 kB": ext(0x0B, "a" * 10_000),
            "a folder of ZoneInfos": ext(0x0B, "America"),
            "a deque without maxlen": ext(0x13),
            "a deque of negative size": ext(0x13, -1, 1),
            "an OrderedDict of an int": ext(0x14, 1),
            "a Counter of an int": ext(0x15, 1),
            "a defaultdict of eval": ext(0x16, "eval", {}),
            "a defaultdict of a list": ext(0x16, [], {}),
            "a defaultdict of nothing": ext(0x16, "int"),
        }.items()
    },
    "a negative code": b"\x92\xc7\x00\x80\x01",
    "a moment beyond datetime": b"\xc7\x0c\xff" + bytes(4) + b"\x7f" * 8,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_data_is_refused(data: bytes) -> None:
    with localcontext(Context(traps=[])), pytest.raises(UndecodableError, match="cannot be read"):
        EXACT.loads(data)


def test_an_extension_of_msgpack_itself_is_at_least_read_as_a_type_of_ours() -> None:
    assert EXACT.loads(msgpack.packb(msgpack.Timestamp(1))) == datetime(1970, 1, 1, 0, 0, 1, 0, UTC)


@pytest.mark.parametrize("size", [1_000, 20_000, 1_000_000])
def test_a_lying_header_gets_no_memory(size: int) -> None:
    claim = b"\xdd" + (size - 5).to_bytes(4, "big")
    bomb = (claim * min(1000, size // 6)).ljust(size, b"\xc0")
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError):
            EXACT.loads(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000 + 3 * size


def test_running_out_of_memory_is_not_taken_for_damaged_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(msgpack, "unpackb", fail)
    with pytest.raises(MemoryError):
        EXACT.loads(b"\xc0")


# -- Many at once ---------------------------------------------------------------------------------


def test_many_threads_share_one_serializer() -> None:
    serializer = ExactSerializer()
    threads = 8
    start = threading.Barrier(threads)

    def work(seed: int) -> int:
        rng = random.Random(seed)  # noqa: S311 - no secret
        start.wait()
        for turn in range(300):
            value = [(seed, turn), {"s": {rng.random() for _ in range(5)}, "d": Decimal(seed)}]
            assert serializer.loads(serializer.dumps(value)) == value
            with pytest.raises(NotStorableError, match=rf"^t{seed}\[1\]\[0\]: .* object cannot"):
                serializer.dumps([(seed,), (object(),)], f"t{seed}")
        return seed

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(work, range(threads))) == list(range(threads))
    finally:
        sys.setswitchinterval(interval)
    assert len(serializer._writers) <= threads


def test_a_signal_handler_that_packs_in_the_middle_does_not_mix_its_value_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serializer = ExactSerializer()
    inner: list[bytes] = []

    def interrupted(value: complex) -> list[float]:
        inner.append(serializer.dumps({"inner": (1, 2)}))
        return [value.real, value.imag]

    monkeypatch.setitem(serializers._WRITERS, complex, (0x03, interrupted))
    value = ["outer", 1j, (2j, "end")]
    assert serializer.loads(serializer.dumps(value)) == value
    assert inner == [EXACT.dumps({"inner": (1, 2)})] * 2


def test_the_buffer_of_a_huge_value_is_not_kept() -> None:
    serializer = ExactSerializer()
    serializer.dumps("small")
    assert len(serializer._writers) == 1
    serializer.dumps("a" * 10**6)
    assert serializer._writers == []


# -- Signed pickles -------------------------------------------------------------------------------


class Bomb:
    exploded = 0

    def __reduce__(self) -> Any:
        return Bomb.explode, ()

    @staticmethod
    def explode() -> str:
        Bomb.exploded += 1
        return "boom"


class Vanishing:
    pass


def test_both_are_serializers() -> None:
    both: list[Serializer] = [ExactSerializer(), SignedPickleSerializer(KEY)]
    assert [each.name for each in both] == ["x1", "p1"]


def test_a_signed_pickle_takes_any_object() -> None:
    value = {"p": Point(1, 2), "c": Color.RED, "r": Record(7), "z": float("inf")}
    data = SignedPickleSerializer(KEY).dumps(value)
    assert SignedPickleSerializer(KEY.decode()).loads(data) == value
    assert data[32:34] == b"\x80\x05"


def test_a_signed_pickle_is_not_read_with_another_key() -> None:
    data = SignedPickleSerializer(KEY).dumps(Bomb())
    Bomb.exploded = 0
    with pytest.raises(UndecodableError, match=r"check that all processes give .* the same key"):
        SignedPickleSerializer(KEY + b".").loads(data)
    assert Bomb.exploded == 0
    assert SignedPickleSerializer(KEY).loads(data) == "boom"
    assert Bomb.exploded == 1


def test_a_signed_pickle_is_not_read_with_any_bit_flipped_or_byte_missing() -> None:
    serializer = SignedPickleSerializer(KEY)
    data = serializer.dumps(Bomb())
    Bomb.exploded = 0
    flipped = (
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for at, bit in itertools.product(range(len(data)), range(8))
    )
    for bad in (*flipped, *(data[:cut] for cut in range(len(data))), data[1:], data + b"."):
        with pytest.raises(UndecodableError, match="does not carry our signature"):
            serializer.loads(bad)
    assert Bomb.exploded == 0


@pytest.mark.parametrize(
    "key", [b"", "", b"fifteen bytes..", "fifteen bytes..", None, 16, [1] * 16]
)
def test_a_signed_pickle_needs_a_key(key: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"at least 16 bytes.*secrets\.token_bytes"):
        SignedPickleSerializer(key)


def test_a_key_of_text_counts_by_its_bytes_and_is_not_shown() -> None:
    serializer = SignedPickleSerializer("ключключ")
    assert serializer.loads(serializer.dumps(1)) == 1
    assert "ключ" not in repr(serializer)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (threading.Lock(), "_thread.lock"),
        (lambda: 1, "function"),
        (nest(WRAPS["list"], 50_000), "list"),
    ],
    ids=lambda x: x if type(x) is str else "",
)
def test_what_cannot_be_pickled_is_refused_by_its_type(value: Any, name: str) -> None:
    with pytest.raises(NotStorableError, match=f"^doc: a value of type {name} cannot be pickled"):
        SignedPickleSerializer(KEY).dumps(value, "doc")


def test_a_signed_pickle_of_a_class_that_is_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    serializer = SignedPickleSerializer(KEY)
    data = serializer.dumps(Vanishing())
    monkeypatch.delattr(sys.modules[__name__], "Vanishing")
    with pytest.raises(UndecodableError, match=r"Vanishing.* the same version of its classes"):
        serializer.loads(data)
