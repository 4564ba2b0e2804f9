"""The asyncio API is the other one, to be awaited: the same names, arguments and errors."""

import inspect
import re
from typing import Any

import pytest

import phonon
from phonon import aio
from phonon.batch import Batch

TWINS = {
    phonon.Admin: aio.AsyncAdmin,
    phonon.Process: aio.AsyncProcess,
    phonon.Reference: aio.AsyncReference,
    phonon.Lock: aio.AsyncLock,
    phonon.Semaphore: aio.AsyncSemaphore,
    phonon.Update: aio.AsyncUpdate,
    phonon.ConflictFreeUpdate: aio.AsyncConflictFreeUpdate,
    phonon.LruCache: aio.AsyncLruCache,
    phonon.Collection: aio.AsyncCollection,
}

#: What one of them has and the other has not, and why.
ONLY_SYNC = {
    # The caller's thread is what is limited there; here it is the number of tasks.
    (phonon.Process, "executor"),
}
ONLY_ASYNC = {
    (phonon.Process, "max_concurrent"),
    # A constructor does not wait.
    (phonon.Process, "start"),
    (phonon.Admin, "start"),
    # Between the library's own modules.
    (phonon.Update, "open_now"),
    (phonon.Update, "is_to_be_opened"),
    (phonon.ConflictFreeUpdate, "open_now"),
    (phonon.ConflictFreeUpdate, "is_to_be_opened"),
}


def public(cls: type) -> set[str]:
    """The names that users see: of the class, and what its constructor sets."""
    found = set(dir(cls))
    for base in cls.__mro__[:-1]:
        found |= set(
            re.findall(r"^ +self\.(\w+)(?:: .*)? = ", inspect.getsource(base), re.MULTILINE)
        )
    return {name for name in found if not name.startswith("_")}


def names_of(function: Any) -> dict[str, tuple[Any, Any]]:
    """The arguments, with their kinds and defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in parameters if p.name not in ("self", "cls")}


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_names(cls: type) -> None:
    sync = {name for name in public(cls) if (cls, name) not in ONLY_SYNC}
    twin = {name for name in public(TWINS[cls]) if (cls, name) not in ONLY_ASYNC}
    assert twin == sync


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_arguments(cls: type) -> None:
    twin = TWINS[cls]
    compared = 0
    for name in ["__init__", *(public(cls) & public(twin))]:
        ours: Any = getattr(twin, name, None)
        theirs: Any = getattr(cls, name, None)
        if not inspect.isfunction(inspect.unwrap(theirs)) and not inspect.ismethod(theirs):
            continue
        compared += 1
        assert {n: p for n, p in names_of(ours).items() if (cls, n) not in ONLY_ASYNC} == {
            n: p for n, p in names_of(theirs).items() if (cls, n) not in ONLY_SYNC
        }, name
    assert compared


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_documentation(cls: type) -> None:
    """Each says what it does, or where that is said."""
    for name in public(TWINS[cls]):
        found = inspect.getattr_static(TWINS[cls], name, None)
        if inspect.isfunction(found) or isinstance(found, property | classmethod):
            assert found.__doc__, name


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_references_in_documentation(cls: type) -> None:
    """Where a twin refers to the original, that is there and documented, under the same name."""
    originals = {original.__name__: original for original in (*TWINS, Batch)}
    for name, found in vars(TWINS[cls]).items():
        for original, attribute in re.findall(
            r"See `(\w+)\.(\w+)`", getattr(found, "__doc__", "") or ""
        ):
            assert attribute == name
            assert inspect.getattr_static(originals[original], attribute).__doc__, name


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_shells(cls: type) -> None:
    """Nothing of the original is to be awaited."""
    for name in public(TWINS[cls]) & public(cls):
        assert not inspect.iscoroutinefunction(inspect.getattr_static(cls, name, None)), name


def test_exports() -> None:
    """Every exported name that waits has a twin."""
    twins = {cls.__name__ for cls in (*TWINS.values(), aio.AsyncBatch)}
    assert set(aio.__all__) == twins
    assert {f"Async{cls.__name__}" for cls in (*TWINS, Batch)} == twins
    exported = {*phonon.__all__, "Batch"}
    assert all(re.sub("^Async", "", name) in exported for name in aio.__all__)
