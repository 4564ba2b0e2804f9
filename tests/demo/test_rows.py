"""Reading rows: what comes out of files as people have them, and what is said about bad ones."""

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phonon_demo import exact
from phonon_demo.errors import InputError
from phonon_demo.formats import Rejected, Values, csv_records, json_records
from phonon_demo.rows import Rejections, open_rows
from phonon_demo.sums import Sums

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(content: str | bytes, name: str = "input") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(path: str, *columns: str) -> tuple[list[Values], Rejections]:
    with open_rows(path, columns, lambda values: values) as rows:
        return list(rows), rows.rejections


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
    rows, rejections = read(save(gzip.compress(raw) if packed else raw), "b", "a")
    assert rows == [("x", "1"), ("ы", "2")]
    assert rejections.total == 0


def test_a_file_name_tells_the_format(save: Save) -> None:
    assert read(save("{a\n1\n", "x.CSV"), "{a")[0] == [("1",)]
    assert "no JSON object" in error_of(save("[1]\n", "x.jsonl"), "a")
    assert "no column" in error_of(save("[1]\n2\n", "x.txt"), "a")
    with_ending = save(gzip.compress(b'\n[{"a": 1}]\n'), "x.json.gz")
    assert "jq" in error_of(with_ending, "a")


def test_numbers_come_as_they_are_written(save: Save) -> None:
    big = "123456789012345678901234567890.10"
    rows, _ = read(save(f'{{"a": {big}, "b": 1e400, "c": NaN, "d": 1.0}}\n'), *"abcd")
    assert rows == [(big, "1e400", "NaN", "1.0")]


def test_what_json_has_besides(save: Save) -> None:
    rows, rejections = read(save('{"a": null, "b": true, "c": [1], "x": 0}\n'), *"abc")
    assert rows == [(None, True, ["1"])]
    assert rejections.total == 0


def test_columns_may_be_rare_in_json(save: Save) -> None:
    rows, _ = read(save('{"type": "start"}\n{"a": 1}\n{"b": 2}\n'), "a", "b")
    assert rows == [(None, None), ("1", None), (None, "2")]


def test_a_quoted_field_may_have_lines(save: Save) -> None:
    rows, rejections = read(save('a,b\n"1\n2",x\n3,"say ""so"", will you"\n'), "a", "b")
    assert rows == [("1\n2", "x"), ("3", 'say "so", will you')]
    assert rejections.total == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param("9", "wrong number of fields", id="too few"),
        pytest.param("9,x,y", "wrong number of fields", id="too many"),
        pytest.param('9,"x', "bad CSV", id="a quote that is never closed"),
        pytest.param('"9,x', "bad CSV", id="the same in the first field"),
        pytest.param('9,"x"y', "bad CSV", id="text behind a closing quote"),
        pytest.param("9,\udcff", "not UTF-8", id="not UTF-8"),
        pytest.param("9," + "x" * 200_000, "bad CSV", id="a giant"),
    ],
)
def test_a_bad_csv_row_costs_no_other(save: Save, bad: str, reason: str) -> None:
    text = f"a,b\n1,x\n{bad}\n2,y\n3,z\n{bad}\n{bad}\n4,z"
    rows, rejections = read(save(text.encode(errors="surrogateescape")), "a")
    assert rows == [("1",), ("2",), ("3",), ("4",)]
    assert rejections.total == 3
    ((found, line),) = rejections.first.items()
    assert found.startswith(reason)
    assert line == 3


def test_a_runaway_quote_costs_its_own_line_only(save: Save) -> None:
    many = [f"{i},x" for i in range(50_000)]
    path = save("\n".join(["a,b", *many[:10], '"z,x', *many[10:], '"z,x']))
    rows, rejections = read(path, "a")
    assert [row[0] for row in rows] == [str(i) for i in range(50_000)]
    assert rejections == Rejections({"bad CSV": 2}, {"bad CSV": 12})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b"{", "bad JSON", id="cut off"),
        pytest.param(b"x", "bad JSON", id="no JSON"),
        pytest.param(b"[" * 100_000, "bad JSON", id="too deep"),
        pytest.param(b'{"a": 1} {"a": 2}', "bad JSON", id="two in a line"),
        pytest.param(b"7", "not a JSON object", id="a number"),
        pytest.param(b'["a"]', "not a JSON object", id="a list"),
        pytest.param(b'{"a": "\xff"}', "not UTF-8 text", id="not UTF-8"),
    ],
)
def test_a_bad_json_line_costs_no_other(save: Save, bad: bytes, reason: str) -> None:
    rows, rejections = read(save(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n' + bad), "a")
    assert rows == [("1",), ("2",)]
    assert rejections.reasons == {reason: 2}
    assert rejections.first == {reason: 2}


def test_a_row_may_be_rejected_by_who_wants_it(save: Save) -> None:
    def convert(values: Values) -> int:
        if values[0] == "2":
            raise Rejected("is two")
        return int(values[0])

    with open_rows(save("a\n1\n2\n3\n2\n"), ["a"], convert) as rows:
        assert list(rows) == [1, 3]
    assert rows.rejections == Rejections({"is two": 2}, {"is two": 3})


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
        pytest.param('k,"b\n1,2\n', ["header"], id="a broken header"),
        pytest.param(b"k,\xff\n1,2\n", ["header", "UTF-8"], id="a header in Latin-1"),
        pytest.param("k,b\n1,2\n".encode("utf-16"), ["UTF-16", "UTF-8"], id="UTF-16"),
        pytest.param(b"PK\x03\x04...", ["spreadsheet"], id="a spreadsheet"),
        pytest.param('{"a"\n{"b"\n', ["no JSON object", "first 2 lines"], id="no JSON"),
    ],
)
def test_an_input_that_cannot_be_used(save: Save, content: str | bytes, words: list[str]) -> None:
    path = save(content)
    message = error_of(path, "k")
    assert message.startswith(repr(path))
    for word in words:
        assert word in message


