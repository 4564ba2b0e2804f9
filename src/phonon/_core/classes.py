"""The classes of updates, and the names under which the server knows them."""

import gc
import sys
import weakref
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any

from phonon.errors import ConfigurationError

#: Strong references: a class that nobody else refers to may still have data on the server.
_classes: dict[str, type[Any]] = {}
#: Names of classes, also of those that are not found under them any more.
_names: "weakref.WeakKeyDictionary[type[Any], str]" = weakref.WeakKeyDictionary()


def register(cls: type[Any], name: str | None = None) -> None:
    """Make a class known by its name, so that its batches can be executed here.

    Args:
        cls: The class.
        name: Its name on the server. None: its qualified name.

    Raises:
        ConfigurationError: Another class has that name, and is still in use.
    """
    given = name
    if given is None:
        name = f"{_module_of(cls)}.{cls.__qualname__}"
    elif not isinstance(given, str) or not given:
        raise ConfigurationError(
            f"name is the name under which {cls.__qualname__} is known on the server, a str, not "
            f'{given!r}: write class {cls.__name__}(..., name="{cls.__name__.lower()}")'
        )
    assert name is not None  # noqa: S101 - for the type checker
    known = _classes.get(name)
    if known is not None and known is not cls and not _is_redefinition(known, cls):
        del known
        _drop_if_unused(name, cls)
    _classes[name] = cls
    _names[cls] = name
    cls._headers_ = {}


def forget(cls: type[Any]) -> None:
    """Forget a class, as if it had not been imported here."""
    _classes.pop(name_of(cls), None)


def name_of(cls: type[Any]) -> str:
    """Return the name under which the server knows a class."""
    return _names[cls]


def _module_of(cls: type[Any]) -> str:
    """Return the name of a class's module, the same in all processes of a program.

    The script that was run is ``__main__``, or ``__mp_main__`` in a child of `multiprocessing`; a
    module that was run with ``-m`` has its own name beside that.
    """
    module = cls.__module__
    if module not in {"__main__", "__mp_main__"}:
        return module
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return spec.name if spec is not None else "__main__"


def _is_redefinition(known: type[Any], cls: type[Any]) -> bool:
    """Return whether a class is the same one, defined again: a module or a notebook cell runs anew.

    Inside a function each call makes another class, which may do something else.
    """
    return (
        known.__qualname__ == cls.__qualname__
        and _module_of(known) == _module_of(cls)
        and "<locals>" not in cls.__qualname__
    )


def _drop_if_unused(name: str, cls: type[Any]) -> None:
    """Let a class's name go to another one, if nothing refers to it any more.

    Raises:
        ConfigurationError: Something does: batches of one would be executed by the other.
    """
    known = weakref.ref(_classes.pop(name))
    if known() is not None:
        gc.collect()  # classes are in reference cycles
    alive = known()
    if alive is None:
        return
    _classes[name] = alive
    raise ConfigurationError(
        f"two classes are called {name!r}, so that each would execute the other's batches: "
        f"give them names of their own, the same in all processes: "
        f'class {cls.__name__}(..., name="{cls.__name__.lower()}-1")'
    )


def check_methods(cls: type[Any], *, is_async: bool) -> None:
    """Refuse methods that would never run, where their class is defined.

    Raises:
        TypeError: A method has a ``yield`` in it, or is a coroutine function that nothing awaits,
            as ``merge`` and ``state`` always are, and ``execute`` in a class without an event loop.
    """
    for name in ("merge", "state", "reset_states", "clear", "execute", "execute_many"):
        method = cls.__dict__.get(name)
        function = getattr(method, "__func__", method)
        where = f"{cls.__qualname__}.{name}"
        if isgeneratorfunction(function) or isasyncgenfunction(function):
            raise TypeError(f"{where} has a yield in it, so calling it runs nothing: remove it")
        if not iscoroutinefunction(function):
            continue
        if name not in {"execute", "execute_many"}:
            raise TypeError(f"{where} is a coroutine function, and nothing awaits it: use def")
        if not is_async:
            raise TypeError(
                f"{where} is a coroutine function, and a process without an event loop never runs "
                "it: use phonon.aio, with AsyncProcess and AsyncUpdate"
            )


def find(name: str) -> type[Any] | None:
    """Return the class of that name, if it is imported here."""
    return _classes.get(name)


def names() -> list[str]:
    """Return the names of all classes that are imported here."""
    return list(_classes)
