"""The checks of the model test find faults: each of these is put into the library and must show."""

from typing import NamedTuple

import pytest
from model import Violation
from steps import Lab
from world import Move, run, run_random

from conftest import Redis
from phonon.protocol.library import text

SCHEDULES = 300
LENGTH = 40


class Mutation(NamedTuple):
    """A fault: every ``old`` in the library's text becomes ``new``."""

    old: str
    new: str


MUTATIONS = {
    "complete does not ask who owns the batch": Mutation(
        "  local mine, due = owns(r, args[3])\n  if not mine then",
        "  local _, due = owns(r, args[3])\n  if false then",
    ),
    "complete deletes before it asks who owns the batch": Mutation(
        "step('complete', function(r, args)\n",
        "step('complete', function(r, args)\n  call('DEL', r.batch)\n",
    ),
    "a batch is owned under any token": Mutation(" and running[2] == token", ""),
    "answers are not remembered": Mutation(
        "          remember(r, answer)", "          call('PEXPIRE', r.memory, MEMORY_MS)"
    ),
    "a repeat is done once more": Mutation("if r.op > last then", "if r.op >= last then"),
    "a stale call gets the last answer": Mutation("if r.op < last then", "if false then"),
    "a stale call is done": Mutation("if r.op > last then", "if r.op ~= last then"),
    "a repeat delivers a batch that was taken over": Mutation(
        "if running[1] ~= r.pid or tonumber(running[2]) ~= answer[3] then", "if false then"
    ),
    "expired members are not dropped": Mutation(
        "call('ZRANGEBYSCORE', r.members, '-inf', r.now)",
        "call('ZRANGEBYSCORE', r.members, '-inf', 0)",
    ),
    "expired members are counted": Mutation(
        "call('ZCOUNT', r.members, '(' .. r.now, '+inf')", "call('ZCARD', r.members)"
    ),
    "leave does not remove the member": Mutation(
        "call('ZREM', r.members, r.pid)", "call('ZSCORE', r.members, r.pid) and 1 or 0"
    ),
    "leave loses its partial": Mutation(
        "total = call('RPUSH', r.partials, partial)", "total = total + 1"
    ),
    "leave starts a batch beside the running one": Mutation(
        "  if running then\n    -- Batches", "  if false then\n    -- Batches"
    ),
    "leave does not note what is due": Mutation(
        "-- Batches run one after the other: the running one's owner takes these when it is done.\n"
        "    call('HSET', r.running, 'due', total)",
        "",
    ),
    "modifications outlive the session": Mutation(
        "elseif left == 0 and #modified > 0 then\n    call('DEL', r.modified)",
        "elseif false then",
    ),
    "append does not join": Mutation("  enter(r, args[3])\n  local count", "  local count"),
    "one who leaves does not look who is there": Mutation(
        "if #members == 1 and members[1] == r.pid then", "if true then"
    ),
    "the only one who was there does not leave": Mutation(
        "  call('DEL', r.members)\n  call('RPUSH', r.batch", "  call('RPUSH', r.batch"
    ),
    "the only one who was there has changed nothing": Mutation(
        "0, 1, { r.pid, 1 } }, { partial }", "0, 1, {} }, { partial }"
    ),
    "append stores at the wrong end": Mutation(
        "call('RPUSH', r.partials, args[4])", "call('LPUSH', r.partials, args[4])"
    ),
    "append does not say that there are many": Mutation(
        "count % COMPACT_AT == 0", "count % 128 == 0"
    ),
    "leave does not say that there are many": Mutation(
        "many = total % COMPACT_AT == 0 and total or nil", "many = nil"
    ),
    "leave does not say that there are many that are due": Mutation(
        "{ 'deferred', let_go(r), 0, left, was_member, modified, many }",
        "{ 'deferred', let_go(r), 0, left, was_member, modified }",
    ),
    "compact does not ask whether the partials are the same": Mutation(
        "if digest_of(call('LRANGE', r.partials, first, behind - 1)) ~= args[5] then",
        "if false then",
    ),
    "partials whose bytes are the same together count as the same": Mutation(
        "    parts[#parts + 1] = #partial .. ':'\n", ""
    ),
    "compact merges what is due with what is not": Mutation(
        "if behind > total or first < due and due < behind then", "if behind > total then"
    ),
    "compact forgets how much less is due": Mutation(
        "  if behind <= due then\n", "  if false then\n"
    ),
    "compact always takes it for due": Mutation("  if behind <= due then\n", "  if due > 0 then\n"),
    "compact drops what is in front": Mutation("  if first > 0 then\n", "  if false then\n"),
    "compact drops what is behind": Mutation(
        "    call('RPUSH', r.partials, partial)\n", "    local _ = partial\n"
    ),
    "compact puts what was merged in front of all": Mutation(
        "call('RPUSH', r.partials, args[i])", "call('LPUSH', r.partials, args[i])"
    ),
    "compact stores only the first of those that were merged": Mutation(
        "for i = 6, #args do", "for i = 6, 6 do"
    ),
    "complete does not start what is due": Mutation(
        "if due > 0 then\n    return", "if false then\n    return"
    ),
    "complete takes the newcomers too": Mutation(
        "start(r, due, call('LLEN', r.partials))",
        "start(r, call('LLEN', r.partials), call('LLEN', r.partials))",
    ),
    "a batch starts without its last partial": Mutation(
        "call('RENAME', r.partials, r.batch)",
        "call('RENAME', r.partials, r.batch)\n    call('RPOP', r.batch)",
    ),
    "a batch starts with a partial of the next session": Mutation(
        "for _ = 1, n do", "for _ = 0, n do"
    ),
    "fail never parks": Mutation("if attempts < tonumber(args[6]) then", "if true then"),
    "fail parks nothing": Mutation(
        "call('RENAME', r.batch, r.parked .. ':' .. token)", "call('DEL', r.batch)"
    ),
    "a parked batch does not make way": Mutation("next_batch(r, due, 'parked')", "{'parked', 0}"),
    "tokens follow a clock that is set back": Mutation(
        "math.max(r.last_token + 1, r.micros)", "r.micros"
    ),
    "tokens are not remembered": Mutation(
        "  if r.is_token_new then\n    local token", "  if false then\n    local token"
    ),
    "the registry is not written": Mutation(
        "  if r.registry then\n    enter_registry(", "  if false then\n    enter_registry("
    ),
    "the registry is cleared while a batch is owned": Mutation(
        "    or pcall('HGET', r.running, 'owner') == r.pid\n", ""
    ),
    "the registry is not cleared": Mutation("    pcall('ZREM', r.registry, r.base)", ""),
    "the memory does not expire": Mutation("call('PEXPIRE', r.memory, ", "math.max("),
    "partials expire": Mutation(
        "return STORED", "call('PEXPIRE', r.partials, 3600000)\n  return STORED"
    ),
    "a lock is granted twice": Mutation("local free = not held[1]", "local free = true"),
    "a lock's lease never ends": Mutation(
        "if held[1] and tonumber(held[2]) <= r.now then", "if false then"
    ),
    "unlock frees the lock of another": Mutation(
        "local mine = held[1] == holder\n  if others", "local mine = held[1]\n  if others"
    ),
    "recover leaves the dead member": Mutation("  call('ZREM', r.members, dead)\n", ""),
    "recover does not free the lock": Mutation(
        "  if in_the_way then\n    call('DEL', r.lock)\n  end\n", ""
    ),
    "recover leaves the dead in line": Mutation(
        "    if process_of(holder) == dead then\n      quit_queue",
        "    if false then\n      quit_queue",
    ),
    "recover does not wake the next": Mutation(
        "  if in_the_way then\n    wake_next(r)", "  if false then\n    wake_next(r)"
    ),
    "recover does not claim the batch": Mutation(
        "    call('HSET', r.running, 'owner', r.pid)\n    local token", "    local token"
    ),
    "recover claims anybody's batch": Mutation(
        "  if running[1] == dead then\n    call('HSET'", "  if running[1] then\n    call('HSET'"
    ),
    "recover gives the batch another token": Mutation(
        "local token, due_in = tonumber(running[2])",
        "local token, due_in = tonumber(running[2]) + 1",
    ),
    "recover starts a batch beside the running one": Mutation(
        "  if ended and total > 0 and not running[1] then", "  if ended and total > 0 then"
    ),
    "recover starts a batch of a session that goes on": Mutation(
        "  if ended and total > 0 and not running[1] then", "  if total > 0 and not running[1] then"
    ),
    "recover forgets what is due": Mutation(
        "    if running[1] and total > 0 then\n", "    if false then\n"
    ),
    "recover does not wait for the next attempt": Mutation(
        "    if due_in > 0 then", "    if false then"
    ),
    "recover does not count the death": Mutation(
        "call('HINCRBY', r.running, 'crashes', args[4])",
        "tonumber(call('HGET', r.running, 'crashes') or 0)",
    ),
    "recover does not enter its own registry": Mutation(
        "    hold(r)\n  end\n  if not r.registry then", "  end\n  if not r.registry then"
    ),
    "recover leaves the dead one's registry": Mutation(
        "    redis.pcall('ZREM', args[6], r.base)", "    local _ = r"
    ),
    "the dead are not fenced off": Mutation("    call('SADD', r.fence, dead)\n", ""),
    "the fence is not looked at": Mutation(
        "elseif call('SISMEMBER', r.fence, r.pid) == 1 then", "elseif false then"
    ),
    "the fence does not expire": Mutation("    call('PEXPIRE', r.fence, FENCE_MS)\n", ""),
    "a shared lock is granted beside an exclusive one": Mutation(
        "free = free and sharers < (places or math.huge)", "free = sharers < (places or math.huge)"
    ),
    "an exclusive lock is granted beside shared ones": Mutation(
        "    free = free and sharers == 0\n", ""
    ),
    "a semaphore has a place too many": Mutation(
        "free = free and sharers < (places or math.huge)",
        "free = free and sharers <= (places or math.huge)",
    ),
    "a shared lock's lease never ends": Mutation(
        "call('ZRANGEBYSCORE', r.shared, '-inf', r.now)",
        "call('ZRANGEBYSCORE', r.shared, '-inf', 0)",
    ),
    "readers overtake a waiting writer": Mutation(
        "if not (together and is_shared(waiter)) then", "if not together then"
    ),
    "the places of a semaphore are taken out of turn": Mutation(
        "local together = is_shared(holder) and not places_of(holder)",
        "local together = is_shared(holder)",
    ),
    "a run of sharers is woken one by one": Mutation(
        "inside = is_shared(waiter) and inside + 1 or math.huge", "inside = math.huge"
    ),
    "a writer is woken while others share": Mutation(
        "(places_of(waiter) or is_shared(waiter) and math.huge or 1)",
        "(places_of(waiter) or math.huge)",
    ),
    "more are woken than there are places": Mutation(
        "(places_of(waiter) or is_shared(waiter) and math.huge or 1)",
        "(is_shared(waiter) and math.huge or 1)",
    ),
    "a waiter that does not notice its wake-up holds all up": Mutation(
        "r.now - woken <= UNTAKEN_MS", "true"
    ),
    "a renewal that comes late makes a lease shorter": Mutation(
        "if mine and tonumber(held[2]) < r.now + lease_ms then", "if mine then"
    ),
    "a renewal that comes late makes a shared lease shorter": Mutation(", 'GT', r.now", ", r.now"),
    "whoever asks is passed over itself": Mutation("first == asking or ", ""),
    "the next one is not woken when the first is passed over": Mutation(
        "    if first_until > r.now + WOKEN_MS then", "    if false then"
    ),
    "a place that is left over wakes nobody": Mutation(
        "    if places then\n      wake_next(r)", "    if false then\n      wake_next(r)"
    ),
    "a sharer's process is not counted": Mutation(
        "    call('HINCRBY', r.sharers, '@' .. r.pid, 1)\n", ""
    ),
    "the registry is cleared while a lock is shared": Mutation(
        "type(pcall('HGET', r.sharers, '@' .. r.pid)) == 'string'", "false"
    ),
    "renew brings a shared lock back": Mutation(
        "call('ZADD', r.shared, 'XX', 'GT', ", "call('ZADD', r.shared, 'GT', "
    ),
    "recover does not free shared locks": Mutation(
        "    if process_of(holder) == dead then\n      drop_sharer",
        "    if false then\n      drop_sharer",
    ),
    "recover frees the shared locks of others": Mutation(
        "    if process_of(holder) == dead then\n      drop_sharer",
        "    if true then\n      drop_sharer",
    ),
    "a woken waiter is given more time": Mutation(
        "call('ZADD', r.waiting, 'LT', ", "call('ZADD', r.waiting, "
    ),
    "the parties are not waited for": Mutation(
        "if arrived(r) >= tonumber(call('HGET', r.parties, 'n') or 0) then", "if true then"
    ),
    "the parties are waited for when all have come": Mutation(
        "if arrived(r) >= tonumber(", "if arrived(r) > tonumber("
    ),
    "the least number of parties counts": Mutation(
        "math.max(tonumber(args[4]), tonumber(call('HGET', r.parties, 'n') or 0))",
        "tonumber(args[4])",
    ),
    "recover forgets the parties": Mutation(
        "if ended and not is_incomplete(r, args[5]) then", "if ended then"
    ),
    "resume leaves the time of the next attempt": Mutation(
        "  call('LLEN', r.batch)\n  call('HDEL', r.running, 'retry_at')\n",
        "  call('LLEN', r.batch)\n",
    ),
    "entrust does not ask who owns the batch": Mutation(
        "step('entrust', function(r, args)\n  if not owns(r, args[3]) then",
        "step('entrust', function(r, args)\n  if false then",
    ),
    "replay starts a batch beside the running one": Mutation(
        "  if call('EXISTS', r.running, r.batch) > 0 then", "  if false then"
    ),
    "replay takes the old token": Mutation(
        "  return { 'run', 0, run(r) }\nend)", "  run(r)\n  return { 'run', 0, args[3] * 1 }\nend)"
    ),
    "discard deletes the list only": Mutation(
        "local parked = call('HDEL', r.parked, args[3])",
        "local parked = call('HEXISTS', r.parked, args[3])",
    ),
}


