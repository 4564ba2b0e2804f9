"""Tables: rows that are grouped and reduced column-wise, one merge a key.

Tables are reduced when one of their records is read or sent, not when they arrive. That is much
faster than making Python objects of each table and merging them with those of the next.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from phonon._models.compiled import Compiled
from phonon._models.field import Field
from phonon.errors import ConfigurationError, InvalidMessageError

#: Sums below this bound fit into 64 bits, in which Arrow adds up.
_MOST_SUM = 2**63
#: Tables of so many bytes are reduced even if none of their records is read.
MOST_BYTES = 64 * 1024 * 1024


class Rows(NamedTuple):
    """A table whose rows a model takes.

    Attributes:
        table: An Arrow table whose columns can be reduced; None if one of them cannot.
        rejected: The rows that the model refuses, with numbers and reasons.
        rows: All rows as dicts, if the table cannot be reduced.
        most: For each column that is added up, a bound of its sums.
    """

    table: Any
    rejected: list[tuple[int, InvalidMessageError]]
    rows: list[dict[str, Any]]
    most: dict[str, int]


def rows_of(table: Any, compiled: Compiled, *, ignore_unknown: bool) -> Rows:
    """Return the rows of a table that a model takes.

    Args:
        table: A polars or pandas frame, an Arrow table or record batch, or anything else with the
            Arrow PyCapsule interface.
        compiled: The model's code.
        ignore_unknown: Whether to ignore columns that the model does not have.

    Raises:
        ConfigurationError: pyarrow is not installed, or this is not a table.
        InvalidMessageError: The ID has no column, or the model does not have a column's field.
    """
    arrow = _arrow()
    table = _table(table, arrow)
    unknown = [name for name in table.column_names if name not in compiled.fields]
    if unknown and not ignore_unknown:
        raise compiled.unknown(unknown, {})
    if compiled.id.name not in table.column_names:
        raise compiled.missing()
    table = table.drop_columns(unknown)
    found = [
        _column(compiled.fields[name], column, arrow)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    columns = [column for column in found if column is not None]
    if len(columns) < len(found):
        return Rows(None, [], table.to_pylist(), {})
    table, rejected = _without_wrong_rows(
        arrow.table(columns, names=table.column_names), compiled, arrow
    )
    most = {
        name: _largest(table[name], arrow) * max(1, table.num_rows)
        for name in table.column_names
        if compiled.fields[name].kind in _ADDED
    }
    if any(size >= _MOST_SUM for size in most.values()):
        return Rows(None, rejected, table.to_pylist(), {})
    return Rows(table, rejected, [], most)


def _arrow() -> Any:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.compute  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError(
            "add_table() needs pyarrow, which groups and reduces the rows: "
            "pip install 'phonon[columns]'"
        ) from None
    return pa


def _table(table: Any, arrow: Any) -> Any:
    if isinstance(table, arrow.Table):
        return table
    if isinstance(table, arrow.RecordBatch):
        return arrow.Table.from_batches([table])
    if type(table).__name__ == "LazyFrame" and hasattr(table, "collect"):  # polars'
        table = table.collect()
    if hasattr(table, "__arrow_c_stream__"):
        return arrow.table(table)
    if hasattr(table, "__arrow_c_array__"):
        return arrow.Table.from_batches([arrow.record_batch(table)])
    raise ConfigurationError(
        f"add_table() takes a polars or pandas frame, or an Arrow table or record batch, not a "
        f"{type(table).__qualname__}; add_many() takes rows"
    )


#: The kinds of fields whose columns are added up.
_ADDED = frozenset({"sum", "diff", "count"})
_INTEGER = int | float


def _column(field: Field[Any, Any], column: Any, arrow: Any) -> Any:
    """Return a column in the type for reducing; None if reducing would change the result."""
    if field.kind not in _AGGREGATES and field.kind != "id":
        return None
    target = _target(field, column.type, arrow)
    if target is None:
        return None
    try:
        return column if column.type == target else column.cast(target)
    except arrow.ArrowInvalid:  # an unsigned integer above 64 bits, or too much text for a chunk
        return None
    except arrow.ArrowNotImplementedError:  # a Categorical of polars
        return None


def _target(field: Field[Any, Any], given: Any, arrow: Any) -> Any:
    """Return the type in which a column is reduced; None if the field takes no such values."""
    kind, types = field.value_type, arrow.types
    if types.is_dictionary(given):
        given = given.value_type
    is_text = types.is_string(given) or types.is_large_string(given) or types.is_string_view(given)
    if kind is str and is_text and field.kind not in _ORDERED:
        return arrow.string()  # large_string is grouped at a fifth of the speed
    if (kind is int or (field.kind in _ADDED and kind == _INTEGER)) and types.is_integer(given):
        return arrow.int64()
    if kind is bool and types.is_boolean(given):
        return arrow.bool_()
    # Arrow rounds sums at each step, and tells NaNs and zeros apart where sets do not.
    if kind is float and types.is_floating(given) and field.kind in _ORDERED:
        return arrow.float64()
    return None


def _largest(column: Any, arrow: Any) -> int:
    bounds: dict[str, int | None] = arrow.compute.min_max(column).as_py()
    return max(abs(bounds["min"] or 0), abs(bounds["max"] or 0), 1)


#: Arrow's names of the fields' merges.
_AGGREGATES = {
    "sum": "sum",
    "diff": "sum",
    "count": "sum",
    "min": "min",
    "max": "max",
    "timestamp": "max",
    "any_of": "any",
    "all_of": "all",
    "set_append": "distinct",
    "list_append": "list",
    "distinct": "distinct",
}
_ORDERED = frozenset({"min", "max", "timestamp"})


def reduce(tables: Sequence[Any], compiled: Compiled) -> dict[str, list[Any]]:
    """Group tables by the ID, and reduce each column like its field merges.

    Args:
        tables: The tables of `rows_of`.
        compiled: The model's code.

    Returns:
        The values by field: the IDs, and the values to fold of each other field; None is no value.
    """
    arrow = _arrow()
    pc = arrow.compute
    table = arrow.concat_tables(tables, promote_options="default")
    aggregates: list[Any] = []
    texts: dict[str, list[Any]] = {}
    for field in compiled.others:
        kind = _AGGREGATES.get(field.kind)
        if field.kind == "count":
            table = _counted(table, field.name, arrow)
        if field.name in table.column_names:
            options = pc.CountOptions(mode="only_valid") if kind == "distinct" else None
            aggregates.append((field.name, kind, options))
            if kind == "distinct" and arrow.types.is_string(table[field.name].type):
                table, texts[field.name] = _numbered(table, field.name, arrow)
    name = compiled.id.name
    grouped = table.group_by(name, use_threads=False).aggregate(aggregates)
    columns = {name: _values(grouped[name])}
    for name, kind, _ in aggregates:
        column = grouped[f"{name}_{kind}"]
        columns[name] = _contributions(compiled.fields[name], column, texts.get(name))
    return columns


def _numbered(table: Any, name: str, arrow: Any) -> tuple[Any, list[Any]]:
    """Return a table with numbers in a column of texts, and the texts by number.

    Arrow finds the different ones among numbers of a group in half the time.
    """
    encoded = table[name].dictionary_encode()
    numbers = arrow.chunked_array([chunk.indices for chunk in encoded.chunks], arrow.int32())
    texts = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    return table.set_column(table.column_names.index(name), name, numbers), texts


def _counted(table: Any, name: str, arrow: Any) -> Any:
    """Return a table with a column of the number of messages that each row stands for."""
    if name not in table.column_names:
        return table.append_column(name, arrow.repeat(1, table.num_rows))
    filled = arrow.compute.fill_null(table[name], 1)
    return table.set_column(table.column_names.index(name), name, filled)


def _contributions(
    field: Field[Any, Any], column: Any, texts: list[Any] | None = None
) -> list[Any]:
    """Return the values to fold of a column that was reduced; None is no value.

    Args:
        field: The field.
        column: The column.
        texts: The texts that its numbers stand for.
    """
    kind = _AGGREGATES[field.kind]
    if kind == "list":
        lists = _lists(column)
        return [[item for item in part if item is not None] or None for part in lists]
    if kind == "distinct":
        make = set if field.kind == "set_append" else field.check
        return [make(part) if part else None for part in _lists(column, texts)]
    values = _values(column)
    if field.value_type is float:
        return [None if value is None else field.check(value) for value in values]
    return values


def _lists(column: Any, texts: list[Any] | None = None) -> Iterator[list[Any]]:
    """Return the lists of a column; see `_contributions`."""
    for chunk in column.chunks:
        values = _values(chunk.values)
        if texts is not None:
            values = [texts[number] for number in values]
        for begin, end in itertools.pairwise(_values(chunk.offsets)):
            yield values[begin:end]


def _values(column: Any) -> list[Any]:
    """Return the values of a column of one of the types that are reduced.

    Arrow's own method makes an Arrow object of each value before it makes the Python object.
    """
    chunks = getattr(column, "chunks", None)
    if chunks is not None:
        return [value for chunk in chunks for value in _values(chunk)]
    values: list[Any]
    code: Any = _CODES.get(str(column.type))
    if code is not None and not column.null_count:
        view: Any = memoryview(column.buffers()[1]).cast(code)
        values = view[column.offset : column.offset + len(column)].tolist()
        return values
    if str(column.type) == "string" and len(column):
        encoded = column.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        return [None if at is None else texts[at] for at in _values(encoded.indices)]
    values = column.to_pylist()
    return values


#: The type codes of numbers in Python's `struct` module.
_CODES = {"int64": "q", "int32": "i", "double": "d"}


def _without_wrong_rows(
    table: Any, compiled: Compiled, arrow: Any
) -> tuple[Any, list[tuple[int, InvalidMessageError]]]:
    """Return a table without the rows that the model refuses, and these rows."""
    pc = arrow.compute
    masks = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        field = compiled.fields[name]
        if field is compiled.id and column.null_count:
            masks.append(pc.is_null(column))
        if field.value_type is float:
            masks.append(pc.fill_null(pc.invert(pc.is_finite(column)), False))  # noqa: FBT003 - Arrow's value
        elif field.kind == "count":
            masks.append(pc.fill_null(pc.less(column, 0), False))  # noqa: FBT003 - Arrow's value
    masks = [mask for mask in masks if pc.any(mask).as_py()]
    if not masks:
        return table, []
    wrong = masks[0]
    for mask in masks[1:]:
        wrong = pc.or_(wrong, mask)
    rejected = []
    for number in pc.indices_nonzero(wrong).to_pylist():
        (row,) = table.slice(number, 1).to_pylist()
        try:
            compiled.fold({}, **row)
        except InvalidMessageError as error:
            rejected.append((number, error))
    return table.filter(pc.invert(wrong)), rejected


class PendingTables:
    """The tables of a collection that were not merged into its records yet.

    All of its methods are called under the collection's lock.

    Args:
        compiled: The model's code.
        lock: The collection's lock.
    """

    def __init__(self, compiled: Compiled, lock: Any) -> None:
        self._compiled = compiled
        self._lock = lock
        self._tables: list[Any] = []
        self._records: dict[Any, Any] = {}
        self._most: dict[str, int] = {}
        self._bytes = 0

    def keys(self, rows: Rows) -> list[Any]:
        """Return the keys that rows have."""
        found: list[Any] = rows.table[self._compiled.id.name].unique().to_pylist()
        return found

    def add(self, rows: Rows, records: dict[Any, Any]) -> None:
        """Keep rows, of which there are some.

        Args:
            rows: The rows.
            records: The records of all of their keys.
        """
        known = self._records
        most = {name: self._most.get(name, 0) + size for name, size in rows.most.items()}
        if any(size >= _MOST_SUM for size in most.values()) or any(
            known.get(key, record) is not record for key, record in records.items()
        ):
            self.merge_all()
            most, known = rows.most, self._records
        for record in records.values():
            record.pending_ = self
        known.update(records)
        self._most = self._most | most
        self._bytes += rows.table.nbytes
        self._tables.append(rows.table)  # if this is not reached, nothing was merged
        if self._bytes > MOST_BYTES:
            self.merge_all()

    def merge_all(self) -> None:
        """Merge all rows into their records."""
        with self._lock:
            columns = reduce(self._tables, self._compiled) if self._tables else {}
            if columns:
                self._compiled.fold_columns(columns, self._records)
            # Only now: an interrupt comes before each record has its rows, or behind that.
            for record in self._records.values():
                record.pending_ = None
            self._tables, self._records, self._most, self._bytes = [], {}, {}, 0
