"""Updates: merged wherever they arrive, executed once, by whoever is last."""

import gc
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, ClassVar, cast
from uuid import UUID

import msgpack
import pytest
import redis

import phonon.update
from phonon import (
    ConflictFreeUpdate,
    LruCache,
    Process,
    RetryPolicy,
    SignedPickleSerializer,
    Update,
)
from phonon._core import sessions
from phonon._core.executor import TOKENS
from phonon.errors import NotStorableError, UndecodableError, UnknownClassError
from support.samples import Sluice, Tally, Written, forget, fresh, put
from support.world import Make, Redis, key_for, retry_now, wait_until

SOON = RetryPolicy(attempts=3, first_delay=0.01, longest_delay=0.02)


class Count(ConflictFreeUpdate):
    """Notes what is executed, and fails as often as it is told to."""

    executed: ClassVar[list[tuple[str, Any, int]]] = []
    failures: ClassVar[list[BaseException]] = []

    def execute(self) -> None:
        if self.failures:
            raise self.failures.pop(0)
        assert self.token
        self.executed.append((self.resource_id, dict(self.doc), self.token))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Count.executed.clear()
    Count.failures.clear()


def docs() -> list[Any]:
    return [doc for _, doc, _ in Count.executed]


@pytest.mark.parametrize("init_cache", [True, False])
def test_three_processes_make_one_write(
    make: Make, keys: Callable[[], set[str]], *, init_cache: bool
) -> None:
    updates = [Count(make(), 1, doc={"n": n}, init_cache=init_cache) for n in (1, 20, 300)]
    assert updates[0].ref.count() == 3
    updates[1].end_session()
    updates[0].end_session()
    assert docs() == []
    updates[2].end_session()
    assert docs() == [{"n": 321}]
    assert keys() == set()
    assert updates[2].token is None


def test_data_that_is_stored_is_not_sent_again(make: Make) -> None:
    process = make()
    update = Count(process, 1, doc={"n": 1})
    update.cache()
    update.cache()
    assert update.ref.get_times_modified() == 1
    update.refresh(Count(process, 1, doc={"n": 10}))
    update.end_session()
    update.end_session()
    assert docs() == [{"n": 11}]


def test_an_update_that_was_merged_into_another_is_spent(make: Make) -> None:
    process = make()
    update, other = (Count(process, 1, doc={"n": n}, init_cache=False) for n in (1, 10))
    update.refresh(other)
    update.end_session()
    other.end_session()
    assert docs() == [{"n": 11}]


def test_a_change_made_by_hand_after_storing_is_not_lost(make: Make) -> None:
    update = Count(make(), 1, doc={"n": 1})
    update.doc["n"] = 5
    update.end_session()
    update.doc["n"] = 100
    update.end_session()
    assert docs() == [{"n": 6}, {"n": 100}]


