"""References: who holds a resource, who has modified it, and who was the last to let it go."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from phonon import Process, Reference
from support.proxy import Fault, Proxy
from support.samples import Sluice, Tally, fresh, put
from support.world import Make, Redis, wait_until

Keys = Callable[[], set[str]]
MANY_TIMES = 1000


class Impatient(Process):
    """It does not wait for a lock that it never gets."""

    BLOCKING_TIMEOUT = 0.05


# Counting


def test_count_and_holders(make: Make) -> None:
    processes = [make() for _ in range(3)]
    references = [process.create_reference("x") for process in processes]
    assert [reference.count() for reference in references] == [3, 3, 3]
    holders = references[0].holders()
    assert {holder.id for holder in holders} == {process.id for process in processes}
    assert {holder.host for holder in holders} == {os.uname().nodename}
    assert {holder.pid for holder in holders} == {os.getpid()}
    assert references[1].dereference() is False
    assert references[0].count() == 2
    assert {holder.id for holder in references[1].holders()} == {processes[0].id, processes[2].id}


def test_holders_say_since_when(make: Make, server: Redis) -> None:
    process = make()
    with server.client() as client:
        before = client.time()
        reference = process.create_reference("x")
        after = client.time()
    (holder,) = reference.holders()
    assert before[0] + before[1] / 1e6 - 0.001 <= holder.since <= after[0] + after[1] / 1e6
    reference.refresh_session()
    assert reference.holders()[0].since == holder.since


def test_a_process_is_a_member_once(make: Make) -> None:
    process, other = make(), make()
    references = [process.create_reference("x") for _ in range(5)]
    with ThreadPoolExecutor(4) as pool:
        references += pool.map(lambda _: process.create_reference("x"), range(8))
    assert references[0].count() == 1
    other.create_reference("x")
    assert references[0].count() == 2
    assert references[3].dereference() is False
    assert references[0].count() == 1
    assert [reference.dereference() for reference in references] == [False] * len(references)
    assert [holder.id for holder in references[0].holders()] == [other.id]


def test_who_is_no_member_is_never_the_last(make: Make, keys: Keys) -> None:
    process, other = make(), make()
    reference = process.create_reference("x")
    assert reference.dereference() is True
    calls: list[int] = []
    assert reference.dereference() is False
    assert reference.dereference(calls.append, (1,)) is False
    theirs = other.create_reference("x")
    assert reference.dereference(calls.append, (1,)) is False
    assert theirs.count() == 1
    assert theirs.dereference() is True
    assert calls == []
    assert keys() == set()


def test_it_can_be_joined_again(process: Process) -> None:
    reference = process.create_reference("x")
    assert reference.dereference()
    reference.refresh_session()
    assert reference.count() == 1
    assert process.get_registry() == ["x"]
    assert reference.dereference()
    assert process.create_reference("x").dereference()


def test_repr_and_attributes(make: Make) -> None:
    process = make()
    reference = process.create_reference("x", False)
    assert reference.resource_key == "x"
    assert reference.block is False
    assert reference.force_expiry is False
    assert "'x'" in repr(reference)
    assert process.id in repr(reference)


# Modifications


def test_modifications_are_counted_by_process(make: Make) -> None:
    one, two = make(), make()
    here, there = one.create_reference("x"), two.create_reference("x")
    assert here.modified_by() == {}
    assert here.get_times_modified() == 0
    here.increment_times_modified()
    there.increment_times_modified()
    there.increment_times_modified()
    assert here.modified_by() == there.modified_by() == {one.id: 1, two.id: 2}
    assert here.get_times_modified() == 3
    assert here.dereference() is False
    assert there.get_times_modified() == 3
    assert there.dereference() is True
    assert there.get_times_modified() == 0


def test_no_modification_gets_lost_between_threads(process: Process) -> None:
    reference = process.create_reference("x")
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(reference.increment_times_modified) for _ in range(200)]:
            future.result()
    assert reference.modified_by() == {process.id: 200}


def test_whoever_modifies_becomes_a_member(make: Make, keys: Keys) -> None:
    process = make()
    reference = process.create_reference("x")
    assert reference.dereference()
    reference.increment_times_modified()
    assert (reference.count(), reference.get_times_modified()) == (1, 1)
    assert process.get_registry() == ["x"]
    process.stop()
    assert keys() == set()


def test_an_update_that_stores_counts_as_a_modification(make: Make) -> None:
    sheet = fresh()
    process = make()
    update = put(sheet, process, "a")
    reference = process.create_reference("test.test.a")
    assert reference.modified_by() == {process.id: 1}
    put(sheet, process, "a", init_cache=False)
    assert reference.modified_by() == {process.id: 1}
    assert update.ref.resource_key == "test.test.a"
    assert update.ref.get_times_modified() == 1


# The callback of the last


def test_the_callback_is_the_lasts(make: Make) -> None:
    calls: list[tuple[Any, ...]] = []

    def callback(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "ignored"

    one, two = make().create_reference("x"), make().create_reference("x")
    assert one.dereference(callback, (1,), {"by": "one"}) is False
    assert calls == []
    assert two.dereference(callback, args=[2, 3], kwargs={"by": "two"}, block=True) is True
    assert calls == [((2, 3), {"by": "two"})]
    assert two.dereference(callback) is False
    assert len(calls) == 1


def test_in_the_callback_the_sessions_figures_are_final(make: Make) -> None:
    one, two = make(), make()
    here, there = one.create_reference("x"), two.create_reference("x")
    here.increment_times_modified()
    there.increment_times_modified()
    assert here.dereference() is False
    seen: list[object] = []

    def look() -> None:
        seen.append(there.get_times_modified())
        seen.append(there.modified_by())
        seen.append(there.count())
        one.create_reference("x").increment_times_modified()  # which is the next session's
        seen.append(there.get_times_modified())

    assert there.dereference(look) is True
    assert seen == [2, {one.id: 1, two.id: 1}, 0, 2]
    assert there.get_times_modified() == 1


def test_the_callback_runs_under_the_lock(make: Make) -> None:
    process, other = make(), make()
    reference = process.create_reference("x")
    taken: list[bool] = []

    def look() -> None:
        taken.append(other.lock("x").acquire(block=False))

    assert reference.dereference(look)
    assert taken == [False]
    with other.lock("x", block=False):
        pass


def test_the_lock_is_not_taken_twice(make: Make) -> None:
    process, other = make(), make()
    reference = process.create_reference("x")
    with reference.lock() as lock:
        assert reference.dereference(lambda: None) is True
        assert lock.owned()
        assert not other.lock("x").acquire(block=False)
    # The same with a lock of the process, and with one that was asked for in vain meanwhile.
    reference = process.create_reference("x")
    with process.lock("x"):
        assert not reference.lock().acquire(block=False)
        assert process.create_reference("x").dereference(lambda: None, block=False) is True


def test_a_lock_of_another_thread_is_waited_for(make: Make) -> None:
    process = make()
    reference = process.create_reference("x")
    order: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with reference.lock():
            leaving = pool.submit(reference.dereference, order.append, ("callback",))
            wait_until(process.lock("x").waiters)
            order.append("body")
        assert leaving.result() is True
    assert order == ["body", "callback"]


def test_two_threads_share_a_reference(make: Make) -> None:
    process = make()
    reference = process.create_reference("x")
    with ThreadPoolExecutor(1) as pool, reference.lock():
        waiting = pool.submit(reference.lock().acquire)
        wait_until(process.lock("x").waiters)
        # The lock that the other thread waits for is not the one we hold.
        assert reference.dereference(lambda: None, block=False) is True
    assert waiting.result()


@pytest.mark.parametrize("way", ["argument", "reference"])
def test_a_taken_lock_leaves_the_reference_held(way: str, make: Make) -> None:
    process, other = make(), make()
    reference = process.create_reference("x", block=way != "reference")
    calls: list[int] = []
    with other.lock("x"):
        with pytest.raises(Process.AlreadyLocked, match=other.id):
            reference.dereference(calls.append, (1,), block=False if way == "argument" else None)
        assert reference.count() == 1
        # Without a callback no lock is needed.
        assert reference.dereference() is True
    reference.refresh_session()
    assert reference.dereference(calls.append, (2,)) is True
    assert calls == [2]


def test_a_callbacks_lock_is_waited_for_by_default(
    make: Make, server: Redis, namespace: str
) -> None:
    with Impatient(url=server.url, namespace=namespace) as process, make().lock("x"):
        reference = process.create_reference("x", block=False)
        with pytest.raises(Process.AlreadyLocked, match=r"after 0\.05 s of waiting"):
            reference.dereference(lambda: None, block=True)
        with pytest.raises(Process.AlreadyLocked) as raised:
            reference.dereference(lambda: None)
        assert "waiting" not in str(raised.value)
        assert reference.count() == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), KeyboardInterrupt()])
def test_a_callback_that_raises_leaves_all_as_it_was(
    error: BaseException, make: Make, keys: Keys
) -> None:
    one, two = make(), make()
    here, there = one.create_reference("x"), two.create_reference("x")
    for reference in (here, there, there):
        reference.increment_times_modified()
    assert here.dereference() is False
    calls: list[int] = []

    def callback() -> None:
        calls.append(there.get_times_modified())
        if len(calls) < 3:
            raise error

    for times in (1, 2):
        with pytest.raises(type(error)) as raised:
            there.dereference(callback)
        assert raised.value is error
        assert calls == [3] * times
        assert there.count() == 1
        assert there.modified_by() == {one.id: 1, two.id: 2}
        assert two.get_registry() == ["x"]
        with there.lock(block=False):
            pass
    assert there.dereference(callback) is True
    assert calls == [3, 3, 3]
    assert there.dereference(callback) is False
    assert keys() == set()


def test_after_a_callback_that_raised_somebody_else_may_be_the_last(make: Make) -> None:
    here, there = make().create_reference("x"), make().create_reference("x")
    assert there.dereference() is False
    with pytest.raises(ZeroDivisionError):
        here.dereference(lambda: 1 / 0)
    there.refresh_session()
    assert here.dereference() is False
    assert there.dereference() is True


def test_a_callback_that_raises_when_the_server_has_gone(make: Make, server: Redis) -> None:
    """It is held again as soon as the server is back, and somebody else is the last then."""
    proxy = Proxy(server.socket)
    try:
        process = make(url=proxy.url, retry_timeout=0.2)
        reference = process.create_reference("x")
        reference.increment_times_modified()
        proxy.strike_step(Fault.LOST_REQUEST, "restore", gone=True)
        with pytest.raises(ZeroDivisionError) as raised:
            reference.dereference(lambda: 1 / 0)
        note, *_ = raised.value.__notes__
        assert "phonon: and it is not held again" in note
        assert "does not answer" in note
        there = make().create_reference("x")
        assert there.count() == 1
        proxy.plan()
        proxy.back()
        wait_until(lambda: there.count() == 2)
        assert there.modified_by() == {process.id: 1}
        assert there.dereference() is False
        assert reference.dereference() is True
        process.stop()
    finally:
        proxy.close()


def test_newcomers_during_a_callback_are_the_next_session(make: Make) -> None:
    one, two = make(), make()
    here = one.create_reference("x")
    sluice = Sluice()
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(here.dereference, sluice.pass_through)
        assert sluice.reached.wait(20)
        there = two.create_reference("x")
        assert there.count() == 1
        there.increment_times_modified()
        sluice.opened.set()
        assert leaving.result() is True
    assert (there.count(), there.get_times_modified()) == (1, 1)
    assert there.dereference() is True


def test_partials_are_executed_before_the_callback(make: Make) -> None:
    sheet = fresh()
    process = make()
    put(sheet, process, "a", 1)
    reference = process.create_reference("test.test.a")
    seen: list[dict[Any, dict[str, int]]] = []
    assert reference.dereference(lambda: seen.append(sheet.docs())) is True
    assert seen == [{"a": {"n": 1}}]


def test_letting_go_takes_what_an_update_has_not_sent_yet(make: Make) -> None:
    sheet = fresh()
    process = make()
    update = put(sheet, process, "a", 1, init_cache=False)
    assert update.ref.dereference() is True
    assert sheet.docs() == {"a": {"n": 1}}
    assert not update.has_unsent()


def test_forced_expiry_executes_although_others_stay(make: Make) -> None:
    sheet = fresh()
    one, two = make(), make()
    put(sheet, one, "a", 1)
    there = put(sheet, two, "a", 2)
    here = one.create_reference("test.test.a")
    here.force_expiry = True
    assert here.dereference() is False
    assert sheet.docs() == {"a": {"n": 3}}
    assert there.ref.count() == 1
    there.refresh(put(sheet, two, "a", 4))
    there.end_session()
    assert [entry.doc for entry in sheet.written] == [{"n": 3}, {"n": 4}]
    assert sheet.written[0].token < sheet.written[1].token


def test_a_failed_batch_does_not_keep_the_last_from_its_callback(make: Make, caplog: Any) -> None:
    class Fails(Tally):
        database_is_there = False

        def execute(self) -> None:
            if not self.database_is_there:
                raise OSError("no database")

    process = make()
    put(Fails, process, "a")
    calls: list[int] = []
    assert process.create_reference("test.test.a").dereference(calls.append, (1,)) is True
    assert calls == [1]
    assert "OSError: no database" in caplog.text
    Fails.database_is_there = True


# The lock


def test_a_references_lock_does_as_the_reference_was_told(
    make: Make, server: Redis, namespace: str
) -> None:
    with Impatient(url=server.url, namespace=namespace) as process, make().lock("x"):
        blocking, other = process.create_reference("x"), process.create_reference("x", False)
        for reference, block, waits in [
            (blocking, None, True),
            (blocking, False, False),
            (other, None, False),
            (other, True, True),
        ]:
            with pytest.raises(Process.AlreadyLocked) as raised:
                reference.lock(block).__enter__()
            assert ("of waiting" in str(raised.value)) is waits


# The last one out


@pytest.mark.parametrize("together", ["threads of two processes", "threads of one process"])
def test_of_two_that_leave_at_the_same_instant_one_is_last(together: str, make: Make) -> None:
    processes = [make(), make()] if together == "threads of two processes" else [make()] * 2
    barrier = threading.Barrier(2)

    def leave(process: Process) -> list[bool]:
        answers: list[bool] = []
        for i in range(MANY_TIMES):
            reference = process.create_reference(f"x{i}")
            barrier.wait(20)
            answers.append(reference.dereference())
        return answers

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(leave, processes)
    assert [a + b for a, b in zip(one, two, strict=True)] == [1] * MANY_TIMES


def test_of_many_with_a_callback_one_is_last(make: Make, keys: Keys) -> None:
    references = [make().create_reference("x") for _ in range(6)]
    barrier = threading.Barrier(len(references))
    calls: list[int] = []

    def leave(reference: Reference) -> int:
        barrier.wait(20)
        return reference.dereference(calls.append, (1,))

    for times in range(1, 21):
        with ThreadPoolExecutor(len(references)) as pool:
            assert sum(pool.map(leave, references)) == 1
        assert calls == [1] * times
        for reference in references:
            reference.refresh_session()
    for reference in references:
        reference.dereference()
    assert keys() == set()
