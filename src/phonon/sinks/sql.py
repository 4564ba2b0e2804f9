"""Tables of SQL databases as sinks, on SQLAlchemy Core 2: each batch once.

A row has the token of its last batch. A batch is added only if its token is greater, in the same
transaction, so that a batch that comes again changes nothing.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phonon.errors import ConfigurationError
from phonon.settings import check_name

try:
    import sqlalchemy as sa
    from sqlalchemy.dialects import mysql, postgresql, sqlite
except ImportError as error:
    raise ImportError("phonon.sinks needs SQLAlchemy: pip install 'phonon[sql]'") from error

from phonon.sinks.columns import STATE, TOKEN, Layout, added

#: Bound parameters in one statement: SQLite takes 32,766.
MOST_PARAMETERS = 30_000
#: The most attempts at a transaction that loses against others.
ATTEMPTS = 6
#: Seconds before the second attempt; they double.
FIRST_PAUSE = 0.02

#: The errors of a transaction that has to be tried again: SQLSTATEs, and MySQL's numbers.
_AGAIN = frozenset({"40001", "40P01", "55P03", 1213, 1205, 1020})

#: The default name of the table of `once`.
TOKENS = "phonon_tokens"


class BaseSqlTable:
    """The base of `SqlTable` and `phonon.aio.sinks.AsyncSqlTable`: everything but the waiting."""

    def __init__(
        self,
        engine: Any,
        name: str,
        model: Any = None,
        *,
        metadata: sa.MetaData | None = None,
        schema: str | None = None,
        children: Mapping[str, str] | None = None,
    ) -> None:
        self._check_engine(engine)
        _check_metadata(metadata)
        if schema is not None:
            check_name("schema", schema)
        if children is not None and not isinstance(children, Mapping):
            raise ConfigurationError(
                f"children is a dict of the names of tables, by field, not {children!r}"
            )
        self._engine = engine
        self._name = check_name("name", name)
        self._metadata = sa.MetaData() if metadata is None else metadata
        self._schema = schema
        self._children = dict(children or {})
        self._found: Layout | None = None
        if model is not None:
            self.prepare(model)

    @staticmethod
    def _check_engine(engine: Any) -> None:
        raise NotImplementedError

    def prepare(self, model: Any) -> None:
        """Derive the table from a model's fields.

        Raises:
            ConfigurationError: The model cannot be a table, or the sink has another model.
        """
        if self._found is None:
            if not isinstance(model, type) or not hasattr(model, "fields"):
                raise ConfigurationError(
                    f"model is a class of records, not {model!r}: make a subclass of phonon.Model"
                )
            self._found = Layout(model, self._name, self._metadata, self._schema, self._children)
        elif self._found.model is not model:
            raise ConfigurationError(
                f"the sink of table {self._name!r} is that of {self._found.model.__qualname__}: "
                f"make another SqlTable for {model.__qualname__}"
            )

    @property
    def _layout(self) -> Layout:
        if self._found is None:
            raise ConfigurationError(
                f"the sink of table {self._name!r} has no model yet: give it to collect(), or give "
                "it the model"
            )
        return self._found

    @property
    def table(self) -> sa.Table:
        """The table, for queries, and, by its metadata, for Alembic."""
        return self._layout.table

    @property
    def tables(self) -> list[sa.Table]:
        """The table and its child tables."""
        layout = self._layout
        return [layout.table, *layout.children.values()]

    def statement(self, dialect: str) -> sa.Insert:
        """Return the statement that adds records, if the database merges all of their fields.

        Args:
            dialect: The database's name: ``postgresql``, ``sqlite``, ``mysql`` or ``mariadb``.
        """
        statement: sa.Insert = _upsert(dialect, self._layout)
        return statement

    def _create(self, connection: sa.Connection) -> None:
        self._metadata.create_all(connection, tables=self.tables, checkfirst=True)

    def _write(self, connection: sa.Connection, records: Sequence[Any]) -> None:
        layout = self._layout
        # Always in the same order, so that two writers cannot deadlock.
        records = sorted(records, key=layout.key_of)
        width = max(len(table.columns) for table in self.tables)
        for page in _pieces(records, MOST_PARAMETERS // width):
            if layout.is_plain:
                rows = [layout.plain_row(record) for record in page]
                connection.execute(self.statement(connection.dialect.name).values(rows))
            else:
                _merge(connection, layout, page)


class SqlTable(BaseSqlTable):
    """A table with one row for each key of a model.

    Args:
        engine: The engine of SQLAlchemy.
        name: The table's name.
        model: The model; None leaves it to `phonon.Process.collect`.
        metadata: The metadata of the table; give the one that Alembic uses.
        schema: The database's schema.
        children: For a `Counter` or `SetAppend`: the name of a child table, by field, with one row
            for each item.

    Raises:
        ConfigurationError: The model cannot be a table.

    Example:
        >>> sink = SqlTable(engine, "page_views")  # doctest: +SKIP
        >>> views = process.collect(PageViews, sink=sink)  # doctest: +SKIP
        >>> sink.create_table()  # doctest: +SKIP
    """

    @staticmethod
    def _check_engine(engine: Any) -> None:
        if not isinstance(engine, sa.Engine):
            raise ConfigurationError(
                f"engine is a sqlalchemy.Engine, not {engine!r}: write "
                "sqlalchemy.create_engine(...); phonon.aio.sinks.AsyncSqlTable takes an AsyncEngine"
            )

    def create_table(self) -> None:
        """Create the table and its child tables, unless they exist."""
        with self._engine.begin() as connection:
            self._create(connection)

    def write(self, records: Sequence[Any]) -> None:
        """Add records to their rows, in one transaction.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The database cannot be reached, or refuses.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self._engine.begin() as connection:
                    self._write(connection, records)
            except sa.exc.DBAPIError as error:
                if attempt == ATTEMPTS - 1 or not is_lost_race(error):
                    raise
                time.sleep(pause(attempt))
            else:
                return


