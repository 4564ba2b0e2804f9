"""The checks of the model test find faults: each of these is put into the library and must show."""

from typing import NamedTuple

import pytest
from model import Violation
from steps import Lab
from world import run_random

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
        "step('complete', function(r, args)\n  if not owns(r, args[3]) then",
        "step('complete', function(r, args)\n  if false then",
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
        "if left == 0 and #modified > 0 then\n    call('DEL', r.modified)",
        "if false then",
    ),
    "append does not join": Mutation("  enter(r, args[3])\n  call('RPUSH'", "  call('RPUSH'"),
    "append stores at the wrong end": Mutation(
        "call('RPUSH', r.partials, args[4])", "call('LPUSH', r.partials, args[4])"
    ),
    "complete does not start what is due": Mutation(
        "if due and tonumber(due) > 0 then", "if false then"
    ),
    "complete takes the newcomers too": Mutation(
        "start(r, tonumber(due), call('LLEN', r.partials))",
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
    "a parked batch does not make way": Mutation(
        "next_batch(r, running[1], 'parked')", "{'parked', 0}"
    ),
    "tokens follow a clock that is set back": Mutation("math.max(last + 1, r.micros)", "r.micros"),
    "tokens are not remembered": Mutation(
        "  call('HSET', r.memory, 'token', string.format('%.0f', token + spare))\n", ""
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
    "a lock is granted twice": Mutation(
        "if not held[1] and (not first or first == holder) then",
        "if not first or first == holder then",
    ),
    "a lock's lease never ends": Mutation(
        "if held[1] and tonumber(held[2]) <= r.now then", "if false then"
    ),
    "unlock frees the lock of another": Mutation(
        "local mine = held[1] == holder\n  if", "local mine = held[1]\n  if"
    ),
    "recover leaves the dead member": Mutation("  call('ZREM', r.members, dead)\n", ""),
    "recover does not free the lock": Mutation(
        "  if in_the_way then\n    call('DEL', r.lock)\n  end\n", ""
    ),
    "recover leaves the dead in line": Mutation(
        "    if is_of(dead, holder) then", "    if false then"
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
        "    redis.pcall('ZREM', args[5], r.base)", "    local _ = r"
    ),
    "the dead are not fenced off": Mutation("    call('SADD', r.fence, dead)\n", ""),
    "the fence is not looked at": Mutation(
        "elseif call('SISMEMBER', r.fence, r.pid) == 1 then", "elseif false then"
    ),
    "the fence does not expire": Mutation("    call('PEXPIRE', r.fence, FENCE_MS)\n", ""),
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


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checks_find(server: Redis, namespace: str, name: str) -> None:
    old, new = MUTATIONS[name]
    body = text()
    assert body.count(old) == 1, "the library has changed: adapt the mutation"
    lab = Lab(server, namespace, body.replace(old, new))
    try:
        with pytest.raises(Violation) as found:
            run_random(lab, 1, SCHEDULES, LENGTH)
        assert "user_function" not in str(found.value), "it is no fault but an error in Lua"
    finally:
        lab.client.delete(*(key for key in lab.client.scan_iter(f"{namespace}*", 1_000)))
        lab.close()
