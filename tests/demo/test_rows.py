"""Reading rows: what comes out of files as people have them, and what is said about bad ones."""

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phonon_demo.models import FLIGHTS, Job, Message, Rejected
from phonon_demo.rows import InputError, Rows, add, lines_of, sums_of

Save = Callable[..., str]
Values = tuple[Any, ...]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(content: str | bytes) -> str:
        path = tmp_path / "input"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def job_of(*columns: str) -> Job:
    """Return a job that takes the columns as they are, the first of them as the key."""
    return sums_of(columns[0], columns[1:])._replace(content=list)


def read(path: str, *columns: str) -> tuple[list[Values], Rows]:
    rows = Rows(job_of(*columns), repr(path), lines_of(path))
    return [(key, *content) for key, content in rows], rows


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
    values, rows = read(save('{"type": "start"}\n{"a": 1}\n{"a": 2, "b": 3}\n'), "a", "b")
    assert values == [("1", None), ("2", "3")]
    assert rows.rejected == {"no a": 1}


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("9", id="too few"),
        pytest.param("9,x,y", id="too many"),
        pytest.param('9,"x', id="a quote that is never closed"),
        pytest.param('9,"x"y', id="text behind a closing quote"),
        pytest.param("9,\udcff", id="not UTF-8"),
        pytest.param("9," + "x" * 200_000, id="a giant"),
    ],
)
def test_a_bad_csv_row_costs_no_other(save: Save, bad: str) -> None:
    text = f"a,b\n1,x\n{bad}\n2,y\n3,z\n{bad}\n{bad}\n4,z"
    values, rows = read(save(text.encode(errors="surrogateescape")), "a", "b")
    assert values == [("1", "x"), ("2", "y"), ("3", "z"), ("4", "z")]
    assert rows.rejected == {"broken": 3}


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[" * 100_000, id="too deep"),
        pytest.param(b'{"a": 1} {"a": 2}', id="two in a line"),
        pytest.param(b"7", id="a number"),
        pytest.param(b'{"a": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"a": "\\ud800"}', id="a lone surrogate"),
    ],
)
def test_a_bad_json_line_costs_no_other(save: Save, bad: bytes) -> None:
    values, rows = read(save(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n' + bad), "a")
    assert values == [("1",), ("2",)]
    assert rows.rejected == {"broken": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", ["is empty"], id="empty"),
        pytest.param("\n \n\r\n", ["is empty"], id="blank"),
        pytest.param(gzip.compress(b""), ["is empty"], id="empty, packed"),
        pytest.param("b,c\n1,2\n", ["no column 'k'", "'b', 'c'"], id="no such column"),
        pytest.param("k,b,k\n1,2,3\n", ["2 columns 'k'"], id="twice"),
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


def _flat(message: Message) -> Values:
    return (message.key, *message.content)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_any_csv_is_read_back(rows: list[tuple[str, str]], line_end: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerows([("key", "value"), *rows])
    lines = io.StringIO(file.getvalue(), newline="")
    found = list(map(_flat, Rows(job_of("key", "value"), "x", lines)))
    assert found == [row for row in rows if row[0].strip() not in ("", "NA")]


@given(st.lists(st.fixed_dictionaries({"k": cells, "v": cells}), min_size=1))
def test_any_json_is_read_back(objects: list[dict[str, str]]) -> None:
    lines = [json.dumps(o, ensure_ascii=False) + "\n" for o in objects]
    found = list(map(_flat, Rows(job_of("k", "v"), "x", lines)))
    assert found == [(o["k"], o["v"]) for o in objects if o["k"].strip() not in ("", "NA")]


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
    assert sums_of("who", ("a",)).content((text,)) == [{"a": number}]


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "NA", "nan", "inf", "-", ".", "e5", "1e", "1,5", "0x10", "1 2",
     "9" * 401, "1e401", "1e-401", "1e999999999999999999999", None, True, 5, ["1"]],
)  # fmt: skip
def test_what_is_none(text: object) -> None:
    with pytest.raises(Rejected, match="no number in 'a'"):
        sums_of("who", ("a",)).content((text,))


@pytest.mark.parametrize("key", ['""', '"  "', '"NA"', "null", "true", '["x"]'])
def test_a_row_without_a_key(save: Save, key: str) -> None:
    values, rows = read(save(f'{{"who": {key}}}'), "who")
    assert values == []
    assert rows.rejected == {"no who": 1}


def test_a_flight_without_figures() -> None:
    row = ("EWR", "IAH", "1400", "NA", "NA")
    assert FLIGHTS.content(row) == [["EWR", "IAH"], 1400, None, None]
    with pytest.raises(ValueError, match="far"):
        FLIGHTS.content((*row[:2], "far", *row[3:]))


numbers = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=5).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
)


@given(st.lists(numbers, min_size=1, max_size=8), st.randoms())
def test_sums_are_exact_in_any_order(values: list[str], random: Any) -> None:
    def total() -> str:
        return list(itertools.accumulate(values, add))[-1]

    before = total()
    assert Fraction(before) == sum(map(Fraction, values))
    random.shuffle(values)
    assert total() == before
