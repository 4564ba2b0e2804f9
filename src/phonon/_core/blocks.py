"""The ends of ``with`` blocks that a signal handler's exception may leave without their end.

Python looks for signals at the entry of each function, also of ``__exit__``: what a handler raises
there leaves the block, and nothing of ``__exit__`` runs. But the statement holds the callable that
it has looked up as ``__exit__`` until it is left, in any way. So each block gets a callable of
its own, and the block has been left when that is gone.
"""

import functools
from collections.abc import Callable
from typing import Any


class BlockEnd:
    """A method ``__exit__`` or ``__aexit__`` that tells its object which block begins.

    The object's ``_begins`` is called with a callable that lives as long as the block, and its
    result is handed to the method as ``block``. `contextlib.ExitStack` looks the method up in the
    class, and hands it nothing.

    Args:
        method: The method.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]  # it is called like the method

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        if instance is None:
            return self._method
        # A C function calls the method, so no frame, and no traceback, refers to it.
        end = functools.partial(self._method, instance)
        end.keywords["block"] = instance._begins(end)  # noqa: SLF001 - its other half
        return end
