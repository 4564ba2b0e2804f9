"""Sums that do not depend on the order of addition.

Numbers are added as the decimals that they are written as: ints stay ints, and 0.1 + 0.2 is 0.3.
Binary floating point would come out differently whenever partial results meet in another order.
"""

import decimal
import re
from decimal import Decimal
from typing import Any

Number = int | Decimal

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MOST_DIGITS = 400
_MOST_EXPONENT = 400
# Room for every sum of numbers within those limits. Should one not fit after all, it raises.
_EXACT = decimal.Context(
    prec=2000,
    Emax=decimal.MAX_EMAX,
    Emin=decimal.MIN_EMIN,
    traps=[decimal.Inexact, decimal.InvalidOperation, decimal.Overflow],
)
_SQLITE_MOST = 2**63 - 1


def parse(text: Any) -> Number:
    """The number that a text says.

    Raises:
        ValueError: It says none, or one that is out of all proportion.
    """
    if not isinstance(text, str) or len(text) > _MOST_DIGITS:
        raise ValueError(f"{text!r:.40} is not a number")
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    number = Decimal(text)
    if abs(number.adjusted()) > _MOST_EXPONENT:
        raise ValueError(f"{text!r} is out of range")
    return number


def add(a: Number, b: Number) -> Number:
    """The sum: an int if both are ints."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return _EXACT.add(Decimal(a), Decimal(b))


def to_sql(number: Number) -> int | str:
    """What SQLite stores without loss: an integer of 64 bits, or text."""
    if isinstance(number, int) and abs(number) <= _SQLITE_MOST:
        return number
    return str(number) if isinstance(number, int) else format(number, "f")


def from_sql(stored: int | str) -> Number:
    """What `to_sql` was given."""
    if isinstance(stored, int):
        return stored
    return int(stored) if _INTEGER.fullmatch(stored) else Decimal(stored)


def add_in_sql(a: int | str, b: int | str) -> int | str:
    """`add`, as a function for SQLite."""
    return to_sql(add(from_sql(a), from_sql(b)))
