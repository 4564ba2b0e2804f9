"""Models and their collections, in threads and real processes, on a real server."""

import contextlib
import copy
import dataclasses
import enum
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import msgspec
import pydantic
import pytest

from phonon import Model, Process
from phonon._core.compaction import COMPACT_AT
from phonon._models import collecting
from phonon.errors import ConfigurationError, InvalidMessageError, ProcessStoppedError
from phonon.fields import ID, Count, Counter, Latest, ListAppend, Max, SetAppend, Sum, Window
from phonon.serializers import ExactSerializer
from support.world import Make, Redis, key_for, keys_in, wait_until

T = TypeVar("T")


class PageViews(Model, name="test_page_views"):
    user: ID[str]
    views: Sum[int] = Sum()
    pages: Counter[str] = Counter()
    last_seen: Latest[datetime] = Latest()
    recent: Window[str] = Window(2)

    done: ClassVar[list["PageViews"]] = []
    failing: ClassVar[int] = 0

    def on_complete(self) -> None:
        if PageViews.failing:
            PageViews.failing -= 1
            raise ZeroDivisionError
        self.done.append(self)


class Many(Model, name="test_many"):
    id: ID[int]
    hits: Count = Count()

    done: ClassVar[list[list["Many"]]] = []
    failing: ClassVar[set[int]] = set()

    @classmethod
    def on_complete_many(cls, records: Sequence[Self]) -> Any:
        cls.done.append(list(records))
        return [(record, ZeroDivisionError()) for record in records if record.id in cls.failing]