class WithState(Update):
    seen: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, pages: Any = (), **options: Any) -> None:
        self.pages = set(pages)
        super().__init__(*args, **options)

    def state(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def clear(self) -> dict[str, Any]:
        return {"pages": set()}

    def merge(self, other: Any) -> None:
        self.pages |= other.pages

    def execute(self) -> None:
        self.seen.append((self.spec, self.database, self.collection, self.pages))


def test_own_attributes_travel_and_the_constructor_is_not_needed(make: Make) -> None:
    key = {(1, None): Decimal("1.10"), b"raw": 2**80}
    update = WithState(make(), "a", "db", "users", spec=key, pages={"x"})
    assert update.pages == set(), "they are on the server"
    other = WithState(make(), "a", "db", "users", spec=key, pages={"y"}, init_cache=False)
    update.end_session()
    other.end_session()
    assert WithState.seen == [(key, "db", "users", {"x", "y"})]
    WithState.seen.clear()


class Sibling(Count):
    pass


def test_two_classes_of_one_record_execute_one_after_the_other(make: Make) -> None:
    one, other = make(), make()
    first = Count(one, 1, doc={"n": 1})
    second = Sibling(other, 1, doc={"n": 2})
    Count(one, 1, doc={"n": 4})
    first.end_session()
    second.end_session()
    assert docs() == [{"n": 5}, {"n": 2}]
    tokens = [token for _, _, token in Count.executed]
    assert tokens[0] < tokens[1]
    Count(one, 1, doc={"n": 8}).end_session()
    assert Count.executed[-1][2] > tokens[1]


@pytest.mark.parametrize("init_cache", [True, False])
def test_what_cannot_be_stored_is_refused_where_it_is_made(make: Make, *, init_cache: bool) -> None:
    with pytest.raises(NotStorableError, match=r"Count\.doc\['tags'\]\[1\]"):
        Count(make(), 1, doc={"tags": ["a", object()]}, init_cache=init_cache)


def test_attributes_set_too_late_are_explained(make: Make) -> None:
    class Late(WithState):
        def __init__(self, *args: Any) -> None:
            Update.__init__(self, *args)
            self.pages = set()

    with pytest.raises(AttributeError) as raised:
        Late(make(), 1)
    assert "before calling super().__init__()" in raised.value.__notes__[0]


def test_a_failing_execute_is_raised_kept_and_tried_again(
    make: Make, keys: Callable[[], set[str]]
) -> None:
    update = Count(make(retry=SOON), 1, doc={"n": 1})
    Count.failures += [ZeroDivisionError("first"), ZeroDivisionError("second")]
    with pytest.raises(ZeroDivisionError, match="first") as raised:
        update.end_session()
    assert "tried again" in raised.value.__notes__[0]
    wait_until(docs)
    assert docs() == [{"n": 1}]
    wait_until(lambda: keys() == set())


def test_a_batch_that_keeps_failing_is_parked_and_makes_way(
    make: Make, keys: Callable[[], set[str]]
) -> None:
    process = make(retry=SOON)
    update = Count(process, 1, doc={"n": 1})
    Count.failures += [ZeroDivisionError()] * 3
    with pytest.raises(ZeroDivisionError):
        update.end_session()
    Count(process, 1, doc={"n": 2}).end_session()  # waits its turn, or finds the way free
    wait_until(docs)
    assert docs() == [{"n": 2}]
    (found,) = process.parked()
    server_token = found.token // TOKENS
    assert keys() == {"parked", "parked:test.test.1", f"dead:{server_token}:test.test.1"}


def test_what_cannot_be_read_is_parked_at_once(make: Make, server: Redis) -> None:
    process = make(retry=SOON)
    update = Count(process, 1, doc={"n": 1})
    with server.client() as client:
        client.rpush(key_for(process, "partials", update.resource_id), b"not ours")
        with pytest.raises(UndecodableError, match=r":batch:test\.test\.1 is not one of Phonon's"):
            update.end_session()
        assert client.hlen(key_for(process, "parked", update.resource_id)) == 1
    assert docs() == []


def test_another_serializer(make: Make, server: Redis) -> None:
    options: dict[str, Any] = {"serializer": SignedPickleSerializer(b"k" * 16), "retry": SOON}
    here, there = make(**options), make(**options)
    one = Count(here, 1, doc={"n": complex(1, 2)})
    two = Count(there, 1, doc={"n": complex(1, 2)})
    one.end_session()
    two.end_session()
    assert docs() == [{"n": complex(2, 4)}]
    stored = Count(here, 2, doc={"n": 1})
    stranger = Count(make(retry=SOON), 2, doc={"n": 1}, init_cache=False)
    stored.end_session()
    with pytest.raises(UndecodableError, match="same serializer="):
        stranger.end_session()


def test_a_forced_or_expired_session_executes_though_others_hold_it(make: Make) -> None:
    one, other = make(), make()
    Count(other, 1, doc={"n": 1})
    held = other.create_reference("test.test.1")
    Count(one, 1, doc={"n": 2}).force_expiry()
    assert docs() == [{"n": 3}]
    assert held.count() == 1, "the other one goes on"
    expired = Count(one, 1, doc={"n": 4}, soft_session=0)
    assert expired.is_expired()
    assert not Count(one, 1, doc={}).is_expired()
    assert Count(one, 1, doc={}, hard_session=0).is_expired()
    expired.end_session()
    assert docs() == [{"n": 3}, {"n": 4}]


def test_a_session_that_ends_during_a_batch_is_its_owners(make: Make) -> None:
    executing, go_on = threading.Event(), threading.Event()

    class Slow(Count):
        def execute(self) -> None:
            executing.set()
            assert go_on.wait(20)
            super().execute()

    one, other = make(), make()
    first = Slow(one, 1, doc={"n": 1})
    thread = threading.Thread(target=first.end_session)
    thread.start()
    assert executing.wait(20)
    newcomer = Slow(other, 1, doc={"n": 2})
    assert newcomer.ref.count() == 1
    newcomer.end_session()  # does not wait
    assert docs() == []
    go_on.set()
    thread.join()
    assert docs() == [{"n": 1}, {"n": 2}]
    assert Count.executed[0][2] < Count.executed[1][2]


def test_execute_may_use_its_own_process_and_resource(make: Make) -> None:
    process = make()

    class Nested(Count):
        def execute(self) -> None:
            with self.process().lock(self.resource_id):
                super().execute()
            Count(self.process(), self._id, doc={"later": 1})

    Nested(process, 1, doc={"n": 1}).end_session()
    assert docs() == [{"n": 1}]
    process.create_reference("test.test.1").dereference()
    assert docs() == [{"n": 1}, {"later": 1}]


# The content of an update


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(phonon.update, "time", clock)
    monkeypatch.setattr(sessions, "time", clock)
    return clock


@pytest.fixture
def admin(server: Redis) -> Iterator["redis.Redis"]:
    with server.client() as client:
        yield client


def test_what_the_constructor_is_told_is_there(make: Make) -> None:
    process = make()
    sheet = fresh()
    update = sheet(process, "id", "db", "users", {"_id": "id"}, {"n": 1}, False, False, 20, 10)
    assert update.process() is process
    assert (update._id, update.database, update.collection) == ("id", "db", "users")
    assert (update.spec, update.doc) == ({"_id": "id"}, {"n": 1})
    assert (update.block, update.hard_session, update.soft_session) == (False, 20, 10)
    assert update.resource_id == "db.users.id"
    assert update.ref.resource_key == "db.users.id"
    assert update.ref is update.ref
    assert update.ref.block is False
    assert update.token is None
    assert "db.users.id" in repr(update)
    default = sheet(process, 7)
    assert (default.database, default.collection, default.resource_id) == (
        "test",
        "test",
        "test.test.7",
    )
    assert (default.spec, default.doc, default.block) == (None, None, True)
    assert default.soft_session < default.hard_session
    default.doc = {}
    default.end_session()


def test_names_of_databases_and_collections_do_not_run_together(process: Process) -> None:
    sheet = fresh()
    names = [("a", "b.c"), ("a.b", "c"), ("a%2Eb", "c"), ("a", "b%2Ec"), ("a.b.c", ""), ("", "")]
    updates = [sheet(process, "d", *name, doc={"n": 1}) for name in names]
    assert len({update.resource_id for update in updates}) == len(names)
    for update in updates:
        update.end_session()
    assert len(sheet.written) == len(names)


VALUES: dict[str, Any] = {
    "nothing": None,
    "truth": [True, False],
    "huge": [2**64, -(2**64), 10**100],
    "float": [0.1, -0.0, math.inf, -math.inf],
    "text": ["", "ключ", "\x00", "\udc80"],
    "bytes": b"\x00\xff",
    "nested": [(1, (2,)), [[]], {"a": {"b": ({3}, frozenset({(4,)}))}}],
    "keys": {1: "int", (1, 2): "tuple", None: "none", b"b": "bytes", 1.5: "float"},
    "aware": datetime(2026, 11, 21, 1, 2, 3, 4, tzinfo=UTC),
    "offset": datetime(2026, 11, 21, tzinfo=timezone(timedelta(hours=-5), "EST")),
    "naive": datetime(2026, 11, 21, 1, 2, 3, 4, fold=1),  # noqa: DTZ001 - that is the point
    "day": date(2026, 11, 21),
    "span": timedelta(days=-1, microseconds=1),
    "decimal": [Decimal("1.10"), Decimal("NaN"), Decimal("-0E+3")],
    "uuid": UUID(int=5),
    "ordered": OrderedDict(b=1, a=2),
}


class Keeper(Update):
    """Keeps what it gets, wherever it is kept."""

    seen: ClassVar[list["Keeper"]] = []

    def __init__(self, process: Process, own: Any, needed: str, **options: Any) -> None:
        self.own = own
        self.needed = needed
        super().__init__(process, "k", "db.x", "co", **options)

    def state(self) -> dict[str, Any]:
        return {"own": self.own}

    def merge(self, other: Any) -> None:
        self.own = self.own or other.own
        self.spec = self.spec or other.spec
        self.doc = self.doc or other.doc

    def execute(self) -> None:
        self.seen.append(self)


@pytest.fixture
def seen() -> Iterator[list[Keeper]]:
    yield Keeper.seen
    Keeper.seen.clear()


def test_every_value_comes_back_in_another_process(make: Make, seen: list[Keeper]) -> None:
    one, other = make(), make()
    reference = other.create_reference("db%2Ex.co.k")
    update = Keeper(one, VALUES, "by the constructor", spec=VALUES, doc=VALUES)
    assert update.resource_id == "db%2Ex.co.k"
    update.end_session()
    assert seen == []
    assert reference.dereference()
    (rebuilt,) = seen
    assert rebuilt is not update
    for found in (rebuilt.spec, rebuilt.doc, rebuilt.own):
        assert repr(found) == repr(VALUES), "types and all, NaN too"
        assert [type(value) for value in found.values()] == [
            type(value) for value in VALUES.values()
        ]
    assert (rebuilt._id, rebuilt.database, rebuilt.collection) == ("k", "db.x", "co")
    assert rebuilt.process() is other
    assert not hasattr(rebuilt, "needed"), "its constructor was not called"
    assert not rebuilt.is_expired()


def test_the_update_that_ends_the_session_executes_itself(make: Make, seen: list[Keeper]) -> None:
    one, other = make(), make()
    Keeper(one, 1, "of one").end_session()
    update = Keeper(other, None, "of the other", doc={"n": 2})
    Keeper(one, 1, "of one").end_session()
    update.end_session()
    assert seen[-1] is update
    assert (update.needed, update.own) == ("of the other", 1)


@pytest.mark.parametrize("key", [1, "1.2", (1, "b"), "", "ключ", b"raw", None, 2**70])
def test_any_storable_value_is_a_key(key: Any, make: Make) -> None:
    sheet = fresh()
    one, two = make(), make()
    here, there = put(sheet, one, key, 1), put(sheet, two, key, 2)
    there.end_session()
    here.end_session()
    assert sheet.docs() == {key: {"n": 3}}


class Mutating(Keeper):
    def reset_states(self) -> None:
        self.own = []


class ByName(Keeper):
    def clear(self) -> dict[str, Any]:
        return {"own": []}


class Returning(Keeper):
    def reset_states(self) -> dict[str, Any]:
        return {"own": []}


@pytest.mark.parametrize("kind", [Mutating, ByName, Returning])
def test_what_is_stored_is_emptied(kind: type[Keeper], process: Process, seen: Any) -> None:
    update = kind(process, [1], "x", spec={"id": 1}, doc={"n": 1}, init_cache=False)
    assert (update.own, update.doc) == ([1], {"n": 1})
    assert update.has_unsent()
    update.cache()
    assert (update.own, update.doc, update.spec) == ([], {}, {"id": 1})
    assert not update.has_unsent()
    update.end_session()
    assert [(entry.own, entry.doc) for entry in seen] == [([1], {"n": 1})]


class Guarded(Update):
    """Its state is behind a property, and it has no dictionary of its own to put it in."""

    __slots__ = ("_total",)
    seen: ClassVar[list[int]] = []

    def __init__(self, process: Process, total: int) -> None:
        self.total = total
        super().__init__(process, "g")

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def reset_states(self) -> dict[str, Any]:
        return {"total": 0}

    def merge(self, other: Any) -> None:
        self.total += other.total

    def execute(self) -> None:
        self.seen.append(self.total)


def test_state_may_be_properties(make: Make) -> None:
    one, other = make(), make()
    first, second = Guarded(one, 1), Guarded(other, 20)
    assert first.total == 0
    first.end_session()
    second.end_session()
    assert Guarded.seen == [21]
    Guarded.seen.clear()


@pytest.mark.parametrize("init_cache", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"doc": {"a": [1, {"b": object()}]}}, r"Keeper\.doc\['a'\]\[1\]\['b'\]"),
        ({"spec": object()}, r"Keeper\.spec"),
        ({"own": {1, Clock}}, r"Keeper\.own\[element"),
    ],
)
def test_what_cannot_be_stored_is_named(
    options: dict[str, Any],
    path: str,
    init_cache: bool,
    batched: bool,
    process: Process,
    keys: Callable[[], set[str]],
) -> None:
    given = {"own": None, **options, "init_cache": init_cache}
    with pytest.raises(NotStorableError, match=path):
        if batched:
            with process.batch():
                Keeper(process, needed="x", **given)
        else:
            Keeper(process, needed="x", **given)
    assert keys() == set()
    assert process.get_registry() == []


