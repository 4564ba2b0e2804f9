"""The code of a model: functions that check a message and fold it into the merged state.

A message costs neither an object nor a call for each of its values: a model's fields are known, so
the function that a person would write for it is written here, once for each model, and compiled.
``Model.source()`` shows it.
"""

import itertools
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from phonon._core.local import EMPTY
from phonon._models.field import Field
from phonon._models.messages import mapping_of
from phonon._models.packing import Packing
from phonon.errors import ConfigurationError, InvalidMessageError

#: One level of indentation.
_STEP = "    "


class Compiled:
    """The compiled code of a model, and the parts of its fields that the code uses.

    Args:
        model: The model's qualified name, for messages.
        fields: Its fields by name, the ID first.

    Attributes:
        model: The same.
        fields: The same.
        id: The ID.
    """

    def __init__(self, model: str, fields: Mapping[str, Field[Any, Any]]) -> None:
        self.model = model
        self.fields = dict(fields)
        self.id, *self.others = self.fields.values()
        stamps = [field.name for field in self.others if field.kind == "timestamp"]
        if len(stamps) > 1:
            raise ConfigurationError(
                f"{model} has two time stamps, {' and '.join(stamps)}: make one of them a Max"
            )
        self._stamp = stamps[0] if stamps else None
        self._namespace: dict[str, Any] = {
            "_type": type,
            "_refuse": self.unknown,
            "_missing": self.missing,
            "_no_mapping": self.no_mapping,
            "_int": int,
            "_float": float,
            "_list": list,
            "_dict": dict,
            "_NOTHING": {},
            "_len": len,
            "_zip": zip,
            "_EMPTY": EMPTY,
            "_names": frozenset(self.fields),
            # Far apart: each fold adds 1 to a record's version.
            "_next_version": itertools.count(0, 2**40).__next__,
        }
        for name, field in self.fields.items():
            check = field.check_stamped if field.is_stamped and self._stamp else field.check
            self._namespace[f"_check_{name}"] = self._checker(field, check)
            # Methods that the fields' lines call
            for function in ("fold", "sums", "better", "changed", "tidy"):
                if hasattr(field, function):
                    self._namespace[f"_{function}_{name}"] = getattr(field, function)
            kind = field.values.exact
            if kind is not None:
                self._namespace[f"_{kind.__name__}"] = kind
        self.slots = (*(field.slot for field in self.others), "version_")
        self._folds = {field: field.fold_code() for field in self.others}
        self._sealed = [field.name for field in self.others if field.seals]
        self._names = frozenset(field.name for field in self.others)
        self._has_versions = any(code.prepare or code.most for code in self._folds.values())
        self._states: Any = type("_States", (), {"__slots__": self.slots})
        self._column_folds: dict[tuple[str, ...], Any] = {}
        self._fold = self.build("fold", FOLD)
        #: Returns whether a record has a state.
        self.has_states: Callable[[Any], bool] = self.build("has_states", _HAS)
        #: Returns the doc of a record.
        self.doc_of: Callable[[Any], dict[str, Any]] = self.build("doc_of", _DOC)
        #: Gives a record the states of a doc.
        self.fill: Callable[[Any, Mapping[str, Any]], None] = self.build("fill", _FILL)
        #: Stores records, and reads stored ones.
        self.packing = Packing(self)

    # Docs: the states of a record's fields, by name

    def fold(self, doc: dict[str, Any], *values: Any, **named: Any) -> Any:
        """Fold a message, given like arguments of the constructor, into a doc. Return its ID."""
        states = self._states()
        self.fill(states, doc)
        identifier = self._fold(*values, _record=states, **named)
        doc.update(self.doc_of(states))
        return identifier

    def merge(self, doc: dict[str, Any], other: dict[str, Any]) -> None:
        """Merge the states of another record, which are used up, into these."""
        fields = self.fields
        for name, state in other.items():
            own = doc.get(name)
            doc[name] = state if own is None else fields[name].merge(own, state)

    def knows(self, doc: Any) -> bool:
        """Return whether a decoded value is a doc with this model's fields, of any content."""
        return type(doc) is dict and doc.keys() <= self._names

    def seal(self, doc: dict[str, Any]) -> None:
        """Bring the states into the form in which they are stored."""
        for name in self._sealed:
            if name in doc:
                doc[name] = self.fields[name].seal(doc[name])

    def fault_of(self, doc: Any) -> str:
        """Return the fault of a decoded doc; empty if it is valid."""
        if type(doc) is not dict:
            return "its fields are no dict"
        for name, state in doc.items():
            field = self.fields.get(name)
            if field is None or field is self.id:
                return (
                    f"{self.model} has no field {name!r} here: it is of another release; a class "
                    "whose fields change has another version="
                )
            if not field.is_state(state):
                return f"its field {name!r} does not hold the state of a {type(field).__name__}"
        return ""

    # Messages

    def _checker(self, field: Field[Any, Any], check: Callable[..., Any]) -> Callable[..., Any]:
        def checked(value: Any, *stamp: Any) -> Any:
            try:
                return check(value, *stamp)
            except (TypeError, ValueError, OverflowError) as error:
                hint = ""
                if field is self.id and mapping_of(value) is not None:
                    hint = "; add_many() takes whole messages, add() takes their values"
                raise InvalidMessageError(
                    f"{self.model}.{field.name} {error}, not {_shown(value)}{hint}",
                    self.model,
                    field.name,
                    value,
                ) from None

        return checked

    def unknown(self, names: Iterable[str], values: Mapping[str, Any]) -> InvalidMessageError:
        """Return the error for fields that the model does not have."""
        name = next(iter(names))
        known = ", ".join(self.fields)
        return InvalidMessageError(
            f"{self.model} has no field {name!r} (the message has {_shown(values.get(name))}): "
            f"its fields are {known}",
            self.model,
            name,
            values.get(name),
        )

    def missing(self) -> InvalidMessageError:
        """Return the error for a message without an ID."""
        name = self.id.name
        return InvalidMessageError(
            f"{self.model}.{name} is the ID, and a message has none: give {name}=...",
            self.model,
            name,
            None,
        )

    def no_mapping(self, row: Any) -> InvalidMessageError:
        """Return the error for a message of an unknown type."""
        return InvalidMessageError(
            f"{self.model} takes messages that are dicts, dataclasses, msgspec structs or pydantic "
            f"models, not {_shown(row)}",
            self.model,
            "",
            row,
        )

    # Code

    def parameters(self) -> str:
        """Return the parameters of functions that take a message's values."""
        others = [f"{field.name}={field.default!r}" for field in self.others]
        return ", ".join([f"{self.id.name}=None", *others])

    def check_lines(self) -> list[str]:
        """Return the lines that check a message's values. None stands for no value."""
        name = self.id.name
        exact = self.id.values.exact
        condition = f"_type({name}) is not _{exact.__name__}" if exact is not None else "True"
        lines = [
            f"if {condition}:",
            f"    if {name} is None:",
            "        raise _missing()",
            f"    {name} = _check_{name}({name})",
        ]
        # The time stamp first: the checks of other fields use it.
        fields = sorted(self.others, key=lambda field: field.kind != "timestamp")
        for field in fields:
            code = field.check_code(self._stamp)
            if len(code) == 2 and code[0].startswith("if ") and code[0].endswith(":"):  # noqa: PLR2004
                # A value of the usual type is not None: this saves a test
                lines += [
                    code[0],
                    f"    if {field.name} is not None:",
                    f"    {code[1]}",
                ]
            else:
                lines += [f"if {field.name} is not None:", *(_STEP + line for line in code)]
        return lines

    def usual(self) -> str:
        """Return the condition that no value needs a check; empty if some always do."""
        if not self.others:
            return ""
        conditions: list[str] = []
        for field in self.fields.values():
            line, *more = field.check_code(self._stamp)
            if not more or not all(other.startswith(_STEP) for other in more):
                return ""
            conditions.append(line[3:-1].replace(" is not ", " is ").replace(" != ", " == "))
        return " and ".join(conditions)

    def before_lines(self) -> list[str]:
        """Return the lines that examine checked values before they are folded."""
        return [line for code in self._folds.values() for line in code.before]

    def prepare_lines(self) -> list[str]:
        """Return the lines that prepare the folding of checked values into ``_record``."""
        lines: list[str] = []
        for field, code in self._folds.items():
            if code.prepare:
                lines.append(f"if {field.name} is not None:")
                lines += [_STEP + line for line in code.prepare]
        if not lines:
            return lines
        stale = ["if _record.version_ != _version:", "    continue"]
        return ["_version = _record.version_", *lines, *stale]

    def commit_lines(self) -> list[str]:
        """Return the lines that fold checked values into ``_record``, all at once."""
        lines: list[str] = []
        for field, code in self._folds.items():
            lines.append(f"if {field.name} is not None:")
            lines += [_STEP + line for line in code.commit]
        if self._has_versions:
            lines.append("_record.version_ += 1")
        return lines

    def _unless_usual(self, lines: list[str]) -> list[str]:
        usual = self.usual()
        if not usual:
            return lines
        return [f"_usual = {usual}", "if not _usual:", *(_STEP + line for line in lines)]

    def fold_lines(self) -> list[str]:
        """Return `commit_lines`, after shorter ones for a message that needed no check."""
        if not self.usual():
            return self.commit_lines()
        lines = ["if _usual:"]
        for code in self._folds.values():
            lines += [_STEP + line for line in code.usual or code.commit]
        if self._has_versions:
            lines.append(f"{_STEP}_record.version_ += 1")
        return [*lines, "else:", *(_STEP + line for line in self.commit_lines())]

    def tidy_lines(self) -> list[str]:
        """Return the lines that shorten states which have become long."""
        lines: list[str] = []
        for field, code in self._folds.items():
            if code.most:
                name, state = field.name, f"_record.{field.slot}"
                lines += [
                    f"if {name} is not None and {state}.__class__ is not _int:",
                    "    _version = _record.version_",
                    f"    _new_{name} = {state}",
                    f"    if _len(_new_{name}) > {code.most}:",
                    f"        _new_{name} = _tidy_{name}(_new_{name})",
                    "        if _record.version_ == _version:",
                    f"            {state} = _new_{name}",
                ]
        return lines

    def move_lines(self) -> list[str]:
        """Return the lines that move the states of ``_record`` into a doc."""
        lines: list[str] = []
        for field in self.others:
            state = f"_record.{field.slot}"
            lines += [
                f"if {state} is not None:",
                f"    _doc[{field.name!r}] = {state}",
                f"    {state} = None",
            ]
        return lines

    def fill_lines(self) -> list[str]:
        """Return the lines that give ``_record`` the states of ``_doc``, all at once."""
        names = [field.name for field in self.others]
        return [
            *(f"_new_{name} = _get({name!r})" for name in names),
            "_record.version_ = _next_version()",
            *(f"_record.{field.slot} = _new_{field.name}" for field in self.others),
        ]

    def fold_columns(
        self, columns: Mapping[str, Sequence[Any]], records: Mapping[Any, Any]
    ) -> None:
        """Fold the rows of columns into their records, unless a record has its row already.

        Args:
            columns: The values by field, with the IDs.
            records: The records by ID. A record without an ``pending_`` has its row already.
        """
        names = tuple(columns)
        fold_columns = self._column_folds.get(names)
        if fold_columns is None:
            absent = [field.name for field in self.others if field.name not in columns]
            template = _FOLD_COLUMNS.replace("@NAMES", f"({', '.join(names)},)").replace(
                "@ABSENT", " = ".join([*absent, "None"])
            )
            fold_columns = self._column_folds[names] = self.build("fold_columns", template)
        fold_columns(columns.values(), records)

    def row_lines(self) -> list[str]:
        """Return the lines that take a message's values from the mapping ``_row``."""
        lines = [f"_known = _len(_row) == {len(self.fields)}", "if _known:", "    try:"]
        lines += [f"        {name} = _row[{name!r}]" for name in self.fields]
        lines += [
            "    except _KeyError:",
            "        _known = False",
            "if not _known:",
            "    if not (_ignore_unknown or _row.keys() <= _names):",
            "        raise _refuse(_row.keys() - _names, _row)",
            "    _get = _row.get",
        ]
        for field in self.fields.values():
            default = f", {field.default!r}" if field.default is not None else ""
            lines.append(f"    {field.name} = _get({field.name!r}{default})")
        return lines

    def source(
        self, template: str, more: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> str:
        """Return the source of a function, given its template, and blocks of its own."""
        blocks: dict[str, Sequence[str]] = {
            **more,
            "@CHECKS": self._unless_usual([*self.check_lines(), *self.before_lines()]),
            "@FOLD": self.fold_lines(),
            "@BEFORE": self.before_lines(),
            "@PREPARE": self.prepare_lines(),
            "@COMMIT": self.commit_lines(),
            "@TIDY": self.tidy_lines(),
            "@ROW": self.row_lines(),
            "@MOVE": self.move_lines(),
            "@READ": [line for line in self.move_lines() if not line.endswith("= None")],
            "@FILL": self.fill_lines(),
        }
        lines: list[str] = []
        for line in (
            template.replace("@PARAMETERS", self.parameters())
            .replace("@IDLE", _IDLE)
            .replace(
                "@EMPTY",
                " and ".join(["True", *(f"_record.{f.slot} is None" for f in self.others)]),
            )
            .replace("@ID", self.id.name)
            .splitlines()
        ):
            block = blocks.get(line.strip())
            indent = line[: len(line) - len(line.lstrip())]
            lines += [line] if block is None else [indent + inner for inner in block]
        return "\n".join(lines) + "\n"

    def build(
        self,
        name: str,
        template: str,
        namespace: Mapping[str, Any] = MappingProxyType({}),
        blocks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Any:
        """Compile a function.

        Args:
            name: Its name.
            template: Its source, with ``@PARAMETERS``, ``@ID`` and lines that stand for blocks.
            namespace: The values of its free names.
            blocks: The lines that marks of its own stand for.
        """
        source = self.source(template, blocks)
        file = f"<{name} of {self.model}>"
        # For tracebacks, which then show the line
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        everything = {**self._namespace, **namespace}
        exec(compile(source, file, "exec"), everything)  # noqa: S102 - the fields' own code
        return everything[name]


#: Whether nothing is unsent of a record that no batch stores, and one is open that does.
_IDLE = (
    "_record._batch_ is None and _target is not None and not _record._unsent_ "
    "and _record._emptied_ == _EMPTY and _record.pending_ is None and @EMPTY"
)

FOLD = """\
def fold(@PARAMETERS, *, _record, **_unknown):
    if _unknown:
        raise _refuse(_unknown, _unknown)
    @CHECKS
    while True:
        @PREPARE
        break
    @FOLD
    @TIDY
    return @ID
"""

_FOLD_COLUMNS = """\
def fold_columns(_columns, _records):
    @ABSENT
    for @NAMES in _zip(*_columns):
        _record = _records.get(@ID)
        if _record is None or _record.pending_ is None:
            continue
        @BEFORE
        while True:
            @PREPARE
            break
        @COMMIT
        _record.pending_ = None
        @TIDY
"""

_DOC = """\
def doc_of(_record):
    _doc = {}
    @READ
    return _doc
"""

_HAS = """\
def has_states(_record):
    return not (@EMPTY)
"""

_FILL = """\
def fill(_record, _doc):
    _get = _doc.get
    @FILL
"""


def _shown(value: Any) -> str:
    text = repr(value)
    shortened = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{shortened} ({type(value).__name__})"


#: Characters of a value that an error shows.
_LONGEST = 100
