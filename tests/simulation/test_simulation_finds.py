"""The simulation finds faults: each of these is put into the library or a flow, and must show."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
from sim_checks import Violation
from sim_explorer import Explorer
from sim_link import Link
from sim_random import run_random
from sim_scenarios import LARGE, SCENARIOS

from conftest import Redis
from phonon.protocol import heirs, messages, parking, recovery, updates
from phonon.protocol.effects import NOTHING, Call, Effect, Execute, Flow, Participant
from phonon.protocol.library import text
from phonon.protocol.recovery import Recovered
from phonon.protocol.updates import RetryPolicy, Runner

#: What is tried: these scenarios, then so many random schedules.
SMALL = ("a zombie completes", "an answer is lost, then a pause", "leaver and newcomer")
SCHEDULES = 600


class Mutation(NamedTuple):
    """A fault: ``old``, which occurs once in the library's text, becomes ``new``.

    Attributes:
        guarantees: Those one of which is violated then.
        scenarios: What is explored before random schedules are tried.
        seed: Of the schedules; another one for what they seldom come to.
    """

    old: str
    new: str
    guarantees: str
    scenarios: tuple[str, ...] = SMALL
    seed: str = "finds"


MUTATIONS = {
    "complete does not ask who owns the batch": Mutation(
        "  local mine, due = owns(r, args[3])\n  if not mine then",
        "  local _, due = owns(r, args[3])\n  if false then",
        "G9",
    ),
    "fail does not ask who owns the batch": Mutation(
        "  local mine, due = owns(r, token)\n  if not mine then",
        "  local _, due = owns(r, token)\n  if call('EXISTS', r.running) == 0 then",
        "G9",
    ),
    "a batch is owned under any token": Mutation(
        " and running[2] == token", "", "G9", seed="finds7"
    ),
    "operation numbers are not remembered": Mutation(
        "          remember(r, answer)",
        "          call('PEXPIRE', r.memory, MEMORY_MS)",
        "G4 G2 G9",
    ),
    "a repeat is done once more": Mutation(
        "if r.op > last then", "if r.op >= last then", "G4 G2 G9"
    ),
    "a late call is answered": Mutation("if r.op < last then", "if false then", "G4"),
    "a repeat delivers a batch that was taken over": Mutation(
        "if running[1] ~= r.pid or tonumber(running[2]) ~= answer[3] then",
        "if not running[1] then",
        "G3 G4 G5 G6 G9",
    ),
    "the batch is deleted when it is delivered": Mutation(
        "  delivered[#answer + 3] = add_piece(r.batch, {}, 0, FIRST_PARTIALS - 1)",
        "  delivered[#answer + 3] = add_piece(r.batch, {}, 0, FIRST_PARTIALS - 1)\n"
        "  call('DEL', r.batch)",
        "G3 G6",
    ),
    "the registry is not written": Mutation(
        "  if r.registry then\n    enter_registry(", "  if false then\n    enter_registry(", "G8"
    ),
    "the registry is cleared while a batch is owned": Mutation(
        "    or pcall('HGET', r.running, 'owner') == r.pid\n", "", "G8"
    ),
    "a tombstone is ignored": Mutation(
        "  if redis.pcall('GET', registry) == TOMBSTONE then\n    refuse_the_dead(pid)\n  end\n"
        "  error(added)",
        "  return 0",
        "G8",
    ),
    "a resource does not know its dead": Mutation("call('SADD', r.fence, dead)", "", "G8 G3"),
    "recover forgets the batch": Mutation(
        "  if running[1] == dead then\n    call('HSET'", "  if false then\n    call('HSET'", "G3 G5"
    ),
    "recover starts with a new token": Mutation(
        "    local token, due_in = tonumber(running[2]),",
        "    call('HSET', r.running, 'token', string.format('%.0f', next_token(r, SPARE_TOKENS)))\n"
        "    running[2] = call('HGET', r.running, 'token')\n"
        "    local token, due_in = tonumber(running[2]),",
        "G6",
    ),
    "recover does not drop the member": Mutation("call('ZREM', r.members, dead)", "", "G1 G8"),
    "recover does not free the lock": Mutation(
        "  if in_the_way then\n    call('DEL', r.lock)",
        "  if false then\n    call('DEL', r.lock)",
        "G8 G13",
    ),
    "recover does not free the shared lock": Mutation(
        "    if process_of(holder) == dead then\n      drop_sharer",
        "    if false then\n      drop_sharer",
        "G8 G13",
    ),
    "recover does not start the batch of the dead": Mutation(
        "  if ended and total > 0 and not running[1] then", "  if false then", "G3"
    ),
    "recover forgets what is due": Mutation(
        "    if running[1] and total > 0 then\n      call('HSET', r.running, 'due', total)",
        "    if false then\n      call('HSET', r.running, 'due', total)",
        "G3",
    ),
    "leave starts a batch beside the running one": Mutation(
        "  if running then\n    -- Batches", "  if false then\n    -- Batches", "G3 G5"
    ),
    "leave does not note what is due": Mutation(
        "    call('HSET', r.running, 'due', total)\n    return { 'deferred'",
        "    return { 'deferred'",
        "G3",
    ),
    "compact does not ask whether the partials are the same": Mutation(
        "if digest_of(call('LRANGE', r.partials, first, behind - 1)) ~= args[5] then",
        "if false then",
        "G3 G4",
        ("two compact", "compaction by the last leaver, and a newcomer"),
    ),
    "compact forgets how much less is due": Mutation(
        "  if behind <= due then\n",
        "  if false then\n",
        "G7 G3 G8",
        ("compaction while a batch runs, two sessions later",),
    ),
    "compact drops what is behind": Mutation(
        "    call('RPUSH', r.partials, partial)\n",
        "    local _ = partial\n",
        "G3",
        ("compaction while a batch runs, two sessions later",),
    ),
    "candidates are of two sessions, and compact merges them": Mutation(
        "  return tonumber(call('HGET', r.running, 'due') or 0) or 0",
        "  return 0",
        "G7 G3 G8",
        ("compaction while a batch runs, two sessions later",),
    ),
    "complete takes the newcomers too": Mutation(
        "start(r, due, call('LLEN', r.partials))",
        "start(r, call('LLEN', r.partials), call('LLEN', r.partials))",
        "G7",
    ),
    "complete does not start what is due": Mutation(
        "if due > 0 then\n    return", "if false then\n    return", "G3"
    ),
    "one who leaves does not look who is there": Mutation(
        "if #members == 1 and members[1] == r.pid then", "if true then", "G1 G2 G3 G8"
    ),
    "append does not join": Mutation(
        "  enter(r, args[3])\n  local count", "  local count", "G1 G2"
    ),
    "tokens are not remembered": Mutation(
        "  local token = math.max(r.last_token + 1, r.micros)",
        "  local token = math.floor(r.micros / 1e9)",
        "G6",
    ),
    "a lock is granted beside another": Mutation(
        "  local free = not held[1]\n", "  local free = true\n", "G13"
    ),
    "a lock is granted beside those who share it": Mutation(
        "    free = free and sharers == 0", "    free = free", "G13"
    ),
    "a place too many": Mutation(
        "sharers < (places", "sharers <= (places", "G13", ("three want two places",)
    ),
    "unlock wakes nobody": Mutation(
        "  if others and (mine or not held[1]) then\n    wake_next(r)",
        "  if false then\n    wake_next(r)",
        "G13",
    ),
    "who gives up keeps its place": Mutation(
        "    call('ZCARD', r.waiting)\n    quit_queue(r, holder)",
        "    call('ZCARD', r.waiting)",
        "G13 G8 G11",
    ),
    "who was woken and gives up wakes nobody": Mutation(
        "  if others and (mine or not held[1]) then",
        "  if others and mine then",
        "G13",
        ("a waiter gives up",),
    ),
    "readers overtake a writer": Mutation(
        "      if not (together and is_shared(waiter)) then",
        "      if not together then",
        "G13",
    ),
    "a writer overtakes readers": Mutation(
        "      if waiter == holder then\n        return nil",
        "      if waiter == holder or not is_shared(holder) then\n        return nil",
        "G13",
    ),
    "the first of two parties is the last": Mutation(
        "  if arrived(r) >= tonumber(", "  if arrived(r) >= 1 or arrived(r) >= tonumber(", "G2"
    ),
    "a party that comes twice counts twice": Mutation(
        "'n', parties, '@' .. r.pid, 1)", "'n', parties, '@' .. r.pid .. r.op, 1)", "G2"
    ),
    "the dead are not buried under a stone": Mutation(
        "  call('SET', registry, TOMBSTONE, 'PX', args[1])", "", "G8 G3", seed="finds3"
    ),
}


def check(
    link: Link, guarantees: str, scenarios: tuple[str, ...] = SMALL, seed: str = "finds"
) -> None:
    with pytest.raises(Violation) as found:
        for name in scenarios:
            Explorer(link, {**SCENARIOS, **LARGE}[name]).run(300)
        run_random(link, seed, SCHEDULES)
    message = str(found.value)
    assert message.partition(":")[0] in guarantees.split(), message


@pytest.mark.parametrize("name", MUTATIONS)
def test_faults_of_the_library(server: Redis, name: str) -> None:
    old, new, guarantees, scenarios, seed = MUTATIONS[name]
    body = text()
    assert body.count(old) == 1, "the library has changed: adapt the mutation"
    link = Link(server.socket, body.replace(old, new))
    try:
        check(link, guarantees, scenarios, seed)
    finally:
        link.close()


# -- faults of the flows


def holds_nothing(
    _: Participant, __: bytes, *, lock: bool = False, keep: bool = False
) -> Iterable[Effect]:
    return NOTHING


_hold = Participant.hold


def keeps_nothing(
    me: Participant, base: bytes, *, lock: bool = False, keep: bool = False
) -> Iterable[Effect]:
    """Data that is on its way is in nobody's hands if its caller is cancelled here."""
    return _hold(me, base, lock=lock)


