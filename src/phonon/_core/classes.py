"""The classes of updates, and the names under which the server knows them."""

import gc
import sys
import warnings
import weakref
from collections.abc import Sequence
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any

from phonon.errors import ConfigurationError, UnstableNameWarning

#: Classes by name and by former names. The references are strong, because a class without others
#: may still have data on the server.
_classes: dict[str, type[Any]] = {}
#: The names under which classes store data, even if the name now finds another class.
_names: "weakref.WeakKeyDictionary[type[Any], str]" = weakref.WeakKeyDictionary()
#: Separates a name from a version. Data of an unknown version is left to processes that know it,
#: like the data of an unknown class.
_VERSION = "@"


def register(
    cls: type[Any], name: str | None = None, aliases: Sequence[str] = (), version: int = 1
) -> None:
    """Register a class by its name, so that its batches can be executed here.

    Args:
        cls: The class.
        name: Its name on the server. None: its qualified name.
        aliases: Former names, under which there may still be data.
        version: The version of its stored data. Data of earlier versions is upgraded.

    Raises:
        ConfigurationError: Another class that is still in use has that name, or an argument is
            invalid.
    """
    if name is None:
        name = f"{_module_of(cls)}.{cls.__qualname__}"
        if name.startswith("__main__.") and cls.__module__ == "__main__":  # once, not in children
            _warn_of_main(cls)
    else:
        _check_name(cls, "name", name)
    if isinstance(aliases, str) or not isinstance(aliases, Sequence):
        raise ConfigurationError(f"aliases is a list of names, not {aliases!r}: put it in brackets")
    for alias in aliases:
        _check_name(cls, "aliases", alias)
    if type(version) is not int or version < 1:
        raise ConfigurationError(f"version is a number from 1 on, not {version!r}")
    names = (name, *aliases)
    for each in names:
        known = _classes.get(each)
        if known is not None and known is not cls and not _is_redefinition(known, cls):
            del known
            _drop_if_unused(each, cls)
    for each in names:
        _classes[each] = cls
    _names[cls] = name if version == 1 else f"{name}{_VERSION}{version}"
    cls._version_ = version
    cls._headers_ = {}


def _check_name(cls: type[Any], argument: str, name: Any) -> None:
    if not isinstance(name, str) or not name or _VERSION in name:
        raise ConfigurationError(
            f"{argument} says under which name {cls.__qualname__} is known on the server, a str, "
            f"not {name!r}, and has no {_VERSION} in it: write "
            f'class {cls.__name__}(..., name="{cls.__name__.lower()}")'
        )


def _warn_of_main(cls: type[Any]) -> None:
    """Warn of a class whose data no other program can execute."""
    lowered = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
    warnings.warn(
        f"{cls.__qualname__} is defined in the script that is run, so that no other program can "
        "execute its data, nor this one once the class is imported: give it a name that lasts: "
        f'class {cls.__name__}(..., name="{lowered}")',
        UnstableNameWarning,
        stacklevel=_stack_level(),
    )


def _stack_level() -> int:
    """Return the stack level of the class statement, for a warning."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - there is no other way to find it
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "phonon"
    ):
        level, frame = level + 1, frame.f_back
    return level


def forget(cls: type[Any]) -> None:
    """Forget a class, as if it had not been imported here."""
    for name in [name for name, known in _classes.items() if known is cls]:
        del _classes[name]


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
    """Return whether a class replaces the known one: its module or notebook cell ran again.

    A class statement inside a function makes another class with each call.
    """
    return (
        known.__qualname__ == cls.__qualname__
        and _module_of(known) == _module_of(cls)
        and "<locals>" not in cls.__qualname__
    )


def _drop_if_unused(name: str, cls: type[Any]) -> None:
    """Free the name of a class for another one, if nothing refers to the class any more.

    Raises:
        ConfigurationError: The class is in use: each class would execute the other's batches.
    """
    known = weakref.ref(_classes[name])
    names = [each for each, its in _classes.items() if its is known()]
    for each in names:
        del _classes[each]
    if known() is not None:
        gc.collect()  # classes are in reference cycles
    alive = known()
    if alive is None:
        return
    _classes.update(dict.fromkeys(names, alive))
    raise ConfigurationError(
        f"two classes are called {name!r}, so that each would execute the other's batches: "
        f"give them names of their own, the same in all processes: "
        f'class {cls.__name__}(..., name="{cls.__name__.lower()}-1")'
    )


#: Methods that a subclass may override, and that Phonon calls.
_OVERRIDDEN = (
    "merge",
    "state",
    "reset_states",
    "clear",
    "is_expired",
    "refresh",
    "execute",
    "execute_many",
)


def check_methods(cls: type[Any], *, is_async: bool) -> None:
    """Refuse methods that would never run, when their class is defined.

    Raises:
        TypeError: A method has a ``yield`` in it, or is a coroutine function that nothing awaits,
            as ``merge`` and ``state`` always are, and ``execute`` in a class without an event loop.
    """
    for name in _OVERRIDDEN:
        if not iscoroutinefunction(no_generator(cls, name)):
            continue
        where = f"{cls.__qualname__}.{name}"
        if name not in {"execute", "execute_many"}:
            raise TypeError(f"{where} is a coroutine function, and nothing awaits it: use def")
        if not is_async:
            raise TypeError(
                f"{where} is a coroutine function, and a process without an event loop never runs "
                "it: use phonon.aio, with AsyncProcess and AsyncUpdate"
            )


def no_generator(cls: type[Any], name: str) -> Any:
    """Return the function behind a method, or None; a mixin may define it.

    Raises:
        TypeError: The method has a ``yield`` in it.
    """
    method = getattr(cls, name, None)
    function = getattr(method, "__func__", method)
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise TypeError(
            f"{cls.__qualname__}.{name} has a yield in it, so calling it runs nothing: remove it"
        )
    return function


def find(name: str) -> type[Any] | None:
    """Return the class of that name, if it is imported here and knows that version."""
    found = resolve(name)
    return None if found is None else found[0]


def resolve(name: str) -> tuple[type[Any], int] | None:
    """Return the class that data under a name belongs to, and the version that has stored it."""
    cls, version = _classes.get(name), 1
    if cls is None:
        base, _, number = name.rpartition(_VERSION)
        if not number.isdecimal() or len(number) > _MOST_DIGITS:
            return None
        cls, version = _classes.get(base), int(number)
    if cls is None or version > cls._version_:
        return None
    return cls, version


#: The longest version number: a forged one may be of any length.
_MOST_DIGITS = 9


def known_name(cls: type[Any]) -> str:
    """Return the server's name of a class; its qualified name if it has none."""
    return _names.get(cls) or cls.__qualname__


def names() -> list[str]:
    """Return the names of all classes that are imported here."""
    return list(_classes)
