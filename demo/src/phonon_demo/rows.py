"""The rows of an input. Whatever is wrong with one is counted; none is lost silently."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Generic, TypeVar

from phonon_demo.errors import InputError
from phonon_demo.formats import Rejected, Values, csv_records, json_records
from phonon_demo.streams import Text, open_text

T = TypeVar("T")

_JSON_ENDINGS = {".json", ".jsonl", ".ndjson"}
_CSV_ENDINGS = {".csv", ".tsv"}


@dataclass
class Rejections:
    """The rows that could not be used.

    Attributes:
        reasons: How many, by reason.
        first: The line of the first of them, by reason.
    """

    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Count a row."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first.setdefault(reason, line)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.reasons.values())


class Rows(Generic[T]):
    """The rows of an input, to be gone through once.

    Args:
        text: The input.
        columns: The columns wanted.
        convert: Makes what is wanted of a row's values, or raises `Rejected`.
        ending: The extension of the file's name. Unless it tells the format, the first line does.

    Attributes:
        text: The input.
        rejections: What was wrong, so far.

    Raises:
        InputError: There are no rows, or not with these columns.
    """

    def __init__(
        self, text: Text, columns: Sequence[str], convert: Callable[[Values], T], ending: str = ""
    ) -> None:
        self.text = text
        self.rejections = Rejections()
        self._convert = convert
        first, lines = _peek(text)
        if first is None:
            raise InputError(f"{text.name} is empty: a CSV header or JSON objects are expected")
        is_json = ending in _JSON_ENDINGS or (
            ending not in _CSV_ENDINGS and first.lstrip().startswith("{")
        )
        read = json_records if is_json else csv_records
        records = read(lines, columns, text.name)
        record = next(records, None)
        if record is None:
            raise InputError(f"{text.name} has a header and no rows: there is nothing to add up")
        self._records = itertools.chain([record], records)

    def __iter__(self) -> Iterator[T]:
        for line, values in self._records:
            if isinstance(values, Rejected):
                self.rejections.add(str(values), line)
                continue
            try:
                row = self._convert(values)
            except Rejected as reason:
                self.rejections.add(str(reason), line)
            else:
                yield row


def _peek(text: Text) -> tuple[str | None, Iterator[str]]:
    """The first line that is not blank, and all lines."""
    lines = iter(text)
    seen = []
    for line in lines:
        seen.append(line)
        if line.strip():
            return line, itertools.chain(seen, lines)
    return None, iter(())


@contextlib.contextmanager
def open_rows(
    path: str, columns: Sequence[str], convert: Callable[[Values], T]
) -> Iterator[Rows[T]]:
    """Open CSV or JSON lines, gzip or not.

    Args:
        path: The file's name; ``-`` for standard input.
        columns: See `Rows`.
        convert: See `Rows`.

    Raises:
        InputError: It cannot be opened, has no rows, or not with these columns.
    """
    name = PurePath(path.lower())
    ending = PurePath(name.stem).suffix if name.suffix == ".gz" else name.suffix
    with open_text(path) as text:
        yield Rows(text, columns, convert, ending)