def lets_go_always(me: Participant, base: bytes, _: int) -> Iterable[Effect]:
    return NOTHING if me.colocated else clears(me.registry, base)


def clears(registry: bytes, base: bytes) -> Flow[None]:
    yield Call("", registry, (b"ZREM", registry, base), keep=True)


_recover = recovery.recover


def releases_first(
    me: Participant, base: bytes, dead: str, run: Runner, policy: RetryPolicy
) -> Flow[Recovered]:
    """The dead one's registry is cleared before the resource is recovered."""
    registry = me.keys.registry(dead.encode())
    yield Call("", registry, (b"ZREM", registry, base))
    return (yield from _recover(me, base, dead, run, policy))


def buries_at_once(me: Participant, dead: str) -> Flow[bool]:
    """A dead process is struck off the list before its registry is empty."""
    yield Call("resign", me.keys.processes, (dead.encode(),))
    return False


def never_completes(me: Participant, base: bytes, batch: Any, run: Runner, _: RetryPolicy) -> Any:
    """A batch is completed before it is executed."""
    ran = messages.ran((yield me.step("complete", base, batch.token, keep=True)))
    yield Execute(lambda: run(batch))
    return ran, None


def claims_nothing(me: Participant, dead: str) -> Flow[recovery.Claim]:
    yield Call("claim", me.keys.registry(dead.encode()), (0, 0))
    return recovery.Claim(0, [])