def test_a_change_that_cannot_be_stored_is_kept(process: Process) -> None:
    sheet = fresh()
    update = put(sheet, process, "a", 1)
    update.doc = {"n": 2, "odd": object()}
    for call in (update.cache, update.end_session):
        with pytest.raises(NotStorableError, match=r"Sheet\.doc\['odd'\]"):
            call()
        assert update.doc["n"] == 2
    assert update.ref.count() == 1
    del update.doc["odd"]
    update.end_session()
    assert sheet.docs() == {"a": {"n": 3}}


def test_updates_must_say_how(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Update):
        pass

    class Sums(ConflictFreeUpdate):
        pass

    one, two = (Bare(process, "a", init_cache=False, doc={}) for _ in range(2))
    with pytest.raises(NotImplementedError, match=r"Bare must define merge\(other\)"):
        one.refresh(two)
    for update in (one, Sums(process, "b", init_cache=False)):
        with pytest.raises(NotImplementedError, match=r"must define execute\(\)"):
            update.execute()
    with process.lock("quiet"):  # what is left need not be executed
        one.doc = two.doc = None
    # When the process stops it has to execute what is left.
    for kind in (Bare, Sums):
        monkeypatch.setattr(kind, "execute", lambda _: None)
        monkeypatch.setattr(kind, "merge", lambda _, __: None)
    process.stop()


