"""Detects that this is another process of the operating system, after a fork.

`os.fork` runs the functions that were given to `os.register_at_fork`. A fork in C does not: uWSGI
and other programs that embed Python fork like this. Then two processes would go on under one
identity, with one sequence of numbers and the same connections. So every function that a user
calls checks `SAME` first, which costs about as much as reading an attribute.
"""

import mmap
import os
from collections.abc import Callable
from typing import Protocol

#: The kernel's advice to give a forked child a page of zeros; Python has no name for it.
_WIPE_ON_FORK = 18


class _Mark(Protocol):
    """The first item is true, except in a forked child that has not called `notice` yet."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class _PidMark:
    """Compares process numbers if the kernel cannot wipe pages. Costs a system call each time."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, index: int, /) -> int:
        return self._pid == os.getpid()

    def __setitem__(self, index: int, value: int, /) -> None:
        self._pid = os.getpid()


def _mark() -> _Mark:
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, OSError, ValueError):  # not Linux, or older than 4.14
        return _PidMark()
    return page


_in_child: list[Callable[[], object]] = []
#: ``SAME[0]`` is false in a forked child until `notice` was called.
SAME = _mark()
SAME[0] = 1


def call_in_child(function: Callable[[], object]) -> None:
    """Have a function called in each forked child, before any call of the user's there."""
    _in_child.append(function)


def notice() -> None:
    """Call the hooks of a forked child. A second call does nothing."""
    if SAME[0]:
        return
    for function in _in_child:
        function()
    SAME[0] = 1  # last: after an interrupt before this, the next call does the work


os.register_at_fork(after_in_child=notice)
