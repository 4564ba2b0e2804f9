"""References with known parties: nobody is the last before all have come."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from phonon import Process
from phonon.errors import ConfigurationError, ProcessStoppedError
from support.samples import fresh, put
from support.world import Make, Redis, key_of, wait_until

Keys = Callable[[], set[str]]


def test_the_first_to_finish_is_not_taken_for_the_last(make: Make, keys: Keys) -> None:
    one, two, three = make(), make(), make()
    assert not one.create_reference("x", parties=3).dereference()
    second = two.create_reference("x", parties=3)
    assert not second.dereference(), "the third one has not come"
    assert three.create_reference("x", parties=3).dereference()
    assert keys() == set()
    assert one.create_reference("x").dereference(), "the next session knows of no parties"


def test_modifications_are_those_of_the_whole_session(make: Make) -> None:
    one, two = make(), make()
    first = one.create_reference("x", parties=2)
    first.increment_times_modified()
    assert not first.dereference()
    second = two.create_reference("x", parties=2)
    second.increment_times_modified()
    found = []
    assert second.dereference(lambda: found.append(second.modified_by()))
    assert found == [{one.id: 1, two.id: 1}]


def test_a_process_counts_once_however_often_it_comes(make: Make) -> None:
    one, two = make(), make()
    for _ in range(3):
        assert not one.create_reference("x", parties=2).dereference()
    assert two.create_reference("x", parties=2).dereference()


def test_the_greatest_number_counts(make: Make) -> None:
    processes = [make() for _ in range(3)]
    ends = [
        process.create_reference("x", parties=parties).dereference()
        for process, parties in zip(processes, (2, 3, 2), strict=True)
    ]
    assert ends == [False, False, True]


def test_what_is_not_used_any_more_goes_by_itself(
    server: Redis, namespace: str, make: Make
) -> None:
    process = make()
    parties, week = key_of(namespace, "parties", "x"), 7 * 24 * 3600 * 1000
    assert not process.create_reference("x", parties=2).dereference()
    with server.client() as client:
        assert 0 < client.pttl(parties) <= week
        process.create_reference("x", parties=2)
        assert client.pttl(parties) == -1, "as long as somebody is there"


@pytest.mark.parametrize("leaves_last", [True, False])
def test_waiting_for_the_others(make: Make, leaves_last: bool) -> None:
    one, two, three = make(), make(), make()
    first = one.create_reference("x", parties=3)
    second = two.create_reference("x", parties=3)
    assert not first.wait(timeout=0.01)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(first.wait(timeout=20)))
    waiting.start()
    third = three.create_reference("x", parties=3)
    for reference in (second, third) if leaves_last else (third, second):
        assert not done
        assert not reference.dereference()
    waiting.join(10)
    assert done == [True]
    assert first.count() == 1
    assert first.dereference(), "whoever waited for all others is the last"
    assert first.wait(timeout=0), "it is over"


def test_a_wait_ends_with_its_process(make: Make) -> None:
    process = make()
    reference = process.create_reference("x", parties=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reference.wait, timeout=40)
        wait_until(lambda: process.engine.identity.waiters)
        process.stop()
        with pytest.raises(ProcessStoppedError, match="waits no longer for the other parties"):
            waiting.result(20)


def test_waiting_leaves_nothing_behind(make: Make, keys: Keys) -> None:
    one, two = make(), make()
    first = one.create_reference("x", parties=2)
    assert not first.wait(timeout=0.01)
    assert not two.create_reference("x", parties=2).dereference()
    assert first.wait()
    assert first.dereference()
    assert keys() == set()


def test_a_process_that_is_killed_has_come_and_left(
    make: Make, server: Redis, namespace: str
) -> None:
    survivor = make(heartbeat_interval=0.1, session_length=5)
    mine = survivor.create_reference("x", parties=2)
    script = (
        "import phonon, sys;"
        f"p = phonon.Process(url={server.url!r}, namespace={namespace!r}, heartbeat_interval=0.1);"
        "p.create_reference('x', parties=2); print('ready', flush=True); sys.stdin.read()"
    )
    popen = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert popen.stdin is not None
    assert popen.stdout is not None
    with popen.stdin, popen.stdout:
        assert popen.stdout.readline() == b"ready\n"
        wait_until(lambda: mine.count() == 2)
        assert not mine.wait(timeout=0.01)
        popen.send_signal(signal.SIGKILL)
        popen.wait()
        assert mine.wait(timeout=20)
    assert mine.dereference()


def test_known_parties_and_updates(make: Make) -> None:
    """Stored data does not wait for parties that may never come."""
    sheet = fresh()
    one, two = make(), make()
    reference = one.create_reference("test.test.1", parties=2)
    put(sheet, one, 1, 5)
    assert not reference.dereference()
    assert sheet.docs() == {1: {"n": 5}}
    assert two.create_reference("test.test.1", parties=2).dereference()


def test_waiting_needs_a_number(process: Process) -> None:
    with pytest.raises(ConfigurationError, match=r"create_reference\(\.\.\., parties=n\)"):
        process.create_reference("x").wait()
    with pytest.raises(ConfigurationError, match="parties is at least 1, not 0"):
        process.create_reference("x", parties=0)
