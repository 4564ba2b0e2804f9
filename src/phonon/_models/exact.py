"""Exact sums, so that the order in which numbers are added up makes no difference.

Floats do not add up associatively: 0.1 + 0.2 + 0.3 depends on the brackets. A sum is kept as the
nearest float, the float nearest to the rest, and so on (a floating-point expansion, J. R. Shewchuk
1997), of which `math.fsum` yields the first term, correctly rounded. The terms depend on the exact
sum only.
"""

import contextlib
import decimal
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

#: Number of floats that are added up together, which spreads the time of an fsum over messages.
BUFFER = 64
#: Digits of an exact sum of Decimals within the range of decimal128; more would be an error.
_DECIMAL = decimal.Context(
    prec=14_000, Emin=-99_999, Emax=99_999, traps=[decimal.Inexact, decimal.InvalidOperation]
)
#: Integers up to here are floats without loss.
_WHOLE = 2**53

#: A sum: an int, or with floats a list of the int and the floats' expansion. Terms that were not
#: added up yet may follow in the list.
Total = int | list[Any]


def add(total: Total, value: float) -> Total:
    """Add a number to a sum, and return it. The argument may be changed."""
    if type(total) is not list:
        return total + value if type(value) is int else [total, value]  # type: ignore[operator]  # an int
    if type(value) is int:
        total[0] += value
    else:
        total.append(value)
        if len(total) > BUFFER:
            shorten(total)
    return total


def merge(one: Total, other: Total) -> Total:
    """Add two sums. Both arguments may be changed."""
    if type(other) is not list:
        return add(one, other)  # type: ignore[arg-type]  # an int
    if type(one) is not list:
        one, other = other, one
        return add(one, other)  # type: ignore[arg-type]  # an int
    one[0] += other[0]
    one += other[1:]
    if len(one) > BUFFER:
        shorten(one)
    return one


def shorten(total: list[Any]) -> None:
    """Add up the floats of a sum."""
    terms: list[float] = total[1:]
    expansion: list[float] = []
    try:
        # Each round takes 53 bits off the rest, so that there are at most 40 rounds.
        while rest := math.fsum((*terms, *(-term for term in expansion))):
            expansion.append(rest)
    except OverflowError:  # beyond what a float can hold, so the terms stay as they are
        expansion = sorted(terms)
    total[1:] = expansion


def sealed(total: Total) -> Total:
    """Return a sum in its canonical form."""
    if type(total) is not list:
        return total
    shorten(total)
    return total if len(total) > 1 else total[0]


def number(total: Total) -> int | float:
    """Return the value of a sum: an int, or the nearest float."""
    if type(total) is not list:
        return total  # type: ignore[return-value]  # an int
    if -_WHOLE <= total[0] <= _WHOLE:
        with contextlib.suppress(OverflowError):
            return math.fsum(total)
    return nearest(fraction_of(total))


def nearest(value: Fraction) -> float:
    """Return the nearest float, or infinity if the value is beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_total(state: Any) -> bool:
    """Return whether a decoded value is a sum."""
    if type(state) is int:
        return True
    return (
        type(state) is list
        and bool(state)
        and type(state[0]) is int
        and all(type(term) is float and math.isfinite(term) for term in state[1:])
    )


def add_decimals(one: Decimal, other: Decimal) -> Decimal:
    """Return the exact sum of two Decimals, independent of the thread's context."""
    return _DECIMAL.add(one, other)


# Squares: the exact square of a float is an integer times a power of two


def square(value: float) -> tuple[int, int]:
    """Return the exact square of a number: an integer, and the bits to shift it right by."""
    numerator, denominator = value.as_integer_ratio()
    return numerator * numerator, 2 * (denominator.bit_length() - 1)


def add_shifted(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return the sum of two shifted integers, in its shortest form."""
    (a, by_a), (b, by_b) = one, other
    shift = max(by_a, by_b)
    total = (a << (shift - by_a)) + (b << (shift - by_b))
    if not total:
        return 0, 0
    zeros = min(shift, (total & -total).bit_length() - 1)
    return total >> zeros, shift - zeros


def fraction(shifted: tuple[int, int]) -> Fraction:
    """Return a shifted integer as a fraction."""
    return Fraction(shifted[0], 1 << shifted[1])


def fraction_of(total: Total) -> Fraction:
    """Return a sum as an exact fraction."""
    if type(total) is not list:
        return Fraction(total)  # type: ignore[arg-type]  # an int
    return sum(map(Fraction, total[1:]), Fraction(total[0]))
