"""Tables come to the same as their rows."""

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from phonon import Model
from phonon._models import columns
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


def test_text_in_any_of_arrows_types(make: Make) -> None:
    arrow = pytest.importorskip("pyarrow")
    plain = arrow.array(["a", "b", None, "a"])
    columns_of = {
        "string": plain,
        "large": plain.cast(arrow.large_string()),
        "view": plain.cast(arrow.string_view()),
        "dictionary": plain.dictionary_encode(),
        "a dictionary with null": arrow.DictionaryArray.from_arrays(
            arrow.array([0, 1, 2, 0]), arrow.array(["a", "b", None])
        ),
        "a Categorical of polars": arrow.DictionaryArray.from_arrays(
            arrow.array([0, 1, None, 0]), arrow.array(["a", "b"], arrow.string_view())
        ),
    }
    orders = make().collect(Orders)
    for column in columns_of.values():
        table = arrow.table({"customer": column, "items": column, "amount": [1, 2, 4, 8]})
        assert [row for row, _ in orders.add_table(table)] == [2]
        assert orders.add_table(table.slice(0, 0)) == []
    orders.expire_all()
    assert {name: (r.amount, r.items) for name, r in Orders.done.items()} == {
        "a": (54, {"a"}), "b": (12, {"b"}),
    }  # fmt: skip


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


def test_a_table_in_a_block_that_is_not_durable_stays_here(make: Make) -> None:
    process, reader = make(), make().collect(Orders)
    orders = process.collect(Orders)
    with process.batch(durable=False):
        for _ in range(3):
            orders.add_table(pl.DataFrame({"customer": ["a", "b", "a"], "amount": [1, 2, 4]}))
        orders.add("a", amount=100)
    assert reader.read("a") is None
    here = orders.get("a")
    assert here is not None
    assert (here.amount, here.orders) == (115, 7)
    orders.expire_all()
    assert {name: record.amount for name, record in Orders.done.items()} == {"a": 115, "b": 6}


def test_a_block_that_fails_takes_its_tables_with_it(make: Make) -> None:
    process = make()
    orders = process.collect(Orders)
    frame = pl.DataFrame({"customer": ["a", "b"], "amount": [1, 2]})
    with process.batch(durable=False):
        orders.add_table(frame)
    with pytest.raises(ZeroDivisionError), process.batch():
        orders.add_table(frame)
        raise ZeroDivisionError
    orders.expire_all()
    assert {name: record.amount for name, record in Orders.done.items()} == {"a": 1, "b": 2}


def test_tables_of_more_keys_than_there_is_room_for(make: Make) -> None:
    process = make()
    orders = process.collect(Orders, max_entries=2)
    frame = pl.DataFrame({"customer": list("abcdabcd"), "amount": [1, 2, 3, 4] * 2})
    with process.batch(durable=False):
        for _ in range(3):
            orders.add_table(frame)
    process.stop()
    found = {name: record.amount for name, record in Orders.done.items()}
    assert found.keys() == set("abcd")
    assert orders.size() == 0


def test_many_bytes_of_tables_are_merged_although_nobody_looks(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "MOST_BYTES", 100)
    process = make()
    orders = process.collect(Orders)
    with process.batch(durable=False):
        orders.add_table(pl.DataFrame({"customer": ["a"] * 50, "amount": [1] * 50}))
        record = orders._cache._entries["a"]
        assert record.pending_ is None
    orders.expire_all()
    assert Orders.done["a"].amount == 50


def test_an_interrupt_while_tables_are_reduced_loses_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make()
    orders = process.collect(Orders)
    with process.batch(durable=False):
        orders.add_table(pl.DataFrame({"customer": ["a", "b"], "amount": [1, 2]}))
        compiled = orders._compiled
        fold_columns = compiled.fold_columns

        def interrupted(found: Any, records: Any) -> None:
            fold_columns({name: values[:1] for name, values in found.items()}, records)
            raise KeyboardInterrupt

        monkeypatch.setattr(compiled, "fold_columns", interrupted)
        with pytest.raises(KeyboardInterrupt):
            orders.get("a")
        monkeypatch.undo()
    orders.expire_all()
    assert {name: record.amount for name, record in Orders.done.items()} == {"a": 1, "b": 2}
