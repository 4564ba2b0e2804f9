"""An heir is left a batch while somebody works off what it was left before: nothing gets lost.

These are conversations of two processes, so that the flows run here, call by call.
"""

import itertools
from typing import Any

import pytest
import redis
from steps import LEASE, Lab, lab_fixture  # noqa: F401 - the fixture is found by its name

from phonon.errors import ServerError
from phonon.protocol import heirs, recovery
from phonon.protocol.effects import Call, Effect, Flow, Participant
from phonon.protocol.messages import Batch
from phonon.protocol.updates import RetryPolicy

HEIR = b"class:C"
#: More than both make.
CALLS = 10


class Talk:
    """A flow of one process that goes on by as many calls as a test says.

    Args:
        lab: Where it calls.
        me: The process.
        flow: What it does.
        number: The number of its last operation.
    """

    def __init__(self, lab: Lab, me: Participant, flow: Flow[Any], number: int = 0) -> None:
        self.lab = lab
        self.me = me
        self.flow = flow
        self.number = number
        self.over = False
        self.effect: Effect | None = None
        self.go_on(lambda: next(flow))

    def go_on(self, move: Any) -> None:
        try:
            self.effect = move()
        except StopIteration:
            self.over = True

    def step(self) -> None:
        """One call, and up to the next, if there is one."""
        if self.over or not isinstance(self.effect, Call):
            return
        try:
            answer = self.answer(self.effect)
        except redis.ResponseError as error:
            refused = ServerError(str(error))
            self.go_on(lambda: self.flow.throw(refused))
            return
        self.go_on(lambda: self.flow.send(answer))

    def answer(self, call: Call) -> Any:
        if not call.step:
            return self.lab.client.execute_command(*call.args)  # type: ignore[no-untyped-call]
        args = list(call.args)
        if call.numbered:
            self.number += 1
            args.insert(1, self.number)
        keys = [call.base, *([call.registry] if call.registry else [])]
        return self.lab.call(call.step, len(keys), *keys, *args)


class Unexpected:
    """The user's code."""

    def __call__(self, batch: Batch) -> None:
        raise AssertionError(batch)  # not in this test

    def merge(self, partials: list[bytes]) -> list[bytes]:
        return partials


def named_in(lab: Lab, base: bytes) -> set[str]:
    """Whose registries name a resource."""
    return {
        name for name, key in lab.dump().items() if name.endswith(":holds") and base in key.content
    }


@pytest.mark.parametrize("colocated", [True, False], ids=["one server", "cluster"])
def test_a_batch_is_left_to_an_heir_whose_registry_is_being_worked_off(
    lab: Lab, colocated: bool
) -> None:
    """All the orders in which the calls of both may come; and each may die after any of them."""
    me, other = (Participant(name, lab.keys, LEASE, colocated=colocated) for name in ("a", "b"))
    outcomes = set()
    for n, order in enumerate(itertools.combinations(range(CALLS), CALLS // 2)):
        a = lab.process("a", f"x{n}", colocated=colocated)
        token = a.batch(b"1")
        # The heir was left a batch of this resource before, and somebody has executed it.
        lab.call("hold", 1, lab.keys.registry(HEIR), a.base, HEIR)
        leave = heirs.entrust(me, a.base, Batch(token, 0, 1, [b"1"]), HEIR)
        take = recovery.recover(other, a.base, HEIR.decode(), Unexpected(), RetryPolicy())
        leaving, working_off = Talk(lab, me, leave, a.number), Talk(lab, other, take)
        for turn in range(CALLS):
            (leaving if turn in order else working_off).step()
            owner = lab.client.hget(a.base + b":running", "owner")
            named = named_in(lab, a.base)
            assert owner != HEIR or named, f"nobody would find it after {turn} of {order}"
            assert owner != b"b" or "{@b}:holds" in named
        assert leaving.over
        assert working_off.over == (owner != b"b"), "else it is about to execute the batch"
        if owner == HEIR:
            assert named == {"{@class:C}:holds"}
            assert lab.client.zscore(lab.keys.processes, HEIR) is not None
        outcomes.add(owner)
        lab.client.delete(*lab.client.scan_iter(f"{lab.namespace}:*", 1_000))
    assert outcomes == {HEIR, b"b"}


@pytest.mark.parametrize("colocated", [True, False], ids=["one server", "cluster"])
def test_a_batch_is_left_to_an_heir_that_is_about_to_be_dismissed(
    lab: Lab, colocated: bool
) -> None:
    """All the orders of one that leaves it a batch and of two that dismiss it, as far as any go."""
    me, *others = (Participant(name, lab.keys, LEASE, colocated=colocated) for name in "abc")
    for n, order in enumerate(sorted(set(itertools.permutations("aaaabbbccc")))[::7]):
        a = lab.process("a", f"x{n}", colocated=colocated)
        token = a.batch(b"1")
        lab.call("announce", 1, lab.keys.processes, HEIR)
        talks = {
            "a": Talk(lab, me, heirs.entrust(me, a.base, Batch(token, 0, 1, [b"1"]), HEIR), 10),
            "b": Talk(lab, others[0], heirs.dismiss(others[0], HEIR)),
            "c": Talk(lab, others[1], heirs.dismiss(others[1], HEIR)),
        }
        for turn, name in enumerate(order):
            talks[name].step()
            named = named_in(lab, a.base)
            listed = lab.client.zscore(lab.keys.processes, HEIR) is not None
            assert "{@a}:holds" in named or listed, f"nobody would find it after {turn} of {order}"
        assert all(talk.over for talk in talks.values())
        assert named == {"{@class:C}:holds"}
        assert listed
        lab.client.delete(*lab.client.scan_iter(f"{lab.namespace}:*", 1_000))
