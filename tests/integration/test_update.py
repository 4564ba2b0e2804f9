"""Updates: merged wherever they arrive, executed once, by whoever is last."""

import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, ClassVar

import pytest

from conftest import Make, Redis, wait_until
from phonon import ConflictFreeUpdate, RetryPolicy, SignedPickleSerializer, Update
from phonon.errors import NotStorableError, UndecodableError

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
    assert keys() == {"{=test.test.1}:memory"}
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
    wait_until(lambda: keys() == {"{=test.test.1}:memory"})


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
    parked = {name.rpartition(":")[0] for name in keys() if ":parked" in name}
    assert parked == {"{=test.test.1}", "{=test.test.1}:parked"}


def test_what_cannot_be_read_is_parked_at_once(make: Make, server: Redis) -> None:
    process = make(retry=SOON)
    update = Count(process, 1, doc={"n": 1})
    with server.client() as client:
        base = process.engine.keys.base(update.resource_id)
        client.rpush(base + b":partials", b"not ours")
        with pytest.raises(Exception, match=r"test\.test\.1.*:batch is not one of Phonon's"):
            update.end_session()
        assert client.hlen(base + b":parked") == 1
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
