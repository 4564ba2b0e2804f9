"""Directed scenarios: one for each rule of the protocol, which chance does not always come to.

The resource ``d`` is in partition 0, and ``y`` in partition 1.
"""

from collections.abc import Callable
from typing import Any

from phonon._core.flows import Branch, Execute, Read, Send, Sleep
from phonon._protocol.operations import Code
from phonon.errors import BatchLostError, DeclaredDeadError, ServerStateLostError
from simulation.checks import instances_of
from simulation.process import LEASE_US, SimProcess
from simulation.settle import run_out, settle
from simulation.world import Setup, World

Scenario = Callable[[World], None]

A_LEASE = LEASE_US + 2_000_000


def _kept(world: World, process: str, partition: int, sequence: int) -> Any:
    """Return the first call that the network has kept of a process under a number."""
    wanted = process.encode(), partition, sequence
    return next(key for key in world.kept if key[:3] == wanted)


def _does(world: World, name: str, what: str, *arguments: Any) -> None:
    """A user does something, and all that follows from it in its process."""
    assert world.do(("user", name, "user0", what, *arguments))
    run_out(world, name)


def _beats(world: World, name: str) -> None:
    world.do(("beat", name))
    run_out(world, name)


def _is_reborn(world: World, name: str) -> None:
    """A zombie's heartbeat finds out, and nothing else of its process goes on."""
    p = world.processes[name]
    before = p.identity.id
    world.do(("beat", name))
    for _ in range(30):
        if p.identity.id != before:
            return
        world.do(("go", name, "heartbeat", "ok"))
    raise AssertionError("it does not find out")


def _reports(p: SimProcess, kind: type[Exception]) -> list[Any]:
    return [error for error in p.errors if isinstance(error, kind)]


def _is_applied(world: World, item: bytes) -> bool:
    resource = item.split(b"-")[0].decode()
    return any(item in items for items in world.checks.applied[resource].values())


def begin(world: World) -> None:
    """All live for longer than a lease, so that they can tell who is silent."""
    run_out(world)
    world.do(("time", A_LEASE))


def a_lane_has_a_number(world: World) -> None:
    """A late duplicate of the first call of a lane that is lost makes no lane."""
    _does(world, "a", "append", "d")
    world.do(("empty",))
    world.do(("dup", _kept(world, "a1", 0, 1)))


def a_rebirth_fences(world: World) -> None:
    """A duplicate between a rebirth's look and its sending again is not carried out."""
    world.do(("user", "a", "user0", "append", "d"))
    world.do(("call", "a", 0, "lost"))
    world.do(("pause", "a"))
    _is_reborn(world, "a")
    world.do(("dup", _kept(world, "a1", 0, 1)))


def a_leave_comes_behind_the_former_self(world: World) -> None:
    """A leave is not told that somebody is still there: its own former self."""
    _does(world, "a", "append", "d")
    world.do(("user", "a", "user0", "leave", ("d",), True, False))
    world.do(("call", "a", 0, "lost"))
    world.do(("pause", "a"))
    _is_reborn(world, "a")
    world.do(("call", "a", 0, "ok"))
    world.do(("go", "a", "takeover", "ok"))
    world.do(("call", "a", 0, "ok"))


