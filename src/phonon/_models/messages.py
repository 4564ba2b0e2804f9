"""Messages of other libraries' types: dataclasses, msgspec structs, pydantic models, mappings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def mapping_of(message: Any) -> Mapping[str, Any] | None:
    """Return a message's values by name; None if its type is unknown.

    None of these libraries is imported: their instances are recognized by their attributes.
    """
    kind = type(message)
    found = _getters.get(kind)
    if found is None:
        found = _getter(kind)
        if len(_getters) < _MOST_TYPES:
            _getters[kind] = found
    return found(message)


#: The function that returns a message's values, by type.
_getters: dict[type, Callable[[Any], Mapping[str, Any] | None]] = {}
_MOST_TYPES = 1000


def _getter(kind: Any) -> Callable[[Any], Mapping[str, Any] | None]:
    if issubclass(kind, Mapping):
        return dict
    if hasattr(kind, "_record") and hasattr(kind, "on_complete"):  # a model of ours
        return lambda message: message.__dict__.get("_message_")
    if dataclasses.is_dataclass(kind):
        names: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(kind))
    elif hasattr(kind, "__struct_fields__"):  # msgspec.Struct
        names = tuple(kind.__struct_fields__)
    elif isinstance(getattr(kind, "model_fields", None), dict):  # pydantic.BaseModel
        names = tuple(kind.model_fields)
    elif isinstance(getattr(kind, "__attrs_attrs__", None), tuple):
        names = tuple(attribute.name for attribute in kind.__attrs_attrs__)
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):  # typing.NamedTuple
        names = tuple(kind._fields)
    else:
        return lambda _: None
    return lambda message: {name: getattr(message, name) for name in names}
