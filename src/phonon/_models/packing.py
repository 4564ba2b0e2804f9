"""Compiles the code that stores a model's records, and reads stored ones.

What it writes is, byte for byte, what the serializer writes, and what it reads is checked as if it
had been decoded alone. Anything unusual it leaves to the serializer and the codec, which raise the
error that names the fault.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from phonon._models.field import Field
from phonon.serializers import KEPT, SET_HEAD, ExactSerializer, loads_plain

if TYPE_CHECKING:
    from phonon._models.compiled import Compiled

#: Types that MessagePack writes as they are.
_ATOMS = frozenset({int, str, bool})
#: The number of parts of a content.
_LENGTH = 6
_EMPTY_DICT = 0x80

#: The values of which a kind of field's state is made, if it is made of nothing else.
_STATES = {
    "id": "atoms",
    "sum": "numbers",
    "diff": "numbers",
    "count": "always",
    "mean": "numbers",
    "min": "atoms or floats",
    "max": "atoms or floats",
    "timestamp": "atoms or floats",
    "any_of": "always",
    "all_of": "always",
    "counter": "atoms",
    "list_append": "atoms",
    "set_append": "atoms",
}
#: The operators that merge one state into another, where that takes no call.
_ADDED, _ORDERED = frozenset({"sum", "diff", "count"}), {"min": "<", "max": ">", "timestamp": ">"}


class Packing:
    """The code that stores a model's records, and reads stored ones.

    Args:
        compiled: The model's code.

    Attributes:
        is_plain: Whether its states are of types that MessagePack has, or sets of them.
    """

    def __init__(self, compiled: "Compiled") -> None:
        self._compiled = compiled
        self.is_plain = all(map(_is_plain, compiled.fields.values()))
        self._merge: Any = None
        sets = [field.name for field in compiled.others if field.kind == "set_append"]
        blocks = {
            "@SEAL": [
                f"if {field.name!r} in _doc: "
                f"_doc[{field.name!r}] = _seal_{field.name}(_doc[{field.name!r}])"
                for field in compiled.others
                if field.seals
            ],
            # The states stay as they are: the caller may need them.
            "@SPELL": [
                f"if {name!r} in _doc: _spelled = _spelled | {{{name!r}: [_SET, *_doc[{name!r}]]}}"
                for name in sets
            ],
        }
        namespace = {f"_seal_{field.name}": field.seal for field in compiled.others} | {
            "_pack": _packer(), "_packer": _packer, "_SET": SET_HEAD, "_Exact": ExactSerializer,
            "_globals": globals, "_wrong": (TypeError, ValueError, OverflowError), "_kept": KEPT,
        }  # fmt: skip
        #: Moves the states of a record into its ``moved_``. Returns their stored form, or None if
        #: only the serializer can produce it.
        self.take: Callable[[Any, Any], bytes | None] = compiled.build(
            "take", _TAKE + _WRITE * self.is_plain + "    return None\n", namespace, blocks
        )

    def merge(
        self, bodies: Sequence[bytes], serializer: ExactSerializer
    ) -> tuple[Any, str, str, dict[str, Any]] | None:
        """Merge contents of one record, which are alike but for the states.

        Args:
            bodies: The contents, as the serializer has written them.
            serializer: The serializer.

        Returns:
            ID, database, collection and states; None if anything about the contents is unusual.

        Raises:
            Exception: Something cannot be read.
        """
        content = serializer.loads(bodies[0])
        if type(content) is not list or len(content) != _LENGTH:
            return None
        identifier, database, collection, *_ = content
        if type(database) is not str or type(collection) is not str:
            return None
        if not self._compiled.id.is_state(identifier):
            return None
        # An array of six, the last of them an empty dict
        begin = b"\x96" + b"".join(map(_packer(), (identifier, database, collection, None)))
        at = len(begin)
        docs = [b[at:-1] for b in bodies if b[-1] == _EMPTY_DICT and b.startswith(begin)]
        if len(docs) < len(bodies):
            return None
        loads: Callable[[bytes], Any] = loads_plain if self.is_plain else serializer.loads
        if self._merge is None:
            self._merge = self._merger()
        states = self._merge(map(loads, docs))
        return None if states is None else (identifier, database, collection, states)

    def _merger(self) -> Any:
        fields = self._compiled.others
        lines: list[str] = []
        for field in fields:
            name = field.name
            lines += [f"{name} = _get({name!r})", f"if {name} is not None:", "    _left -= 1"]
            lines += [f"    {line}" for line in self._check_lines(field)]
            lines += [f"    if _new_{name} is None:", f"        _new_{name} = {name}", "    else:"]
            lines += [f"        {line}" for line in self._merge_lines(field)]
        blocks = {
            "@ABSENT": [f"_new_{field.name} = None" for field in fields],
            "@MERGE": lines,
            # Their elements are those of several sets, and looked at together.
            "@SETS": [
                line
                for field in fields
                if self._is_spelled(field)
                for line in (
                    f"if _new_{field.name} is not None:",
                    f"    if not _only_{field.name}(_map(_type, _new_{field.name})): return None",
                    f"    _new_{field.name} = _set(_new_{field.name})",
                )
            ],
            "@DOC": [
                f"if _new_{field.name} is not None: _doc[{field.name!r}] = _new_{field.name}"
                for field in fields
            ],
        }
        namespace: dict[str, Any] = {
            "_bool": bool, "_str": str, "_set": set, "_map": map, "_SET": SET_HEAD
        }  # fmt: skip
        for field in fields:
            namespace[f"_is_state_{field.name}"] = field.is_state
            namespace[f"_merge_{field.name}"] = field.merge
            namespace[f"_only_{field.name}"] = {field.values.exact}.issuperset
        return self._compiled.build("merge", _MERGE, namespace, blocks)

    def _is_spelled(self, field: Field[Any, Any]) -> bool:
        """Return whether a decoded state is a list that begins with the head of a set."""
        return self.is_plain and field.kind == "set_append"

    def _check_lines(self, field: Field[Any, Any]) -> list[str]:
        """Return the lines that give up if a decoded variable is no state of a field."""
        name, exact = field.name, field.values.exact
        if self._is_spelled(field):
            return [
                f"if {name}.__class__ is not _list: return None",
                f"if not {name} or {name}[0] is not _SET: return None",
                f"del {name}[0]",
            ]
        if exact in _ATOMS and field.kind in {"sum", "diff", *_ORDERED}:
            return [f"if {name}.__class__ is not _{exact.__name__}: return None"]
        return [f"if not _is_state_{name}({name}): return None"]

    def _merge_lines(self, field: Field[Any, Any]) -> list[str]:
        """Return the lines that merge a state into the present one."""
        name, new = field.name, f"_new_{field.name}"
        if self._is_spelled(field) or (field.kind in _ADDED and field.values.exact is int):
            return [f"{new} += {name}"]
        if field.kind in _ORDERED and field.values.exact in _ATOMS:
            return [f"if {name} {_ORDERED[field.kind]} {new}: {new} = {name}"]
        return [f"{new} = _merge_{name}({new}, {name})"]


def _packer() -> Callable[[Any], bytes]:
    # One C call that runs no Python, so that nothing comes in the middle and finds it half used
    pack: Callable[[Any], bytes] = msgpack.Packer(strict_types=True).pack
    return pack


def _is_plain(field: Field[Any, Any]) -> bool:
    """Return whether a field's state needs no spelling of the serializer's, apart from sets."""
    made_of, values = _STATES.get(field.kind), field.values
    numbers = values.annotation in {int, float} or values.annotation == int | float
    return (
        made_of == "always"
        or (made_of == "numbers" and numbers)
        or (made_of is not None and "atoms" in made_of and values.exact in _ATOMS)
        or (made_of == "atoms or floats" and values.annotation is float)
    )


_TAKE = """\
def take(_record, _serializer):
    _doc = {}
    _record.moved_ += (_doc,)
    @MOVE
    _record.version_ += 1
    _record._unsent_ = False
    _record._emptied_ = _EMPTY
    # Until here no handler comes in between.
    @SEAL
"""

_WRITE = """\
    if _serializer.__class__ is _Exact:
        _spelled = _doc
        @SPELL
        try:
            _content = _pack(
                [_record._id, _record.database, _record.collection, None, _spelled, _NOTHING]
            )
        except _wrong:
            return None
        if _len(_content) > _kept:
            _globals()["_pack"] = _packer()
        return _content
"""

_MERGE = """\
def merge(_docs):
    @ABSENT
    for _doc in _docs:
        if _doc.__class__ is not _dict:
            return None
        _left, _get = _len(_doc), _doc.get
        @MERGE
        if _left:
            return None
    _doc = {}
    @SETS
    @DOC
    return _doc
"""
