"""The checks of sources find faults: each of these is put into the Lua text, and must show."""

from typing import Any

import pytest
import redis

from steps import test_step_sources
from steps.lab import Lab
from steps.test_mutations import Mutation, checks_of, load, lua_files, mutated, unload
from support.world import Redis

LUA = {
    "a claim's number does not grow": Mutation("sources", "math.max(next_token(c), last + 1)", "next_token(c)"),
    "an older claim is taken": Mutation("sources", "elseif epoch < last then", "elseif false then"),
    "the same claim again is refused": Mutation("sources", "elseif epoch < last then", "elseif epoch <= last then"),
    "a claim loses the position": Mutation("sources", "    position = known[2] or ''\n", ""),
    "a claim does not move the source": Mutation("sources", "'epoch', fmt(epoch), 'position', position)", "'epoch', fmt(epoch))"),
    "anybody makes it forgotten": Mutation("sources", "if tonumber(known[1] or 0) > epoch then", "if false then"),
    "the epoch is not checked": Mutation("sources", "if epoch ~= o[i + 2] or position", "if position"),
    "a later epoch is not refused": Mutation("sources", "if epoch ~= o[i + 2] or position", "if epoch > o[i + 2] or position"),
    "the position is not checked": Mutation("sources", " or position ~= o[i + 3] then", " then"),
    "the position is not stored": Mutation("sources", "  call('HSET', source, 'position', o[i + 4])\n", ""),
    "the data is not stored": Mutation("sources", "  call('HSET', source, 'position', o[i + 4])\n  return append_all(c, o[i + 5])", "  call('HSET', source, 'position', o[i + 4])\n  return INGESTED"),
    "one that stores is not entered": Mutation("sources", "        track_member(c, resource)\n", ""),
    "nothing asks to be merged": Mutation("sources", "if total % COMPACT_AT == 0 then", "if false then"),
    "a foreign key drops a partial": Mutation("sources", "  call('RPUSH', T .. 'dead:' .. fmt(token) .. ':' .. resource, partial)\n", ""),
    "what is put aside is not listed": Mutation("sources", "redis.pcall('HSET', T .. 'parked:' .. resource, fmt(token), ", "redis.pcall('ECHO', "),
    "a partial is stored for nobody": Mutation("sources", "        call('RPOP', partials)\n", ""),
    "an id is not checked": Mutation("sources", "  if #seen > 0 then", "  if false then"),
    "an id is not stored": Mutation("sources", "    call('SADD', set, unpack(ids, j", "    call('SMISMEMBER', set, unpack(ids, j"),
    "an id is forgotten early": Mutation("sources", "for n = latest - SHARES, latest + 1 do", "for n = latest - 1, latest + 1 do"),
    "an id is forgotten late": Mutation("sources", "for n = latest - SHARES, latest + 1 do", "for n = latest - 2 * SHARES, latest + 1 do"),
    "ids of a later hour are forgotten": Mutation("sources", "for n = latest - SHARES, latest + 1 do", "for n = latest - SHARES, latest do"),
    "ids never expire": Mutation("sources", "  call('PEXPIRE', set, fmt((SHARES + 2) * share))\n", ""),
    "ids expire early": Mutation("sources", "fmt((SHARES + 2) * share)", "fmt(share)"),
    "all queues share their ids": Mutation("sources", "fmt(n) .. ':' .. o[i + 1]\n", "fmt(n) .. ':'\n"),
    "only the first ids are checked": Mutation("sources", "seen[#seen + 1] = ids[j + k - 1]", "seen[#seen + 1] = ids[k]"),
}  # fmt: skip


def check(server: Redis, namespace: str, library: Any) -> str:
    for number, function in enumerate(checks_of((test_step_sources,), "lab")):
        lab = Lab(server, f"{namespace}-{number}", library)
        try:
            function(lab)
        except (AssertionError, redis.RedisError, ValueError, KeyError, TypeError) as error:
            return f"{function.__name__}: {error!r:.100}"
        finally:
            lab.close()
    return ""


@pytest.mark.parametrize("name", LUA)
def test_faults_in_the_text_of_sources_show(server: Redis, namespace: str, name: str) -> None:
    files = lua_files()
    files["sources"] = mutated(LUA[name], files)
    made = load(server, namespace, "\n".join(files.values()))
    try:
        found = check(server, namespace, made)
    finally:
        unload(server, namespace, made)
    print(f"{name}: {found}")
    assert found, "nothing finds it"
