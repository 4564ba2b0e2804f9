"""Columns of a table for the fields of a model.

The database merges integers, and values that are compared by size. The states of all other fields
are in one binary column, which the model's own code merges; another column shows their values to
people and queries. If the database merged them (floating point, decimals of a fixed scale, texts by
a collation, time zones) the result would differ from the model's.
"""

import copy
import datetime as dt
import decimal
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from phonon.errors import ConfigurationError
from phonon.serializers import ExactSerializer

#: The names of the columns of the token and of the state.
TOKEN, STATE = "token", "phonon_state"

_ADDED = frozenset({"sum", "diff", "count"})
_COMPARED = {"max": True, "timestamp": True, "min": False}
#: The kinds of field that may have a child table, and whether its rows have a count.
_CHILDREN = {"counter": True, "set_append": False}
#: A key of MySQL has a length.
_KEY_LENGTH = 255
_MYSQL = ("mysql", "mariadb")
#: Characters that PostgreSQL takes neither as text nor in JSON.
_UNSHOWABLE = re.compile("[\0\ud800-\udfff]")


class ExactNumeric(sa.TypeDecorator[decimal.Decimal]):
    """A decimal. SQLite has no such type and MySQL's has few digits: they store its text."""

    impl = sa.Numeric
    cache_ok = True
    _as_text = ("sqlite", *_MYSQL)

    def load_dialect_impl(self, dialect: Any) -> Any:
        """Return the database's type."""
        type_: Any = sa.Text() if dialect.name in self._as_text else sa.Numeric()
        return dialect.type_descriptor(type_)

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        """Return a value in the form to send."""
        return str(value) if value is not None and dialect.name in self._as_text else value

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        """Return a value in the form to read."""
        del dialect
        return None if value is None else decimal.Decimal(value)