def an_own_former_self_is_recovered(world: World) -> None:
    """A zombie's batch does not wait for a stranger."""
    world.do(("user", "a", "user0", "leave", ("d",), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    _is_reborn(world, "a")
    settle(world, A_LEASE)
    assert not world.checks.state().running, "G8: it waits for somebody who recovers"


def former_identities_are_fenced_again(world: World) -> None:
    """A loss takes the fences of former identities."""
    world.do(("user", "a", "user0", "append", "d"))
    world.do(("call", "a", 0, "lost"))
    world.do(("pause", "a"))
    world.do(("save",))
    # Its call under the new identity is carried out, but not answered.
    _is_reborn(world, "a")
    for _ in range(60):
        if world.checks.stored:
            break
        lane = world.processes["a"].identity.lanes[0]
        appends = any(o.words[0] == 2 for o in lane.queue)
        world.do(("call", "a", 0, "deaf" if appends else "ok"))
        world.do(("call", "a", 1, "ok"))
        for task in list(world.processes["a"].tasks):
            world.do(("go", "a", task, "ok"))
    world.do(("rollback",))
    world.do(("dup", _kept(world, "a1", 0, 1)))
    _beats(world, "a")


def a_refused_call_asks(world: World) -> None:
    """An earlier copy has not carried out a call that is reported as refused."""
    world.do(("user", "a", "user0", "append", "d"))
    world.do(("call", "a", 0, "deaf"))
    world.do(("call", "a", 0, "refused"))
    run_out(world, "a")


def a_listing_has_a_number(world: World) -> None:
    """A late duplicate of a listing lets no dead process live."""
    assert world.do(("user", "a", "user0", "lock", "d", 5.0, False, None))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    run_out(world, "b")
    world.do(("dup", next(key for key in world.kept if key[0] == "list" and b"a1" in key)))
    world.do(("beat", "a"))
    while world.processes["a"].identity.id == b"a1" and world.do(("go", "a", "heartbeat", "ok")):
        assert not any(grant.is_ours for grant in world.processes["a"].granted), "G13"
        if not world.processes["a"].identity.suspected and world.seen["late"]:
            break
        world.seen["late"] += 1
        if world.seen["late"] > 10:
            break
    assert world.processes["a"].identity.suspected or world.processes["a"].identity.id == b"a2", (
        "G9: a dead process lives"
    )


def an_outage_is_nobodys_death(world: World) -> None:
    """When the server was away for all, nobody is marked."""
    _does(world, "a", "append", "d")
    _does(world, "b", "append", "d")
    world.do(("outage",))
    _beats(world, "a")
    _beats(world, "b")
    settle(world, A_LEASE)
    for p in world.processes.values():
        assert not _reports(p, DeclaredDeadError), f"G8: {p.name} was declared dead in an outage"


def a_newcomer_marks_nobody(world: World) -> None:
    """Nor does a process that has just started, when the server comes back."""
    _does(world, "a", "append", "d")
    world.do(("outage",))
    world.do(("start", *Setup("e")))
    run_out(world, "e")
    _beats(world, "e")
    _beats(world, "a")
    assert not _reports(world.processes["a"], DeclaredDeadError), "G8"


def what_a_reaper_leaves_is_marked(world: World) -> None:
    """A process that does not execute does not look at the same batch for ever."""
    for resource in ("d", "f", "w"):
        _does(world, "b", "append", resource)
    world.do(("kill", "b"))
    world.do(("time", A_LEASE))
    settle(world, A_LEASE)


def a_call_names_the_stamp_before_it(world: World) -> None:
    """Another history of the same length does not go unnoticed."""
    world.do(("save",))
    _does(world, "a", "append", "d")
    world.do(("rollback",))
    world.do(("dup", _kept(world, "a1", 0, 1)))
    _does(world, "a", "append", "d")


def lanes_are_verified(world: World) -> None:
    """An idle process notices that its calls are lost, and says how many."""
    world.do(("save",))
    for _ in range(3):
        _does(world, "a", "append", "d")
    _does(world, "a", "append", "y")
    world.do(("rollback",))
    _beats(world, "a")
    losses = _reports(world.processes["a"], ServerStateLostError)
    assert [error.calls for error in losses] == [4], f"G15: {losses}"


def the_loss_of_all_lanes_is_told_by_the_first_call(world: World) -> None:
    """A call that finds a loss asks for all lanes how many calls are gone."""
    world.do(("save",))
    _does(world, "a", "append", "d", "y")
    _does(world, "a", "append", "y")
    world.do(("rollback",))
    _does(world, "a", "append", "d")
    losses = _reports(world.processes["a"], ServerStateLostError)
    assert [error.calls for error in losses] == [3], f"G15: {losses}"


def orphaned_lanes_are_reaped(world: World) -> None:
    """A rollback takes the listing of a process that dies."""
    world.do(("save",))
    world.do(("start", *Setup("e", users=1)))
    run_out(world, "e")
    _does(world, "e", "append", "d")
    world.do(("kill", "e"))
    world.do(("rollback", "namespace"))
    settle(world, 4 * A_LEASE)
    assert _is_applied(world, b"d-e1"), "G8: a lane is forgotten"


def a_sweep_is_patient(world: World) -> None:
    """A process that does not know yet that its listing is lost is not reaped."""
    world.do(("save",))
    world.do(("start", *Setup("e", users=1)))
    run_out(world, "e")
    world.do(("user", "e", "user0", "lock", "d", 5.0, False, None))
    world.do(("call", "e", 0, "ok"))
    world.do(("rollback", "namespace"))
    for _ in range(10):
        _beats(world, "b")
    _does(world, "b", "lock", "d", None, False, None)
    e = world.processes["e"]
    assert any(grant.is_ours for grant in e.granted)
    assert not world.seen["LOCK GRANTED"] > 1, "G13: a lock is taken from one that believes in it"


def a_stale_reaper_meets_an_outage(world: World) -> None:
    """A mark is final: who was marked before an outage has not come back by it."""
    world.do(("user", "a", "user0", "lock", "d", 5.0, False, None))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    world.do(("outage",))
    world.do(("beat", "a"))
    for _ in range(3):
        world.do(("go", "a", "heartbeat", "ok"))
    run_out(world, "b")
    _does(world, "b", "lock", "d", 5.0, False, None)


def a_refused_release_keeps_its_lock(world: World) -> None:
    """A look at the locks, while one is released, leaves it: the release may be refused."""
    world.do(("user", "a", "user0", "lock", "d", None, False, None))
    p = world.processes["a"]
    lane = p.identity.lanes[0]
    world.do(("call", "a", 0, "ok"))
    while not lane.queue:  # until the release is asked for
        world.do(("go", "a", "user0", "ok"))
    world.do(("call", "a", 0, "refused"))
    p.engine.leases.compare(0, [b"d"])
    p.engine.leases.start_work()
    for _ in range(10):
        world.do(("go", "a", "leases", "ok"))
    run_out(world)
    assert world.seen["release tried again"] == 1


def a_clock_that_is_set_forward_is_nobodys_death(world: World) -> None:
    """Neither by more than a lease nor by less: deadlines are set forward with it."""
    assert world.do(("user", "a", "user0", "lock", "d", 5.0, False, None))
    world.do(("call", "a", 0, "ok"))
    world.do(("time", 12_000_000, "a"))
    world.do(("jump", 30_000_000))
    _beats(world, "b")
    _does(world, "b", "lock", "d", None, False, None)
    assert world.seen["LOCK BUSY"] == 1, "G13: a lock is taken from one that believes in it"


def a_rollback_in_a_takeover(world: World) -> None:
    """A resource that was taken over by a process that dies is taken over again."""
    _does(world, "a", "append", "d", "y")
    world.do(("save",))
    world.do(("kill", "a"))
    world.do(("time", A_LEASE))
    run_out(world, "b")
    world.do(("rollback",))
    settle(world, 4 * A_LEASE)


def a_zombie_does_not_complete(world: World) -> None:
    """A batch that was taken over from a zombie is completed by its new owner only."""
    world.do(("user", "a", "user0", "leave", ("d",), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    for _ in range(12):
        world.do(("call", "b", 0, "ok"))
        world.do(("call", "b", 1, "ok"))
        for task in list(world.processes["b"].tasks):
            world.do(("go", "b", task, "ok"))
    world.do(("exec", "a", "user0", 0, "ok"))
    _beats(world, "a")


def a_batch_is_not_forgotten_while_its_answer_lies_here(world: World) -> None:
    """One partition answers at once, another one much later: nothing is executed twice at once."""
    world.do(("user", "a", "user0", "leave", ("d", "y"), True, False))
    world.do(("call", "a", 0, "ok"))
    for _ in range(3):
        world.do(("time", 11_000_000))
    for _ in range(6):
        for task in list(world.processes["a"].tasks):
            if not task.startswith("user"):
                world.do(("go", "a", task, "ok"))
    world.do(("call", "a", 0, "ok"))
    for task in list(world.processes["a"].tasks):
        world.do(("go", "a", task, "ok"))


def a_batch_whose_answer_lies_here_is_not_resumed(world: World) -> None:
    """A rebirth takes over a batch whose answer waits, in a flow, for that of another partition."""
    world.do(("user", "a", "user0", "leave", ("d", "y"), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    _is_reborn(world, "a")
    p = world.processes["a"]
    for _ in range(30):
        world.do(("call", "a", 0, "ok"))
        if not any(operation.words[0] == Code.LEAVE for operation in p.identity.lanes[1].queue):
            world.do(("call", "a", 1, "ok"))
        for task in list(p.tasks):
            if not task.startswith("user"):
                world.do(("go", "a", task, "ok"))
    world.do(("call", "a", 1, "ok"))
    world.do(("go", "a", "user0", "ok"))


def a_batch_of_a_former_self_is_not_begun(world: World) -> None:
    """A survivor executes it, while its answer waits, in a flow, for that of another partition."""
    world.do(("user", "a", "user0", "leave", ("d", "y"), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("pause", "a"))
    b = world.processes["b"]
    for _ in range(12):
        for partition in range(len(b.identity.lanes)):
            world.do(("call", "b", partition, "ok"))
        for task in list(b.tasks):
            world.do(("go", "b", task, "ok"))
    assert b.engine.executor.workloads, "b does not execute it"
    _is_reborn(world, "a")
    run_out(world, "a")
    assert world.seen["RESUME LOST"] == 1


def _executes(p: SimProcess) -> list[str]:
    """Return the resources whose batches a user's flow executes."""
    effect = p.tasks["user0"].effect
    jobs = effect.jobs if isinstance(effect, Execute) else ()
    instances = [each for job in jobs for each in instances_of(job)]
    return [instance.record.resource for instance in instances]


def _loses_the_batch_of_d(world: World) -> SimProcess:
    """A process executes batches of d and y, and a survivor takes over the first. Return the zombie."""
    world.do(("user", "a", "user0", "leave", ("d", "y"), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("call", "a", 1, "ok"))
    a, b = world.processes["a"], world.processes["b"]
    assert _executes(a) == ["d", "y"]
    if "d" not in world.together:
        world.do(("exec", "a", "user0", 0, "half"))
    world.do(("pause", "a"))
    for _ in range(12):
        for lane in b.identity.lanes:
            recovers = any(o.words[0] == Code.REAP and o.words[3] for o in lane.queue)
            if lane.partition == 0 or not recovers:
                world.do(("call", "b", lane.partition, "ok"))
        for task in list(b.tasks):
            world.do(("go", "b", task, "ok"))
    _is_reborn(world, "a")
    a.tasks["user0"].finish(None)  # it looks at what has ended so far
    for _ in range(12):
        for partition in range(len(a.identity.lanes)):
            world.do(("call", "a", partition, "ok"))
        for task in list(a.tasks):
            world.do(("go", "a", task, "ok"))
    assert world.seen["RESUME LOST"] == 1
    return a


def a_batch_of_a_former_self_is_not_executed_with_others(world: World) -> None:
    """A call of the user's code for several batches is made without those that are lost."""
    world.together = "dy"
    assert _executes(_loses_the_batch_of_d(world)) == ["y"]


def a_batch_that_is_lost_while_it_is_executed_is_reported(world: World) -> None:
    """The user's code is running when a zombie asks for its batches: it is not taken from it."""
    a = _loses_the_batch_of_d(world)
    run_out(world)
    assert len(_reports(a, BatchLostError)) == 1


def _gives_up_taking_over(world: World, name: str) -> None:
    """A zombie's takeover of its former self is told that the server does not answer."""
    _is_reborn(world, name)
    while not isinstance(world.processes[name].tasks["takeover"].effect, Send):
        assert world.do(("go", name, "takeover", "ok"))
    assert world.do(("gone", name, "takeover"))


def a_stop_goes_on_when_its_takeover_gives_up(world: World) -> None:
    """The lanes are closed when the former self is reaped, which another attempt does."""
    p = world.processes["a"]
    world.do(("stop", "a"))
    while not isinstance(p.tasks["stop"].effect, Read):  # of what is left to leave
        assert world.do(("go", "a", "stop", "ok"))
    world.do(("pause", "a"))
    _beats(world, "b")
    _gives_up_taking_over(world, "a")


def a_release_that_a_rebirth_has_ended_begins_anew(world: World) -> None:
    """A survivor releases one dead process while it executes another's, and is a zombie by then."""
    found = [f"{word}{number}" for number in range(30) for word in "dy"]
    many = [[name for name in found if world.place(name) == p][:5] for p in (0, 1)]
    world.resources += (*many[0], *many[1])
    for name in many[0]:
        _does(world, "a", "append", name)
    for name in many[1]:
        _does(world, "e", "join", name)
    b = world.processes["b"]
    world.do(("kill", "a"))
    world.do(("time", A_LEASE))
    while not isinstance(b.tasks["takeover"].effect, Sleep):
        for partition in range(2):
            world.do(("call", "b", partition, "ok"))
        world.do(("go", "b", "takeover", "ok"))
    world.do(("kill", "e"))
    world.do(("time", A_LEASE))
    world.do(("go", "b", "takeover", "ok"))
    world.do(("call", "b", 0, "ok"))
    world.do(("call", "b", 1, "slow"))
    world.do(("pause", "b"))
    _is_reborn(world, "b")
    world.do(("kill", "c"))
    settle(world, A_LEASE)
    left = {name: some for name, some in world.checks.state().members.items() if some}
    assert not left, f"G8: {left} are left behind"


def a_former_self_is_not_reaped_again_in_lanes_that_are_closed(world: World) -> None:
    """A reap that is refused in one partition is repeated there, and not where it was done."""
    p = world.processes["a"]
    world.do(("stop", "a"))
    while not isinstance(p.tasks["stop"].effect, Read):
        assert world.do(("go", "a", "stop", "ok"))
    world.do(("pause", "a"))
    _beats(world, "b")
    _is_reborn(world, "a")
    while not isinstance(p.tasks["takeover"].effect, Send):
        assert world.do(("go", "a", "takeover", "ok"))
    reborn = p.identity.id
    for partition, fate in ((0, "ok"), (1, "refused"), (1, "ok")):  # it asks what became of it
        assert world.do(("call", "a", partition, fate))
    while not p.engine.heartbeat.closing:
        assert world.do(("go", "a", "stop", "ok"))
    assert world.do(("call", "a", 0, "ok"))
    assert world.seen["CLOSE CLOSED"] == 1
    settle(world, A_LEASE)
    assert p.identity.id == reborn, "G8: a call of a closed lane looks like a loss"


def a_refused_join_of_a_takeover_that_gave_up(world: World) -> None:
    """A membership whose renewal was refused is renewed before the former self is reaped."""
    _does(world, "a", "join", "y")
    world.do(("pause", "a"))
    _beats(world, "b")
    _gives_up_taking_over(world, "a")
    assert world.do(("call", "a", 1, "refused"))
    settle(world, A_LEASE)


def a_join_while_others_are_executed_stays(world: World) -> None:
    """Leaves of the next piece are made when they are sent, not before a piece is executed."""
    world.do(("user", "a", "user0", "leave", ("d", "y", "f"), True, False))
    world.do(("call", "a", 0, "ok"))
    world.do(("call", "a", 1, "ok"))
    world.do(("user", "a", "user1", "append", "f"))
    run_out(world, "a")


def a_refused_join_behind_a_rebirth(world: World) -> None:
    """A membership that a rebirth has renewed is not forgotten when its own operation is refused."""
    world.do(("user", "a", "user0", "meet", "d", 1))
    world.do(("call", "a", 0, "lost"))
    world.do(("pause", "a"))
    _is_reborn(world, "a")
    for _ in range(40):
        p = world.processes["a"]
        for task in list(p.tasks):
            if not task.startswith("user"):
                world.do(("go", "a", task, "ok"))
        queue = p.identity.lanes[0].queue
        meets = any(operation.words[0] == 14 for operation in queue)
        world.do(("call", "a", 0, "refused" if meets else "ok"))
        world.do(("call", "a", 1, "ok"))
    run_out(world)


def a_leave_behind_a_rebirth_is_the_last(world: World) -> None:
    """The only member of a session is told that it was the last, also as a zombie."""
    _does(world, "a", "join", "d")
    world.do(("user", "a", "user0", "leave", ("d",), False, False))
    world.do(("call", "a", 0, "lost"))
    world.do(("pause", "a"))
    run_out(world, "b")
    _is_reborn(world, "a")
    run_out(world)
    assert world.seen["told last"] == 1, "G2: nobody is told that it was the last"


def _closes_a_lane(world: World) -> None:
    """A process that stops has closed one of its lanes."""
    world.do(("stop", "a"))
    lanes = world.processes["a"].identity.lanes
    for _ in range(30):
        if lanes[1].call is not None:
            break
        world.do(("go", "a", "stop", "ok"))
        world.do(("go", "a", "heartbeat", "ok"))
    world.do(("call", "a", 1, "ok"))
    assert lanes[1].answered


def a_closed_lane_has_lost_nothing(world: World) -> None:
    """A process that is declared dead while it stops does not miss the lanes that it has closed."""
    _closes_a_lane(world)
    world.do(("pause", "a"))
    run_out(world, "b")
    _is_reborn(world, "a")


def a_call_behind_a_close_has_lost_nothing(world: World) -> None:
    """A process that takes over while it stops may call a lane that it has closed."""
    _closes_a_lane(world)
    identity = world.processes["a"].identity
    identity.suspect(identity.lanes[1], "PHONONLOST", 0)  # as it is told there
    _is_reborn(world, "a")


def of_two_batches_of_a_source_one_is_refused(world: World) -> None:
    """A thread has stored the next messages while the batch of another one was under way."""
    for _ in range(3):
        _does(world, "a", "append", "d")
    world.do(("user", "a", "user0", "consume", 4, 0, 2))
    task = world.processes["a"].tasks["user0"]
    for _ in range(20):
        # The collected partials make it merge some, after its first two messages.
        if not isinstance(task.effect, Branch):
            world.do(("call", "a", 0, "ok"))
            world.do(("call", "a", 1, "ok"))
    assert isinstance(task.effect, Branch)
    world.do(("user", "a", "user1", "consume", 1, 0, 0))
    world.do(("call", "a", 0, "ok"))
    world.do(("call", "a", 1, "ok"))
    run_out(world, "a")


#: Who is there; two that recover unless it says otherwise.
OTHERS: dict[Scenario, list[Setup]] = {
    an_own_former_self_is_recovered: [Setup("a", recovers=False), Setup("b", recovers=False)],
    what_a_reaper_leaves_is_marked: [Setup("a", recovers=False), Setup("b")],
    a_release_that_a_rebirth_has_ended_begins_anew: [
        Setup("a"),
        Setup("b"),
        Setup("c", recovers=False),
        Setup("e"),
    ],
}
SCENARIOS: list[Scenario] = [
    a_lane_has_a_number,
    a_rebirth_fences,
    a_leave_comes_behind_the_former_self,
    an_own_former_self_is_recovered,
    former_identities_are_fenced_again,
    a_refused_call_asks,
    a_listing_has_a_number,
    an_outage_is_nobodys_death,
    a_newcomer_marks_nobody,
    what_a_reaper_leaves_is_marked,
    a_call_names_the_stamp_before_it,
    lanes_are_verified,
    the_loss_of_all_lanes_is_told_by_the_first_call,
    orphaned_lanes_are_reaped,
    a_sweep_is_patient,
    a_stale_reaper_meets_an_outage,
    a_refused_release_keeps_its_lock,
    a_clock_that_is_set_forward_is_nobodys_death,
    a_rollback_in_a_takeover,
    a_zombie_does_not_complete,
    a_batch_is_not_forgotten_while_its_answer_lies_here,
    a_batch_whose_answer_lies_here_is_not_resumed,
    a_batch_of_a_former_self_is_not_begun,
    a_batch_of_a_former_self_is_not_executed_with_others,
    a_batch_that_is_lost_while_it_is_executed_is_reported,
    a_stop_goes_on_when_its_takeover_gives_up,
    a_release_that_a_rebirth_has_ended_begins_anew,
    a_former_self_is_not_reaped_again_in_lanes_that_are_closed,
    a_refused_join_of_a_takeover_that_gave_up,
    a_join_while_others_are_executed_stays,
    a_refused_join_behind_a_rebirth,
    a_leave_behind_a_rebirth_is_the_last,
    a_closed_lane_has_lost_nothing,
    a_call_behind_a_close_has_lost_nothing,
    of_two_batches_of_a_source_one_is_refused,
]


def play(server: Any, scenario: Scenario, tell: Callable[[str], object] | None = None) -> World:
    """Play a scenario, and let the dust settle."""
    from simulation.settle import finish  # noqa: PLC0415 - for tests that only read the list

    setups = OTHERS.get(scenario, [Setup("a"), Setup("b")])
    world = World(server, setups, seed=scenario.__name__, tell=tell)
    begin(world)
    scenario(world)
    finish(world)
    return world
