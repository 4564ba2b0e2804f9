"""Sinks: destinations of records whose sessions are over, each batch once.

A sink is any object with the two methods of `Sink`. Give it to `phonon.Process.collect`::

    views = process.collect(PageViews, sink=SqlTable(engine, "page_views"))

`SqlTable` and `once`, with the extra ``phonon[sql]``, are for databases that SQLAlchemy knows.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from phonon.sinks.sql import SqlTable, once, table_of, tokens_table

__all__ = ["Sink", "SqlTable", "once", "table_of", "tokens_table"]


class Sink(Protocol):
    """A destination to which the records of a model are written.

    In `phonon.aio` the second method may be a coroutine function.
    """

    def prepare(self, model: Any) -> None:
        """Get ready for a model's records, or refuse them.

        Called whenever a collection is made.

        Args:
            model: The model; its ``fields()`` are the fields by name.

        Raises:
            ConfigurationError: The sink cannot write records of this model.
        """

    def write(self, records: Sequence[Any]) -> Iterable[tuple[Any, Exception]] | None:
        """Write records, in one transaction.

        If a process dies before it could report back, a written record comes again, with the same
        ``token``. So store the token beside the record, in the same transaction, and skip a record
        whose token is not greater than the stored one.

        Args:
            records: Records of different keys, with their tokens. Their attributes are the fields.

        Returns:
            Pairs of a failed record and its error; None if all succeeded.

        Raises:
            Exception: Nothing was written. The records are tried again, one by one.
        """


def __getattr__(name: str) -> Any:
    if name in __all__:
        from phonon.sinks import sql  # noqa: PLC0415 - SQLAlchemy is an extra

        return getattr(sql, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