class Instant(sa.TypeDecorator[dt.datetime]):
    """A time. Databases that know no time zones get it in UTC, if it has one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        """Return a value as it is sent."""
        if value is None or value.tzinfo is None or dialect.name == "postgresql":
            return value
        try:
            return value.astimezone(dt.UTC)
        except OverflowError:  # in the first or last day of all
            return value


_KEYS: dict[Any, Any] = {
    str: sa.Text().with_variant(sa.String(_KEY_LENGTH, collation="utf8mb4_bin"), *_MYSQL),
    int: sa.BigInteger(),
    uuid.UUID: sa.Uuid(),
    dt.date: sa.Date(),
}
_SCALARS: dict[Any, Any] = {
    str: sa.Text().with_variant(mysql.LONGTEXT(), *_MYSQL),
    int: sa.BigInteger(),
    float: sa.Double(),
    bool: sa.Boolean(),
    bytes: sa.LargeBinary().with_variant(mysql.LONGBLOB(), *_MYSQL),
    decimal.Decimal: ExactNumeric(),
    dt.datetime: Instant(),
    dt.date: sa.Date(),
    uuid.UUID: sa.Uuid(),
}
#: Kinds of field that show a single value, of the type of the values in messages.
_SHOW_ONE = frozenset({"sum", "diff", "max", "min", "timestamp", "latest", "first"})
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

_serializer = ExactSerializer()


class MergedColumn(NamedTuple):
    """A field that the database merges.

    Attributes:
        field: The field.
        zero: The value of a record without messages.
    """

    field: Any
    zero: Any

    def merged(self, old: Any, new: Any, dialect: str) -> Any:
        """Return the expression that merges two values."""
        kind = self.field.kind
        if self.zero is not None:
            # Rows from before the column was added have none.
            old = sa.func.coalesce(old, sa.literal(self.zero))
        if kind in _ADDED:
            return added(old, new, dialect)
        if kind == "any_of":
            return sa.or_(old, new)
        if kind == "all_of":
            return sa.and_(old, new)
        greater = new > old if _COMPARED[kind] else new < old
        return sa.case((old.is_(None), new), (greater, new), else_=old)


def added(old: Any, new: Any, dialect: str) -> Any:
    """Return the expression of a sum, which raises where it does not fit the column."""
    total = old + new
    if dialect != "sqlite":
        return total
    # SQLite would go on with floating point. Its abs() raises "integer overflow" for this number.
    least = sa.literal_column(str(-(2**63) + 1), sa.BigInteger) - 1
    return sa.case((sa.func.typeof(total) == "integer", total), else_=sa.func.abs(least))


class Layout:
    """The layout of a model in tables.

    Args:
        model: The model.
        name: The table's name.
        metadata: The metadata of the tables.
        schema: The database's schema.
        children: Tables for counters and sets, by field.

    Attributes:
        table: The table.
        key: The column of the key.
        plain: Fields that the database merges, by name.
        kept: Fields whose states are in the binary column, by name.
        children: The child tables of other fields, by name.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        metadata: sa.MetaData,
        schema: str | None,
        children: Mapping[str, str],
    ) -> None:
        fields = dict(model.fields())
        self.model = model
        self.id = next(iter(fields))
        key_type = _KEYS.get(fields[self.id].value_type)
        if key_type is None:
            raise ConfigurationError(
                f"{model.__qualname__}.{self.id} cannot be the key of a table: its type is "
                f"{fields[self.id].value_type!r}; annotate it as ID[str], ID[int], ID[UUID] or "
                "ID[date]"
            )
        reserved = {TOKEN, STATE} & fields.keys()
        if reserved:
            raise ConfigurationError(
                f"{model.__qualname__}.{min(reserved)} has the name of a column that the sink "
                "needs: call the field something else"
            )
        self.plain: dict[str, MergedColumn] = {}
        self.kept: dict[str, Any] = {}
        self.children: dict[str, sa.Table] = {}
        columns: list[sa.Column[Any]] = [sa.Column(self.id, key_type, primary_key=True)]
        if key_type is _KEYS[int]:
            columns[0].autoincrement = False
        for each, field in list(fields.items())[1:]:
            if each in children:
                self.children[each] = _child(
                    model, field, children[each], metadata, schema, (self.id, key_type)
                )
            elif _is_plain(field):
                self.plain[each] = MergedColumn(field, field.zero)
                type_ = _SCALARS[bool if field.kind in ("any_of", "all_of") else field.value_type]
                columns.append(sa.Column(each, type_, nullable=field.zero is None))
            else:
                self.kept[each] = field
                scalar = _SCALARS.get(field.value_type) if field.kind in _SHOW_ONE else None
                if field.kind == "mean":
                    scalar = sa.Double()
                columns.append(sa.Column(each, scalar or _JSON))
        unknown = children.keys() - self.children.keys()
        if unknown:
            raise ConfigurationError(
                f"{model.__qualname__} has no field {min(unknown)!r} for a child table"
            )
        columns.append(sa.Column(TOKEN, sa.BigInteger, nullable=False))
        if self.kept:
            columns.append(sa.Column(STATE, _SCALARS[bytes]))
        self.table = _table(model, name, metadata, schema, columns)
        self.key: sa.Column[Any] = self.table.c[self.id]
        self.token: sa.Column[Any] = self.table.c[TOKEN]

    @property
    def is_plain(self) -> bool:
        """Return whether one statement writes a whole record."""
        return not (self.kept or self.children)

    def key_of(self, record: Any) -> Any:
        """Return a record's key."""
        return getattr(record, self.id)

    def plain_row(self, record: Any) -> dict[str, Any]:
        """Return a record's key, token and the fields that the database merges."""
        row = {name: getattr(record, name) for name in self.plain}
        return {self.id: self.key_of(record), TOKEN: record.token, **row}

    def empty_row(self, record: Any) -> dict[str, Any]:
        """Return the row of a key without records."""
        row = {name: plain.zero for name, plain in self.plain.items()}
        return {self.id: self.key_of(record), TOKEN: 0, **row}

    def kept_row(self, record: Any, stored: bytes | None) -> dict[str, Any]:
        """Return the state of a record merged with the stored one, and its shown values."""
        states = record.__dict__["_states_"]
        old = _serializer.loads(bytes(stored)) if stored else {}
        # A value of a newer release stays, though this one does not know its field.
        merged: dict[str, Any] = {k: v for k, v in old.items() if k not in self.kept}
        for name, field in self.kept.items():
            # Copied, because merging changes states, and a lost transaction is tried again.
            one, other = old.get(name), copy.deepcopy(states.get(name))
            if one is None or other is None:
                state = other if one is None else one
            else:
                state = field.merge(one, other)
            if state is not None:
                merged[name] = field.seal(state)
        row: dict[str, Any] = {STATE: _serializer.dumps(merged)}
        for name, field in self.kept.items():
            value = field.read(merged.get(name))
            is_json = isinstance(self.table.c[name].type, sa.JSON)
            row[name] = _for_json(value) if is_json or isinstance(value, str) else value
        return row

    def child_rows(self, name: str, record: Any) -> list[dict[str, Any]]:
        """Return the rows that a record adds to a child table."""
        value, key = getattr(record, name), self.key_of(record)
        if isinstance(value, Mapping):
            return [{self.id: key, "item": item, "n": n} for item, n in sorted(value.items())]
        return [{self.id: key, "item": item} for item in sorted(value)]


