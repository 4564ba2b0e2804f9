"""Calls are freed as soon as they are answered: nothing is left to the garbage collector."""

import gc
from collections.abc import Callable

import pytest

from phonon import ConflictFreeUpdate, LruCache, Process


class _Sums(ConflictFreeUpdate, name="test_garbage_sums"):
    def execute(self) -> None:
        pass


def _lock(process: Process) -> None:
    with process.lock("lock"):
        pass


def _reference(process: Process) -> None:
    process.create_reference("reference").dereference()


def _sessions(process: Process) -> None:
    cache: LruCache[_Sums] = LruCache()
    with process.batch():
        for i in range(100):
            cache.set(i, _Sums(process, i, doc={"n": 1}))
    cache.expire_all()


@pytest.mark.parametrize("use", [_lock, _reference, _sessions])
def test_nothing_is_left_to_the_garbage_collector(
    process: Process, use: Callable[[Process], None]
) -> None:
    use(process)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            use(process)
        assert gc.collect() < 20  # other threads may leave something
    finally:
        gc.enable()
