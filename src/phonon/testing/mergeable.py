"""Tests whether merging depends on the order and the grouping of messages."""

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from phonon._models.messages import mapping_of
from phonon.errors import ConfigurationError
from phonon.model import Model
from phonon.serializers import ExactSerializer
from phonon.settings import check_count, check_iterable
from phonon.update import Update

_SERIALIZER = ExactSerializer()


def assert_mergeable(
    kind: type[Model] | type[Update],
    messages: Iterable[Any],
    *,
    rounds: int = 100,
    seed: int = 0,
) -> None:
    """Assert that messages merge to the same record in any order and grouping.

    Messages are dealt out to processes, merged there, stored, read and merged again, in random
    orders and groupings. A merge that is not associative and commutative then produces different
    records, as it occasionally would in production.

    Args:
        kind: A subclass of `Model` or `Update`.
        messages: Messages about one record, the more different the better. For a model: the values
            by field, with the ID. For an update: ``doc``, ``spec`` and the attributes of `state`,
            by name.
        rounds: The number of orders and groupings to try.
        seed: The seed of the random orders, so that a failure can be repeated.

    Raises:
        AssertionError: Two ways of merging produce different records, or `merge` needs an attribute
            that is not stored. The message shows the difference.
        ConfigurationError: There are fewer than two messages, or they belong to several records.

    Example:
        >>> from phonon.update import ConflictFreeUpdate
        >>> assert_mergeable(ConflictFreeUpdate, [{"doc": {"n": 1}}, {"doc": {"n": 2, "m": 5}}])
    """
    if not isinstance(kind, type) or not issubclass(kind, Model | Update):
        raise ConfigurationError(f"kind is a subclass of Model or Update, not {kind!r}")
    check_iterable("messages", messages)
    check_count("rounds", rounds)
    given = list(messages)
    if len(given) < 2:  # noqa: PLR2004 - a single message has no merge
        raise ConfigurationError("assert_mergeable() takes two messages at least, of one record")
    merging: _Merging = _Models(kind, given) if issubclass(kind, Model) else _Updates(kind, given)
    chance = random.Random(seed)  # noqa: S311 - repeatable, no secret
    order = list(range(len(given)))
    expected, first = merging.run(_in_turn(order)), str(order)
    for _ in range(rounds):
        chance.shuffle(order)
        plan = _grouped(order, chance)
        found = merging.run(plan)
        if found != expected:
            raise AssertionError(
                f"{kind.__qualname__} depends on how its messages are merged (numbers are those of "
                f"the messages, brackets are processes):\n  {first} gives {expected!r}\n"
                f"  {_text(plan)} gives {found!r}"
            )


#: A message's number, or two groups that are merged first and then with each other.
_Plan = int | tuple[Any, Any]


def _in_turn(order: Sequence[int]) -> _Plan:
    plan: _Plan = order[0]
    for number in order[1:]:
        plan = plan, number
    return plan


def _grouped(order: Sequence[int], chance: random.Random) -> _Plan:
    if len(order) == 1:
        return order[0]
    at = chance.randrange(1, len(order))
    return _grouped(order[:at], chance), _grouped(order[at:], chance)


def _text(plan: _Plan) -> str:
    if isinstance(plan, int):
        return str(plan)
    return f"({_text(plan[0])}, {_text(plan[1])})"


class _Merging:
    """Merges messages like processes."""

    def make(self, number: int) -> Any:
        """Return a message in the form that its process holds."""
        raise NotImplementedError

    def merge(self, one: Any, other: Any) -> Any:
        """Return the merged data of two processes. Both arguments may be changed."""
        raise NotImplementedError

    def stored(self, one: Any) -> Any:
        """Return the data in the form that comes back from the server."""
        raise NotImplementedError

    def shown(self, one: Any) -> Any:
        """Return the form to compare."""
        raise NotImplementedError

    def run(self, plan: _Plan) -> Any:
        """Merge by a plan. Return the result."""
        return self.shown(self._run(plan))

    def _run(self, plan: _Plan) -> Any:
        if isinstance(plan, int):
            return self.make(plan)
        one, other = self._run(plan[0]), self._run(plan[1])
        # Single messages are merged where they arrive; merged data was stored in between.
        if not isinstance(plan[1], int):
            one, other = self.stored(one), self.stored(other)
        return self.merge(one, other)


class _Models(_Merging):
    def __init__(self, model: type[Model], messages: Sequence[Any]) -> None:
        self._model = model
        self._compiled = model._code()  # noqa: SLF001 - a model of ours
        self._rows: list[Mapping[str, Any]] = []
        for message in messages:
            row = mapping_of(message)
            if row is None:
                raise self._compiled.no_mapping(message)
            self._rows.append(row)
        self._id = None
        ids = {self._compiled.fold({}, **row) for row in self._rows}
        if len(ids) > 1:
            raise ConfigurationError(
                f"assert_mergeable() takes messages of one record, not of {sorted(ids, key=str)}"
            )
        (self._id,) = ids

    def make(self, number: int) -> dict[str, Any]:
        doc: dict[str, Any] = {}
        self._compiled.fold(doc, **self._rows[number])
        return doc

    def merge(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        self._compiled.merge(one, other)
        return one

    def stored(self, one: dict[str, Any]) -> Any:
        self._compiled.seal(one)
        doc = _SERIALIZER.loads(_SERIALIZER.dumps(one))
        fault = self._compiled.fault_of(doc)
        assert not fault, fault  # noqa: S101 - the function asserts
        return doc

    def shown(self, one: dict[str, Any]) -> Model:
        return self._model.from_states(self._id, one, None)


class _Updates(_Merging):
    def __init__(self, kind: type[Update], messages: Sequence[Mapping[str, Any]]) -> None:
        self._kind = kind
        self._messages = messages

    def make(self, number: int) -> Update:
        return self._made(copy.deepcopy(dict(self._messages[number])))

    def _made(self, content: dict[str, Any]) -> Update:
        update = object.__new__(self._kind)
        update._id = update.resource_id = ""
        update.spec, update.doc = content.pop("spec", None), content.pop("doc", None)
        for name, value in content.items():
            setattr(update, name, value)
        return update

    def merge(self, one: Update, other: Update) -> Update:
        merge: Callable[[Any], Any] = one.merge
        result = merge(other)
        assert result is None, f"merge() returned {result!r}: it changes self and returns None"  # noqa: S101
        return one

    def stored(self, one: Update) -> Update:
        return self._made(_SERIALIZER.loads(_SERIALIZER.dumps(self.shown(one))))

    def shown(self, one: Update) -> dict[str, Any]:
        return {"spec": one.spec, "doc": one.doc, **one.state()}
