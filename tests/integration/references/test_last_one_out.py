"""Exactly one of those that leave is the last, in whatever order they do."""

import os
import socket
import threading
from collections.abc import Callable

import pytest

from phonon.errors import AlreadyLockedError
from support.world import Make


def test_two_that_leave_at_the_same_instant_a_thousand_times(make: Make) -> None:
    processes = make(), make()
    barrier = threading.Barrier(2)
    last: list[list[bool]] = [[], []]

    def leave(number: int) -> None:
        for i in range(1000):
            reference = processes[number].create_reference(f"resource-{i}")
            barrier.wait()  # both are members
            last[number].append(reference.dereference())

    threads = [threading.Thread(target=leave, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a + b for a, b in zip(*last, strict=True)] == [1] * 1000


def test_a_process_is_a_member_once_however_often_it_asks(make: Make) -> None:
    one, other = make(), make()
    references = [one.create_reference("x") for _ in range(3)]
    there = other.create_reference("x")
    assert there.count() == 2
    assert not references[0].dereference()
    assert there.count() == 1
    assert there.dereference()
    assert not references[1].dereference(), "it is no member any more"


def test_the_callback_is_the_last_ones(make: Make, keys: Callable[[], set[str]]) -> None:
    one, other = make(), make()
    called: list[tuple[str, int, bool]] = []
    here, there = one.create_reference("x"), other.create_reference("x")
    here.increment_times_modified()
    there.increment_times_modified()
    there.increment_times_modified()
    assert here.modified_by() == {one.id: 1, other.id: 2}

    def callback(who: str, *, final: bool) -> None:
        called.append((who, there.get_times_modified(), final))

    assert not here.dereference(callback, args=("here",), kwargs={"final": True})
    assert there.dereference(callback, args=("there",), kwargs={"final": True})
    assert called == [("there", 3, True)]
    assert keys() == set()


def test_a_callback_that_raises_leaves_the_reference_held(make: Make) -> None:
    process = make()
    reference = process.create_reference("x")
    reference.increment_times_modified()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reference.dereference(fail)
    assert (reference.count(), reference.get_times_modified()) == (1, 1)
    assert process.get_registry() == ["x"]
    called: list[int] = []
    assert reference.dereference(called.append, args=(1,))
    assert called == [1]


def test_leaving_with_a_callback_waits_for_the_lock(make: Make) -> None:
    one, other = make(), make()
    reference = one.create_reference("x")
    with other.lock("x"), pytest.raises(AlreadyLockedError):
        reference.dereference(print, block=False)
    assert reference.count() == 1, "still held"
    with reference.lock():
        assert reference.dereference(list), "its own lock is no hindrance"


def test_holders_say_who_and_where(make: Make) -> None:
    one, other = make(), make()
    reference = one.create_reference("x")
    other.create_reference("x")
    holders = {holder.id: holder for holder in reference.holders()}
    assert holders.keys() == {one.id, other.id}
    assert {(h.host, h.pid) for h in holders.values()} == {(socket.gethostname(), os.getpid())}
    assert all(holder.since > 1_700_000_000 for holder in holders.values())