@pytest.mark.parametrize(
    ("mine", "theirs", "sum_"),
    [
        ({"n": 1}, {"n": 2, "m": 3}, {"n": 3, "m": 3}),
        ({"a": {"b": 1}}, {"a": {"b": 2, "c": 5}}, {"a": {"b": 3, "c": 5}}),
        ({"n": Decimal("1.1")}, {"n": 2}, {"n": Decimal("3.1")}),
        ({"s": "a"}, {"s": "b"}, {"s": "b"}),
        ({"s": "b"}, {"s": "a"}, {"s": "b"}),
        ({"f": False}, {"f": True}, {"f": True}),
        ({"n": None}, {"n": 1}, {"n": 1}),
        ({"n": 1}, {"n": None}, {"n": 1}),
        (None, {"n": 1}, {"n": 1}),
        ({"n": 1}, None, {"n": 1}),
    ],
)
def test_numbers_add_up(mine: Any, theirs: Any, sum_: Any, make: Make) -> None:
    one, two = make(), make()
    here, there = Count(one, 1, doc=mine), Count(two, 1, doc=theirs)
    there.end_session()
    here.end_session()
    assert docs() == [sum_]


def test_what_does_not_add_up_is_named(process: Process) -> None:
    one, two = (Count(process, 1, doc={"n": n}, init_cache=False) for n in ("a", 1))
    with pytest.raises(TypeError, match=r"doc\['n'\]: str and int do not add up; override merge"):
        one.refresh(two)


