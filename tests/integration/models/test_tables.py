"""Tables come to the same as their rows."""

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import Model
from phonon.errors import ConfigurationError, InvalidMessageError
from phonon.fields import (
    ID,
    AllOf,
    AnyOf,
    Count,
    Diff,
    Distinct,
    ListAppend,
    Max,
    Min,
    SetAppend,
    Sum,
    Window,
)
from support.world import Make

pl = pytest.importorskip("polars")


class Orders(Model, name="test_orders"):
    customer: ID[str]
    amount: Sum[int] = Sum()
    refund: Diff[int] = Diff()
    price: Max[float] = Max()
    least: Min[int] = Min()
    items: SetAppend[str] = SetAppend()
    notes: ListAppend[str] = ListAppend()
    different: Distinct[str] = Distinct()
    paid: AllOf = AllOf()
    rush: AnyOf = AnyOf()
    weight: Sum[float] = Sum()
    recent: Window[str] = Window(2)
    orders: Count = Count()

    done: ClassVar[dict[str, "Orders"]] = {}

    def on_complete(self) -> None:
        self.done[self.customer] = self


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Orders.done.clear()


def table(size: int, *, exact: bool) -> Any:
    rng = random.Random(3)  # noqa: S311 - repeatable, no secret

    def some(values: list[Any]) -> list[Any]:
        return [rng.choice([*values, None]) for _ in range(size)]

    columns = {
        "customer": [rng.choice("abcdefg") for _ in range(size)],
        "amount": some([1, 2, 3]),
        "refund": some([1, 5]),
        "price": some([0.5, 1.5, -0.0]),
        "least": some([5, -2]),
        "items": some(["pen", "ink"]),
        "notes": some(["x", "y"]),
        "different": some(["p", "q"]),
        "paid": some([True, False]),
        "rush": some([True, False]),
    }
    if not exact:
        columns["weight"] = some([0.1, 0.2, 0.3])
    return pl.DataFrame(columns)


@pytest.mark.parametrize("exact", [True, False], ids=["reduced", "row by row"])
@pytest.mark.parametrize("kind", ["polars", "lazy", "capsule"])
def test_a_table_comes_to_the_same_as_its_rows(make: Make, kind: str, exact: bool) -> None:
    class Capsule:
        """As any library's table: nothing is known of it but that it has Arrow data."""

        def __arrow_c_stream__(self, schema: Any = None) -> Any:
            return frame.__arrow_c_stream__(schema)

    process = make()
    orders = process.collect(Orders)
    frame = table(500, exact=exact)
    given: Any = {"polars": frame, "lazy": frame.lazy(), "capsule": Capsule()}[kind]
    assert orders.add_table(given) == []
    orders.expire_all()
    by_table = dict(Orders.done)
    Orders.done.clear()
    assert orders.add_many(frame.to_dicts()) == []
    orders.expire_all()
    assert by_table == Orders.done
    assert len(by_table) == 7


def test_rows_that_are_not_taken_come_back_with_their_numbers(make: Make) -> None:
    orders = make().collect(Orders)
    frame = pl.DataFrame(
        {"customer": ["a", None, "a", "b"], "price": [1.0, 2.0, float("nan"), 3.0]}
    )
    rejected = orders.add_table(frame)
    assert [(row, error.field) for row, error in rejected] == [(1, "customer"), (2, "price")]
    wrong = pl.DataFrame({"customer": ["a", "b"], "amount": ["1", None]})
    assert [(row, error.field) for row, error in orders.add_table(wrong)] == [(0, "amount")]
    orders.expire_all()
    assert {name: (r.orders, r.price) for name, r in Orders.done.items()} == {
        "a": (1, 1.0), "b": (2, 3.0),
    }  # fmt: skip


def test_a_sum_that_leaves_64_bits_is_exact(make: Make) -> None:
    orders = make().collect(Orders)
    orders.add_table(pl.DataFrame({"customer": ["a"] * 4, "amount": [2**62] * 4}))
    orders.expire_all()
    assert Orders.done["a"].amount == 2**64


def test_what_is_no_table_of_the_model_is_refused(make: Make) -> None:
    orders = make().collect(Orders)
    with pytest.raises(InvalidMessageError, match="no field 'vews'"):
        orders.add_table(pl.DataFrame({"customer": ["a"], "vews": [1]}))
    with pytest.raises(InvalidMessageError, match="is the ID"):
        orders.add_table(pl.DataFrame({"amount": [1]}))
    with pytest.raises(ConfigurationError, match="add_many"):
        orders.add_table([{"customer": "a"}])
    lenient = make().collect(Orders, ignore_unknown=True)
    assert lenient.add_table(pl.DataFrame({"customer": ["a"], "vews": [1]})) == []
