"""Sessions that go on for long: their partials are merged on the way, and nothing comes to harm."""

import itertools
import logging
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from phonon import Process, RetryPolicy, Update
from phonon._core import classes
from phonon._core.compaction import COMPACT_AT
from phonon.errors import UndecodableError
from support.member import Crew, Entry, Member, learn
from support.proxy import Fault, Proxy
from support.world import Make, Redis, is_settled, key_for, wait_until

#: So long that nobody is taken for dead, on however busy a machine.
NO_BEAT = 50
FAULTS = pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())


@pytest.fixture
def crew(server: Redis, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    with Crew(server.url, namespace, tmp_path) as crew:
        yield crew


@pytest.fixture
def proxy(server: Redis) -> Iterator[Proxy]:
    proxy = Proxy(server.socket)
    yield proxy
    proxy.close()


@pytest.fixture
def executed() -> list[tuple[str, Any]]:
    """Class and content of what was executed here."""
    EXECUTED.clear()
    return EXECUTED


EXECUTED: list[tuple[str, Any]] = []


class Numbers(Update):
    """Keeps all numbers, in their order."""

    def merge(self, other: Any) -> None:
        self.doc = {"n": self.doc["n"] + other.doc["n"]}

    def execute(self) -> None:
        EXECUTED.append((type(self).__name__, self.doc["n"]))


class Others(Numbers):
    pass


class Sum(Numbers):
    """Counts in an attribute of its own."""

    def __init__(self, process: Process, record: str, n: int, **options: Any) -> None:
        self.total = n
        super().__init__(process, record, **options)

    def merge(self, other: Any) -> None:
        self.total += other.total

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def reset_states(self) -> dict[str, Any]:
        return {"total": 0}

    def execute(self) -> None:
        EXECUTED.append(("Sum", self.total))


def store(update: Update, *numbers: int) -> None:
    for number in numbers:
        update.doc = {"n": [number]}
        update.cache()


def partials(process: Process, record: str = "record") -> list[bytes]:
    key = key_for(process, "partials", f"test.test.{record}")
    found: list[bytes] = process.client.lrange(key, 0, -1)
    return found


def length(process: Process, record: str = "record") -> int:
    return int(process.client.llen(key_for(process, "partials", f"test.test.{record}")))


# Purpose


@pytest.mark.slow
def test_a_hot_key_stays_small(crew: Crew) -> None:
    """Three processes store ten thousand messages about one key."""
    watch = crew.process(heartbeat_interval=NO_BEAT)
    members = [crew.member(heartbeat_interval=NO_BEAT) for _ in range(3)]
    counts = [3334, 3333, 3333]
    reference = watch.create_reference("test.test.hot")
    done = [
        member.begin("put_times", "hot", count)
        for member, count in zip(members, counts, strict=True)
    ]
    longest = 0
    while not all(future.done() for future in done):
        longest = max(longest, length(watch, "hot"))
    for future in done:
        future.result()
    # Those that were under way when others were merged come on top, but for few.
    assert longest <= 4 * COMPACT_AT
    assert reference.get_times_modified() == 10_000
    assert sum(map(len, partials(watch, "hot"))) < 10_000
    for member in members:
        member.do("end", "hot")
    assert not crew.journal.lines()
    assert reference.dereference()
    assert crew.journal.applied() == {"hot": {"n": 10_000}}
    assert len(crew.journal.lines()) == 1


def test_what_does_not_get_smaller_stays_in_few_pieces(
    make: Make, executed: list[tuple[str, Any]]
) -> None:
    process = make()
    update = Numbers(process, "record", doc={"n": [-1]})
    longest = 0
    for i in range(3000):
        store(update, i)
        longest = max(longest, length(process))
    assert longest < COMPACT_AT
    update.end_session()
    assert executed == [("Numbers", list(range(-1, 3000)))], "each once, and in order"


def test_what_is_larger_than_an_answer(make: Make, executed: list[tuple[str, Any]]) -> None:
    process = make()
    update = Numbers(process, "record", init_cache=False)
    parts = ["x" * 40_000 + str(i) for i in range(COMPACT_AT)]
    for part in parts:
        update.doc = {"n": [part]}
        update.cache()
    assert length(process) == 1
    update.end_session()
    assert executed == [("Numbers", parts)]


def test_a_large_value_is_executed_in_little_memory(make: Make) -> None:
    """Partials are merged as they arrive: 50 MB in pieces, a few of them in memory at a time."""
    process = make()
    longest = ["x" * 100_000]

    class Longest(Update):
        def merge(self, other: Any) -> None:
            self.doc = max(self.doc, other.doc)

        def execute(self) -> None:
            found.append(self.doc)

    found: list[list[str]] = []
    update = Longest(process, "record", doc=longest)
    (partial,) = partials(process)
    key = key_for(process, "partials", update.resource_id)
    for _ in range(50):  # as of a time when nobody merged them
        process.client.rpush(key, *[partial] * 10)
    size = int(process.client.llen(key)) * len(partial)
    assert size > 50_000_000
    tracemalloc.start()
    try:
        update.end_session()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [longest]
    assert peak < size / 4


def test_attributes_are_merged_too(make: Make, executed: list[tuple[str, Any]]) -> None:
    process = make()
    updates = [Sum(process, "record", n) for n in range(COMPACT_AT)]
    assert length(process) == 1
    updates[0].end_session()
    assert executed == [("Sum", sum(range(COMPACT_AT)))]


def test_many_at_once(make: Make, executed: list[tuple[str, Any]]) -> None:
    process = make()
    records = [f"record-{i}" for i in range(20)]
    for n in range(COMPACT_AT):
        with process.batch():
            updates = [Numbers(process, record, doc={"n": [n]}) for record in records]
    assert {length(process, record) for record in records} == {1}
    for update in updates:
        update.end_session()
    assert executed == [("Numbers", list(range(COMPACT_AT)))] * 20


def test_modifications_are_counted_as_they_were(make: Make) -> None:
    one, two = make(), make()
    reference = one.create_reference("test.test.record")
    updates = [Numbers(process, "record", doc={"n": [0]}) for process in (one, two)]
    store(updates[0], *range(COMPACT_AT))
    store(updates[1], *range(COMPACT_AT))
    assert length(one) < COMPACT_AT
    assert reference.modified_by() == {one.id: COMPACT_AT + 1, two.id: COMPACT_AT + 1}


def test_force_expiry_executes_what_was_merged(make: Make, executed: list[tuple[str, Any]]) -> None:
    one, two = make(), make()
    mine = Numbers(one, "record", doc={"n": [-1]})
    other = Numbers(two, "record", doc={"n": [-2]})
    store(mine, *range(100))
    other.force_expiry()
    assert executed == [("Numbers", [-1, -2, *range(100)])]
    store(mine, *range(100, 200))
    mine.end_session()
    assert executed[1:] == [("Numbers", list(range(100, 200)))]


def test_while_a_batch_runs(make: Make, executed: list[tuple[str, Any]]) -> None:
    """A session that has ended waits for it, and the next one goes on behind."""

    class Slow(Numbers):
        def execute(self) -> None:
            if not executed:
                for session in range(2):
                    update = Slow(other, "record", doc={"n": [-session]})
                    store(update, *range(COMPACT_AT + 10))
                    lengths.append(length(other))
                    update.end_session()
                update = Slow(other, "record", doc={"n": [-2]})
                store(update, *range(COMPACT_AT + 10))
                lengths.append(length(other))
            super().execute()

    lengths: list[int] = []
    process, other = make(), make()
    Slow(process, "record", doc={"n": ["first"]}).end_session()
    assert max(lengths) < 2 * COMPACT_AT
    numbers = list(range(COMPACT_AT + 10))
    assert executed == [("Slow", ["first"]), ("Slow", [0, *numbers, -1, *numbers])]
    other.stop()
    assert executed[2:] == [("Slow", [-2, *numbers])]


def test_data_that_comes_with_the_end_of_a_session(
    make: Make, executed: list[tuple[str, Any]]
) -> None:
    """Nobody calls `cache`: processes come and go, and one stays."""
    process, other = make(), make()
    reference = other.create_reference("test.test.record")
    longest = 0
    for n in range(500):
        Numbers(process, "record", doc={"n": [n]}, init_cache=False).end_session()
        longest = max(longest, length(process))
    assert longest <= COMPACT_AT
    assert not executed
    assert reference.dereference()
    assert executed == [("Numbers", list(range(500)))]


def test_sessions_that_end_while_a_batch_runs(make: Make, executed: list[tuple[str, Any]]) -> None:
    class Slow(Numbers):
        def execute(self) -> None:
            if not executed:
                for n in range(500):
                    Slow(other, "record", doc={"n": [n]}, init_cache=False).end_session()
                lengths.append(length(other))
            super().execute()

    lengths: list[int] = []
    process, other = make(), make()
    Slow(process, "record", doc={"n": ["first"]}).end_session()
    assert lengths[0] <= COMPACT_AT
    assert executed == [("Slow", ["first"]), ("Slow", list(range(500)))]


# Partials that do not merge


def test_two_classes_on_one_resource(make: Make, executed: list[tuple[str, Any]]) -> None:
    process = make()
    one = Numbers(process, "record", doc={"n": [-1]})
    two = Others(process, "record", doc={"n": [-2]})
    for i in range(200):
        store(one, i)
        store(two, 1000 + i)
    assert length(process) < COMPACT_AT
    one.end_session()
    assert executed == [
        ("Numbers", [-1, *range(200)]),
        ("Others", [-2, *range(1000, 1200)]),
    ]


def test_a_class_that_is_not_imported_here_is_left_as_it_is(crew: Crew) -> None:
    process, member = crew.process(), crew.member()
    member.do("learn", "Rare")
    member.do("put", "record", 1, "Rare")
    (rare,) = partials(process)
    update = Entry(process, "record", doc={"n": 1})
    for _ in range(2 * COMPACT_AT):
        update.doc = {"n": 1}
        update.cache()
    stored = partials(process)
    assert stored[0] == rare
    assert len(stored) < COMPACT_AT
    update.end_session()
    member.do("put", "record", 2, "Rare")
    member.do("end", "record")
    lines = crew.journal.lines()
    assert [line.doc for line in lines] == [{"n": 3}, {"n": 2 * COMPACT_AT + 1}]
    assert len({line.token for line in lines}) == 2


def test_nothing_but_classes_that_are_not_imported_here(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rare = learn("VeryRare")
    process = crew.process()
    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG, "phonon"):
        patch.delitem(classes._classes, "support.member.VeryRare")
        update = rare(process, "record", doc={"n": 1})
        for _ in range(3 * COMPACT_AT):
            update.doc = {"n": 1}
            update.cache()
    assert length(process) == 3 * COMPACT_AT + 1
    said = [each for each in caplog.records if "not merged before" in each.message]
    assert [each.levelno for each in said] == [logging.DEBUG], "once"
    for _ in range(COMPACT_AT - 1):
        update.doc = {"n": 1}
        update.cache()
    assert length(process) == 1, "now it is"
    update.end_session()
    assert crew.journal.applied() == {"record": {"n": 4 * COMPACT_AT}}


@pytest.mark.parametrize("bad", [b"no partial", b"\x94\x09\xa1x\xa1y\xa1z"])
def test_what_cannot_be_read_stays_and_is_parked(
    make: Make, bad: bytes, executed: list[tuple[str, Any]]
) -> None:
    process = make(retry=RetryPolicy(attempts=2, first_delay=0.01))
    update = Numbers(process, "record", doc={"n": [-1]})
    store(update, *range(10))
    key = key_for(process, "partials", update.resource_id)
    process.client.rpush(key, bad)
    store(update, *range(10, 100))
    stored = partials(process)
    assert stored[1] == bad, "what comes before is not merged with what comes behind"
    assert len(stored) < COMPACT_AT
    with pytest.raises(UndecodableError):
        update.end_session()
    (entry,) = process.parked()
    assert entry.size == len(stored)
    assert not executed
    process.discard(entry.resource, entry.token)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_merge_may_raise_anything(
    make: Make, error: type[BaseException], executed: list[tuple[str, Any]]
) -> None:
    class Raising(Numbers):
        def merge(self, other: Any) -> None:
            if raising:
                self.doc["n"].clear()  # half done
                raise error
            super().merge(other)

    raising = False
    process = make()
    update = Raising(process, "record", doc={"n": [-1]})
    good = Others(process, "record", doc={"n": [-1]})
    store(update, *range(COMPACT_AT // 2 - 1))
    store(good, *range(COMPACT_AT // 2 - 2))
    raising = True
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            store(good, COMPACT_AT)
        assert length(process) == COMPACT_AT, "it is stored, and nothing was merged"
    else:
        store(good, COMPACT_AT)
        assert length(process) == COMPACT_AT // 2 + 1, "the other class was merged"
    raising = False
    update.end_session()
    assert executed == [
        ("Raising", [-1, *range(COMPACT_AT // 2 - 1)]),
        ("Others", [-1, *range(COMPACT_AT // 2 - 2), COMPACT_AT]),
    ]


def test_what_cannot_be_stored_once_it_is_merged_stays(
    make: Make, executed: list[tuple[str, Any]]
) -> None:
    class Growing(Numbers):
        def merge(self, other: Any) -> None:
            super().merge(other)
            self.doc["n"].append(object())

        def execute(self) -> None:
            self.doc["n"] = [n for n in self.doc["n"] if isinstance(n, int)]
            super().execute()

    process = make()
    update = Growing(process, "record", doc={"n": [-1]})
    store(update, *range(COMPACT_AT))
    assert length(process) == COMPACT_AT + 1
    update.end_session()
    assert executed == [("Growing", [-1, *range(COMPACT_AT)])]


# Failures on the way


@FAULTS
@pytest.mark.parametrize("step", ["candidates", "compact"])
def test_a_call_that_gets_lost_is_repeated(
    proxy: Proxy, make: Make, step: str, fault: Fault, executed: list[tuple[str, Any]]
) -> None:
    process = make(url=proxy.url, heartbeat_interval=NO_BEAT)
    update = Numbers(process, "record", doc={"n": [-1]})
    proxy.strike_step(fault, step)
    store(update, *range(COMPACT_AT - 1))
    assert proxy.steps.count(step) == 2
    assert length(process) == 1
    update.end_session()
    assert executed == [("Numbers", list(range(-1, COMPACT_AT - 1)))]


@FAULTS
@pytest.mark.parametrize("step", ["candidates", "compact"])
def test_a_server_that_goes_fails_no_call_that_has_stored(
    proxy: Proxy, make: Make, step: str, fault: Fault, executed: list[tuple[str, Any]]
) -> None:
    process = make(url=proxy.url, heartbeat_interval=NO_BEAT)
    update = Numbers(process, "record", doc={"n": [-1]})
    store(update, *range(COMPACT_AT - 2))
    driver = process.engine.driver
    proxy.strike_step(fault, step, gone=True)
    driver.retry_timeout = 0.5
    store(update, COMPACT_AT - 2)
    driver.retry_timeout = 20.0
    proxy.back()
    wait_until(lambda: is_settled(process))
    store(update, *range(COMPACT_AT, 3 * COMPACT_AT))
    assert length(process) < COMPACT_AT
    update.end_session()
    assert executed == [
        ("Numbers", [*range(-1, COMPACT_AT - 1), *range(COMPACT_AT, 3 * COMPACT_AT)])
    ]


def test_the_session_ends_meanwhile(
    proxy: Proxy, make: Make, executed: list[tuple[str, Any]]
) -> None:
    process, other = make(url=proxy.url, heartbeat_interval=NO_BEAT), make()
    update = Numbers(process, "record", doc={"n": [-1]})

    def end(step: str) -> None:
        if step == "candidates":
            Numbers(other, "record", doc={"n": [1000]}).force_expiry()

    proxy.on_reply = end
    store(update, *range(COMPACT_AT - 1))
    assert executed == [("Numbers", [*range(-1, COMPACT_AT - 1), 1000])]
    assert length(process) == 0
    store(update, 5)
    update.end_session()
    assert executed[1:] == [("Numbers", [5])]


def test_threads_and_a_bad_connection(proxy: Proxy, make: Make) -> None:
    class Tally(Sum):
        def execute(self) -> None:
            sums.append(self.total)

    sums: list[int] = []
    process, other = make(url=proxy.url, heartbeat_interval=NO_BEAT), make()
    proxy.at_random(1, 0.05)

    def use(thread: int) -> None:
        for _ in range(60):
            update = Tally(process if thread % 2 else other, "record", 1, init_cache=False)
            update.cache()
            if thread == 0 and next(numbers) % 20 == 19:
                update.force_expiry()

    numbers = itertools.count()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    proxy.plan()
    process.stop()
    other.stop()
    assert sum(sums) == 8 * 60


# Death


def hot(crew: Crew, proxy: Proxy, record: str = "record") -> Member:
    """A member that is about to merge."""
    member = crew.member(url=proxy.url)
    member.do("put_times", record, COMPACT_AT - 1)
    return member


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["append", "candidates", "compact"])
def test_killed_at_a_call(proxy: Proxy, crew: Crew, step: str, when: str) -> None:
    survivor = crew.process()
    member = hot(crew, proxy)
    if when == "before":

        def strike(_: int, called: str) -> Fault | None:
            if called != step:
                return None
            member.kill()
            return Fault.LOST_REQUEST

        proxy.plan(strike)
    else:
        proxy.on_reply = lambda called: member.kill() if called == step else None
    member.begin("put", "record")
    member.popen.wait(20)
    wait_until(lambda: crew.journal.lines("record"))
    stored = COMPACT_AT - (step == "append" and when == "before")
    assert crew.journal.applied() == {"record": {"n": stored}}
    wait_until(lambda: not survivor.get_registry())


def test_killed_while_it_merges(proxy: Proxy, crew: Crew) -> None:
    crew.process()
    member = hot(crew, proxy, "halt-1")
    member.begin("put", "halt-1")
    wait_until(lambda: crew.journal.begun("halt-1"))
    member.kill()
    crew.journal.open("halt-1")
    wait_until(lambda: crew.journal.lines("halt-1"))
    assert crew.journal.applied() == {"halt-1": {"n": COMPACT_AT}}


def test_paused_while_it_merges(proxy: Proxy, crew: Crew) -> None:
    """It is declared dead, others execute its data, and then it goes on."""
    crew.process()
    member = hot(crew, proxy, "halt-1")
    done = member.begin("put", "halt-1")
    wait_until(lambda: crew.journal.begun("halt-1"))
    member.pause()
    crew.journal.open("halt-1")
    wait_until(lambda: crew.journal.lines("halt-1"))
    member.go_on()
    done.result(20)
    member.do("put_times", "halt-1", 3)
    member.do("end", "halt-1")
    assert Counter(line.doc["n"] for line in crew.journal.lines()) == {COMPACT_AT: 1, 3: 1}


def test_others_go_on_while_one_merges(crew: Crew) -> None:
    one, two = crew.member(heartbeat_interval=NO_BEAT), crew.member(heartbeat_interval=NO_BEAT)
    one.do("put_times", "halt-1", COMPACT_AT - 1)
    merging = one.begin("put", "halt-1")
    wait_until(lambda: crew.journal.begun("halt-1"))
    two.do("put_times", "halt-1", 10)
    assert not merging.done()
    crew.journal.open("halt-1")
    merging.result(20)
    process = crew.process()
    assert length(process, "halt-1") == 11, "what was stored meanwhile is behind"
    two.do("end", "halt-1")
    one.do("end", "halt-1")
    assert crew.journal.applied() == {"halt-1": {"n": COMPACT_AT + 10}}
