"""Each field comes to the same, whoever meets whom: that is what merging is about."""

import math
import random
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phonon import Model
from phonon._models.compiled import Compiled
from phonon.errors import InvalidMessageError
from phonon.fields import (
    ID,
    AllOf,
    AnyOf,
    Count,
    Counter,
    Custom,
    Diff,
    Distinct,
    First,
    Latest,
    ListAppend,
    Max,
    Mean,
    Min,
    SetAppend,
    Stats,
    Sum,
    Timestamp,
    TopK,
    Window,
)
from phonon.serializers import ExactSerializer
from support.examples import examples

_SERIALIZER = ExactSerializer()

INTS = st.integers(-(10**20), 10**20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=3)
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
TIMES = st.datetimes(
    datetime(2020, 1, 1), datetime(2020, 1, 3), timezones=st.sampled_from(  # noqa: DTZ001 - the strategy gives them zones
        [UTC, timezone(timedelta(hours=2)), timezone(timedelta(hours=-1), "west")]
    )
)  # fmt: skip
FEW = st.integers(0, 3)

#: Of each kind of field: how it is made, and what its messages have.
FIELDS: dict[str, tuple[Callable[[], Any], st.SearchStrategy[Any]]] = {
    "sum of ints": (lambda: Sum(int), INTS),
    "sum of floats": (lambda: Sum(float), FLOATS),
    "sum of decimals": (lambda: Sum(Decimal), DECIMALS),
    "sum of both": (Sum, INTS | FLOATS),
    "diff": (Diff, INTS | FLOATS),
    "diff of decimals": (lambda: Diff(Decimal), DECIMALS),
    "min": (lambda: Min(int), INTS),
    "max of floats": (lambda: Max(float), FLOATS),
    "max of anything": (Max, INTS | FLOATS | TEXTS | st.lists(FEW, max_size=2)),
    "min of times": (lambda: Min(datetime), TIMES),
    "max of decimals": (lambda: Max(Decimal), DECIMALS),
    "count": (Count, FEW),
    "any of": (AnyOf, st.booleans()),
    "all of": (AllOf, st.booleans()),
    "latest": (lambda: Latest(str), st.tuples(FEW, TEXTS)),
    "latest time": (lambda: Latest(datetime), TIMES),
    "first": (First, st.tuples(FEW | TIMES, INTS | TEXTS)),
    "list": (lambda: ListAppend(str), TEXTS | st.lists(TEXTS, max_size=4)),
    "list of anything": (ListAppend, INTS | TEXTS | st.dictionaries(TEXTS, FEW)),
    "set": (lambda: SetAppend(str), TEXTS | st.sets(TEXTS, max_size=4)),
    "counter": (lambda: Counter(str), st.dictionaries(TEXTS, INTS, max_size=4)),
    "mean": (Mean, FLOATS | INTS),
    "stats": (Stats, FLOATS | st.integers(-(10**9), 10**9)),
    "window": (lambda: Window(3, str), st.tuples(FEW, TEXTS) | st.lists(st.tuples(FEW, TEXTS))),
    "top": (lambda: TopK(2, str), st.dictionaries(TEXTS, FEW, max_size=4)),
    "distinct": (Distinct, INTS | TEXTS),
    "custom": (lambda: Custom(merge=lambda a, b: a | b, zero=0), st.integers(0, 255)),
}


def compiled(field: Any) -> Compiled:
    identifier: Any = ID(str)
    identifier.name, field.name = "id", "field"
    return Compiled("Model", {"id": identifier, "field": field})


def folded(code: Compiled, values: list[Any]) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    for value in values:
        code.fold(doc, "a", value)
    return doc


def stored(code: Compiled, doc: dict[str, Any]) -> Any:
    """As it comes back from the server."""
    code.seal(doc)
    loaded = _SERIALIZER.loads(_SERIALIZER.dumps(doc))
    assert not code.fault_of(loaded)
    return loaded


@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=examples(100), deadline=None)
@given(data=st.data())
def test_merging_is_associative_and_commutative_and_has_a_neutral_element(
    name: str, data: st.DataObject
) -> None:
    make, values = FIELDS[name]
    field = make()
    code = compiled(field)
    messages = data.draw(st.lists(values, max_size=8))
    shuffled = data.draw(st.permutations(messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(messages)), min_size=2, max_size=2)))
    whole = field.read(stored(code, folded(code, messages)).get("field"))

    parts = [
        stored(code, folded(code, shuffled[a:b]))
        for a, b in zip([0, *cuts], [*cuts, len(messages)], strict=True)
    ]
    copies = [_SERIALIZER.loads(_SERIALIZER.dumps(part)) for part in parts]
    left: dict[str, Any] = {}  # the neutral element
    for part in parts:
        code.merge(left, part)
    code.merge(copies[1], copies[2])
    code.merge(copies[1], copies[0])
    right = stored(code, copies[1])

    assert field.read(left.get("field")) == whole
    assert field.read(right.get("field")) == whole
    assert field.read(None) == field.zero


