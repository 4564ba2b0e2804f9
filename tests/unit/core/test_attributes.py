"""Methods that are compiled for a `state` that lists attributes do what the general ones do."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from phonon import Process, Update
from phonon._core import classes, codec
from phonon._core.attributes import attributes_of
from phonon._core.local import LocalUpdate


class Both(Update, name="test.Both"):
    """The base of two classes that differ in whether `state` only lists attributes."""

    def __init__(self, process: Any, one: Any, two: Any) -> None:
        self.one, self.two = one, two
        super().__init__(process, "x", init_cache=False)

    def merge(self, other: Any) -> None:
        self.one = [self.one, other.one]
        self.two = [self.two, other.two]
        self.doc = self.doc or other.doc

    def reset_states(self) -> None:
        self.one, self.two = 0, set()


class Listed(Both, name="test.Listed"):
    def state(self) -> dict[str, Any]:
        """All there is."""
        return {"one": self.one, "two": self.two}


class Worked(Both, name="test.Worked"):
    def state(self) -> dict[str, Any]:
        return dict(one=self.one, two=self.two)  # noqa: C408 - not compiled


VALUES: list[Any] = [
    None, True, 0, 1, 2.5, "", "a", b"", b"a", 2**80, "\ud800",
    [], [1], [[1]], [{1}], (), (1,), set(), {1}, {(1, 2)}, frozenset(), frozenset({1}),
    {}, {"a": 1}, Decimal(1), bytearray(b"a"), date(2000, 1, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process("embedded://") as made:
        yield made


def made(cls: Any, process: Process, one: Any, two: Any = 1) -> Any:
    return cls(process, deepcopy(one), deepcopy(two))


class Methods:
    """Methods that list attributes, and methods that do something else."""

    field: Any

    def listed(this) -> Any:  # noqa: N805 - any name will do
        return {"a": this.a, "b": this.b}  # type: ignore[attr-defined]  # never called

    def renamed(self) -> Any:
        return {"b": self.field}

    def computed(self) -> Any:
        return {"field": self.field + 1}

    def called(self) -> Any:
        return {"field": self.field()}

    def sometimes(self) -> Any:
        if not self.field:
            return {}
        return {"field": self.field}

    def of_another(self, other: Any = None) -> Any:
        return {"field": other.field}

    def half(self) -> Any:
        return {"field": self.field, "one": 1}

    async def later(self) -> Any:
        return {"field": self.field}

    def each(self) -> Any:
        yield {"field": self.field}


def test_only_what_lists_attributes_is_compiled() -> None:
    assert tuple(attributes_of(Methods.listed)) == ("a", "b")
    assert tuple(attributes_of(Listed.state)) == ("one", "two")
    methods = [method for name, method in vars(Methods).items() if not name.startswith("_")]
    for other in (*methods[1:], Worked.state, Update.state, print, None):
        assert tuple(attributes_of(other)) == (), other


def test_a_class_has_the_methods_of_its_own_state() -> None:
    class Same(Listed, name="test.Same"):
        pass

    class Odd(Listed, name="test.Odd"):
        def state(self) -> dict[str, Any]:
            return {**super().state(), "three": 3}

    class Even(Odd, name="test.Even"):
        def state(self) -> dict[str, Any]:
            return {"one": self.one}

    def mark(cls: Any) -> Callable[..., Any]:
        return cls._mark_  # type: ignore[no-any-return]  # a method

    assert mark(Same) is mark(Listed) is not LocalUpdate._mark_
    assert mark(Odd) is mark(Worked) is LocalUpdate._mark_
    assert mark(Even) not in {mark(Listed), mark(Odd)}
    for cls in (Same, Odd, Even):
        classes.forget(cls)


def test_a_decorator_of_the_class_may_replace_its_methods(process: Process) -> None:
    """Which are looked at again when the first instance is made."""

    def stamped(cls: Any) -> Any:
        before = cls.state
        cls.state = lambda self: {**before(self), "seen": self.seen}
        cls.is_expired = lambda _: True
        return cls

    class Bare(Update, name="test.Bare"):
        seen = 0

        def merge(self, other: Any) -> None:
            self.seen += other.seen

        def reset_states(self) -> None:
            self.seen = 0

    class Given(Bare, name="test.Given"):
        def state(self) -> dict[str, Any]:
            return {"doc": self.doc}

    for cls in (Bare, Given):
        mine, theirs = (stamped(cls)(process, "x", init_cache=False) for _ in range(2))
        assert mine.take() is not None
        theirs.seen = 5
        mine.refresh(theirs)
        assert mine.seen == 5, "adopted, because the other was sent"
        assert not cls._has_default_expiry_
        classes.forget(cls)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_fares_alike(value: Any, process: Process) -> None:
    def of(cls: Any) -> list[Any]:
        serializer = process.engine.codec.serializer
        update = made(cls, process, value)
        seen: list[Any] = [update.state(), codec.dump(update, serializer), update._content_()]
        mine = made(cls, process, 1)
        mine.one = deepcopy(value)
        seen += [mine._survey_(), mine._mark_(), mine._emptied_]
        partial = update.take()
        seen += [partial.replace(cls.__name__.encode(), b""), update.has_unsent()]
        update.one = deepcopy(value)
        seen += [update.has_unsent(), update.take() is None]
        update.one = deepcopy(value)
        update.mark_sent()
        update._mark_()
        seen += [update.has_unsent(), update._emptied_.__class__]
        for change, argument in (("clear", ()), ("append", (1,)), ("add", (1,))):
            if hasattr(update.one, change):
                getattr(update.one, change)(*argument)
            seen += [update.has_unsent()]
        update.mark_sent()
        update._adopt_(made(cls, process, value))
        return [*seen, update.state(), update.spec, update.doc]

    assert of(Listed) == of(Worked)


def test_a_callers_set_is_copied(process: Process) -> None:
    for cls in (Listed, Worked):
        mine, theirs = {1}, [2]
        update: Any = cls(process, mine, theirs)
        mine.add(3)
        theirs.append(4)
        assert update.state() == {"one": {1}, "two": [2]}


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_stored_content_is_merged_alike(value: Any, process: Process) -> None:
    found = []
    for cls in (Listed, Worked):
        partials = [made(cls, process, n, value).take() for n in range(5)]
        (partial,) = process.engine.codec.merge("test.test.x", partials)
        merged = process.engine.codec.decode("test.test.x", partial, "")
        found.append([merged.state(), merged.spec, merged.doc, merged.resource_id])
    assert found[0] == found[1]
    one = [[[[0, 1], 2], 3], 4]
    assert found[0][0] == {"one": one, "two": [[[[value] * 2, value], value], value]}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_batch_is_read_alike(value: Any, count: int, process: Process) -> None:
    """By the update whose session has ended, or by any, before and after the first one."""
    found = []
    for cls in (Listed, Worked):
        partials = [made(cls, process, n, value).take() for n in range(count)]
        local = made(cls, process, 7)
        local.mark_sent()
        for update in (None, local, None, local):
            (record,) = process.engine.codec.records("test.test.x", partials, update)
            instance = record.begin(12)
            assert (instance is local) is (update is local)
            found.append([instance.state(), instance.spec, instance.doc, instance.token])
            record.finish()
    assert all(each == found[0] for each in found)


def test_what_is_merged_has_all_that_a_decoded_update_has(process: Process) -> None:
    class Nosy(Listed, name="test.Nosy"):
        seen: list[dict[str, Any]] = []  # noqa: RUF012 - of this test

        def merge(self, other: Any) -> None:
            slots = {*LocalUpdate.__slots__} - {"__dict__", "__weakref__", "_begun_", "_touched_"}
            self.seen.append({name: getattr(other, name) for name in slots} | vars(other))

    partials = [made(Nosy, process, 1).take()] * 5
    process.engine.codec.merge("test.test.x", partials)
    first, *others = Nosy.seen
    decoded = process.engine.codec.decode("test.test.x", partials[0], "")
    Nosy.merge(decoded, decoded)
    assert [first] * 4 == [*others, Nosy.seen[-1]]
    classes.forget(Nosy)


def test_what_is_not_alike_is_merged_all_the_same(process: Process) -> None:
    """Partials of another record, or of the class's earlier form, among others."""
    made_of = process.engine.codec
    partials = [made(Listed, process, n).take() for n in range(4)]
    update = made(Listed, process, 9)
    update.doc = {"n": {1}}
    odd = update.take()
    for at in range(5):
        (partial,) = made_of.merge("test.test.x", [*partials[:at], odd, *partials[at:]])
        merged = made_of.decode("test.test.x", partial, "")
        numbers = str(merged.one).replace("[", "").replace("]", "").split(", ")
        assert [int(n) for n in numbers] == [*range(at), 9, *range(at, 4)]
        assert merged.doc == {"n": {1}}
    other = Listed(process, 1, 2)
    other.resource_id, other._id = "test.test.y", "y"
    more = ["x", "test", "test", None, None, {"one": 1, "two": 2, "three": 3}]
    content = made_of.serializer.dumps(more)
    for foreign in (other.take(), codec.enveloped(Listed, made_of.serializer, content)):
        kept = made_of.merge("test.test.x", [*partials, foreign])
        assert kept[1:] == [foreign], "left as it is"
        assert made_of.decode("test.test.x", kept[0], "").one == [[[0, 1], 2], 3]


def test_an_attribute_that_is_missing_is_named_where_the_state_reads_it(process: Process) -> None:
    class Late(Update, name="test.Late"):
        missing: Any

        def state(self) -> dict[str, Any]:
            return {"missing": self.missing}

    with pytest.raises(AttributeError, match="missing") as caught:
        Late(process, 1)
    assert caught.traceback[-1].name == "state"
    assert "set the attributes that it returns before" in caught.value.__notes__[0]
    classes.forget(Late)