#: One of two waiters that were woken for the places of a semaphore comes before its turn.
OUT_OF_TURN = [
    *(Move("lock", 0, what) for what in (1, 2)),
    *(Move("lock", 1, what) for what in (1, 2)),
    *(Move("unlock", 0, what) for what in (1, 2)),
    *(Move("lock", 1, what) for what in (2, 1)),
]
#: The first of two waiters is woken and does not notice; then one of the two asks.
WOKEN = [*(Move("lock", who, 1) for who in range(3)), Move("unlock", 0, 1), Move("advance", 0, 1)]
UNNOTICED = [[*WOKEN, Move("lock", who, 1)] for who in (1, 2)]
#: A session has ended and waits; what comes behind it is merged.
BEHIND_DUE = [
    *(Move("append", 0), Move("leave", 0, 2), Move("append", 1), Move("leave", 1, 2)),
    *(Move("append", 1), Move("append", 1), Move("compact", 0, 2)),
]
#: A session of one process that has stored nothing before.
ALONE = [Move("join", 0, 1), Move("leave", 0, 1), Move("join", 1, 1), Move("leave", 1, 2)]
#: So many partials come together that some are to be merged: with an append, with a leave, and
#: with one while a batch runs.
MANY = (
    [Move("append", 0)] * 64,
    [Move("append", 1), *[Move("append", 0)] * 62, Move("leave", 0, 1)],
    [Move("leave", 0, 1), *[Move("append", 1)] * 63, Move("leave", 1, 1)],
)


def play(lab: Lab) -> None:
    """What random schedules seldom come to."""
    run(lab, 3, OUT_OF_TURN)
    for schedule in UNNOTICED:
        run(lab, 4, schedule)
    for schedule in (ALONE, BEHIND_DUE, *MANY):
        run(lab, 2, schedule)


def test_the_library_as_it_is_passes(server: Redis, namespace: str) -> None:
    lab = Lab(server, namespace)
    try:
        play(lab)
    finally:
        lab.close()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checks_find(server: Redis, namespace: str, name: str) -> None:
    old, new = MUTATIONS[name]
    body = text()
    assert body.count(old) == 1, "the library has changed: adapt the mutation"
    lab = Lab(server, namespace, body.replace(old, new))
    try:
        with pytest.raises(Violation) as found:
            play(lab)
            run_random(lab, 1, SCHEDULES, LENGTH)
        assert "user_function" not in str(found.value), "it is no fault but an error in Lua"
    finally:
        lab.client.delete(*(key for key in lab.client.scan_iter(f"{namespace}*", 1_000)))
        lab.close()