# Sessions


def test_one_write_by_the_last_of_three(make: Make) -> None:
    sheet = fresh()
    processes = [make() for _ in range(3)]
    updates = []
    for process in processes:
        cache = put(sheet, process, "a", 1)
        for _ in range(9):
            cache.refresh(put(sheet, process, "a", 1))
        updates.append(cache)
    for update in (updates[2], updates[0]):
        update.end_session()
        assert sheet.written == []
    updates[1].end_session()
    (written,) = sheet.written
    assert written == Written("a", {"n": 30}, written.token, processes[1].id)


def test_a_token_is_there_while_execute_runs_and_grows(process: Process) -> None:
    tokens: list[int | None] = []

    class Watched(Tally):
        def execute(self) -> None:
            tokens.append(self.token)
            if len(tokens) == 2:
                raise OSError("once")

    for attempt in range(4):
        update = put(Watched, process, "a")
        assert update.token is None
        if attempt == 1:
            with pytest.raises(OSError, match="once"):
                update.end_session()
            retry_now(process)
        else:
            update.end_session()
        assert update.token is None
    assert None not in tokens
    grown = [token for token in tokens if token is not None]
    assert grown[1] == grown[2], "stable over retries of a batch"
    assert sorted(set(grown)) == [*grown[:2], *grown[3:]]


def test_a_record_can_be_ended_many_times(process: Process) -> None:
    sheet = fresh()
    update = put(sheet, process, "a", 1)
    update.end_session()
    update.end_session()
    update.cache()
    update.refresh(put(sheet, process, "a", 2))
    update.end_session()
    update.end_session()
    assert [entry.doc for entry in sheet.written] == [{"n": 1}, {"n": 2}]
    assert process.get_registry() == []


def test_an_update_is_not_merged_into_itself(process: Process) -> None:
    sheet = fresh()
    cache: LruCache[Tally] = LruCache()
    cache.set("a", put(sheet, process, "a", 1, init_cache=False))
    update = cache.get("a")
    assert update is not None
    update.doc["n"] += 10
    assert cache.set("a", update) is False
    assert update.doc == {"n": 11}
    with process.batch():
        update.doc["n"] += 100
        cache.set("a", update)
    assert not update.has_unsent()
    cache.expire_all()
    assert sheet.docs() == {"a": {"n": 111}}


