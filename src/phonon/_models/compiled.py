"""The code of a model: functions that check a message and fold it into the merged state.

A message costs neither an object nor a call for each of its values: a model's fields are known, so
the function that a person would write for it is written here, once for each model, and compiled.
``Model.source()`` shows it.
"""

import linecache
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from phonon._models.field import Field
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
        }
        for name, field in self.fields.items():
            check = field.check_stamped if field.is_stamped and self._stamp else field.check
            self._namespace[f"_check_{name}"] = self._checker(field, check)
            self._namespace[f"_fold_{name}"] = field.fold
            kind = field.values.exact
            if kind is not None:
                self._namespace[f"_{kind.__name__}"] = kind
        #: Folds a message, given like arguments of the constructor, into a doc: returns its ID.
        self.fold: Callable[..., Any] = self.build("fold", _FOLD, {})

    # Docs: the states of a record's fields, by name

    def merge(self, doc: dict[str, Any], other: dict[str, Any]) -> None:
        """Merge the states of another record, which are used up, into these."""
        fields = self.fields
        for name, state in other.items():
            mine = doc.get(name)
            doc[name] = state if mine is None else fields[name].merge(mine, state)

    def seal(self, doc: dict[str, Any]) -> None:
        """Bring the states into the form in which they are stored."""
        for name, state in doc.items():
            doc[name] = self.fields[name].seal(state)

    def fault_of(self, doc: Any) -> str:
        """Return the fault of a decoded doc; empty if it is one of this model's."""
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
                raise InvalidMessageError(
                    f"{self.model}.{field.name} {error}, not {_shown(value)}",
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
        """Return the error for a message of which nothing is known."""
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
        # The time stamp first: others are given it.
        fields = sorted(self.others, key=lambda field: field.kind != "timestamp")
        for field in fields:
            code = field.check_code(self._stamp)
            if len(code) == 2 and code[0].startswith("if ") and code[0].endswith(":"):  # noqa: PLR2004
                # The usual type is never None: one test less
                lines += [
                    code[0],
                    f"    if {field.name} is not None:",
                    f"    {code[1]}",
                ]
            else:
                lines += [f"if {field.name} is not None:", *(_STEP + line for line in code)]
        return lines

    def fold_lines(self) -> list[str]:
        """Return the lines that fold checked values into ``_doc``."""
        lines: list[str] = []
        # The user's functions first, which may raise: then nothing is merged of the message.
        custom = [field for field in self.others if field.kind == "custom"]
        for field in custom:
            name = field.name
            lines += [
                f"if {name} is not None:",
                f"    {name} = _fold_{name}(_doc.get({name!r}), {name})",
            ]
        for field in custom:
            name = field.name
            lines += [f"if {name} is not None:", f"    _doc[{name!r}] = {name}"]
        for field in self.others:
            if field.kind != "custom":
                lines.append(f"if {field.name} is not None:")
                lines += [_STEP + line for line in field.fold_code()]
        return lines

    def row_lines(self) -> list[str]:
        """Return the lines that take a message's values from the mapping ``_row``."""
        lines = ["_get = _row.get"]
        for field in self.fields.values():
            default = f", {field.default!r}" if field.default is not None else ""
            lines.append(f"{field.name} = _get({field.name!r}{default})")
        return lines

    def source(self, template: str) -> str:
        """Return the source of a function, given its template."""
        blocks = {
            "@CHECKS": self.check_lines(),
            "@FOLDS": self.fold_lines(),
            "@ROW": self.row_lines(),
        }
        lines: list[str] = []
        for line in (
            template.replace("@PARAMETERS", self.parameters())
            .replace("@ID", self.id.name)
            .splitlines()
        ):
            block = blocks.get(line.strip())
            indent = line[: len(line) - len(line.lstrip())]
            lines += [line] if block is None else [indent + inner for inner in block]
        return "\n".join(lines) + "\n"

    def build(self, name: str, template: str, namespace: Mapping[str, Any]) -> Any:
        """Compile a function.

        Args:
            name: Its name.
            template: Its source, with ``@PARAMETERS``, ``@ID`` and lines that stand for blocks.
            namespace: The values of its free names.
        """
        source = self.source(template)
        file = f"<{name} of {self.model}>"
        # So that a traceback shows the line
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        everything = {**self._namespace, **namespace}
        exec(compile(source, file, "exec"), everything)  # noqa: S102 - the fields' own code
        return everything[name]


_FOLD = """\
def fold(_doc, @PARAMETERS, **_unknown):
    if _unknown:
        raise _refuse(_unknown, _unknown)
    @CHECKS
    @FOLDS
    return @ID
"""


def _shown(value: Any) -> str:
    text = repr(value)
    shortened = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{shortened} ({type(value).__name__})"


#: As much of a value as a message shows.
_LONGEST = 100