def announces_nothing(_: Participant, __: bytes) -> Flow[None]:
    return
    yield


def indexes_nothing(_: Participant, __: bytes) -> Flow[None]:
    return
    yield


FLOWS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "in a cluster the registry is not written first": (Participant, "hold", holds_nothing, "G8"),
    "in a cluster data is not kept before its step": (Participant, "hold", keeps_nothing, "G1 G3"),
    "in a cluster the registry is always cleared": (Participant, "let_go", lets_go_always, "G8"),
    "the dead registry is cleared before the step": (recovery, "recover", releases_first, "G8 G3"),
    "the dead are struck off, but not recovered": (recovery, "bury", buries_at_once, "G8 G3 G11"),
    "a batch is completed before it is executed": (updates, "_attempt", never_completes, "G3"),
    "nothing of the dead is claimed": (recovery, "claim", claims_nothing, "G8 G3 G11"),
    "heirs are not listed": (heirs, "announce", announces_nothing, "G3 G8"),
    "parked batches are not indexed": (parking, "index", indexes_nothing, "G3 G11"),
}


@pytest.mark.parametrize("name", FLOWS)
def test_faults_of_the_flows(server: Redis, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    where, what, instead, guarantees = FLOWS[name]
    monkeypatch.setattr(where, what, instead)
    link = Link(server.socket)
    try:
        check(link, guarantees)
    finally:
        link.close()