def test_a_session_ends_when_it_is_silent(clock: Clock, process: Process) -> None:
    sheet = fresh()
    update = put(sheet, process, "a", soft_session=10, hard_session=25)
    for seconds in (9, 9):
        clock.now += seconds
        assert not update.is_expired()
        update.refresh(put(sheet, process, "a"))
    clock.now += 6.9
    assert not update.is_expired()
    clock.now += 0.1
    assert update.is_expired(), "messages kept coming, and it has lasted for too long"

    update = put(sheet, process, "b", soft_session=10, hard_session=25)
    clock.now += 10
    assert update.is_expired()
    update.refresh(put(sheet, process, "b"))
    assert update.is_expired(), "what is over is not extended"
    update.end_session()
    assert not update.is_expired(), "what comes now is another session"
    clock.now += 9
    assert not update.is_expired()


def test_the_default_sessions(clock: Clock, process: Process) -> None:
    update = put(fresh(), process, "a")
    clock.now += 30 * 60 - 1
    assert not update.is_expired()
    clock.now += 1
    assert update.is_expired()


def test_a_message_that_finds_its_session_over_ends_it_for_good(clock: Clock, make: Make) -> None:
    """Although another process still holds the record."""
    sheet = fresh()
    one, other = make(), make()
    theirs = put(sheet, other, "a", 1)
    cache: LruCache[Tally] = LruCache()
    cache.set("a", put(sheet, one, "a", 2, soft_session=10))
    clock.now += 10
    assert cache.set("a", put(sheet, one, "a", 4)) is None
    assert [entry.doc for entry in sheet.written] == [{"n": 7}]
    assert theirs.ref.count() == 1
    theirs.end_session()
    assert len(sheet.written) == 1


def test_forcing_it_is_over_with_the_call(make: Make) -> None:
    sheet = fresh()
    one, other = make(), make()
    put(sheet, other, "a", 1)
    update = put(sheet, one, "a", 2)
    update.force_expiry()
    assert [entry.doc for entry in sheet.written] == [{"n": 3}]
    assert update.ref.force_expiry is False
    update.refresh(put(sheet, one, "a", 4))
    update.end_session()
    assert len(sheet.written) == 1, "the other one still holds it"
    update.refresh(put(sheet, one, "a", 8))
    update.ref.force_expiry = True
    update.end_session()
    assert [entry.doc for entry in sheet.written] == [{"n": 3}, {"n": 12}]


def test_sessions_that_end_while_a_batch_executes_follow_in_order(make: Make) -> None:
    sluice = Sluice()

    class Slow(Tally):
        written: ClassVar[list[Written]] = []

        def execute(self) -> None:
            super().execute()
            sluice.pass_through()

    owner, *others = (make() for _ in range(4))
    first = put(Slow, owner, "a", 1)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(first.end_session)
        assert sluice.reached.wait(20)
        for n, other in enumerate(others):
            put(Slow, other, "a", 10 + n).end_session()
        stays = put(Slow, others[0], "a", 100)
        assert len(Slow.written) == 1
        sluice.opened.set()
        ending.result()
    # Data of ended sessions is the owner's; processes that still hold the record go on.
    assert {entry.process for entry in Slow.written} == {owner.id}
    assert [entry.doc for entry in Slow.written] == [{"n": 1}, {"n": 33}]
    assert Slow.written[0].token < Slow.written[1].token
    assert stays.ref.count() == 1
    stays.end_session()
    assert Slow.written[2].doc == {"n": 100}
    assert Slow.written[1].token < Slow.written[2].token


# Trouble


class Flaky(Tally):
    """Executes when its database is there."""

    written: ClassVar[list[Written]] = []
    errors: ClassVar[list[Exception]] = []
    attempts: ClassVar[list[int]] = []

    def execute(self) -> None:
        assert self.token is not None
        self.attempts.append(self.token)
        for error in self.errors:
            raise error
        super().execute()


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    Flaky.errors.append(OSError("no database"))
    yield Flaky
    for values in (Flaky.written, Flaky.errors, Flaky.attempts):
        values.clear()


def parked(admin: "redis.Redis", process: Process, resource: str) -> dict[int, dict[str, Any]]:
    found = admin.hgetall(key_for(process, "parked", resource))
    return {int(token) * TOKENS: msgpack.unpackb(about) for token, about in found.items()}


def parked_partials(
    admin: "redis.Redis", process: Process, resource: str, token: int
) -> list[bytes]:
    key = key_for(process, f"dead:{token // TOKENS}", resource)
    return cast("list[bytes]", admin.lrange(key, 0, -1))