class Plain(Model, name="test_plain"):
    id: ID[int]
    hits: Sum[int] = Sum()
    seen: SetAppend[str] = SetAppend()

    def on_complete(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    PageViews.done.clear()
    Many.done.clear()
    PageViews.failing = 0


class Color(enum.Enum):
    RED = "red"


#: A size that is none. No type checker takes one in brackets.
NOTHING: Any = Window[str, 0]  # type: ignore[misc,valid-type]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_messages_come_to_one_record(make: Make, server: Redis, namespace: str) -> None:
    one, other = make(), make()
    here, there = one.collect(PageViews), other.collect(PageViews)
    with one.batch():
        here.add("ada", views=1, pages={"/": 1}, last_seen=NOON)
        here.add("ada", 2, {"/": 1, "/x": 1}, recent=[(1, "a"), (5, "b")])
    with other.batch():
        there.add("ada", views=4, last_seen=NOON.replace(hour=11), recent=(3, "c"))
    here.expire("ada")
    assert not PageViews.done, "another process holds it"
    there.expire("ada")
    (record,) = PageViews.done
    assert record == PageViews("ada", 7, {"/": 2, "/x": 1}, NOON, [(5, "b"), (3, "c"), (1, "a")])
    assert record.recent == ["b", "c"]
    assert isinstance(record.token, int)
    assert not keys_in(server, namespace)


def test_what_is_here_and_what_is_stored(make: Make) -> None:
    one, other = make(), make()
    here, there = one.collect(PageViews), other.collect(PageViews)
    assert here.read("ada") is None
    here.add("ada", views=1)
    there.add("ada", views=2)
    stored = here.read("ada")
    assert stored is not None
    assert stored.views == 3
    with one.batch():
        here.add("ada", views=4)
        local, stored = here.get("ada"), there.read("ada")
        assert local is not None
        assert stored is not None
        assert (local.views, stored.views) == (4, 3)
    assert here.get("bob") is None
    assert "ada" in here
    assert len(here) == here.size() == 1
    stored = here.read("ada")
    assert stored is not None
    assert stored.views == 7


def test_a_message_is_stored_when_add_returns(make: Make) -> None:
    one, other = make(), make()
    here, there = one.collect(PageViews), other.collect(PageViews)
    here.add("ada", views=1)
    stored = there.read("ada")
    assert stored is not None
    assert stored.views == 1


def test_many_rows_of_all_kinds(make: Make) -> None:
    @dataclasses.dataclass
    class Row:
        user: str
        views: int

    class Pair(NamedTuple):
        user: str
        views: int

    class Struct(msgspec.Struct):
        user: str
        views: int = 0

    class Parsed(pydantic.BaseModel):
        user: str
        views: int

    process = make()
    views = process.collect(PageViews)
    rows = [
        {"user": "ada", "views": 1}, {"user": None}, {"views": 1}, Row("ada", 2), Pair("ada", 4),
        {"user": "ada", "views": "8"}, {"user": "ada", "vews": 8}, 5, PageViews("ada", views=8),
        {"user": "ada", "pages": None}, Struct("ada", 16), Parsed(user="ada", views=32),
    ]  # fmt: skip
    rejected = views.add_many(rows)
    assert [(row, error.field) for row, error in rejected] == [
        (1, "user"), (2, "user"), (5, "views"), (6, "vews"), (7, ""),
    ]  # fmt: skip
    stored = views.read("ada")
    assert stored is not None
    assert stored.views == 63
    lenient = process.collect(PageViews, ignore_unknown=True)
    assert lenient.add_many([{"user": "bob", "views": 1, "vews": 1}]) == []
    lenient.add("bob", views=1, vews=2)  # type: ignore[call-arg]  # it is passed over
    stored = lenient.read("bob")
    assert stored is not None
    assert stored.views == 2


def test_a_refused_message_leaves_nothing(make: Make, server: Redis, namespace: str) -> None:
    process = make()
    views = process.collect(PageViews)
    for message in ({"user": "ada", "vews": 1}, {"user": "ada", "views": 1, "pages": 3}, {}):
        with pytest.raises(InvalidMessageError):
            views.add(**message)  # type: ignore[arg-type]  # what is wrong with them
    assert len(views) == 0
    assert not keys_in(server, namespace)


def test_the_least_recently_used_makes_room(make: Make) -> None:
    process = make()
    views = process.collect(PageViews, max_entries=2)
    with process.batch():
        for user in ("a", "b", "a", "c"):
            views.add(user, views=1)
        assert "b" not in views
    assert [record.user for record in PageViews.done] == ["b"]
    rejected = views.add_many([{"user": f"u{i}", "views": 1} for i in range(100)])
    assert not rejected
    assert len(views) == 2
    assert sum(record.views for record in PageViews.done) == 102


def test_records_complete_together(make: Make) -> None:
    process = make()
    many = process.collect(Many)
    many.add_many({"id": i} for i in range(20))
    many.add(3)
    Many.failing.add(13)
    with pytest.raises(ExceptionGroup):
        many.expire_all()
    Many.failing.clear()
    assert [len(records) for records in Many.done] == [20]
    assert {record.id: record.hits for record in Many.done[0]} == dict.fromkeys(range(20), 1) | {
        3: 2
    }


def test_a_failed_record_is_tried_again_with_its_token(make: Make) -> None:
    process = make()
    views = process.collect(PageViews)
    views.add("ada", views=1)
    PageViews.failing = 1
    with pytest.raises(ZeroDivisionError):
        views.expire("ada")
    wait_until(lambda: PageViews.done)
    assert PageViews.done[0].views == 1


def test_stop_ends_what_is_left(make: Make) -> None:
    process = make()
    views = process.collect(PageViews)
    with process.batch(durable=False):
        views.add("ada", views=1)
        views.add("ada", views=2)
    assert views.read("ada") is None, "it is only here"
    process.stop()
    assert [record.views for record in PageViews.done] == [3]
    with pytest.raises(ProcessStoppedError):
        views.add("ada", views=1)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("again", ["add", "durable", "local", "many", "end"])
def test_a_message_that_comes_again_after_a_block_that_failed(
    make: Make, stored: bool, again: str
) -> None:
    process = make()
    views = process.collect(PageViews)
    with process.batch(durable=stored):
        views.add("ada", views=100)
    with pytest.raises(ZeroDivisionError), process.batch():
        views.add("ada", views=1)
        raise ZeroDivisionError
    if again in ("durable", "local"):
        with process.batch(durable=again == "durable"):
            views.add("ada", views=1)
    elif again == "many":
        views.add_many([{"user": "ada", "views": 1}])
    elif again == "add":
        views.add("ada", views=1)
    process.stop()
    assert sum(record.views for record in PageViews.done) == (100 if again == "end" else 101)


def test_blocks_that_fail_and_blocks_that_do_not(make: Make) -> None:
    """Random messages, of which a block that fails brings none."""
    moves = random.Random(1)  # noqa: S311 - the same moves each time
    process = make()
    views = process.collect(PageViews, max_entries=3)
    expected: dict[str, int] = {}
    for _ in range(400):
        kind = moves.choice(["add", "durable", "local", "failing"])
        users = [f"user-{moves.randrange(6)}" for _ in range(moves.randrange(1, 6))]
        if kind == "add":
            for user in users:
                views.add(user, views=1)
        else:
            with contextlib.suppress(ZeroDivisionError), process.batch(durable=kind != "local"):
                for user in users:
                    views.add(user, views=1)
                if kind == "failing":
                    raise ZeroDivisionError
        if kind != "failing":
            for user in users:
                expected[user] = expected.get(user, 0) + 1
    process.stop()
    found = dict.fromkeys(expected, 0)
    for record in PageViews.done:
        found[record.user] += record.views
    assert found == expected


def test_threads_with_batches_of_their_own(make: Make) -> None:
    process = make()
    views = process.collect(PageViews)
    reader = make().collect(PageViews)
    mine, theirs = threading.Event(), threading.Event()

    def work() -> None:
        mine.wait(10)
        with process.batch():
            views.add("ada", views=2)
        theirs.set()

    thread = threading.Thread(target=work)
    thread.start()
    with process.batch():
        views.add("ada", views=1)
        mine.set()
        assert theirs.wait(10)
        stored = reader.read("ada")
        assert stored is not None
        assert stored.views == 2, "the other thread's block has ended, so its data is stored"
    thread.join()
    stored = reader.read("ada")
    assert stored is not None
    assert stored.views == 3


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns much more often than they do otherwise."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


def test_no_data_is_taken_while_a_message_is_merged(make: Make) -> None:
    views = make().collect(PageViews)
    views.add("ada", views=1)
    record = views._cache._entries["ada"]
    views.add("ada", views=1)
    taking = threading.Thread(target=record.take)
    with views._cache._lock:
        taking.start()
        taking.join(0.2)
        assert taking.is_alive()
    taking.join()


@pytest.mark.slow
@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("durable", [True] * 12 + [False] * 4)
def test_many_threads_lose_and_double_nothing(make: Make, *, durable: bool) -> None:
    process = make()
    views = process.collect(PageViews, max_entries=5)

    def work(seed: int) -> None:
        for first in range(0, 400, 50):
            with process.batch(durable=durable):
                for i in range(first, first + 50):
                    views.add(f"user{(i * seed) % 13}", views=1)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    views.expire_all()
    process.stop()
    assert sum(record.views for record in PageViews.done) == 4 * 400


def test_a_forked_child_begins_with_nothing(make: Make) -> None:
    process = make()
    views = process.collect(PageViews)
    with process.batch(durable=False):
        views.add("ada", views=1)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            views.add("ada", views=10)
            stored = views.read("ada")
            code = 0 if len(views) == 1 and stored and stored.views == 10 else 2
            process.stop()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    views.expire_all()
    assert [record.views for record in PageViews.done] == [11]


def test_what_is_no_model_is_refused(make: Make) -> None:
    process = make()
    with pytest.raises(ConfigurationError, match="a subclass of"):
        process.collect(dict)

    class Silent(Model, name="silent"):
        id: ID[str]

    with pytest.raises(ConfigurationError, match="must define on_complete"):
        process.collect(Silent)
    with pytest.raises(ConfigurationError, match="idle"):
        process.collect(PageViews, idle=-1)

    class Waiting(Model, name="waiting"):
        id: ID[str]

        async def on_complete(self) -> None: ...

    with pytest.raises(ConfigurationError, match="AsyncProcess"):
        process.collect(Waiting)


def test_fields_in_either_spelling() -> None:
    class Old(Model, name="old"):
        id: Any = ID()
        impressions: Any = Sum()
        tags: Any = SetAppend()

    class Base(Model):
        key: ID[int]
        total: Sum[int]

    class Derived(Base, name="derived"):
        items: list[str] = ListAppend()  # type: ignore[assignment]  # a plain type is one as well
        best: "Max[int]" = Max()

    assert list(Old.fields()) == ["id", "impressions", "tags"]
    assert list(Derived.fields()) == ["key", "total", "items", "best"]
    assert Derived(1, 2, ["b", "a"]).items == ["a", "b"]
    with pytest.raises(AttributeError, match="add another message"):
        Derived(1, 2).total = 5


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"__annotations__": {"total": Sum[int], "id": ID[str]}}, "first field"),
        ({"a": ID(), "b": ID()}, "one ID"),
        ({"id": ID(), "token": Sum()}, "model's own"),
        ({"id": ID(), "total": Sum}, r"Sum\(\)"),
        ({"__annotations__": {"id": ID[str], "total": Sum[int]}, "total": 0}, r"= Sum\(\)"),
        ({"__annotations__": {"id": ID[str], "top": NOTHING}}, "at least 1"),
        ({"__annotations__": {"id": ID[str], "n": Sum[int] | None}}, r"n: Sum\[...\] = Sum\(\)"),
        ({"__annotations__": {"id": ID[str], "n": ClassVar[Sum[int]]}}, r"= Sum\(\)"),
        ({"__annotations__": {"id": ID[str], "n": int}, "n": 0}, r"Latest\[int\].*ClassVar"),
        ({"__annotations__": {"id": ID[Color]}}, "values of Color cannot be stored"),
    ],
)
def test_fields_that_cannot_be_a_models_are_refused(body: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        type("Wrong", (Model,), {"__module__": __name__, **body})


def test_what_is_no_field_cannot_take_the_place_of_an_inherited_one() -> None:
    """It would be ignored, and the field would be there."""

    class Base(Model):
        id: ID[str]
        total: Sum[int] = Sum()

    for value in (None, 5, property(len)):
        with pytest.raises(ConfigurationError, match="a field of its base class"):
            type("Wrong", (Base,), {"__module__": __name__, "total": value})
    mixin = type("Mixin", (), {"extra": Sum()})
    with pytest.raises(ConfigurationError, match=r"class Mixin\(Model\)"):
        type("Wrong", (mixin, Base), {"__module__": __name__})


class Best(Model, Generic[T]):
    id: ID[str]
    best: Max[T] = Max()
    ratio: Annotated[Sum[float], "of clicks"] = Sum()


class BestNumber(Best[int], name="best_number"):
    pass


def test_a_generic_model_takes_what_its_subclass_says() -> None:
    assert BestNumber("a", 5, ratio=0.5).best == 5
    with pytest.raises(InvalidMessageError, match=r"BestNumber\.best takes int, not 'x'"):
        BestNumber("a", "x")  # type: ignore[arg-type]  # this is what the test is about


def test_a_record_is_a_value() -> None:
    record = PageViews("ada", views=1, pages={"/": 1})
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 - its own
    assert copy.deepcopy(record) == copy.copy(record) == record
    assert record != PageViews("ada", views=2, pages={"/": 1})
    assert record != "ada"
    assert repr(record).startswith("PageViews(user='ada', views=1, pages={'/': 1}")
    with pytest.raises(AttributeError, match=r"PageViews\.views cannot be deleted"):
        del record.views
    with pytest.raises(TypeError, match="unhashable"):
        hash(record)


def test_arguments_that_no_message_has(make: Make) -> None:
    views: Any = make().collect(PageViews)
    too_many: list[Any] = ["ada", 1, {}, NOON, [], 6]
    with pytest.raises(TypeError, match=r"^PageViews\(\) takes from 0 to 5 positional"):
        PageViews(*too_many)
    with pytest.raises(TypeError, match=r"^add\(\) takes from 0 to 5 positional"):
        views.add(*too_many)
    for whole in ({"user": "ada"}, PageViews("ada")):
        with pytest.raises(InvalidMessageError, match=r"add_many\(\) takes whole messages"):
            views.add(whole)
    for rows in ({"user": "ada"}, PageViews("ada"), "ada"):
        with pytest.raises(ConfigurationError, match="put it into a list"):
            views.add_many(rows)


def test_keys_are_kept_as_plain_text(make: Make) -> None:
    class Name(str):
        __slots__ = ()

    class Kind(enum.StrEnum):
        ADA = "ada"

    process = make()
    views = process.collect(PageViews)
    for key in (Name("ada"), Kind.ADA, "ada"):
        views.add(key, views=1)
    assert len(views) == 1
    stored = views.read("ada")
    assert stored is not None
    assert (stored.views, type(stored.user)) == (3, str)


def test_two_collections_of_a_model_come_to_one_record(make: Make) -> None:
    process = make()
    one, other = process.collect(PageViews), process.collect(PageViews)
    with process.batch(durable=False):
        one.add("ada", views=1)
        other.add("ada", views=2)
    process.stop()
    assert sum(record.views for record in PageViews.done) == 3


def test_a_record_adds_to_another_when_it_is_complete(make: Make) -> None:
    class Chained(Model, name="test_chained"):
        id: ID[int]
        hits: Count = Count()

        def on_complete(self) -> None:
            done.append(self.id)
            if self.id < 3:
                records.add(self.id + 1)

    done: list[int] = []
    records = make().collect(Chained)
    records.add(1)
    while len(records):
        records.expire_all()
    assert done == [1, 2, 3]


def test_naive_times_come_before_aware_ones() -> None:
    early = PageViews("ada", last_seen=NOON)
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 - this is what the test is about
    for order in ([naive, NOON], [NOON, naive]):
        doc: dict[str, Any] = {}
        for time in order:
            PageViews._code().fold(doc, "ada", last_seen=time)
        assert doc["last_seen"] == [NOON, NOON]
    assert early.last_seen == NOON


def test_read_shows_what_threads_of_a_process_have_stored(make: Make) -> None:
    process: Process = make()
    views = process.collect(PageViews)
    for i in range(1100):
        with process.batch():
            views.add("ada", views=1, pages={str(i % 3): 1})
    stored = views.read("ada")
    assert stored is not None
    assert stored.views == 1100


class Rushed:
    """A serializer in whose middle a message comes, as one from a signal handler would."""

    name = "rushed"

    def __init__(self) -> None:
        self.rush: Callable[[], object] = lambda: None
        self._exact = ExactSerializer()

    def dumps(self, value: Any) -> bytes:
        rush, self.rush = self.rush, lambda: None
        rush()
        return self._exact.dumps(value)

    def loads(self, data: bytes) -> Any:
        return self._exact.loads(data)


def test_a_message_that_comes_while_its_record_is_stored_is_kept(make: Make) -> None:
    serializer = Rushed()
    process = make(serializer=serializer)
    views = process.collect(PageViews)
    with process.batch(durable=False):
        views.add("ada", views=1)
    serializer.rush = lambda: views.add("ada", views=2)
    views.expire("ada")
    views.expire_all()
    assert sum(record.views for record in PageViews.done) == 3


def test_a_record_that_cannot_be_stored_stays(make: Make) -> None:
    serializer = Rushed()
    process = make(serializer=serializer)
    views = process.collect(PageViews)
    with process.batch(durable=False):
        views.add("ada", views=1)

    def rush() -> None:
        with process.batch(durable=False):
            views.add("ada", views=2)
        raise ZeroDivisionError

    serializer.rush = rush
    with pytest.raises(ZeroDivisionError):
        views.expire("ada")
    views.expire("ada")
    assert [record.views for record in PageViews.done] == [3]


@pytest.mark.parametrize("has_gil", [True, False])
def test_threads_add_while_others_end_the_session(
    make: Make, monkeypatch: pytest.MonkeyPatch, has_gil: bool
) -> None:
    monkeypatch.setattr(collecting, "_HAS_GIL", has_gil)
    process = make()
    views = process.collect(PageViews, max_entries=2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def work() -> None:
            with process.batch(durable=False):
                for i in range(600):
                    views.add(f"user{i % 3}", views=1, pages={"/": 1})

        def end() -> None:
            for _ in range(30):
                views.expire_all()
                views.add_many([{"user": "user0", "views": 0}])

        threads = [threading.Thread(target=run) for run in (work, work, end)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    process.stop()
    assert sum(record.views for record in PageViews.done) == 2 * 600
    assert sum(record.pages.get("/", 0) for record in PageViews.done) == 2 * 600


def test_a_message_outside_of_another_threads_durable_batch_is_kept(make: Make) -> None:
    process = make()
    views = process.collect(PageViews)

    def work() -> None:
        with process.batch(durable=False):
            views.add("ada", views=2)

    with process.batch():
        views.add("ada", views=1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    views.expire_all()
    assert sum(record.views for record in PageViews.done) == 3


@pytest.mark.parametrize("durable", [True, False])
def test_a_batch_that_fails_leaves_nothing_in_its_records(make: Make, durable: bool) -> None:
    process = make()
    views = process.collect(PageViews)
    with process.batch(durable=durable):
        views.add("ada", views=4)
    with pytest.raises(ZeroDivisionError), process.batch():
        views.add("ada", views=1)
        raise ZeroDivisionError
    with process.batch():
        views.add("ada", views=2)
    views.expire_all()
    assert [record.views for record in PageViews.done] == [6]


def test_partials_of_a_long_session_are_merged_by_compiled_code(
    make: Make, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, client = make(), server.client()
    records = process.collect(Plain)
    key = key_for(process, "partials", f"model.test_plain.{7}")
    decoded: list[Any] = []
    decode = process.engine.codec.decode

    def watched(*arguments: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(process.engine.codec, "decode", watched)
    for number in range(COMPACT_AT):
        records.add(7, hits=number, seen=str(number % 5))
    assert client.llen(key) == 1
    assert not decoded

    # One that cannot be read stays, and the others are merged as ever.
    client.rpush(key, b"damaged")
    for number in range(COMPACT_AT - 2):
        records.add(7, hits=number, seen="x")
    assert decoded
    assert b"damaged" in client.lrange(key, 0, -1)
    client.lrem(key, 1, "damaged")
    found = records.read(7)
    assert found == Plain(
        7, hits=sum(range(COMPACT_AT)) + sum(range(COMPACT_AT - 2)), seen={*"01234x"}
    )
