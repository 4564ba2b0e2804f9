"""Tables: rows that are grouped and reduced column-wise before they are merged, one merge a key."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from phonon._models.compiled import Compiled
from phonon._models.field import Field
from phonon.errors import ConfigurationError, InvalidMessageError

#: No sum of so many numbers of that size leaves 64 bits, in which polars adds up.
_MOST_SUM = 2**63


class Reduced(NamedTuple):
    """A table, reduced to one row a key.

    Attributes:
        columns: The values by field: the IDs first, then the folded values of each other field.
        rejected: The rows that the model does not take, by number, and why.
        rows: All rows as dicts, where a table cannot be reduced; the others are empty then.
        taken: How many rows the columns come of.
    """

    columns: dict[str, list[Any]]
    rejected: list[tuple[int, InvalidMessageError]]
    rows: list[dict[str, Any]] | None = None
    taken: int = 0


def reduce(table: Any, compiled: Compiled, *, ignore_unknown: bool) -> Reduced:
    """Group a table by the ID, and reduce each column as its field merges.

    Args:
        table: A polars or pandas frame, an Arrow table or record batch, or anything else with the
            Arrow PyCapsule interface.
        compiled: The model's code.
        ignore_unknown: Whether columns that the model does not have are passed over.

    Raises:
        ConfigurationError: polars is not installed, or this is no table.
        InvalidMessageError: There is no column for the ID, or one that the model does not have.
    """
    polars = _polars()
    frame = _frame(table, polars)
    identifier = compiled.id
    unknown = [name for name in frame.columns if name not in compiled.fields]
    if unknown and not ignore_unknown:
        raise compiled.unknown(unknown, {})
    if identifier.name not in frame.columns:
        raise compiled.missing()
    frame = frame.drop(unknown)
    fields = [compiled.fields[name] for name in frame.columns if name != identifier.name]
    counts = [field for field in compiled.others if field.kind == "count" and field not in fields]
    reducers = [_reducer(field, frame[field.name], polars) for field in fields]
    if not _fits(identifier, frame[identifier.name], polars) or None in reducers:
        return Reduced({}, [], frame.to_dicts())
    frame, rejected = _without_wrong_rows(frame, compiled, fields, polars)
    groups = frame.group_by(identifier.name).agg(
        [reducer.expression for reducer in reducers if reducer is not None]
        + [polars.len().alias(field.name) for field in counts]
    )
    columns = {identifier.name: groups[identifier.name].to_list()}
    for field, reducer in zip(fields, reducers, strict=True):
        values = groups[field.name].to_list()
        convert = reducer.convert if reducer is not None else None
        columns[field.name] = values if convert is None else list(map(convert, values))
    for field in counts:
        columns[field.name] = groups[field.name].to_list()
    return Reduced(columns, rejected, taken=frame.height)


def _polars() -> Any:
    try:
        import polars as pl  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigurationError(
            "add_table() needs polars, which groups and reduces the rows: "
            "pip install 'phonon[columns]'"
        ) from None
    return pl


def _frame(table: Any, polars: Any) -> Any:
    if isinstance(table, polars.DataFrame):
        return table
    if isinstance(table, polars.LazyFrame):
        return table.collect()
    if hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
        return polars.DataFrame(table)
    raise ConfigurationError(
        f"add_table() takes a polars or pandas frame, or an Arrow table or record batch, not a "
        f"{type(table).__qualname__}; add_many() takes rows"
    )


class _Reducer(NamedTuple):
    """A polars expression, and a function that makes a field's contribution of its values."""

    expression: Any
    convert: Callable[[Any], Any] | None = None


def _fits(field: Field[Any, Any], column: Any, polars: Any) -> bool:
    """Return whether all of a column's values are of the type that a field takes."""
    kind, dtype = field.value_type, column.dtype
    if kind is str:
        return bool(dtype == polars.String)
    if kind is int or (field.kind in {"sum", "diff"} and kind == int | float):
        return bool(dtype.is_integer())
    if kind is bool:
        return bool(dtype == polars.Boolean)
    return kind is float and bool(dtype.is_float())


def _reducer(field: Field[Any, Any], column: Any, polars: Any) -> _Reducer | None:
    """Return how a column is reduced; None if it cannot be, with the same result."""
    make = _REDUCERS.get(field.kind)
    if make is None or not _fits(field, column, polars):
        return None
    if make is _sum and not _is_safe(column):
        return None
    return make(field, polars.col(field.name))


def _is_safe(column: Any) -> bool:
    least, greatest = column.min() or 0, column.max() or 0
    return bool(max(abs(least), abs(greatest)) * max(1, len(column)) < _MOST_SUM)


def _sum(field: Field[Any, Any], column: Any) -> _Reducer | None:
    if field.value_type is float:
        return None  # polars rounds at each step
    return _Reducer(column.cast(_int64()).sum())


def _int64() -> Any:
    return _polars().Int64


def _count(field: Field[Any, Any], column: Any) -> _Reducer | None:
    del field
    return _Reducer(column.cast(_int64()).fill_null(1).sum())


def _least(field: Field[Any, Any], column: Any) -> _Reducer | None:
    return _Reducer(column.min(), _checked(field))


def _greatest(field: Field[Any, Any], column: Any) -> _Reducer | None:
    return _Reducer(column.max(), _checked(field))


def _checked(field: Field[Any, Any]) -> Callable[[Any], Any] | None:
    """Return the expression that brings a float into the form in which it is kept."""
    if field.value_type is not float:
        return None
    return lambda value: None if value is None else field.check(value)


def _any(field: Field[Any, Any], column: Any) -> _Reducer | None:
    del field
    return _Reducer(column.any())


def _all(field: Field[Any, Any], column: Any) -> _Reducer | None:
    del field
    return _Reducer(column.all())


def _set(field: Field[Any, Any], column: Any) -> _Reducer | None:
    return None if field.value_type is float else _Reducer(column.drop_nulls().unique(), set)


def _list(field: Field[Any, Any], column: Any) -> _Reducer | None:
    return None if field.value_type is float else _Reducer(column.drop_nulls())


def _distinct(field: Field[Any, Any], column: Any) -> _Reducer | None:
    return _Reducer(column.drop_nulls().unique(), field.check)


_REDUCERS: dict[str, Callable[[Field[Any, Any], Any], _Reducer | None]] = {
    "sum": _sum,
    "diff": _sum,
    "count": _count,
    "min": _least,
    "max": _greatest,
    "timestamp": _greatest,
    "any_of": _any,
    "all_of": _all,
    "set_append": _set,
    "list_append": _list,
    "distinct": _distinct,
}


def _without_wrong_rows(
    frame: Any, compiled: Compiled, fields: Sequence[Field[Any, Any]], polars: Any
) -> tuple[Any, list[tuple[int, InvalidMessageError]]]:
    """Return a frame without the rows that the model does not take, and these rows."""
    name = compiled.id.name
    wrong = polars.col(name).is_null()
    for field in fields:
        if field.value_type is float:
            wrong = wrong | ~polars.col(field.name).is_finite().fill_null(value=True)
        elif field.kind == "count":
            wrong = wrong | (polars.col(field.name) < 0).fill_null(value=False)
    found = frame.select(wrong.arg_true()).to_series().to_list()
    if not found:
        return frame, []
    rejected = []
    for number in found:
        try:
            compiled.fold({}, **frame.row(number, named=True))
        except InvalidMessageError as error:
            rejected.append((number, error))
    return frame.filter(~wrong), rejected