def test_a_batch_that_fails_is_kept_with_its_error(
    make: Make, flaky: type[Flaky], admin: "redis.Redis", caplog: Any
) -> None:
    hourly = RetryPolicy(first_delay=3600, longest_delay=3600, jitter=0)
    process, other = make(retry=hourly), make()
    held = put(flaky, other, "a", 2)
    update = put(flaky, process, "a", 4)
    held.end_session()
    with pytest.raises(OSError, match="no database") as raised:
        update.end_session()
    token = flaky.attempts[-1]
    kept = f"phonon: batch {token} of 'a' failed and is tried again in 3600.0 s"
    assert raised.value.__notes__ == [f"{kept}; its data is kept"]
    assert "OSError: no database" in caplog.text
    key = key_for(process, "running", "test.test.a")
    running = cast("dict[bytes, bytes]", admin.hgetall(key))
    assert running[b"owner"].decode() == process.id
    assert running[b"error"] == b"OSError: no database"
    assert int(running[b"attempt"]) == 1
    assert int(running[b"token"]) * TOKENS == token
    assert admin.llen(key_for(process, "batch", "test.test.a")) == 2
    assert process.get_registry() == ["test.test.a"]
    assert other.get_registry() == []

    flaky.errors.clear()
    process.stop()
    assert flaky.written == [Written("a", {"n": 6}, token, process.id)]


def test_a_batch_that_fails_too_often_is_parked(
    make: Make, flaky: type[Flaky], admin: "redis.Redis", caplog: Any
) -> None:
    process = make(retry=SOON)
    with pytest.raises(OSError, match="no database"):
        put(flaky, process, "a", 1).end_session()
    wait_until(lambda: parked(admin, process, "test.test.a"))
    assert len(flaky.attempts) == SOON.attempts
    ((token, about),) = parked(admin, process, "test.test.a").items()
    assert {token} == set(flaky.attempts), "the same in every attempt"
    assert about["error"] == "OSError: no database"
    assert about["attempts"] == SOON.attempts
    assert about["owner"] == process.id
    assert about["since"] <= about["at"]
    assert len(parked_partials(admin, process, "test.test.a", token)) == 1
    wait_until(lambda: "is parked" in caplog.text)
    wait_until(lambda: process.get_registry() == [])
    # It is in nobody's way.
    flaky.errors.clear()
    put(flaky, process, "a", 2).end_session()
    assert [entry.doc for entry in flaky.written] == [{"n": 2}]
    assert flaky.written[0].token > token
    assert list(parked(admin, process, "test.test.a")) == [token]


def test_sessions_queue_up_behind_a_batch_that_fails(make: Make, flaky: type[Flaky]) -> None:
    process, other = make(retry=RetryPolicy(attempts=2, first_delay=3600)), make()
    with pytest.raises(OSError, match="no database"):
        put(flaky, process, "a", 1).end_session()
    # Its owner has them when the way is free; other records do not wait.
    put(flaky, other, "a", 2).end_session()
    put(flaky, other, "a", 4).end_session()
    sheet = fresh()
    put(sheet, process, "b", 1).end_session()
    assert sheet.docs() == {"b": {"n": 1}}
    assert flaky.written == []
    flaky.errors.clear()
    retry_now(process)
    assert [(entry.doc, entry.process) for entry in flaky.written] == [
        ({"n": 1}, process.id),
        ({"n": 6}, process.id),
    ]


def test_merge_that_fails_keeps_the_batch(make: Make, admin: "redis.Redis") -> None:
    class Incompatible(Tally):
        def merge(self, other: Any) -> None:
            raise ValueError(f"{self.doc} and {other.doc}")

    one, two = make(), make(retry=RetryPolicy(attempts=1))
    here, there = put(Incompatible, one, "a", 1), put(Incompatible, two, "a", 2)
    here.end_session()
    with pytest.raises(ValueError, match="and") as raised:
        there.end_session()
    assert "is parked" in raised.value.__notes__[0]
    ((token, about),) = parked(admin, one, "test.test.a").items()
    assert about["error"].startswith("ValueError: ")
    assert len(parked_partials(admin, one, "test.test.a", token)) == 2


@pytest.mark.parametrize(
    ("junk", "words"),
    [
        (b"junk", "is not one of Phonon's"),
        (b"", "is not one of Phonon's"),
        (msgpack.packb([9, "c", "x1", b""]), "has layout 9; this release reads 1"),
        (msgpack.packb([1, "c", "zz", b""]), "was stored by serializer 'zz'"),
    ],
)
def test_what_cannot_be_read_is_parked_with_its_key(
    junk: bytes, words: str, make: Make, admin: "redis.Redis"
) -> None:
    sheet = fresh()
    process = make(retry=RetryPolicy(first_delay=3600))
    update = put(sheet, process, "a", 1)
    admin.rpush(key_for(process, "partials", "test.test.a"), junk)
    with pytest.raises(UndecodableError, match=words) as raised:
        update.end_session()
    assert key_for(process, "batch", "test.test.a").decode() in str(raised.value)
    assert "is parked" in raised.value.__notes__[0]
    ((token, about),) = parked(admin, process, "test.test.a").items()
    assert about["attempts"] == 1
    assert words in about["error"]
    assert parked_partials(admin, process, "test.test.a", token)[1] == junk
    assert process.get_registry() == []
    assert process.engine.outbox.size == 0
    put(sheet, process, "a", 2).end_session()
    assert sheet.docs() == {"a": {"n": 2}}