def pause(attempt: int) -> float:
    """Return the seconds to wait before a lost transaction is tried again."""
    return FIRST_PAUSE * 2.0**attempt * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def is_lost_race(error: Any) -> bool:
    """Return whether a transaction lost against another one, and another attempt may succeed."""
    original = error.orig
    code = getattr(original, "sqlstate", None) or next(iter(getattr(original, "args", ())), None)
    return code in _AGAIN or "database is locked" in str(original)


def _check_metadata(value: Any) -> None:
    if value is not None and not isinstance(value, sa.MetaData):
        raise ConfigurationError(f"metadata is a sqlalchemy.MetaData, not {value!r}")


def table_of(
    model: Any, name: str, metadata: sa.MetaData | None = None, schema: str | None = None
) -> sa.Table:
    """Return the table of a model, without a database: for Alembic, and for queries."""
    return _Table(None, name, model, metadata=metadata, schema=schema).table


class _Table(BaseSqlTable):
    """A table without a database."""

    @staticmethod
    def _check_engine(engine: Any) -> None:
        """Take none."""


_INSERTS: dict[str, Any] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
    "mysql": mysql.insert,
    "mariadb": mysql.insert,
}


def _insert(dialect: str, table: sa.Table) -> Any:
    try:
        return _INSERTS[dialect](table)
    except KeyError:
        raise ConfigurationError(
            f"databases of the dialect {dialect!r} have no upsert that is known here: use one of "
            f"{', '.join(_INSERTS)}, or write a Sink"
        ) from None


def _upsert(dialect: str, layout: Layout) -> Any:
    table, insert = layout.table, _insert(dialect, layout.table)
    if dialect in ("mysql", "mariadb"):
        # MySQL assigns from left to right, so the token comes last.
        new = insert.inserted
        is_newer = new[TOKEN] > table.c[TOKEN]
        changes = []
        for name, plain in layout.plain.items():
            old = table.c[name]
            merged_here = plain.merged(old, new[name], dialect)
            changes.append((name, sa.case((is_newer, merged_here), else_=old)))
        token = sa.case((is_newer, new[TOKEN]), else_=table.c[TOKEN])
        return insert.on_duplicate_key_update([*changes, (TOKEN, token)])
    new = insert.excluded
    merged = {
        name: plain.merged(table.c[name], new[name], dialect)
        for name, plain in layout.plain.items()
    }
    return insert.on_conflict_do_update(
        index_elements=[layout.id],
        set_={**merged, TOKEN: new[TOKEN]},
        where=new[TOKEN] > layout.token,
    )


def _insert_missing(dialect: str, table: sa.Table, key: Sequence[str]) -> Any:
    insert = _insert(dialect, table)
    if dialect in ("mysql", "mariadb"):
        return insert.on_duplicate_key_update([(key[0], table.c[key[0]])])
    return insert.on_conflict_do_nothing(index_elements=list(key))


