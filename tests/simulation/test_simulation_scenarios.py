"""Directed scenarios, each with the fault that it is there for."""

import itertools
from collections.abc import Iterator

import pytest

from phonon._core import (
    executor,
    heartbeat,
    identity,
    leases,
    members,
    outbox,
    rebirth,
    sources,
    takeover,
)
from phonon._protocol import lane
from simulation import scenarios
from simulation.checks import Violation
from simulation.mutations import ANY_LANE, ANY_STAMP, Mutation, Patch, in_core, in_lua, mutated
from simulation.scenarios import SCENARIOS, Scenario, play
from simulation.server import Change, SimServer, small


@pytest.fixture(scope="module")
def sim() -> Iterator[SimServer]:
    server = SimServer()
    yield server
    server.close()


_UNVERIFIED = Patch(
    heartbeat,
    "Heartbeat.beat",
    "lost = not self.closing and self._has_lost(known, found)",
    "lost = False",
)
_UNLISTED = Change("or call('HGET', N .. 'listings', pid) ~= args[4] then", "then")

#: Without its rule each scenario comes to a violation.
WITHOUT: dict[Scenario, Mutation] = {
    scenarios.a_lane_has_a_number: Mutation(ANY_LANE),
    scenarios.a_rebirth_fences: in_lua(
        "call('HGET', lane, 'answers')\n  fence(T, args[1])\n",
        "call('HGET', lane, 'answers')\n",
    ),
    scenarios.a_leave_comes_behind_the_former_self: in_core(
        lane, "Lane.defer", "if self.deferred is None:", "if False:"
    ),
    scenarios.an_own_former_self_is_recovered: in_core(
        takeover, "Takeover.take_over", " or dead in self._identity.former\n", "\n"
    ),
    scenarios.former_identities_are_fenced_again: Mutation(
        core=(
            Patch(
                rebirth,
                "Rebirth._fence",
                "for process in (*self._identity.former, old):",
                "for process in (old,):",
            ),
            Patch(
                rebirth,
                "Rebirth._fence",
                "wanted[lane.partition, call.process] = None",
                "wanted[lane.partition, old] = None",
            ),
        )
    ),
    scenarios.a_refused_call_asks: in_core(
        lane, "Lane.read", "call.error is not None and not answers", "call.error is not None"
    ),
    scenarios.a_listing_has_a_number: Mutation((_UNLISTED,), (_UNVERIFIED,)),
    scenarios.an_outage_is_nobodys_death: in_lua(
        "      if score <= at then\n", "      if false then\n"
    ),
    scenarios.a_newcomer_marks_nobody: in_core(
        identity, "Identity.may_mark", "self.clock() - self.lived_since >= self.lease", "True"
    ),
    scenarios.what_a_reaper_leaves_is_marked: in_lua(
        "    call('ZADD', registry, fmt(LEFT_SCORE), resource)\n",
        "    call('ZADD', registry, 0, resource)\n",
    ),
    scenarios.a_call_names_the_stamp_before_it: Mutation(ANY_STAMP),
    scenarios.lanes_are_verified: Mutation(core=(_UNVERIFIED,)),
    scenarios.the_loss_of_all_lanes_is_told_by_the_first_call: in_core(
        rebirth, "Rebirth.run", "for lane in lanes if suspicious else ():", "for lane in ():"
    ),
    scenarios.orphaned_lanes_are_reaped: in_core(
        heartbeat, "Heartbeat.sweep", "now - since > patience", "False"
    ),
    scenarios.a_sweep_is_patient: in_core(
        heartbeat, "Heartbeat.sweep", "now - since > patience", "True"
    ),
    scenarios.a_stale_reaper_meets_an_outage: in_lua(
        "  if score == 0 then\n    return { 'dead' }\n  end\n", ""
    ),
    scenarios.a_refused_release_keeps_its_lock: in_core(
        leases, "Leases.release", "weakref.ref(releasing)", "lambda: None"
    ),
    scenarios.a_release_that_is_refused_late_is_made_again: in_core(
        leases, "Leases.release", "if (yield CALLER_GONE):", "if False:"
    ),
    scenarios.a_clock_that_is_set_forward_is_nobodys_death: in_lua(
        "  if jump > ttl * JUMP then\n", "  if false then\n"
    ),
    scenarios.a_rollback_in_a_takeover: in_lua(
        "  elseif others == 0 and total > 0 and not run[1] then\n    if recovers then\n",
        "  elseif false then\n    if recovers then\n",
    ),
    scenarios.a_zombie_does_not_complete: in_lua(
        "  local mine, due = owns(c, resource, o[i + 2])\n  if not mine then\n",
        "  local mine, due = owns(c, resource, o[i + 2])\n"
        "  if call('EXISTS', c.T .. 'running:' .. resource) == 0 then\n",
    ),
    scenarios.a_batch_is_not_forgotten_while_its_answer_lies_here: in_core(
        executor, "Executor.expects", "return any(", "return False and any("
    ),
    scenarios.a_batch_whose_answer_lies_here_is_not_resumed: in_core(
        outbox, "Outbox._lies_here", "if not executor.expects(due.name):", "if True:"
    ),
    scenarios.a_batch_of_a_former_self_is_not_begun: in_core(
        executor, "Executor.execute", "while workload.owner != self._identity.id:", "while False:"
    ),
    scenarios.a_batch_of_a_former_self_is_not_executed_with_others: in_core(
        executor, "Executor._confirm", "batch.job.outcome = Outcome(error=_TAKEN_OVER)", "pass"
    ),
    scenarios.a_batch_that_is_lost_while_it_is_executed_is_reported: in_core(
        executor, "Executor._confirm", "if batch.job is not None and batch.job.begun:", "if False:"
    ),
    scenarios.a_stop_goes_on_when_its_takeover_gives_up: in_core(
        heartbeat, "Heartbeat.beat", "self._takeover.go_on()", "pass"
    ),
    scenarios.a_release_that_a_rebirth_has_ended_begins_anew: in_core(
        takeover, "Takeover.take_over", "self._released.clear()", "pass"
    ),
    scenarios.a_former_self_is_not_reaped_again_in_lanes_that_are_closed: in_core(
        takeover, "Takeover._reap", "self.former.get(dead, ", "(lambda all: all)("
    ),
    scenarios.a_refused_join_of_a_takeover_that_gave_up: in_core(
        takeover,
        "Takeover._join",
        "own_id = self._identity.id\n",
        "own_id = self._identity.id\n    self._joins.clear()\n",
    ),
    scenarios.a_join_while_others_are_executed_stays: in_core(
        outbox,
        "Outbox.end",
        "answers = yield from executor.execute(workload, leaves)",
        "made: list[Operation] = []\n                leaves(made)\n"
        "                answers = "
        "yield from executor.execute(workload, lambda sent: sent.extend(made))",
    ),
    scenarios.a_refused_join_behind_a_rebirth: in_core(
        members,
        "Members.entered",
        "not entry.entered and entry.identity == self._identity.id",
        "not entry.entered",
    ),
    scenarios.a_refused_leave_behind_a_refused_join: in_core(
        members, "Members.stay", "if not left.entered:", "if False:"
    ),
    scenarios.a_doubt_stays_until_it_is_settled: in_core(
        members, "Members.settle_doubts", "isinstance(answer, Exception)", "False"
    ),
    scenarios.a_leave_behind_a_rebirth_is_the_last: in_core(
        rebirth, "Rebirth.run", "resources += operation.held", "pass"
    ),
    scenarios.a_closed_lane_has_lost_nothing: in_lua(
        "    stamp = '' -- the lane is gone", "    -- "
    ),
    scenarios.a_call_behind_a_close_has_lost_nothing: in_core(
        identity, "Identity.suspect", "if lane.stamp else 0", "if lane.answered else 0"
    ),
    scenarios.of_two_batches_of_a_source_one_is_refused: in_core(
        sources,
        "OrderedProgress.operations",
        "position = self._positions[partition]",
        "position = claim.positions[partition]",
    ),
}


def _name(scenario: object) -> str:
    return getattr(scenario, "__name__", "")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
def test_with_all_rules(sim: SimServer, scenario: Scenario) -> None:
    with small(sim):
        play(sim, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
def test_without_its_rule(sim: SimServer, scenario: Scenario) -> None:
    with mutated(sim, WITHOUT[scenario]), pytest.raises((Violation, AssertionError)):
        play(sim, scenario)


def test_each_scenario_has_its_rule() -> None:
    assert list(WITHOUT) == SCENARIOS
    pairs = itertools.combinations(SCENARIOS, 2)
    assert all(one is not other for one, other in pairs)
