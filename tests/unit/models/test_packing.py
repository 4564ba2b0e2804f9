"""Records are stored and merged by compiled code as the serializer and the codec would do it."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from phonon import ExactSerializer, Model
from phonon.fields import (
    ID,
    AllOf,
    AnyOf,
    Count,
    Counter,
    Diff,
    Latest,
    ListAppend,
    Max,
    Mean,
    Min,
    SetAppend,
    Sum,
)
from phonon.serializers import KEPT

SERIALIZER = ExactSerializer()


class Plain(Model, name="test_packing_plain"):
    id: ID[str]
    total: Sum[int] = Sum()
    weight: Sum[float] = Sum()
    rest: Diff[int] = Diff()
    n: Count = Count()
    mean: Mean[float] = Mean()
    least: Min[int] = Min()
    most: Max[float] = Max()
    any: AnyOf = AnyOf()
    all: AllOf = AllOf()
    pages: Counter[str] = Counter()
    names: ListAppend[str] = ListAppend()
    seen: SetAppend[int] = SetAppend()


class Timed(Model, name="test_packing_timed"):
    id: ID[str]
    last: Latest[datetime] = Latest()
    seen: SetAppend[str] = SetAppend()


PACKING = Plain._code().packing
MESSAGES: list[dict[str, Any]] = [
    {"total": 1, "weight": 0.1, "rest": 2, "mean": 1.5, "least": 3, "most": 0.5, "any": False,
     "all": True, "pages": {"/": 1}, "names": "x", "seen": 1},
    {"total": 2**62, "weight": 0.2, "mean": 0.1, "least": -1, "all": False, "seen": {2, 3}},
    {"any": True, "pages": {"/": 2, "/b": 1}, "names": ["a", "x"], "n": 0, "most": 7.25},
    {},
]  # fmt: skip


def doc_of(model: Any, *messages: dict[str, Any]) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    for message in messages:
        model._code().fold(doc, "a", **message)
    model._code().seal(doc)
    return doc


def content(doc: Any, identifier: Any = "a", **changes: Any) -> bytes:
    parts = {"id": identifier, "database": "d", "collection": "c", "spec": None, "doc": doc}
    return SERIALIZER.dumps(list(({**parts, "state": {}} | changes).values()))


def record_of(model: Any, doc: dict[str, Any], identifier: Any = "a") -> Any:
    code = model._code()
    record = SimpleNamespace(_id=identifier, database="d", collection="c", moved_=())
    code.fill(record, doc)
    return record


def merged(model: Any, bodies: list[bytes]) -> Any:
    """What merging comes to; None if it is left to the codec."""
    try:
        return model._code().packing.merge(bodies, SERIALIZER)
    except Exception:  # noqa: BLE001 - the codec takes any for that
        return None


@pytest.mark.parametrize("messages", [MESSAGES[:1], MESSAGES[1:2], MESSAGES, MESSAGES[3:]])
def test_it_writes_what_the_serializer_writes(messages: list[dict[str, Any]]) -> None:
    doc = doc_of(Plain, *messages)
    record = record_of(Plain, doc)
    assert PACKING.take(record, SERIALIZER) == content(doc)
    # The states are the caller's to put back.
    assert record.moved_ == (doc,)
    assert not Plain._code().has_states(record)


@pytest.mark.parametrize(
    ("message", "identifier"),
    [({"total": 2**70}, "a"), ({"names": "\ud800"}, "a"), ({}, 2**70), ({}, "\ud800")],
)
def test_what_only_the_serializer_can_write(message: dict[str, Any], identifier: Any) -> None:
    doc = doc_of(Plain, message)
    assert PACKING.take(record_of(Plain, doc, identifier), SERIALIZER) is None


def test_another_serializer_writes_by_itself() -> None:
    assert PACKING.take(record_of(Plain, {}), object()) is None
    assert Timed._code().packing.take(record_of(Timed, {"seen": {"x"}}), SERIALIZER) is None


def test_a_large_record_leaves_no_large_buffer() -> None:
    before = PACKING.take.__globals__["_pack"]
    doc = doc_of(Plain, {"names": ["x" * KEPT]})
    assert PACKING.take(record_of(Plain, doc), SERIALIZER) == content(doc)
    assert PACKING.take.__globals__["_pack"] is not before


def test_it_merges_what_it_reads() -> None:
    found = merged(Plain, [content(doc_of(Plain, message)) for message in MESSAGES])
    assert found is not None, "it was left to the codec"
    Plain._code().seal(found[3])
    assert found == ("a", "d", "c", doc_of(Plain, *MESSAGES))


def test_it_merges_what_only_the_serializer_can_read() -> None:
    first, second = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    docs = [doc_of(Timed, {"last": at, "seen": str(at)}) for at in (second, first)]
    found = merged(Timed, [content(doc) for doc in docs])
    assert found == ("a", "d", "c", {"last": [second, second], "seen": {str(first), str(second)}})


GOOD = doc_of(Plain, MESSAGES[0])


@pytest.mark.parametrize(
    "forged",
    [
        content(GOOD | {"seen": {1, "x"}}),
        content(GOOD | {"seen": {1.0}}),
        content(GOOD | {"seen": [1]}),
        content(GOOD | {"seen": []}),
        content(GOOD | {"seen": frozenset({1})}),
        content(GOOD | {"seen": None}),
        content(GOOD | {"total": True}),
        content(GOOD | {"total": 1.0}),
        content(GOOD | {"n": -1}),
        content(GOOD | {"least": "x"}),
        content(GOOD | {"names": [1]}),
        content(GOOD | {"pages": {"/": "x"}}),
        content(GOOD | {"pages": {1: 1}}),
        content(GOOD | {"id": "a"}),
        content(GOOD | {"unknown": 1}),
        content([]),
        content(GOOD, "b"),
        content(GOOD, database="e"),
        content(GOOD, collection="e"),
        content(GOOD, spec=1),
        content(GOOD, state={"x": 1}),
        content(GOOD)[:-2] + b"\x80",
        content(GOOD) + b"\x80",
        SERIALIZER.dumps("x"),
        b"\x80",
        b"",
    ],
)
def test_what_is_unusual_is_left_to_the_codec(forged: bytes) -> None:
    good = content(GOOD)
    for bodies in ([good, forged], [forged, good]):
        assert merged(Plain, bodies) is None


def test_a_forged_header_takes_no_memory() -> None:
    doc = doc_of(Plain, {"names": ["x"] * 2000})
    good = content(doc)
    forged = good.replace(b"\xdc\x07\xd0", b"\xdd\x7f\xff\xff\xff")
    assert len(forged) == len(good) + 2
    assert merged(Plain, [good, forged]) is None
    assert merged(Plain, [good, good]) is not None