def _merge(connection: sa.Connection, layout: Layout, records: Sequence[Any]) -> None:
    """Add records with fields that are merged here, while their rows are locked."""
    dialect, table = connection.dialect.name, layout.table
    # A missing row cannot be locked, so it is inserted. On SQLite this locks the database.
    missing = _insert_missing(dialect, table, [layout.id])
    connection.execute(missing.values([layout.empty_row(record) for record in records]))
    columns = [layout.key, layout.token, *([table.c[STATE]] if layout.kept else [])]
    keys = [layout.key_of(record) for record in records]
    query = sa.select(*columns).where(layout.key.in_(keys)).order_by(layout.key).with_for_update()
    stored = {row[0]: row for row in connection.execute(query)}
    fresh = [r for r in records if r.token > stored[layout.key_of(r)][1]]
    if not fresh:
        return
    changes: dict[str, Any] = {TOKEN: sa.bindparam("b_token")}
    for name, plain in layout.plain.items():
        value = sa.bindparam(f"b_{name}", type_=table.c[name].type)
        changes[name] = plain.merged(table.c[name], value, dialect)
    for name in layout.kept:
        changes[name] = sa.bindparam(f"b_{name}", type_=table.c[name].type)
    if layout.kept:
        changes[STATE] = sa.bindparam(f"b_{STATE}", type_=table.c[STATE].type)
    rows = []
    for record in fresh:
        row = layout.plain_row(record)
        key = row.pop(layout.id)
        if layout.kept:
            row |= layout.kept_row(record, stored[key][2])
        rows.append({"b_key": key, **{f"b_{name}": value for name, value in row.items()}})
    update = sa.update(table).where(layout.key == sa.bindparam("b_key")).values(changes)
    connection.execute(update, rows)
    for name, child in layout.children.items():
        _add_to_child(connection, layout, child, [layout.child_rows(name, r) for r in fresh])


def _add_to_child(
    connection: sa.Connection,
    layout: Layout,
    child: sa.Table,
    rows: Sequence[Sequence[dict[str, Any]]],
) -> None:
    dialect = connection.dialect.name
    flat = [row for page in rows for row in page]
    if "n" not in child.c:
        statement = _insert_missing(dialect, child, [layout.id, "item"])
    elif dialect in ("mysql", "mariadb"):
        statement = _insert(dialect, child)
        statement = statement.on_duplicate_key_update(n=child.c.n + statement.inserted.n)
    else:
        statement = _insert(dialect, child)
        statement = statement.on_conflict_do_update(
            index_elements=[layout.id, "item"],
            set_={"n": added(child.c.n, statement.excluded.n, dialect)},
        )
    for page in _pieces(flat, MOST_PARAMETERS // len(child.columns)):
        connection.execute(statement.values(list(page)))


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


# Tokens of updates with an `execute` of their own


def tokens_table(metadata: sa.MetaData | None = None, name: str = TOKENS) -> sa.Table:
    """Return the table of tokens for `once`. Create it, or give its metadata to Alembic."""
    text = sa.Text().with_variant(sa.String(700, collation="utf8mb4_bin"), "mysql", "mariadb")
    _check_metadata(metadata)
    return sa.Table(
        check_name("name", name),
        sa.MetaData() if metadata is None else metadata,
        sa.Column("resource", text, primary_key=True),
        sa.Column(TOKEN, sa.BigInteger, nullable=False),
        extend_existing=True,
    )


@contextlib.contextmanager
def once(connection: sa.Connection, update: Any, *, name: str = TOKENS) -> Iterator[bool]:
    """Yield whether a batch is new to the database. Use it in `execute`, in your transaction.

    The token is stored in the same transaction as your data.

    Args:
        connection: A connection in a transaction.
        update: The update that executes.
        name: The name of the table that `tokens_table` describes.

    Returns:
        A context manager with the answer. If the batch is not new, write nothing.

    Example:
        >>> def execute(self):
        ...     with engine.begin() as connection, once(connection, self) as fresh:
        ...         if fresh:
        ...             connection.execute(...)
    """
    yield is_fresh(connection, update.resource_id, update.token, name)


def is_fresh(connection: sa.Connection, resource: str, token: int | None, name: str) -> bool:
    """Store a token. Return whether it is greater than the stored one.

    Raises:
        ConfigurationError: There is no token, because the update is not executing.
    """
    if token is None:
        raise ConfigurationError("once() is for execute(): an update has a token while it runs")
    table, dialect = tokens_table(name=name), connection.dialect.name
    row = {"resource": resource, TOKEN: 0}
    connection.execute(_insert_missing(dialect, table, ["resource"]).values(row))
    update = (
        sa.update(table)
        .where(table.c.resource == resource, table.c[TOKEN] < token)
        .values({TOKEN: token})
    )
    return bool(connection.execute(update).rowcount)