@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_reading_changes_nothing(name: str, data: st.DataObject) -> None:
    make, values = FIELDS[name]
    field = make()
    code = compiled(field)
    doc = folded(code, data.draw(st.lists(values, min_size=1, max_size=5)))
    assert field.read(doc["field"]) == field.read(doc["field"])


def test_a_long_sum_of_floats_is_exact() -> None:
    rng = random.Random(5)  # noqa: S311 - repeatable, no secret
    values = [rng.uniform(-1, 1) * 10 ** rng.randrange(-20, 20) for _ in range(1000)]
    field: Any = Sum(float)
    code = compiled(field)
    shuffled = rng.sample(values, len(values))
    assert field.read(folded(code, values)["field"]) == math.fsum(values)
    assert field.read(folded(code, shuffled)["field"]) == math.fsum(values)
    assert len(stored(code, folded(code, values))["field"]) < 8


def test_stats_are_those_of_all_values() -> None:
    values = [1e9 + x for x in (4.0, 7.0, 13.0, 16.0)]
    field: Any = Stats(float)
    summary = field.read(folded(compiled(field), values)["field"])
    assert (summary.count, summary.sum) == (4, math.fsum(values))
    assert (summary.min, summary.max, summary.mean) == (values[0], values[3], 1e9 + 10)
    assert summary.variance == 22.5
    assert summary.sample_variance == 30
    assert summary.stdev == math.sqrt(22.5)


@pytest.mark.parametrize("size", [0, 1, 100, 5_000, 100_000])
def test_distinct_is_as_good_as_it_says(size: int) -> None:
    field: Any = Distinct(int)
    state = None
    for i in range(size):
        state = field.fold(state, field.check(i))
    assert abs(field.read(state) - size) <= 4 * 0.0163 * size


def test_a_window_keeps_the_highest_ranks_in_their_order() -> None:
    field: Any = Window(3, str)
    state = None
    for rank in sorted(range(100), key=lambda n: n * 37 % 101):
        state = field.fold(state, field.check((rank, f"item{rank}")))
    assert field.read(state) == ["item99", "item98", "item97"]


def test_what_a_caller_passes_stays_the_callers() -> None:
    class Gathered(Model, name="gathered"):
        id: ID[str]
        tags: ListAppend[str]
        kinds: SetAppend[str]
        counts: Counter[str]
        any: Latest[Any]

    tags, kinds, counts, anything = ["a"], {"k"}, {"c": 1}, ["x"]
    code = Gathered._code()
    doc: dict[str, Any] = {}
    for _ in range(2):
        code.fold(doc, "1", tags=tags, kinds=kinds, counts=counts, any=(1, anything))
    anything.append("changed")
    assert (tags, kinds, counts) == (["a"], {"k"}, {"c": 1})
    assert doc == {"tags": ["a", "a"], "kinds": {"k"}, "counts": {"c": 2}, "any": [1, ["x"]]}


class Everything(Model, name="everything"):
    id: ID[int]
    at: Timestamp[int] = Timestamp()
    total: Sum[int] = Sum()
    price: Sum[Decimal] = Sum()
    ratio: Mean[float] = Mean()
    city: Latest[str] = Latest()
    seen: Max[date] = Max()
    recent: Window[str] = Window(2)
    tags: SetAppend[str] = SetAppend()
    counts: Counter[str] = Counter()
    flag: AnyOf = AnyOf()
    hits: Count = Count()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "1"), ("id", True), ("total", 1.0), ("total", "1"), ("total", True),
        ("price", 1.5),
        ("price", Decimal("NaN")), ("price", Decimal("1E+9999")), ("ratio", math.nan),
        ("ratio", math.inf), ("ratio", "1"), ("city", 1),
        ("seen", datetime(2020, 1, 1, tzinfo=UTC)),
        ("recent", [1]), ("tags", 1), ("tags", [1]), ("counts", ["a"]), ("counts", {1: 1}),
        ("counts", {"a": 1.5}), ("flag", 1), ("hits", -1), ("at", "now"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name_and_nothing_is_merged(field: str, value: Any) -> None:
    doc: dict[str, Any] = {}
    message = {"id": 1, "at": 5, "total": 1, field: value}
    with pytest.raises(InvalidMessageError, match=rf"Everything\.{field} ") as caught:
        Everything._code().fold(doc, **message)
    assert not doc
    error = caught.value
    assert (error.model, error.field) == ("Everything", field)
    assert error.value is value
    assert repr(value) in str(error)


def test_a_value_that_goes_by_time_needs_one() -> None:
    with pytest.raises(InvalidMessageError, match=r"Everything\.city goes by the message's time"):
        Everything._code().fold({}, id=1, city="Rome")


def test_a_message_without_a_value_has_none() -> None:
    assert Everything(1).total == 0
    assert Everything(1).hits == 1


def test_fields_tell_what_they_are() -> None:
    fields = Everything.fields()
    assert list(fields)[:3] == ["id", "at", "total"]
    assert [(f.kind, f.value_type) for f in list(fields.values())[:4]] == [
        ("id", int), ("timestamp", int), ("sum", int), ("sum", Decimal),
    ]  # fmt: skip
    assert fields["total"].zero == 0
    assert fields["tags"].zero == set()
    assert Everything.total is fields["total"]
