"""`Upsert`: adds records to the rows of a model, many in one statement."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from django.apps import apps
from django.db import connections, router, transaction

from phonon.errors import ConfigurationError
from phonon.update import ConflictFreeUpdate

#: The most parameters of one statement; old versions of SQLite take 999.
_MOST_PARAMETERS = 900


class Upsert(ConflictFreeUpdate):
    """A record whose numbers are added to the row of its key. Each batch counts once.

    Many rows are written in one statement and one transaction, in the order of their keys, over the
    connection of Django's router. The same statement checks the token.

    Args:
        model: A subclass of `phonon.contrib.django.models.Counted`, or ``"app.Name"``.
        key: The unique field for the record's key.

    Example:
        >>> class Views(Upsert, model="shop.PageViews", key="page"):  # doctest: +SKIP
        ...     "Figures of a page."
    """

    _model: ClassVar[Any] = None
    _key: ClassVar[str] = ""

    def __init_subclass__(
        cls, *, model: Any = None, key: str | None = None, **options: Any
    ) -> None:
        super().__init_subclass__(**options)
        if model is not None:
            cls._model = model
        if key is not None:
            cls._key = key
        if cls._model is None or not cls._key:
            raise ConfigurationError(
                f"{cls.__qualname__} needs a model and its unique field: "
                f'class {cls.__name__}(Upsert, model="app.Model", key="field")'
            )

    @classmethod
    def execute_many(cls, updates: Sequence[Self]) -> None:
        """Add records to their rows."""
        model: Any = apps.get_model(cls._model) if isinstance(cls._model, str) else cls._model
        using = router.db_for_write(model)
        numbers = sorted({name for update in updates for name in update.doc or {}})
        rows = sorted(updates, key=lambda update: str(update._id))
        each = max(1, _MOST_PARAMETERS // (len(numbers) + 2))
        connection = connections[using]
        connection.close_if_unusable_or_obsolete()  # a background thread's may have been idle
        with transaction.atomic(using), connection.cursor() as cursor:
            for first in range(0, len(rows), each):
                page = rows[first : first + each]
                cursor.execute(*_statement(connection, model, cls._key, numbers, page))


def _statement(
    connection: Any, model: Any, key: str, numbers: Sequence[str], updates: Sequence[Any]
) -> tuple[str, list[Any]]:
    """Return an upsert and its parameters."""
    fields = [model._meta.get_field(name) for name in (key, *numbers, "phonon_token")]
    # Django sets no defaults in the database for columns that an INSERT leaves out.
    others = [
        field
        for field in model._meta.local_concrete_fields
        if field not in fields and not field.primary_key and not field.null
    ]
    quote = connection.ops.quote_name
    table = quote(model._meta.db_table)
    columns = [quote(field.column) for field in (*fields, *others)]
    parameters: list[Any] = []
    for update in updates:
        doc = update.doc or {}
        values = [update._id, *(doc.get(name, 0) for name in numbers), update.token]
        values += [field.get_default() for field in others]
        parameters += [
            field.get_db_prep_save(value, connection)
            for field, value in zip((*fields, *others), values, strict=True)
        ]
    row = f"({', '.join(['%s'] * len(columns))})"
    added, token = columns[1 : 1 + len(numbers)], columns[1 + len(numbers)]
    rows = ", ".join([row] * len(updates))
    insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES {rows}"  # noqa: S608 - quoted names
    if connection.vendor == "mysql":
        # The token is set last: MySQL reads columns with the values that the statement has set.
        is_new = f"VALUES({token}) > {token}"
        sets = [f"{name} = IF({is_new}, {name} + VALUES({name}), {name})" for name in added]
        sets.append(f"{token} = GREATEST({token}, VALUES({token}))")
        return f"{insert} ON DUPLICATE KEY UPDATE {', '.join(sets)}", parameters
    sets = [f"{name} = {table}.{name} + excluded.{name}" for name in added]
    sets.append(f"{token} = excluded.{token}")
    update = f"ON CONFLICT ({columns[0]}) DO UPDATE SET {', '.join(sets)}"
    return f"{insert} {update} WHERE excluded.{token} > {table}.{token}", parameters
