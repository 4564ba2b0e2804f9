"""Methods for a class whose `state` does nothing but list attributes, as most do.

``return {"count": self.count, "pages": self.pages}`` needs neither a call nor a loop over a dict to
look at the attributes: the methods of an update that do so are written for the class, and compiled.
Unusual values they leave to the general methods that they replace, which raise the error that names
the fault.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from sys import getrefcount
from types import FunctionType
from typing import Any

from phonon._core.copies import CONTAINERS, DEEP, FLAT, MUTABLE, OWNED, PLAIN, copied
from phonon.serializers import SET_HEAD

#: The parts of a function's code that say what it does.
_PARTS = ("co_argcount", "co_varnames", "co_names", "co_consts", "co_code")


def attributes_of(state: Any) -> Sequence[str]:
    """Return the attributes that a `state` method lists; none if it does anything else.

    Its code is compared with what this interpreter makes of a method that only lists them.
    """
    code = state.__code__ if type(state) is FunctionType else None
    if code is None or not code.co_names or not code.co_varnames:
        return ()
    me = code.co_varnames[0]
    listed = ", ".join(f"{name!r}: {me}.{name}" for name in code.co_names)
    doc = "" if state.__doc__ is None else f"{state.__doc__!r}; "
    namespace: dict[str, Any] = {}
    exec(f"def state({me}): {doc}return {{{listed}}}", namespace)  # noqa: S102 - of attributes' names
    same = namespace["state"].__code__
    alike = all(getattr(code, part) == getattr(same, part) for part in _PARTS)
    return code.co_names if alike else ()


@lru_cache(maxsize=256)
def methods_for(names: Sequence[str], general: Any) -> dict[str, Callable[..., Any]]:
    """Return the methods for classes whose `state` lists these attributes.

    Args:
        names: The attributes. If there are none, the general methods are returned.
        general: The class that has the general methods.
    """
    if not names:
        return {name: getattr(general, name) for name in methods_for(("a",), general)}
    lines: list[str] = []
    # The lines about one attribute are repeated for each.
    for repeated, some in groupby(_METHODS.splitlines(), lambda line: "@I" in line):
        block = "\n".join(some)
        for i, name in enumerate(names if repeated else names[:1]):
            lines.append(block.replace("@I", str(i)).replace("@NAME", name))
    source = (
        "\n".join(lines)
        .replace("@VALUES", "".join(f"_{i}, " for i in range(len(names))))
        .replace("@COUNT", str(len(names)))
        .replace("@PAIRS", ", ".join(f"{name!r}: _{i}" for i, name in enumerate(names)))
    )
    namespace = _NAMESPACE | {"_general": general}
    defined: dict[str, Any] = {}
    exec(compile(source, f"<methods for {', '.join(names)}>", "exec"), namespace, defined)  # noqa: S102 - the text below
    return defined


_NAMESPACE: dict[str, Any] = {
    "_CONTAINERS": CONTAINERS,
    "_DEEP": DEEP,
    "_FLAT": FLAT,
    "_MUTABLE": MUTABLE,
    "_OWNED": OWNED,
    "_PLAIN": PLAIN,
    "_SET": SET_HEAD,
    "_copied": copied,
    "_only_plain": PLAIN.issuperset,
    "_new": object.__new__,
    "_refs": getrefcount,
    "_wrong": (AttributeError, StopIteration),
}

_METHODS = """\
def _survey_(_self):
    try:
        _@I = _self.@NAME
        _kind@I = type(_@I)
        if _kind@I not in _PLAIN:
            if _kind@I not in _FLAT or (_kind@I in _MUTABLE and _refs(_@I) > _OWNED):
                return _general._survey_(_self)  # _@I
            for _item@I in _@I:
                if type(_item@I) not in _PLAIN:
                    return _general._survey_(_self)  # _@I
    except _wrong:
        return _general._survey_(_self)
    return 0

def _adopt_(_self, _other):
    try:
        _@I = _other.@NAME
        _self.spec, _self.doc = _other.spec, _other.doc
        _self.@NAME = _@I
    except _wrong:
        _general._adopt_(_self, _other)

def _has_changed_(_self):
    _emptied = _self._emptied_
    if _emptied.__class__ is not tuple:
        return _general._has_changed_(_self)
    if _self.spec is not None or _self.doc:
        return True
    try:
        _@I = _self.@NAME
        if (@VALUES) != _emptied:
            return True
        if _@I and type(_@I) not in _PLAIN:  # a container, which was empty
            return True  # _@I
    except Exception:
        return True
    return False

def _mark_(_self):
    if _self._unsent_:
        return
    if _self.spec is not None or _self.doc:
        _general._mark_(_self)
        return
    try:
        _@I = _self.@NAME
        if type(_@I) not in _PLAIN and (_@I or type(_@I) not in _CONTAINERS):
            return _general._mark_(_self)  # _@I
    except _wrong:
        _general._mark_(_self)
        return
    _self._emptied_ = (@VALUES)

def _content_(_self):
    if _self.spec is not None or _self.doc is not None:
        return _general._content_(_self)
    try:
        _@I = _self.@NAME
        if type(_@I) not in _PLAIN:
            _@I = _copied(_@I)
            if _@I is _DEEP:
                return None  # _@I
    except _wrong:
        return _general._content_(_self)
    return None, None, {@PAIRS}

def _like_(_self, _content):
    if _content.__class__ is not list or len(_content) != 6:
        return None
    _id, _database, _collection, _spec, _doc, _state = _content
    if (
        type(_id) not in _PLAIN
        or type(_id) is not type(_self._id)
        or (_id, _database, _collection) != (_self._id, _self.database, _self.collection)
        or _spec is not None
        or _doc
        or _state.__class__ is not dict
        or len(_state) != @COUNT
    ):
        return None
    _other = _new(_self.__class__)
    _other.spec, _other.doc = None, _doc
    try:
        _@I = _state["@NAME"]
        if type(_@I) not in _PLAIN:
            if type(_@I) is not list:
                return None  # _@I
            _is_set@I = bool(_@I) and _@I[0] is _SET
            if _is_set@I:
                del _@I[0]
            if not _only_plain(map(type, _@I)):
                return None  # _@I
            if _is_set@I:
                _@I = set(_@I)
        _other.@NAME = _@I
    except KeyError:
        return None
    return _other
"""
