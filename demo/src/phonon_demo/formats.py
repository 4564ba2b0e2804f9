"""CSV and JSON lines: from lines of text to the values of chosen columns.

Both yield records, ``(line, values)``, or ``(line, Rejected)`` for one that cannot be read.
"""

import csv
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from phonon_demo.errors import InputError

#: JSON objects that are looked at to learn which columns there are: not all have all of them.
SAMPLE = 100

_LISTED = 30  # columns in an error message
_DELIMITERS = ",;\t|"


class Rejected(ValueError):  # noqa: N818 - no failure: it is counted
    """A row cannot be used. The text is the reason, the same for all rows of the kind."""


#: The values of one row: text, or what JSON has besides text and numbers.
Values = tuple[Any, ...]
Record = tuple[int, Values | Rejected]


def csv_records(lines: Iterable[str], columns: Sequence[str], name: str) -> Iterator[Record]:
    """Read CSV with a header, separated by commas, semicolons, tabs or bars.

    Args:
        lines: The text.
        columns: The columns whose values are wanted.
        name: What messages call the input.

    Raises:
        InputError: The header is unreadable, or lacks a column.
    """
    source = _Lines(lines)
    first = ""
    while not first.strip():
        source.begin()
        first = next(source, "header")
    source.give_back_all()
    delimiter = max(_DELIMITERS, key=first.count)
    # strict: what comes behind a closing quote is an error and not guessed at.
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    try:
        header = next(reader)
    except csv.Error as error:
        raise InputError(f"{name}: the header cannot be read as CSV: {error}") from error
    if not is_utf8("".join(header)):
        raise InputError(f"{name}: the header is not UTF-8 text; convert the file (iconv can)")
    wanted = [_index(header, column, name) for column in columns]
    while True:
        source.begin()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            line = source.give_back_rest()
            yield line, Rejected("bad CSV")
            continue
        if not fields:
            continue  # a blank line
        if len(fields) != len(header):
            line = source.give_back_rest()
            yield line, Rejected("wrong number of fields")
        elif not is_utf8("".join(fields)):
            yield source.first, Rejected("not UTF-8 text")
        else:
            yield source.first, tuple(fields[i] for i in wanted)


class _Lines:
    """Lines that can be taken back.

    A quote that is never closed swallows the lines behind it. Only the one it stands in is to
    blame: the others are read again.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self._taken: list[str] = []
        self.first = 1
        """The line in which the record begins."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        return line

    def begin(self) -> None:
        """A new record begins."""
        self.first += len(self._taken)
        self._taken.clear()

    def give_back_all(self) -> None:
        """Read the record once more."""
        self._again.extendleft(reversed(self._taken))
        self._taken.clear()

    def give_back_rest(self) -> int:
        """Read all lines of the record but the first once more; return its number."""
        self._again.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]
        return self.first


def json_records(lines: Iterable[str], columns: Sequence[str], name: str) -> Iterator[Record]:
    """Read JSON lines, one object in each. A column that an object lacks is None.

    Numbers come as the text they are written as, so that nothing is lost.

    Args:
        lines: The text.
        columns: The fields whose values are wanted.
        name: What messages call the input.

    Raises:
        InputError: None of the first objects has one of the columns.
    """
    objects = (
        (number, _object(line)) for number, line in enumerate(lines, start=1) if line.strip()
    )
    sample = list(itertools.islice(objects, SAMPLE))
    fields = dict.fromkeys(itertools.chain(*(o for _, o in sample if isinstance(o, dict))))
    if not fields:
        raise InputError(
            f"{name}: no JSON object in its first {len(sample)} lines; one object a line is wanted "
            "(of an array, `jq -c '.[]'` makes that)"
        )
    for column in columns:
        _index(list(fields), column, name)
    for number, found in itertools.chain(sample, objects):
        if isinstance(found, Rejected):
            yield number, found
        else:
            yield number, tuple(found.get(column) for column in columns)


def _object(line: str) -> dict[str, Any] | Rejected:
    if not is_utf8(line):
        return Rejected("not UTF-8 text")
    try:
        found = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return Rejected("bad JSON")
    return found if isinstance(found, dict) else Rejected("not a JSON object")


def _index(columns: Sequence[str], column: str, name: str) -> int:
    match columns.count(column):
        case 1:
            return columns.index(column)
        case 0:
            listed = ", ".join(map(repr, columns[:_LISTED]))
            more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
            raise InputError(f"{name} has no column {column!r}; name one of {listed}{more}")
    raise InputError(f"{name} has {columns.count(column)} columns {column!r}: rename all but one")


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded: the decoder puts lone surrogates where it met bad bytes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