def test_many_columns_are_not_all_listed(save: Save) -> None:
    message = error_of(save(",".join(f"c{i}" for i in range(1000)) + "\n"), "k")
    assert "'c29' and 970 more" in message
    assert "'c30'" not in message


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
    assert "cannot be read to its end" in error_of(save(bytes(packed)), "k")


cells = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_any_csv_is_read_back(rows: list[tuple[str, str]], line_end: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerows([("key", "value"), *rows])
    lines = io.StringIO(file.getvalue(), newline="")
    assert [values for _, values in csv_records(lines, ("key", "value"), "x")] == rows


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_no_line_is_lost_whatever_it_is(lines: list[bytes]) -> None:
    """Every line ends up in a row, in a rejection, or is blank."""
    text = b"\n".join(line.replace(b"\n", b"").replace(b"\r", b"") for line in lines)
    source = io.TextIOWrapper(io.BytesIO(b"k\n" + text), "utf-8", "surrogateescape", newline="")
    covered: list[int] = []
    for line, values in csv_records(source, ("k",), "x"):
        more = 0 if isinstance(values, Rejected) else values[0].count("\n")
        covered += range(line, line + more + 1)
    assert covered == sorted(set(covered))
    assert {n for n, line in enumerate(text.split(b"\n"), start=2) if line} <= set(covered)


@given(st.lists(st.fixed_dictionaries({"k": cells, "v": cells}), min_size=1))
def test_any_json_is_read_back(objects: list[dict[str, str]]) -> None:
    lines = [json.dumps(o, ensure_ascii=False) + "\n" for o in objects]
    found = [values for _, values in json_records(lines, ("k", "v"), "x")]
    assert found == [(o["k"], o["v"]) for o in objects]


# Numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        (" -17 ", -17),
        ("+4", 4),
        ("007", 7),
        ("9" * 400, int("9" * 400)),
        ("1.50", Decimal("1.50")),
        (".5", Decimal("0.5")),
        ("5.", Decimal(5)),
        ("-1e3", Decimal(-1000)),
        ("1E-400", Decimal("1E-400")),
    ],
)
def test_what_is_a_number(text: str, number: exact.Number) -> None:
    assert exact.parse(text) == number
    assert type(exact.parse(text)) is type(number)


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "NA", "nan", "inf", "-", ".", "e5", "1e", "1_000", "1,5", "0x10", "١٢", "1 2",
     "9" * 401, "1e401", "1e-401", "1e999999999999999999999", None, True, 5, ["1"]],
)  # fmt: skip
def test_what_is_none(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is out of range"):
        exact.parse(text)


numbers = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=5).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
).filter(lambda text: len(text) <= 400)


@given(st.lists(numbers, min_size=1, max_size=8), st.randoms())
def test_sums_are_exact_in_any_order(texts: list[str], random: Any) -> None:
    def total(values: Sequence[exact.Number]) -> exact.Number:
        sums = list(itertools.accumulate(values, exact.add))
        return sums[-1]

    values = [exact.parse(text) for text in texts]
    expected = total(values)
    assert Fraction(expected) == sum(Fraction(text) for text in texts)
    assert isinstance(expected, int) == all(isinstance(value, int) for value in values)
    random.shuffle(values)
    middle = random.randrange(len(values))
    parts = [part for part in (values[:middle], values[middle:]) if part]
    merged = exact.to_sql(total(parts[0]))
    for part in parts[1:]:
        merged = exact.add_in_sql(merged, exact.to_sql(total(part)))
    assert exact.from_sql(merged) == expected


# Rows of the user's own become messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("ann", "1", "2.5"), ("ann", 1, Decimal("2.5"))),
        ((" ann ", "1", "2"), (" ann ", 1, 2)),
        ((True, "1", "2"), ("true", 1, 2)),
    ],
)
def test_messages(values: Values, message: tuple[Any, ...]) -> None:
    assert Sums("who", ("a", "b")).message(values) == message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("", "1", "2"), "no key in 'who'"),
        (("  ", "1", "2"), "no key in 'who'"),
        ((None, "1", "2"), "no key in 'who'"),
        ((["x"], "1", "2"), "no key in 'who'"),
        (("\ud800", "1", "2"), "not UTF-8 text"),
        (("ann", "", "2"), "no number in 'a'"),
        (("ann", "1", "NA"), "no number in 'b'"),
        (("ann", "1", None), "no number in 'b'"),
        (("ann", True, "2"), "no number in 'a'"),
    ],
)
def test_rows_without_key_or_number(values: Values, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        Sums("who", ("a", "b")).message(values)