def test_damaged_content_is_parked(make: Make, admin: "redis.Redis") -> None:
    sheet = fresh()
    process = make()
    update = put(sheet, process, "a", 1)
    key = key_for(process, "partials", "test.test.a")
    good = cast("list[bytes]", admin.lrange(key, 0, -1))[0]
    layout, name, serializer, content = msgpack.unpackb(good)
    short = process.engine.codec.serializer.dumps(["a", "test"])
    for body in (content[:-1], short):
        damaged = msgpack.packb([layout, name, serializer, body])
        admin.rpush(key, damaged)
        with pytest.raises(UndecodableError, match=r"a partial of 'a' in"):
            update.end_session()
        update = put(sheet, process, "a", 1)
    update.end_session()
    assert [entry.doc for entry in sheet.written] == [{"n": 1}]


def test_a_class_that_is_not_known_here_is_left_to_those_who_know_it(
    make: Make, admin: "redis.Redis", caplog: Any
) -> None:
    process = make(heartbeat_interval=0.05)
    unknown = fresh()
    put(unknown, process, "a", 1)
    reference = process.create_reference("test.test.a")
    forget(unknown)
    assert reference.dereference() is True
    batch = key_for(process, "batch", "test.test.a")
    assert (
        "support.samples.fresh.<locals>.Sheet, which is not imported in this process" in caplog.text
    )
    assert admin.llen(batch) == 1
    assert process.parked() == []
    assert process.get_registry() == []

    sheet = fresh()
    wait_until(lambda: sheet.written)
    assert sheet.docs() == {"a": {"n": 1}}
    wait_until(lambda: not admin.exists(batch))


def test_an_unknown_class_is_an_error_where_a_session_ends(make: Make) -> None:
    process = make(retry=RetryPolicy(longest_delay=3600))
    unknown = fresh()
    put(unknown, process, "a", 1)
    forget(unknown)
    with pytest.raises(UnknownClassError, match="import it, so that its batches can be executed"):
        put(Tally, process, "a", 1).end_session()


def test_a_class_that_nobody_holds_any_more_is_still_known(process: Process) -> None:
    written = put(fresh(), process, "a", 1).written
    gc.collect()
    process.stop()
    assert [entry.doc for entry in written] == [{"n": 1}]


def test_anything_that_can_be_pickled_with_the_signed_serializer(
    make: Make, seen: list[Keeper]
) -> None:
    one, other = (make(serializer=SignedPickleSerializer(b"k" * 32)) for _ in range(2))
    reference = other.create_reference("db%2Ex.co.k")
    Keeper(one, own=Written("a", {}, 1, "p"), needed="x", doc={"kind": Clock}).end_session()
    assert reference.dereference()
    assert seen[0].own == Written("a", {}, 1, "p")
    assert seen[0].doc == {"kind": Clock}
    with pytest.raises(NotStorableError, match=r"Keeper\.own"):
        Keeper(one, own=lambda: None, needed="x")


def test_processes_with_different_keys_do_not_read_each_other(
    make: Make, admin: "redis.Redis"
) -> None:
    sheet = fresh()
    one, other = (make(serializer=SignedPickleSerializer(key * 32)) for key in (b"k", b"j"))
    put(sheet, one, "a", 1)
    update = put(sheet, other, "a", 2)
    one.create_reference("test.test.a").dereference()
    with pytest.raises(UndecodableError, match=r"a partial of 'a'"):
        update.end_session()
    assert len(parked(admin, one, "test.test.a")) == 1
    assert sheet.written == []


def test_two_classes_of_one_record_have_tokens_of_their_own(make: Make) -> None:
    class Third(Tally):
        written: ClassVar[list[Written]] = []

    sheets: list[type[Tally]] = [fresh(), Third]
    tokens: list[int] = []
    for n in range(3):
        one, other = make(), make()
        here = [put(sheet, one, "a", n) for sheet in sheets]
        there = [put(sheet, other, "a", 10) for sheet in sheets]
        for update in (*here, *there):
            update.end_session()
        for sheet in sheets:
            assert sheet.written[-1].doc == {"n": n + 10}
            tokens.append(sheet.written[-1].token)
    assert tokens == sorted(set(tokens))
