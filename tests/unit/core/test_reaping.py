"""The takeover's worker: one at a time, and nothing that is added is forgotten."""

from types import SimpleNamespace
from typing import Any

import pytest

from phonon._core.flows import Flow
from phonon._core.takeover import Takeover
from phonon.errors import ConnectionLostError


class Lab:
    """A takeover that takes over nothing, in an event loop that enters workers when told to."""

    def __init__(self) -> None:
        identity: Any = SimpleNamespace(id=b"me", name="me")
        outbox: Any = None
        self.takeover = Takeover(identity, outbox, recovers=True, can_execute=lambda _: True)
        self.started: list[Flow[None]] = []
        self.takeover.start_worker = lambda: self.started.append(self.takeover.work())
        self.done: list[bytes] = []
        self.takeover.take_over = self.take_over  # type: ignore[method-assign]  # it is what it calls
        self.failing: set[bytes] = set()

    def take_over(self, dead: bytes) -> Flow[None]:
        yield None  # type: ignore[misc]  # in an exchange with the server
        if dead in self.failing:
            raise ConnectionLostError("gone")
        self.done.append(dead)

    def run(self) -> None:
        """Let all workers that were started work to their end."""
        for worker in self.started:
            for _ in worker:
                pass
        self.started.clear()


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_one_beat_starts_one_worker(lab: Lab) -> None:
    """A beat adds the dead, then the class queues of each partition, before a task is entered."""
    lab.takeover.add([b"a", b"b"])
    for _ in range(16):
        lab.takeover.add([b"class:C"])
        lab.takeover.add([])
    assert len(lab.started) == 1
    lab.run()
    assert sorted(lab.done) == [b"a", b"b", b"class:C"]


def test_what_is_added_while_it_works_is_taken_over_by_the_same_worker(lab: Lab) -> None:
    lab.takeover.add([b"a"])
    (worker,) = lab.started
    next(worker)
    lab.takeover.add([b"b"])
    assert len(lab.started) == 1
    lab.run()
    assert lab.done == [b"a", b"b"]


def test_what_is_added_after_its_end_starts_another(lab: Lab) -> None:
    for dead in (b"a", b"b"):
        lab.takeover.add([dead])
        assert len(lab.started) == 1
        lab.run()
    assert lab.done == [b"a", b"b"]


def test_after_a_failure_another_is_started(lab: Lab) -> None:
    lab.failing.add(b"a")
    lab.takeover.add([b"a"])
    lab.run()
    lab.failing.clear()
    lab.takeover.add([b"a"])
    lab.run()
    assert lab.done == [b"a"]
