"""The stored sizes of fields in docs/models.md are measured."""

import random
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from phonon._models.compiled import Compiled
from phonon.fields import (
    ID,
    AllOf,
    AnyOf,
    Count,
    Counter,
    Custom,
    Distinct,
    First,
    Latest,
    ListAppend,
    Mean,
    Min,
    SetAppend,
    Stats,
    Sum,
    TopK,
    Window,
)
from phonon.serializers import ExactSerializer

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
dumps = ExactSerializer().dumps


def size(value: Any) -> int:
    return len(dumps(value))


def stored(field: Any, messages: Sequence[Any]) -> int:
    identifier: Any = ID(str)
    identifier.name, field.name = "id", "field"
    code = Compiled("Model", {"id": identifier, "field": field})
    doc: dict[str, Any] = {}
    for message in messages:
        code.fold(doc, "a", message)
    code.seal(doc)
    return size(doc["field"])


def numbers(least: float, most: float) -> list[float]:
    rng = random.Random(1)  # noqa: S311 - repeatable, no secret
    return [rng.uniform(least, most) for _ in range(1000)]


WIDE = [x * 10 ** (i % 40 - 20) for i, x in enumerate(numbers(-1, 1))]
NOW = datetime(2026, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
TEXTS = [f"page{i:02}" for i in range(10)]

#: The row of the page, its cell, and the sizes between which states of these messages are.
RANGES: list[tuple[str, str, Callable[[], Any], list[Sequence[Any]]]] = [
    ("`Sum[int]`", "1 to 9", lambda: Sum(int), [[0], [1000] * 1000, [2**63]]),
    ("`Sum[float]`", "11 to 38", lambda: Sum(float), [[0.5], numbers(0, 1), WIDE]),
    ("`Count`", "1 to 9", Count, [[1], [2**63]]),
    ("`AnyOf`, `AllOf`", "1", AnyOf, [[True, False]]),
    ("`AnyOf`, `AllOf`", "1", AllOf, [[True, False]]),
    ("`Mean[N]`", "3 to 41", lambda: Mean(None), [[5], numbers(0, 1), WIDE[:200]]),
    ("`Stats[N]`", "7 to 163", lambda: Stats(None), [[5], numbers(0, 1), WIDE]),
]

#: The row, its cell, and what that comes to for a state of these messages.
FORMULAS: list[tuple[str, str, Callable[[], Any], Sequence[Any], int]] = [
    ("`Sum[Decimal]`", "characters + 5", lambda: Sum(Decimal), [Decimal("12.34")], 10),
    ("`Min[T]`, `Max[T]`", "the value's", lambda: Min(datetime), [NOW], size(NOW)),
    (
        "`First[T]`, `Latest[T]`", "1 + stamp + value",
        lambda: Latest(str), [(NOW, "abc")], 1 + size(NOW) + size("abc"),
    ),
    (
        "`First[T]`, `Latest[T]`", "1 + stamp + value",
        lambda: First(datetime), [NOW], 1 + 2 * size(NOW),
    ),
    ("`ListAppend[T]`", "1 + values", lambda: ListAppend(str), TEXTS, 1 + sum(map(size, TEXTS))),
    ("`SetAppend[T]`", "4 + values", lambda: SetAppend(str), TEXTS, 4 + sum(map(size, TEXTS))),
    (
        "`Counter[K]`", "1 + keys + numbers",
        lambda: Counter(str), [dict.fromkeys(TEXTS, 1)], 1 + sum(map(size, TEXTS)) + 10,
    ),
    (
        "`Window[T]` = `WindowedList(n)`", "1 + n * (1 + rank + value)",
        lambda: Window(5, str), list(enumerate(TEXTS)), 1 + 5 * (1 + 1 + size("page00")),
    ),
    (
        "`TopK(k)`", "1 + k * (key + score)",
        lambda: TopK(5, str), [dict(zip(TEXTS, range(10), strict=True))],
        1 + 5 * (size("page00") + 1),
    ),
    ("`Custom(merge=, zero=)`", "the value's", lambda: Custom(merge=max, zero=0), [1000], 3),
]  # fmt: skip


def cell(row: str) -> str:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    return line.split("|")[5].strip()


@pytest.mark.parametrize(("row", "text", "make", "cases"), RANGES)
def test_a_range(row: str, text: str, make: Callable[[], Any], cases: list[Sequence[Any]]) -> None:
    sizes = [stored(make(), messages) for messages in cases]
    least, most = min(sizes), max(sizes)
    assert cell(row) == text == (f"{least} to {most}" if least < most else f"{least}")


@pytest.mark.parametrize(("row", "text", "make", "messages", "bytes_"), FORMULAS)
def test_a_formula(
    row: str, text: str, make: Callable[[], Any], messages: Sequence[Any], bytes_: int
) -> None:
    assert cell(row) == text
    assert stored(make(), messages) == bytes_


def test_distinct() -> None:
    sizes = [stored(Distinct(int), range(n)) / n for n in (10, 100, 500)]
    most = stored(Distinct(int), range(100_000))
    assert cell("`Distinct[T]`") == f"4 per value, {most:,} at the most"
    assert 3 < min(sizes) <= max(sizes) < 4.5


def test_values() -> None:
    line = " ".join(PAGE.split())
    said = (
        f"an `int` takes 1 to {size(2**63)} bytes, a `float` {size(0.5)}, a `date` "
        f"{size(date(2026, 1, 1))}, a `datetime` {size(NOW)}, and a `str` of up to 31 bytes one "
        "more than its text"
    )
    assert said in line
    assert size("a" * 31) == 32
