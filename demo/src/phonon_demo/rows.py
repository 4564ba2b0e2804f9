"""The rows of an input: CSV or JSON lines, gzip or not. Unusable rows are counted."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from phonon_demo.errors import InputError

T = TypeVar("T")

STDIN = "-"
_GZIP = b"\x1f\x8b"
_DELIMITERS = ",;\t|"
#: The number of JSON objects from which the columns are taken: not all have all columns.
_SAMPLE = 100

#: The number of a line, and the values of the wanted columns, or the reason for the rejection.
Record = tuple[int, "tuple[Any, ...] | Rejected"]


class Rejected(ValueError):  # noqa: N818 - not an error of the program: it is counted
    """A row is unusable. The text is the reason, the same for all rows of the kind."""


class Rows(Generic[T]):
    """The rows of an input, to iterate over once.

    Attributes:
        name: The input's name in messages.
        rejected: The number of unusable rows, by reason.
        first: The line of the first such row, by reason.
    """

    def __init__(
        self,
        name: str,
        lines: Iterable[str],
        columns: Sequence[str],
        convert: Callable[[tuple[Any, ...]], T],
    ) -> None:
        self.name = name
        self.rejected: Counter[str] = Counter()
        self.first: dict[str, int] = {}
        self._convert = convert
        numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
        first = next(numbered, None)
        if first is None:
            raise InputError(f"{name} is empty: a CSV header or JSON objects are expected")
        read = _json if first[1].lstrip().startswith("{") else _csv
        self._records = read(name, itertools.chain([first], numbered), columns)

    def __iter__(self) -> Iterator[T]:
        for line, values in self._records:
            try:
                if isinstance(values, Rejected):
                    raise values
                row = self._convert(values)
            except Rejected as reason:
                self.rejected[str(reason)] += 1
                self.first.setdefault(str(reason), line)
            else:
                yield row


@contextlib.contextmanager
def open_rows(
    path: str, columns: Sequence[str], convert: Callable[[tuple[Any, ...]], T]
) -> Iterator[Rows[T]]:
    """Open an input.

    Args:
        path: The file's name; ``-`` for standard input.
        columns: The columns whose values are wanted.
        convert: Converts the values, or raises `Rejected`.

    Raises:
        InputError: The input cannot be opened or read, has no rows, or lacks a column.
    """
    name = "standard input" if path == STDIN else repr(path)
    with contextlib.ExitStack() as stack:
        stream: Any = sys.stdin.buffer
        if path != STDIN:
            with _readable(name):
                stream = stack.enter_context(Path(path).open("rb"))
        yield Rows(name, _lines(name, stream), columns, convert)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, ValueError, zlib.error) as error:  # damaged gzip, among others
        raise InputError(
            f"{name} cannot be read: {error}; --input takes the name of a file, or - for standard "
            "input"
        ) from error


def _lines(name: str, stream: Any) -> Iterator[str]:
    """Yield the lines. Bytes that are not UTF-8 come as lone surrogates."""
    with _readable(name):
        raw = gzip.GzipFile(fileobj=stream) if stream.peek(2).startswith(_GZIP) else stream
        # The csv module needs unchanged line ends. "-sig" removes a byte order mark.
        with io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as lines:
            yield from lines


def _csv(name: str, lines: Iterator[tuple[int, str]], columns: Sequence[str]) -> Iterator[Record]:
    """Read CSV, a record in each line."""
    _, head = next(lines)
    delimiter = max(_DELIMITERS, key=head.count)
    header = next(csv.reader([head], delimiter=delimiter))
    wanted = [_index(name, header, column) for column in columns]
    number = 0
    for number, line in lines:
        try:
            # strict: text after a closing quote is an error.
            (fields,) = csv.reader([line], delimiter=delimiter, strict=True)
        except csv.Error:
            yield number, Rejected("bad CSV")
            continue
        if len(fields) != len(header):
            yield number, Rejected("wrong number of fields")
        elif not is_utf8(line):
            yield number, Rejected("not UTF-8 text")
        else:
            yield number, tuple(fields[i] for i in wanted)
    if not number:
        raise InputError(f"{name} has a header and no rows: there is nothing to add up")


def _json(name: str, lines: Iterator[tuple[int, str]], columns: Sequence[str]) -> Iterator[Record]:
    """Read JSON lines, an object in each. Numbers come as their text."""
    objects = ((number, _object(line)) for number, line in lines)
    sample = list(itertools.islice(objects, _SAMPLE))
    known = list(dict.fromkeys(key for _, each in sample if type(each) is dict for key in each))
    for column in columns:
        _index(name, known, column)
    for number, found in itertools.chain(sample, objects):
        if isinstance(found, Rejected):
            yield number, found
        else:
            yield number, tuple(found.get(column) for column in columns)


def _object(line: str) -> dict[str, Any] | Rejected:
    try:
        found = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return Rejected("bad JSON")
    if not isinstance(found, dict):
        return Rejected("not a JSON object")
    return found if is_utf8(json.dumps(found, ensure_ascii=False)) else Rejected("not UTF-8 text")


def _index(name: str, columns: Sequence[str], column: str) -> int:
    match columns.count(column):
        case 1:
            return columns.index(column)
        case 0:
            listed = ", ".join(map(repr, columns))
            raise InputError(f"{name} has no column {column!r}; name one of {listed}")
    raise InputError(f"{name} has {columns.count(column)} columns {column!r}: rename all but one")


def is_utf8(text: str) -> bool:
    """Return whether the text can be encoded, that is, has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
