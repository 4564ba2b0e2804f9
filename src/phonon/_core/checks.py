"""Checks of single values that users pass, for all parts that take some."""

import math
import operator
from numbers import Real
from typing import Any

from phonon.errors import ConfigurationError


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, and not True or False."""
    kind = value.__class__
    return kind is float or kind is int or (isinstance(value, Real) and kind is not bool)


def check_seconds(argument: str, value: Any) -> float:
    """Refuse a value that is not a positive, finite number of seconds.

    Raises:
        ConfigurationError: The value is refused.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{argument} is a number of seconds above 0, not {value!r}: give one like "
            f"{argument}=10.0"
        )
    seconds: float = value
    return seconds


def check_flag(argument: str, value: Any) -> bool:
    """Refuse a value that is neither true nor false, such as seconds in place of a flag.

    Raises:
        ConfigurationError: The value is refused.
    """
    if value is True or value is False:
        return value
    if type(value) is int and value in (0, 1):
        return bool(value)
    raise ConfigurationError(
        f"{argument} is True or False, not {value!r}: write {argument}=True or {argument}=False"
    )


def check_whole(argument: str, value: Any) -> int:
    """Refuse a value that is not a whole number.

    Raises:
        ConfigurationError: The value is refused.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    remedy = f"use // where it is divided, or write {argument}=int(...)"
    raise ConfigurationError(f"{argument} is a whole number, not {value!r}: {remedy}")