def _is_plain(field: Any) -> bool:
    if field.kind in ("any_of", "all_of", "count"):
        return True
    if field.kind in _ADDED:
        return field.value_type is int
    return field.kind in _COMPARED and field.value_type in (int, float)


def _child(
    model: Any,
    field: Any,
    name: str,
    metadata: sa.MetaData,
    schema: str | None,
    key: tuple[str, Any],
) -> sa.Table:
    item = _KEYS.get(field.value_type)
    if field.kind not in _CHILDREN or item is None:
        raise ConfigurationError(
            f"{model.__qualname__}.{field.name} cannot have a table of its own: that is for "
            "Counter and SetAppend of str or int"
        )
    columns = [
        sa.Column(key[0], key[1], primary_key=True),
        sa.Column("item", item, primary_key=True),
    ]
    if _CHILDREN[field.kind]:
        columns.append(sa.Column("n", sa.BigInteger, nullable=False))
    return _table(model, name, metadata, schema, columns)


def _table(
    model: Any,
    name: str,
    metadata: sa.MetaData,
    schema: str | None,
    columns: list[sa.Column[Any]],
) -> sa.Table:
    """Return a new table, or the one that is in the metadata: Alembic's may know it already."""
    entered = metadata.tables.get(f"{schema}.{name}" if schema else name)
    if entered is None:
        return sa.Table(name, metadata, *columns, schema=schema)
    missing = [column.name for column in columns if column.name not in entered.c]
    if missing:
        raise ConfigurationError(
            f"the metadata has a table {name!r} without the column {missing[0]!r} that "
            f"{model.__qualname__} needs: give each model a table of its own"
        )
    return entered


def _for_json(value: Any) -> Any:
    """Return a value in the form to show, which is never read back."""
    shown = value
    if isinstance(value, str):
        shown = _UNSHOWABLE.sub("\ufffd", value)
    elif isinstance(value, Mapping):
        shown = {_for_json(str(k)): _for_json(v) for k, v in value.items()}
    elif isinstance(value, set | frozenset):
        ordered = sorted(value, key=lambda each: (str(type(each)), each))
        shown = [_for_json(each) for each in ordered]
    elif hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"):
        names = getattr(value, "_fields", None) or value.__dataclass_fields__
        shown = {name: _for_json(getattr(value, name)) for name in names}
    elif isinstance(value, list | tuple):
        shown = [_for_json(each) for each in value]
    elif value is not None and not isinstance(value, int | float | bool):
        shown = str(value)
    return shown
