"""Rows of a file, and the job that adds up the user's own. Unusable rows are counted."""

import contextlib
import csv
import decimal
import gzip
import io
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from phonon import Model
from phonon.cli.errors import CommandError
from phonon.fields import ID, Count, Custom
from phonon_demo.models import FLIGHTS, Job, Message, Rejected

#: An exact sum of numbers of up to 400 digits and exponents of up to 400; more would raise.
_EXACT = decimal.Context(prec=2000, Emax=9999, Emin=-9999, traps=[decimal.Inexact])
_MOST_DIGITS = 400


class InputError(CommandError):
    """The input or an option is unusable; the message names the remedy."""

    status = 2


class Rows:
    """The rows of an input as messages, to iterate over once.

    Args:
        job: Says which columns are wanted, and makes messages of them.
        name: The input's name in messages.
        lines: Its lines, CSV with a header or JSON objects.

    Attributes:
        rejected: The number of unusable rows, by reason.
    """

    def __init__(self, job: Job, name: str, lines: Iterable[str]) -> None:
        self.job = job
        self.name = name
        self.rejected: Counter[str] = Counter()
        self._lines = (line for line in lines if line.strip())

    def __iter__(self) -> Iterator[Message]:
        first = next(self._lines, "")
        if not first:
            raise InputError(f"{self.name} is empty: a CSV header or JSON objects are expected")
        is_json = first.lstrip().startswith("{")
        row_of = _parse_json if is_json else self._csv(first)
        for line in itertools.chain([first] if is_json else (), self._lines):
            try:
                message = self._message(row_of(line))
            except Rejected as reason:
                self.rejected[str(reason)] += 1
            except (ValueError, AttributeError, RecursionError, csv.Error):
                self.rejected["broken"] += 1
            else:
                yield message

    def _message(self, row: dict[str, Any]) -> Message:
        key, *others = map(row.get, self.job.columns)
        if not isinstance(key, str) or key.strip() in ("", "NA"):
            raise Rejected(f"no {self.job.columns[0]}")
        "".join(map(str, (key, *others))).encode()  # raises if it is not UTF-8
        return Message(key, self.job.content(others))

    def _csv(self, head: str) -> Callable[[str], dict[str, Any]]:
        delimiter = max(",;\t|", key=head.count)
        header = next(csv.reader([head], delimiter=delimiter))
        for column in self.job.columns:
            if (count := header.count(column)) != 1:
                columns = f"{count} columns" if count else "no column"
                listed = ", ".join(map(repr, header))
                raise InputError(f"{self.name} has {columns} {column!r}: name another of {listed}")

        def row_of(line: str) -> dict[str, Any]:
            # Line by line: a quote that is never closed costs no other row.
            (fields,) = csv.reader([line], delimiter=delimiter, strict=True)
            return dict(zip(header, fields, strict=True))

        return row_of


def _parse_json(line: str) -> Any:
    """Return an object whose numbers are as they are written."""
    return json.loads(line, parse_int=str, parse_float=str, parse_constant=str)


def lines_of(path: str) -> Iterator[str]:
    """Yield the lines of a file, gzip or not, or of standard input if its name is ``-``."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = sys.stdin.buffer
            if path != "-":
                file = stack.enter_context(Path(path).open("rb"))
            raw = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            # "-sig" removes a byte order mark. Bytes that are not UTF-8 come as surrogates.
            text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            yield from stack.enter_context(text)
    except (EOFError, OSError, ValueError, zlib.error) as error:  # damaged gzip, among others
        raise InputError(f"{path!r} cannot be read: {error}; give --input a file, or -") from error


def add(one: str, other: str) -> str:
    """Return the exact sum of decimals, so that the order of addition makes no difference."""
    return str(_EXACT.add(Decimal(one), Decimal(other)))


def add_all(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Return the sums of columns."""
    return {name: add(one.get(name, "0"), text) for name, text in other.items()}


class Totals(Model, name="phonon_demo_totals"):
    """Rows and sums of one key; the sums by the name of their column."""

    key: ID[str]
    sums: Custom[dict[str, str]] = Custom(merge=add_all, zero={})
    rows: Count = Count()


def _number(text: Any, column: str) -> str:
    with contextlib.suppress(decimal.InvalidOperation):
        number = Decimal(text if isinstance(text, str) and len(text) <= _MOST_DIGITS else "")
        if number.is_finite() and abs(number.adjusted()) <= _MOST_DIGITS:
            return str(number)
    raise Rejected(f"no number in {column!r}")


def _add_row(row: dict[str, Any] | None, numbers: dict[str, str]) -> dict[str, Any]:
    row = row or {"sums": {}, "rows": 0}
    return {"sums": add_all(row["sums"], numbers), "rows": row["rows"] + 1}


def sums_of(key: str, columns: Sequence[str]) -> Job:
    """Return the job that sums columns of the user's own rows, by the column of the key."""

    def content(row: Sequence[Any]) -> list[Any]:
        return [{name: _number(text, name) for name, text in zip(columns, row, strict=True)}]

    return Job("totals", Totals, (key, *columns), content, _add_row)


#: The jobs by their tables, for workers, which need no columns.
JOBS = {job.table: job for job in (FLIGHTS, sums_of("", ()))}
