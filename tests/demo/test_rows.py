"""Reading rows: what comes out of files as people have them, and what is said about bad ones."""

import csv
import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phonon_demo.aggregations import FLIGHTS, Message, add, sums_of
from phonon_demo.errors import InputError
from phonon_demo.rows import Rejected, Rows, open_rows

Save = Callable[..., str]
Values = tuple[Any, ...]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(content: str | bytes) -> str:
        path = tmp_path / "input"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(path: str, *columns: str) -> tuple[list[Values], Rows[Values]]:
    with open_rows(path, columns, lambda values: values) as rows:
        return list(rows), rows


def error_of(path: str, *columns: str) -> str:
    with pytest.raises(InputError) as caught:
        read(path, *columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a,b\n1,x\n2,ы\n", id="plain"),
        pytest.param("a,b\n1,x\n2,ы", id="no line end at the end"),
        pytest.param("a,b\r\n1,x\r\n2,ы\r\n", id="CRLF"),
        pytest.param("a,b\r1,x\r2,ы\r", id="CR"),
        pytest.param("\ufeffa,b\n1,x\n2,ы\n", id="byte order mark"),
        pytest.param('\ufeff"a","b"\n"1","x"\n"2","ы"\n', id="byte order mark and quotes"),
        pytest.param("\n\na,b\n\n1,x\n2,ы\n\n", id="blank lines"),
        pytest.param("a;b\n1;x\n2;ы\n", id="semicolons"),
        pytest.param("a\tb\n1\tx\n2\tы\n", id="tabs"),
        pytest.param('{"a": 1, "b": "x"}\n{"b": "ы", "a": "2"}\n', id="JSON lines"),
        pytest.param('\ufeff\n{"a":1,"b":"x"}\r\n\r\n{"a":2,"b":"\\u044b"}', id="JSON, Windows"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_same_rows_in_many_guises(save: Save, content: str, *, packed: bool) -> None:
    raw = content.encode()
    values, rows = read(save(gzip.compress(raw) if packed else raw), "b", "a")
    assert values == [("x", "1"), ("ы", "2")]
    assert not rows.rejected


def test_numbers_come_as_they_are_written(save: Save) -> None:
    big = "123456789012345678901234567890.10"
    values, _ = read(save(f'{{"a": {big}, "b": 1e400, "c": NaN, "d": 1.0}}\n'), *"abcd")
    assert values == [(big, "1e400", "NaN", "1.0")]


def test_columns_may_be_rare_in_json(save: Save) -> None:
    values, _ = read(save('{"type": "start"}\n{"a": 1}\n{"b": 2}\n'), "a", "b")
    assert values == [(None, None), ("1", None), (None, "2")]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param("9", "wrong number of fields", id="too few"),
        pytest.param("9,x,y", "wrong number of fields", id="too many"),
        pytest.param('9,"x', "bad CSV", id="a quote that is never closed"),
        pytest.param('9,"x"y', "bad CSV", id="text behind a closing quote"),
        pytest.param("9,\udcff", "not UTF-8", id="not UTF-8"),
        pytest.param("9," + "x" * 200_000, "bad CSV", id="a giant"),
    ],
)
def test_a_bad_csv_row_costs_no_other(save: Save, bad: str, reason: str) -> None:
    text = f"a,b\n1,x\n{bad}\n2,y\n3,z\n{bad}\n{bad}\n4,z"
    values, rows = read(save(text.encode(errors="surrogateescape")), "a")
    assert values == [("1",), ("2",), ("3",), ("4",)]
    ((found, line),) = rows.first.items()
    assert (rows.rejected.total(), line) == (3, 3)
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b"{", "bad JSON", id="cut off"),
        pytest.param(b"[" * 100_000, "bad JSON", id="too deep"),
        pytest.param(b'{"a": 1} {"a": 2}', "bad JSON", id="two in a line"),
        pytest.param(b"7", "not a JSON object", id="a number"),
        pytest.param(b'{"a": "\xff"}', "not UTF-8 text", id="not UTF-8"),
        pytest.param(b'{"a": "\\ud800"}', "not UTF-8 text", id="a lone surrogate"),
    ],
)
def test_a_bad_json_line_costs_no_other(save: Save, bad: bytes, reason: str) -> None:
    values, rows = read(save(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n' + bad), "a")
    assert values == [("1",), ("2",)]
    assert rows.rejected == Counter({reason: 2})
    assert rows.first == {reason: 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", ["is empty"], id="empty"),
        pytest.param("\n \n\r\n", ["is empty"], id="blank"),
        pytest.param(gzip.compress(b""), ["is empty"], id="empty, packed"),
        pytest.param("k,b\n", ["no rows"], id="a header only"),
        pytest.param("b,c\n1,2\n", ["no column 'k'", "'b', 'c'"], id="no such column"),
        pytest.param('{"b": 1, "c": 2}\n', ["no column 'k'", "'b', 'c'"], id="the same in JSON"),
        pytest.param("k,b,k\n1,2,3\n", ["2 columns 'k'", "rename"], id="twice"),
    ],
)
def test_an_input_that_cannot_be_used(save: Save, content: str | bytes, words: list[str]) -> None:
    path = save(content)
    message = error_of(path, "k")
    assert message.startswith(repr(path))
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "No such file" in error_of(str(tmp_path / "nowhere"), "k")
    assert "Is a directory" in error_of(str(tmp_path), "k")
    assert "null byte" in error_of("\0", "k")


@pytest.mark.parametrize("damage", ["cut off", "altered"])
def test_a_damaged_gzip_file(save: Save, damage: str) -> None:
    packed = bytearray(gzip.compress(b"k\n" + b"".join(b"%d\n" % (i**3) for i in range(20_000))))
    if damage == "cut off":
        del packed[-5000:]
    else:
        packed[len(packed) // 2] ^= 0xFF
    assert "cannot be read" in error_of(save(bytes(packed)), "k")


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_any_csv_is_read_back(rows: list[tuple[str, str]], line_end: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerows([("key", "value"), *rows])
    lines = io.StringIO(file.getvalue(), newline="")
    assert list(Rows("x", lines, ("key", "value"), lambda values: values)) == rows


@given(st.lists(st.fixed_dictionaries({"k": cells, "v": cells}), min_size=1))
def test_any_json_is_read_back(objects: list[dict[str, str]]) -> None:
    lines = [json.dumps(o, ensure_ascii=False) + "\n" for o in objects]
    found = list(Rows("x", lines, ("k", "v"), lambda values: values))
    assert found == [(o["k"], o["v"]) for o in objects]


# Rows become messages


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" -17 ", "-17"),
        ("+4", "4"),
        ("9" * 400, "9" * 400),
        ("1.50", "1.50"),
        (".5", "0.5"),
        ("-1e3", "-1E+3"),
    ],
)
def test_what_is_a_number(text: str, number: str) -> None:
    assert sums_of("who", ("a",)).message(("ann", text)) == Message("ann", [["a", number]])


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "NA", "nan", "inf", "-", ".", "e5", "1e", "1_000", "1,5", "0x10", "١٢", "1 2",
     "9" * 401, "1e401", "1e-401", "1e999999999999999999999", None, True, 5, ["1"]],
)  # fmt: skip
def test_what_is_none(text: object) -> None:
    with pytest.raises(Rejected, match="no number in 'a'"):
        sums_of("who", ("a",)).message(("ann", text))


@pytest.mark.parametrize("key", ["", "  ", None, True, ["x"]])
def test_a_row_without_a_key(key: object) -> None:
    with pytest.raises(Rejected, match="no key in 'who'"):
        sums_of("who", ()).message((key,))


def test_a_flight_without_figures() -> None:
    row = ("N1", "EWR", "IAH", "1400", "NA", "NA")
    assert FLIGHTS.message(row) == Message("N1", ["EWR", "IAH", 1400, None, None])
    with pytest.raises(Rejected, match="no tail number"):
        FLIGHTS.message(("NA", *row[1:]))
    with pytest.raises(Rejected, match="not a number"):
        FLIGHTS.message((*row[:3], "far", *row[4:]))


numbers = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=5).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
).map(Decimal)


@given(st.lists(numbers, min_size=1, max_size=8), st.randoms())
def test_sums_are_exact_in_any_order(values: list[Decimal], random: Any) -> None:
    def total() -> Decimal:
        return list(itertools.accumulate(values, add))[-1]

    before = total()
    assert Fraction(before) == sum(map(Fraction, values))
    random.shuffle(values)
    assert str(total()) == str(before)
