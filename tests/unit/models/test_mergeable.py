"""assert_mergeable finds merges that depend on order, and only those."""

from typing import Any

import pytest

from phonon import ConflictFreeUpdate, Model, Update
from phonon.errors import ConfigurationError, InvalidMessageError
from phonon.fields import ID, Custom, Latest, Stats, Sum
from phonon.testing import assert_mergeable


class Good(Model, name="test_mergeable_good"):
    id: ID[str]
    total: Sum[float] = Sum()
    stats: Stats[float] = Stats()
    bits: Custom[int] = Custom(merge=lambda a, b: a | b, zero=0)
    last: Latest[str] = Latest()


class Bad(Model, name="test_mergeable_bad"):
    id: ID[str]
    left: Custom[int] = Custom(merge=lambda a, b: a - b, zero=0)


class Last(Update, name="test_mergeable_last"):
    """It keeps what came last, which is another one in each process."""

    def merge(self, other: Any) -> None:
        self.doc = other.doc


class Forgetful(Update, name="test_mergeable_forgetful"):
    """It adds up an attribute that its state does not name."""

    n: int

    def merge(self, other: Any) -> None:
        self.n += other.n

    def state(self) -> dict[str, Any]:
        return {"m": 1}


def test_what_merges_in_any_order() -> None:
    rows = [
        {"id": "a", "total": x, "stats": x, "bits": i} for i, x in enumerate((0.1, 1e20, -1e20))
    ]
    assert_mergeable(Good, [*rows, Good("a", last=(1, "x")), {"id": "a", "last": (2, "y")}])
    assert_mergeable(ConflictFreeUpdate, [{"doc": {"n": 1}}, {"doc": {"m": 2}}, {"doc": {"n": 3}}])


def test_what_does_not() -> None:
    with pytest.raises(AssertionError, match="Bad depends on how its messages are merged"):
        assert_mergeable(Bad, [{"id": "a", "left": n} for n in (1, 2, 3)])
    with pytest.raises(AssertionError, match="Last depends"):
        assert_mergeable(Last, [{"doc": 1}, {"doc": 2}, {"doc": 3}])
    with pytest.raises(AttributeError):
        assert_mergeable(Forgetful, [{"n": n, "m": 1} for n in (1, 2, 3)])


def test_messages_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match="two messages"):
        assert_mergeable(Good, [{"id": "a"}])
    with pytest.raises(ConfigurationError, match="one record"):
        assert_mergeable(Good, [{"id": "a"}, {"id": "b"}])
    with pytest.raises(InvalidMessageError, match="total"):
        assert_mergeable(Good, [{"id": "a", "total": "x"}, {"id": "a"}])
