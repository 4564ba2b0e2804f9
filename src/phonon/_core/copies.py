"""Copies the caller's data, and checks that it can be stored, without encoding it."""

from sys import getrefcount
from types import SimpleNamespace
from typing import Any

# Types that can be stored without a look inside, and containers whose items are checked.
PLAIN = frozenset({type(None), bool, int, float, str, bytes})
FLAT = frozenset({list, tuple, set, frozenset})
CONTAINERS = FLAT | {dict}
MUTABLE = frozenset({list, set})

#: Stands for a value that has to be copied by the serializer.
DEEP: Any = object()


def copied(value: Any) -> Any:
    """Return a copy of a plain value, or of a collection of such; else `DEEP`.

    A copy is needed because the caller may refill the same dict for each message.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is dict:
        if not PLAIN.issuperset(map(type, value)):
            return DEEP
        copy = {}
        for key, item in value.items():
            own = item if type(item) in PLAIN else _flat_copy(item)
            if own is DEEP:
                return DEEP
            copy[key] = own
        return copy
    return _flat_copy(value)


def _flat_copy(value: Any) -> Any:
    kind = type(value)
    if kind in FLAT:
        return kind(value) if PLAIN.issuperset(map(type, value)) else DEEP
    if (
        kind is dict
        and PLAIN.issuperset(map(type, value))
        and PLAIN.issuperset(map(type, value.values()))
    ):
        return value.copy()
    return DEEP


def _of_an_attribute() -> int:
    owner = SimpleNamespace(value=set())
    state = {"value": owner.value}
    for name, value in state.items():  # noqa: B007, PERF102 - as in the loop that asks
        count = getrefcount(value)
    return count


def _of_a_read_attribute() -> int:
    owner = SimpleNamespace(value=set())
    value = owner.value
    return getrefcount(value)


def _of_a_variable() -> int:
    things = [SimpleNamespace()]
    thing = things.pop()
    return getrefcount(thing)


#: The `getrefcount` of a value that only one attribute refers to, as measured in a loop over the
#: items of `state`; versions of Python count differently.
UNSHARED = _of_an_attribute()
#: The same, as measured where a local variable has the attribute's value.
OWNED = _of_a_read_attribute()
#: The `getrefcount` of an object that only a local variable refers to.
UNREFERENCED = _of_a_variable()
