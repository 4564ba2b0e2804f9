"""Lock, unlock, renew: exclusive, shared, semaphores, the queue and its wake-ups, own leases."""

import itertools

import pytest

from phonon._protocol.answers import Reply
from steps.lab import BATCH_SCORE, Lab, lab_fixture  # noqa: F401 - found by its name
from support import operations as ops


def test_a_free_lock_is_granted_and_again_to_its_holder(lab: Lab) -> None:
    a = lab.process("a")
    granted = a.lock()
    assert granted[0] == Reply.GRANTED
    lab.advance(50)
    assert a.lock() == granted
    assert lab.ask("lockers", "x") == [[b"a/1", granted[1], granted[1] // 1000, -1, b"main"], []]
    assert lab.registry("a") == {b"x": -(granted[1] // 1000)}
    assert a.unlock() == Reply.RELEASED
    assert a.unlock() == Reply.NOT_HELD
    assert lab.data() == {}


def test_two_threads_of_a_process_exclude_each_other(lab: Lab) -> None:
    a = lab.process("a")
    a.lock(1)
    since = lab.now_ms
    assert a.lock(2) == [Reply.BUSY, -1, b"a/1", since, b"main"]
    assert a.lock(2, queue=True) == [Reply.WAIT, 5000, b"a/1", since, b"main"]


def test_a_process_that_shares_twice_and_releases_one_is_still_responsible(lab: Lab) -> None:
    a = lab.process("a")
    a.lock("1s")
    a.lock("2s")
    assert a.unlock("1s") == Reply.RELEASED
    assert lab.registry("a")[b"x"] < 0
    assert a.unlock("2s") == Reply.RELEASED
    assert lab.data() == {}


def test_a_lock_is_no_membership_and_a_member_stays_one(lab: Lab) -> None:
    a = lab.process("a")
    a.lock()
    assert lab.ask("count", "x") == 0
    a.join()
    assert lab.registry("a")[b"x"] < 0, "the lock is what is reaped first"
    assert a.leave() == [Reply.LAST, 0, 1]
    assert lab.registry("a")[b"x"] < 0
    a.join()
    a.unlock()
    assert lab.registry("a")[b"x"] > 0


def test_an_executor_that_unlocks_still_has_its_batch(lab: Lab) -> None:
    a = lab.process("a")
    a.lock()
    token = a.batch()
    a.unlock()
    assert lab.registry("a")[b"x"] >= BATCH_SCORE
    a.complete(token)
    assert lab.data() == {}


def test_waiters_get_it_in_the_order_they_came(lab: Lab) -> None:
    processes = [lab.process(name) for name in "abcd"]
    for process in processes:
        process.lock(queue=True)
    for last, following in itertools.pairwise(processes):
        assert last.unlock() == Reply.RELEASED
        assert following.mail() == [following.holder(1).encode()]
        for other in processes:
            if other not in (last, following) and other.lock()[0] != Reply.BUSY:
                pytest.fail("out of turn")
        assert following.lock(queue=True)[0] == Reply.GRANTED
        assert following.mail() == []
    processes[-1].unlock()
    assert lab.data() == {}


def test_asking_again_keeps_the_place(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c, b, b):
        process.lock(queue=True)
    a.unlock()
    assert (b.mail(), c.mail()) == ([b"b/1"], [])


def test_a_wake_up_that_lies_untaken_belongs_to_nobody(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c):
        process.lock(queue=True)
    a.unlock()
    lab.advance(100)
    wait = c.lock(queue=True)
    assert wait[0] == Reply.WAIT
    assert 100 <= wait[1] <= 102
    lab.advance(99)
    assert c.lock(queue=True)[0] == Reply.WAIT
    lab.advance(5)
    assert c.lock(queue=True)[0] == Reply.GRANTED
    assert b.mail() == []
    assert b.lock() == [Reply.BUSY, -1, b"c/1", lab.now_ms, b"main"] or b.lock()[0] == Reply.BUSY


def test_one_that_took_its_wake_up_has_two_seconds_to_come(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c):
        process.lock(queue=True)
    a.unlock()
    b.take_mail()
    lab.advance(1990)
    wait = c.lock(queue=True)
    assert wait[0] == Reply.WAIT
    assert 0 < wait[1] <= 12
    lab.advance(20)
    assert c.lock(queue=True)[0] == Reply.GRANTED


def test_one_that_asks_late_has_not_lost_its_place(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c):
        process.lock(queue=True)
    a.unlock()
    lab.advance(10_000)
    assert b.lock(queue=True)[0] == Reply.GRANTED
    assert c.lock(queue=True)[0] == Reply.WAIT


def test_a_reader_that_asks_late_has_not_lost_its_place(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    a.lock()
    b.lock("1s", queue=True)
    c.lock(queue=True)
    a.unlock()
    lab.advance(10_000)
    assert b.lock("1s", queue=True)[0] == Reply.GRANTED
    assert c.lock(queue=True)[0] == Reply.WAIT


def test_an_unlock_that_wakes_leaves_its_process_a_member(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.join()
    a.lock()
    b.lock(queue=True)
    assert a.unlock() == Reply.RELEASED
    assert b.mail() == [b"b/1"]
    assert lab.registry("a")[b"x"] > 0


def test_a_woken_waiter_that_gives_up_wakes_the_next(lab: Lab) -> None:
    a, b, c = (lab.process(name) for name in "abc")
    for process in (a, b, c):
        process.lock(queue=True)
    a.unlock()
    assert b.unlock() == Reply.NOT_HELD
    assert (b.mail(), c.mail()) == ([], [b"c/1"])
    assert lab.registry("b") == {}


def test_the_next_is_woken_when_the_first_is_passed_over(lab: Lab) -> None:
    a, b, c, d = (lab.process(name) for name in "abcd")
    for process in (a, b, c):
        process.lock(queue=True)
    a.unlock()
    lab.advance(300)
    assert d.lock()[0] == Reply.BUSY
    assert c.mail() == [b"c/1"]


def test_any_number_share_and_a_writer_waits(lab: Lab) -> None:
    a, b, w = (lab.process(name) for name in "abw")
    assert a.lock("1s")[0] == b.lock("1s")[0] == Reply.GRANTED
    assert w.lock(queue=True)[0] == Reply.WAIT
    a.unlock("1s")
    assert w.mail() == []
    b.unlock("1s")
    assert w.mail() == [b"w/1"]
    assert w.lock(queue=True)[0] == Reply.GRANTED
    assert a.lock("2s")[0] == Reply.BUSY


def test_readers_do_not_starve_a_writer_and_wake_together(lab: Lab) -> None:
    a, w, b, c, w2, d = (lab.process(name) for name in ("a", "w", "b", "c", "w2", "d"))
    a.lock("1s")
    w.lock(queue=True)
    for process in (b, c):
        assert process.lock("1s", queue=True)[0] == Reply.WAIT
    w2.lock(queue=True)
    d.lock("1s", queue=True)
    a.unlock("1s")
    assert (w.mail(), b.mail()) == ([b"w/1"], [])
    w.lock(queue=True)
    w.unlock()
    assert [len(p.mail()) for p in (b, c, w2, d)] == [1, 1, 0, 0]
    assert c.lock("1s", queue=True)[0] == Reply.GRANTED, "in whatever order they come"
    assert b.lock("1s", queue=True)[0] == Reply.GRANTED
    assert d.lock("1s", queue=True)[0] == Reply.WAIT


def test_more_than_a_hundred_wait(lab: Lab) -> None:
    a, w = lab.process("a"), lab.process("w")
    a.lock()
    told = w.answers(*(ops.lock(0, b"x", f"w/{i}s", queue=True) for i in range(250)))
    assert {answer[0] for answer in told} == {Reply.WAIT}
    assert w.lock("last", queue=True)[0] == Reply.WAIT
    a.unlock()
    assert len(w.mail()) == 250
    assert a.lock("2s")[0] == Reply.BUSY, "behind the writer at the queue's end"


def test_a_semaphore_has_so_many_places(lab: Lab) -> None:
    a, b, c, d = (lab.process(name) for name in "abcd")
    assert a.lock("1s2")[0] == b.lock("1s2")[0] == Reply.GRANTED
    assert c.lock("1s2", queue=True)[0] == d.lock("1s2", queue=True)[0] == Reply.WAIT
    a.unlock("1s2")
    assert (c.mail(), d.mail()) == ([b"c/1s2"], [])
    assert d.lock("1s2", queue=True)[0] == Reply.WAIT
    assert a.lock("1s2")[0] == Reply.BUSY
    b.unlock("1s2")
    assert d.mail() == [b"d/1s2"]
    assert d.lock("1s2", queue=True)[0] == Reply.WAIT, "places go in turn"
    assert c.lock("1s2", queue=True)[0] == Reply.GRANTED
    assert d.lock("1s2", queue=True)[0] == Reply.GRANTED
    assert a.lock("1s2")[0] == Reply.BUSY


def test_a_lock_without_a_lease_lasts_and_one_with_a_lease_ends(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    lab.advance(10**9)
    assert b.lock()[0] == Reply.BUSY
    a.unlock()
    a.lock(lease=1000)
    assert b.lock()[1] == 1000
    wait = b.lock(queue=True)
    assert wait[:2] == [Reply.WAIT, 1000]
    lab.advance(1001)
    assert lab.ask("lockers", "x")[0] == [], "it does not hold it any more"
    assert b.lock(queue=True)[0] == Reply.GRANTED
    assert a.unlock() == Reply.NOT_HELD
    assert lab.registry("a") == {}


@pytest.mark.parametrize("name", ["1", "1s"])
def test_renew_makes_no_lease_shorter_and_brings_none_back(lab: Lab, name: str) -> None:
    a = lab.process("a")
    a.lock(name, lease=5000)
    assert a.renew(name, 1000) == Reply.RENEWED
    lab.advance(2000)
    assert a.renew(name) == Reply.RENEWED
    assert a.renew(name, 5000) == Reply.RENEWED
    lab.advance(4000)
    assert a.renew(name) == Reply.RENEWED
    lab.advance(1000)
    assert a.renew(name, 5000) == Reply.NOT_HELD
    assert a.renew(name) == Reply.NOT_HELD
    assert "leases:x" not in lab.dump()


def test_renew_gives_no_lease_to_a_lock_that_has_none(lab: Lab) -> None:
    a = lab.process("a")
    a.lock()
    assert a.renew(lease=100) == Reply.RENEWED
    lab.advance(1000)
    assert a.renew() == Reply.RENEWED


def test_a_sharer_whose_lease_ends_is_dropped_alone(lab: Lab) -> None:
    a, b, w = (lab.process(name) for name in "abw")
    a.lock("1s", lease=500)
    b.lock("1s")
    lab.advance(600)
    assert w.lock()[2] == b"b/1s"
    assert a.renew("1s") == Reply.NOT_HELD
    b.unlock("1s")
    assert w.lock()[0] == Reply.GRANTED


def test_lockers_names_those_that_hold_and_wait(lab: Lab) -> None:
    a, b, w = (lab.process(name) for name in "abw")
    first, second = a.lock("1s", lease=900)[1], b.lock("1s")[1]
    w.lock(queue=True)
    holders, waiters = lab.ask("lockers", "x")
    by_holder = {holders[j]: holders[j + 1 : j + 5] for j in range(0, len(holders), 5)}
    assert by_holder[b"a/1s"][0] == first
    assert 890 <= by_holder[b"a/1s"][2] <= 900
    assert by_holder[b"b/1s"] == [second, second // 1000, -1, b"main"]
    assert waiters == [b"w/1"]


def test_nudge_wakes_the_reader_of_mail(lab: Lab) -> None:
    a = lab.process("a")
    lab.ask("nudge", "a")
    assert a.mail() == [b"a/"]


def test_a_wake_up_expires(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock()
    b.lock(queue=True)
    a.unlock()
    assert 0 < lab.client.pttl(lab.key("mailbox:b")) <= 10_000


def test_a_process_of_which_one_thread_releases_and_another_waits_is_responsible(lab: Lab) -> None:
    a, b = lab.process("a"), lab.process("b")
    a.lock(1)
    b.lock(1, queue=True)
    a.lock(2, queue=True)
    assert a.unlock(1) == Reply.RELEASED
    assert lab.registry("a")[b"x"] < 0


def test_an_unlock_of_one_that_holds_nothing_leaves_the_other_lock_of_its_process(lab: Lab) -> None:
    a = lab.process("a")
    a.lock(1)
    assert a.unlock(2) == Reply.NOT_HELD
    assert lab.registry("a")[b"x"] < 0
