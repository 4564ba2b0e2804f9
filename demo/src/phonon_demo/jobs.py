"""What a job of the demo is: something to add up."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from phonon import Model, Process, Update
from phonon_demo.formats import Values
from phonon_demo.sink import Table

#: What a worker is told: a key first, and what is new about it.
Message = tuple[Any, ...]
#: What came together, by key: the figures in the order of the table's columns.
Totals = dict[str, tuple[Any, ...]]

U = TypeVar("U", bound=Update)


def for_process(kind: type[U], process: Process) -> type[U]:
    """A class of updates, or its twin if the process is one of `phonon.aio`."""
    if isinstance(process, Process):
        return kind
    from phonon_demo.twins import TWINS  # noqa: PLC0415 - needs an extra

    twin: Any = TWINS[kind]  # with the same constructor
    return twin


class Job(Protocol):
    """Which columns it needs, what a message is, which update it makes, where its figures go.

    It travels to the workers, so it holds nothing but settings.
    """

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the input that it needs."""

    @property
    def table(self) -> Table:
        """Where its figures go."""

    def message(self, values: Values) -> Message:
        """Make a message of the columns' values.

        Raises:
            Rejected: They make none.
        """

    @property
    def model(self) -> type[Model] | None:
        """The model of its records; None if it has updates only."""

    def row(self, message: Message) -> tuple[Any, ...]:
        """Return a message's values in the order of the model's fields."""

    def update(self, process: Process, message: Message) -> Update:
        """Make an update of a message, the older way."""

    def figures(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """The figures as Python values, out of the table's."""
