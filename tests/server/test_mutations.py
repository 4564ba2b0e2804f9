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
    "leave does not note what is due": Mutation("call('HSET', r.running, 'due', total)", ""),
    "modifications outlive the session": Mutation("call('DEL', r.modified)", ""),
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
        "  if r.registry then\n    call(", "  if false then\n    call("
    ),
    "the registry is cleared while a batch is owned": Mutation(
        "    or pcall('HGET', r.running, 'owner') == r.pid\n", ""
    ),
    "the registry is not cleared": Mutation("    pcall('HDEL', r.registry, r.base)", ""),
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
