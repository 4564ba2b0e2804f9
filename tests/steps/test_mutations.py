"""The checks find faults: each of these is put into the Lua text or the lane, and must show."""

import functools
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from phonon._protocol import lane as shipped_lane
from phonon._protocol import library
from phonon._protocol.library import text
from steps import (
    test_scenarios,
    test_step_admin,
    test_step_batches,
    test_step_compaction,
    test_step_lanes,
    test_step_locks,
    test_step_membership,
    test_step_parties,
    test_step_processes,
    test_step_reap,
    test_step_tokens,
)
from steps.lab import Lab, make_library
from steps.world import run_random
from support.world import Redis

# Those that take longer are last: most faults are found before.
MODULES = (
    *(test_step_membership, test_step_parties, test_step_tokens, test_step_processes),
    *(
        test_step_reap,
        test_step_locks,
        test_step_lanes,
        test_step_batches,
        test_step_compaction,
        test_step_admin,
    ),
)


class Mutation(NamedTuple):
    """A fault: the ``old`` text in a file becomes ``new``. It must be there exactly once."""

    file: str
    old: str
    new: str


LUA = {
    "join counts twice": Mutation("members", "c.pid, 0) == 1 then\n    track_member(c, resource)\n  end\n  return JOINED\nend)\n\n-- modify", "c.pid, 0) == 1 then\n    call('HSET', c.T .. 'members:' .. resource, c.pid .. '+', 0)\n    track_member(c, resource)\n  end\n  return JOINED\nend)\n\n-- modify"),
    "modify is no membership in the registry": Mutation("members", "o[i + 2])\n  track_member(c, resource)", "o[i + 2])"),
    "restore forgets the others": Mutation("members", "call('HINCRBY', left, times[j], times[j + 1])", "call('HLEN', left)"),
    "the least number of parties counts": Mutation("members", "math.max(o[i + 2], known)", "o[i + 2]"),
    "parties are not waited for": Mutation("members", "arrived(parties) >= tonumber(", "0 >= 0 * tonumber("),
    "one party too many is waited for": Mutation("members", "arrived(parties) >= tonumber(", "arrived(parties) > tonumber("),
    "meet leaves a time to live": Mutation("members", "  call('PERSIST', parties)\n", ""),
    "those that wait for parties get no mail when one leaves": Mutation("members", "    if known > 0 then\n      wake_parties(T, T .. 'parties:' .. resource)\n    end", ""),
    "a batch gets all that is there": Mutation("members", "  if due < total then\n", "  if false then\n"),
    "newcomers are dropped": Mutation("members", "      call('RPUSH', partials, unpack(rest, j, math.min(j + MOST_VALUES - 1, #rest)))\n    end\n  end\n  local token", "    end\n  end\n  local token"),
    "a starter is not entered": Mutation("members", "    'since', ms_text(c))\n  track(c, resource, BATCH)\n  return token", "    'since', ms_text(c))\n  return token"),
    "the fast way does not remove the member": Mutation("members", "if alone and call('HDEL', members, pid) == 1 then", "if alone and call('HEXISTS', members, pid) == 1 then"),
    "the fast way does not look at what is running": Mutation("members", "call('EXISTS', partials, running, left, batch, T", "call('EXISTS', partials, left, T"),
    "the fast way does not look at parties": Mutation("members", "T .. 'queue:' .. resource, T .. 'parties:' .. resource)\n    local total", "T .. 'queue:' .. resource)\n    local total"),
    "the fast way does not look at locks": Mutation("members", "running, left, batch, T .. 'lock:' .. resource,", "running, left, batch,"),
    "the fast way does not look who is there": Mutation("members", "if alone and call('HDEL', members, pid) == 1 then", "if alone and call('HDEL', members, pid) >= 0 then"),
    "the fast way loses its partial": Mutation("members", "total = call('RPUSH', partials, partial)\n        end\n        call", "total = total + 1\n        end\n        call"),
    "the fast way does not enter the batch": Mutation("members", "      track(c, resource, BATCH)\n      return { RUN, 0, 1", "      return { RUN, 0, 1"),
    "leave does not remove the member": Mutation("members", "  if times then\n    call('HDEL', members, pid)", "  if times then"),
    "leave loses its partial": Mutation("members", "    total = call('RPUSH', partials, partial)\n    mine", "    total = total + 1\n    mine"),
    "leave forgets modifications": Mutation("members", "    if mine > 0 then\n      call('HINCRBY', left, pid, mine)\n    end\n    if known", "    if known"),
    "leave does not note what is due": Mutation("members", "    call('HSET', running, 'due', total)\n    settle", "    settle"),
    "leave starts a batch beside the running one": Mutation("members", "  if owner then\n    call('HSET', running, 'due', total)", "  if false then\n    call('HSET', running, 'due', total)"),
    "modifications outlive the session": Mutation("members", "      call('DEL', left)\n      answer[3] = 1", "      answer[3] = 1"),
    "one that is no member is the last": Mutation("members", "    if was_member then\n", "    if true then\n"),
    "force does not force": Mutation("members", "flags % 2 == FORCED", "false"),
    "leave does not settle": Mutation("members", "      settle(c, resource, owner)\n      return { HELD", "      return { HELD"),
    "leave does not say that there are many": Mutation("members", "many = total % COMPACT_AT == 0 and total or 0", "many = 0"),
    "append stores in front": Mutation("batches", "call('RPUSH', partials, o[i + 2])", "call('LPUSH', partials, o[i + 2])"),
    "append does not enter the member": Mutation("batches", "  if times == 1 then\n    track_member", "  if false then\n    track_member"),
    "append does not take back what it stored for nobody": Mutation("batches", "    call('RPOP', partials)\n", ""),
    "append does not say that there are many": Mutation("batches", "  if total % COMPACT_AT == 0 then", "  if false then"),
    "a batch is owned by anybody": Mutation("batches", "return running[1] == c.pid and tonumber(running[2]) == token", "return tonumber(running[2]) == token"),
    "a batch is owned under any token": Mutation("batches", "return running[1] == c.pid and tonumber(running[2]) == token", "return running[1] == c.pid"),
    "complete keeps the batch": Mutation("batches", "call('DEL', c.T .. 'running:' .. resource, c.T .. 'batch:' .. resource)", "call('DEL', c.T .. 'running:' .. resource)"),
    "what is due is forgotten": Mutation("batches", "  if due > 0 and total > 0 then\n", "  if false then\n"),
    "complete does not settle": Mutation("batches", "  settle(c, resource, false)\n  return otherwise", "  return otherwise"),
    "attempts are not counted": Mutation("batches", "call('HINCRBY', running, 'attempt', 1)", "tonumber(call('HGET', running, 'attempt') or 0) + 1"),
    "parked an attempt too late": Mutation("batches", "if attempts < o[i + 5] then", "if attempts <= o[i + 5] then"),
    "a parked batch is deleted": Mutation("batches", "call('RENAME', batch, T .. 'dead:' .. fmt(token) .. ':' .. resource)", "call('DEL', batch)"),
    "parked batches are not listed": Mutation("batches", "  call('SADD', T .. 'parked', resource)\n", ""),
    "the last parked batch stays listed": Mutation("batches", "    call('SREM', T .. 'parked', resource)\n", ""),
    "resume leaves the time of the next attempt": Mutation("batches", "  call('HDEL', running, 'retry_at')\n  return { RUN", "  return { RUN"),
    "hand off keeps the owner": Mutation("batches", "  call('HSET', T .. 'running:' .. resource, 'owner', queue)\n", ""),
    "hand off enters no queue": Mutation("batches", "  call('ZADD', T .. 'registry:' .. queue, 'NX', fmt(now_ms(c)), resource)\n", ""),
    "replay beside the running batch": Mutation("batches", "if call('EXISTS', running, batch) > 0 then", "if false then"),
    "replay under the old token": Mutation("batches", "local new = next_token(c)", "local new = o[i + 2]"),
    "discard deletes the entry only": Mutation("batches", "  call('DEL', T .. 'dead:' .. token .. ':' .. resource)\n  unpark", "  unpark"),
    "compact does not ask whether they are the same": Mutation("batches", "behind - 1)) ~= digest then", "behind - 1)) == '' then"),
    "compact across the end of a session": Mutation("batches", "or first < due and due < behind then", "then"),
    "compact forgets that there are fewer due": Mutation("batches", "  if behind <= due then\n", "  if false then\n"),
    "compact drops what is behind": Mutation("batches", "ipairs({ merged, rest })", "ipairs({ merged })"),
    "a lock is granted twice": Mutation("locks", "  local room = not held\n", "  local room = true\n"),
    "a writer beside readers": Mutation("locks", "room = room and sharers == 0", "room = room"),
    "a place too many": Mutation("locks", "room and sharers < (places", "room and sharers <= (places"),
    "a reader beside a writer": Mutation("locks", "room = room and sharers < (", "room = sharers < ("),
    "readers overtake a writer": Mutation("locks", "if not is_shared(waiter) then", "if not together then"),
    "places go out of turn": Mutation("locks", "local together = is_shared(holder) and not places_of(holder)", "local together = is_shared(holder)"),
    "readers are woken one by one": Mutation("locks", "inside = is_shared(waiter) and inside + 1 or math.huge", "inside = math.huge"),
    "a writer is woken while others share": Mutation("locks", "(places_of(waiter) or is_shared(waiter) and math.huge or 1)", "(places_of(waiter) or math.huge)"),
    "a wake-up never lapses": Mutation("locks", "if now(c) - woken <= (type", "if true or (type"),
    "one that took its wake-up has no time to come": Mutation("locks", "and UNTAKEN_US or COMING_US) then", "and UNTAKEN_US or 0) then"),
    "one that asks is passed over": Mutation("locks", "if not woken or first == asking then", "if not woken then"),
    "unlock wakes nobody": Mutation("locks", "    wake_next(c, resource, held, sharers)\n  end\n  if more", "  end\n  if more"),
    "unlock frees another's lock": Mutation("locks", "  return call('HDEL', c.T .. 'lock:' .. resource, holder) == 1", "  return call('DEL', c.T .. 'lock:' .. resource) == 1"),
    "unlock forgets whom it leaves inside": Mutation("locks", "held and 0 or sharers - 1", "0"),
    "unlock forgets its process's other share": Mutation("locks", "(waiters > 0 or is_shared(holder) or not mine)", "(waiters > 0 or not mine)"),
    "unlock does not settle": Mutation("locks", "  if more > 0 then\n    settle(c, resource)\n", "  if more > 0 then\n"),
    "unlock forgets what else is ours": Mutation("locks", "  if more > 0 then\n    settle", "  if false then\n    settle"),
    "unlock forgets that its process waits": Mutation("locks", "(waiters > 0 or is_shared(holder) or not mine)", "(is_shared(holder) or not mine)"),
    "unlock forgets its process's other lock": Mutation("locks", "(waiters > 0 or is_shared(holder) or not mine)", "(waiters > 0 or is_shared(holder))"),
    "unlock leaves a lease": Mutation("locks", "free(c, resource, holder, leased == 0)", "free(c, resource, holder, true)"),
    "a lease never ends": Mutation("locks", "for _, holder in ipairs(call('ZRANGEBYSCORE', leases, '-inf', fmt(now_ms(c)))) do", "for _, holder in ipairs({}) do"),
    "renew makes a lease shorter": Mutation("locks", "'XX', 'GT', fmt(now_ms(c) + lease_ms)", "'XX', fmt(now_ms(c) + lease_ms)"),
    "renew gives a lease": Mutation("locks", "if lease_ms > 0 and call('ZSCORE', T .. 'leases:' .. resource, holder) then\n    call('ZADD', T .. 'leases:' .. resource, 'XX', 'GT',", "if lease_ms > 0 then\n    call('ZADD', T .. 'leases:' .. resource, 'GT',"),
    "a lock is not entered": Mutation("locks", "    track(c, resource, LOCKER)\n  end\n  local text", "  end\n  local text"),
    "a lock that is alone in its call is not entered": Mutation("locks", "    call('ZADD', c.alone, '-' .. since, resource)\n", "    --\n"),
    "an unlock that is alone in its call stays entered": Mutation("locks", "    call('ZREM', c.alone, resource)\n", "    --\n"),
    "an unlock that is alone in its call looks at nothing else": Mutation("locks", "  if there < 2 and c.alone", "  if c.alone"),
    "an unlock that is alone in its call forgets that its process waits": Mutation("locks", " and not is_among(c, waiting)\n", "\n"),
    "an unlock that is alone in its call wakes nobody": Mutation("locks", "          wake(c, resource, first)\n", "          --\n"),
    "an unlock that is alone in its call wakes one of many": Mutation("locks", "first and not is_shared(first) and not is_among", "first and not is_among"),
    "a waiter is granted a lock that is held": Mutation("locks", "if count == 0 and not is_shared(holder) and call('ZRANGE'", "if not is_shared(holder) and call('ZRANGE'"),
    "a waiter is granted the lock out of its turn": Mutation("locks", "and call('ZRANGE', queue, 0, 0)[1] == holder then", "then"),
    "a waiter that is granted the lock stays in the queue": Mutation("locks", "thread)\n    quit_queue(c, resource, holder)\n", "thread)\n"),
    "an unlock that is alone in its call forgets another share": Mutation("locks", "c.alone and not is_shared(holder) then", "c.alone then"),
    "a waiter is not entered": Mutation("locks", "    track(c, resource, LOCKER)\n  end\n  if left_ms < 0", "  end\n  if left_ms < 0"),
    "a place that is left over wakes nobody": Mutation("locks", "    if is_shared(holder) then\n      wake_next(", "    if false then\n      wake_next("),
    "reap leaves the member": Mutation("reap", "  if times then\n    call('HDEL', members, dead)", "  if times then"),
    "reap forgets modifications": Mutation("reap", "    call('HINCRBY', left, dead, times)\n", ""),
    "reap leaves the lock": Mutation("reap", "      freed = free(c, resource, holder) or freed\n", ""),
    "reap frees everybody's shared locks": Mutation("reap", "    if process_of(holder) == dead then\n      freed", "    if true then\n      freed"),
    "reap leaves the dead in line": Mutation("reap", "      quit_queue(c, resource, waiter)\n", ""),
    "reap wakes nobody": Mutation("reap", "    wake_next(c, resource, held, sharers)\n", ""),
    "reap forgets what is due": Mutation("reap", "      call('HSET', running, 'due', total)\n", ""),
    "reap takes anybody's batch": Mutation("reap", "  if run[1] == dead then\n    if recovers", "  if run[1] then\n    if recovers"),
    "reap does not take the batch over": Mutation("reap", "      call('HSET', running, 'owner', c.pid)\n", ""),
    "reap counts no crash": Mutation("reap", "        call('HINCRBY', running, 'crashes', 1)\n", ""),
    "reap counts the crash of a class": Mutation("reap", "      if died then\n        call('HINCRBY'", "      if true then\n        call('HINCRBY'"),
    "reap does not enter the batch": Mutation("reap", "      track(c, resource, BATCH)\n      out[", "      out["),
    "reap starts a session that goes on": Mutation("reap", "elseif others == 0 and total > 0 and not run[1] then", "elseif total > 0 and not run[1] then"),
    "reap does not mark what it leaves": Mutation("reap", "  if stays then\n    call('ZADD', registry, fmt(LEFT_SCORE), resource)", "  if stays then\n    call('ZREM', registry, resource)"),
    "reap does not fence": Mutation("reap", "  if died then\n    fence(T, dead)\n  end\n", ""),
    "the fence does not expire": Mutation("reap", "  call('PEXPIRE', lane, WEEK_MS)\n", ""),
    "reap leaves the lane listed": Mutation("reap", "      call('SREM', T .. 'lanes', dead)\n", ""),
    "reap leaves the queue listed": Mutation("reap", "      call('SREM', T .. 'handed', dead)\n", ""),
    "close does not look what is left": Mutation("reap", "  if left > 0 then\n    return { LEFT_OVER, left }\n  end\n", ""),
    "tokens follow a clock that is set back": Mutation("prelude", "math.max(last + 1, at)", "at"),
    "tokens lose digits": Mutation("prelude", "return string.format('%d', number)", "return '' .. number"),
    "the last token is not stored": Mutation("prelude", "call('SET', c.T .. 'token', now_text(c), 'GET')", "call('GET', c.T .. 'token')"),
    "a token ahead of the clock is not stored": Mutation("apply", "    store_token(c)\n", ""),
    "only a token ahead of the clock is stored again": Mutation("prelude", "  if token > at or not unread then\n", "  if token > at then\n"),
    "settle forgets locks": Mutation("prelude", "    if holds_or_waits(c, resource) then", "    if false then"),
    "settle forgets batches": Mutation("prelude", "  return owner == c.pid\nend\n", "  return false\nend\n"),
    "settle forgets members": Mutation("prelude", "      return track(c, resource, MEMBER_ANEW)\n", "      return untrack(c, resource)\n"),
    "a member comes anew at each call": Mutation("apply", "zadd(registry, 'NX', new)", "zadd(registry, nil, new)"),
    "the registry is not cleared": Mutation("apply", "    call('ZREM', registry, unpack(gone, j", "    call('ZSCORE', registry, unpack(gone, j"),
    "a repeat is carried out": Mutation("apply", "  if sequence == last and (", "  if false and ("),
    "a repeat is carried out once more": Mutation("apply", "    return not_the_next(T, pid, lane, args)\n", "    local last = call('HGET', lane, 'state') or ''\n    if string.sub(last, 1, #args[3]) ~= args[3] then\n      return not_the_next(T, pid, lane, args)\n    end\n"),
    "an older call is carried out": Mutation("apply", "  if sequence < last then\n", "  if false then\n"),
    "a gap is not noticed": Mutation("apply", "  return redis.error_reply('PHONONLOST ' .. fmt(last))\nend", "  return redis.error_reply('PHONONSTALE ' .. fmt(last))\nend"),
    "any next call of the lane goes on": Mutation("apply", "    return not_the_next(T, pid, lane, args)\n", "    local _, fenced, number, last = lane_of(lane)\n    if fenced or args[3]:match('^%d+') ~= number or tonumber(args[3]:match(' (%d+) ')) <= last then\n      return not_the_next(T, pid, lane, args)\n    end\n"),
    "any lane's number will do": Mutation("apply", "  if known ~= number then\n", "  if not known then\n"),
    "another history is not noticed": Mutation("apply", "call('HGET', lane, 'state') ~= args[2] then", "(call('HGET', lane, 'state') or ''):match('^%S+ ?%S*') ~= args[2]:match('^%S+ ?%S*') then"),
    "other operations under the same number": Mutation("apply", "(digest == of or #words == 0)", "true"),
    "a fence holds nobody off": Mutation("apply", "  if fenced then\n", "  if false then\n"),
    "a fenced lane goes on": Mutation("reap", "      call('HDEL', lane, 'state')", "      --"),
    "an empty call is told of a loss": Mutation("apply", "(digest == of or #words == 0)", "digest == of"),
    "a repeat hands out a batch that another has": Mutation("apply", "  if running[1] ~= c.pid or tonumber(running[2]) ~= token then\n", "  if not running[1] then\n"),
    "an operation that fails breaks the call off": Mutation("apply", "      answer = { FAILED, text_of", "      error(answer)\n      answer = { FAILED, text_of"),
    "close leaves the lane": Mutation("apply", "    call('DEL', lane, T .. 'mailbox:' .. pid)\n", ""),
    "overdue is dead": Mutation("processes", "  if score == 0 then\n    return { 'dead' }", "  if score <= at then\n    return { 'dead' }"),
    "one that is overdue marks others": Mutation("processes", "      if score <= at then\n        call('ZADD', processes, fmt(at + ttl), other)\n      elseif", "      if"),
    "one that may not mark marks": Mutation("processes", "elseif args[5] == '1' then\n        call('ZADD'", "elseif true then\n        call('ZADD'"),
    "any listing's number will do": Mutation("processes", " or call('HGET', N .. 'listings', pid) ~= args[4] then", " then"),
    "the dead are told to everybody": Mutation("processes", "    if till <= at then\n", "    if true then\n"),
    "the epoch stays": Mutation("processes", "    call('DEL', N .. 'epoch')\n", ""),
    "a replay of the operator's keeps the token": Mutation("admin", "  local new = fmt(next_token(c))\n", "  local new = token\n"),
    "a replay of the operator's does not store the token": Mutation("admin", "  store_token(c)\n", "  call('DEL', T .. 'token')\n"),
    "a replay of the operator's goes over what runs": Mutation("admin", "  if call('EXISTS', running, batch) > 0 then\n    return { 'running' }", "  if false then\n    return { 'running' }"),
    "a replay of the operator's waits for nobody": Mutation("admin", "  call('SADD', T .. 'handed', queue)\n", ""),
    "a replay of the operator's is in no registry": Mutation("admin", "  call('ZADD', T .. 'registry:' .. queue, fmt(now_ms(c)), resource)\n", ""),
    "a replay of the operator's stays parked": Mutation("admin", "  unpark(T, resource, token)\n  call('HSET', running", "  call('HSET', running"),
    "a discard of the operator's leaves the data": Mutation("admin", "  call('DEL', dead)\n", ""),
    "a discard of the operator's is not recorded": Mutation("admin", "  record(T, args[3], 'discard', resource, token, size)\n", ""),
    "any token breaks a lock": Mutation("admin", "string.match(holders[j + 1], '^(%d+) ') == token", "true"),
    "a broken lock wakes nobody": Mutation("admin", "  wake_next(c, resource, held, sharers)\n", ""),
    "a broken lock stays in the registry": Mutation("admin", "  settle(c, resource)\n  write_registry(c, registry)\n", ""),
    "an act is done before it is known to be recorded": Mutation("admin", "  call('SCARD', T .. 'parked')\n  call('XLEN', T .. 'acts')\n", "  call('SCARD', T .. 'parked')\n"),
    "the record of acts grows without end": Mutation("admin", "'MAXLEN', '~', MOST_ACTS, ", ""),
    "pages follow the rank": Mutation("admin", "local at = args[2] == '' and 0 or rank_behind(registry, args[2], args[3])", "local at = args[2] == '' and 0 or tonumber(args[4])"),
    "pages go on behind all of one score": Mutation("admin", "  while low < high do\n", "  low = high\n  while low < high do\n"),
    "a session is listed with each member": Mutation("admin", "        if first_of(names) ~= pid then\n", "        if false then\n"),
    "a foreign key ends a walk": Mutation("admin", "ok, cost = pcall(visit, page[j], tonumber(page[j + 1]), found)", "cost = visit(page[j], tonumber(page[j + 1]), found)"),
    "a report outlives its process": Mutation("processes", "  call('HDEL', N .. 'reports', args[1])\n", ""),
    "opening makes another number of partitions": Mutation("processes", "  if partitions ~= args[2] then\n", "  if false then\n"),
}  # fmt: skip


LANE = {
    "a refused call is dropped": Mutation("", "        if refused.error is None:\n", "        if False:\n"),
    "the empty call takes another number": Mutation("", "self, refused.sequence, position.stamp, refused.operations, error", "self, refused.sequence + 1, position.stamp, refused.operations, error"),
    "the empty call is not run by a full server": Mutation("", "body, self.frees = _EMPTY, True", "body, self.frees = _EMPTY, False"),
    "all that was refused is sent again": Mutation("", "if mixed and operation.frees:", "if mixed:"),
    "nothing that was refused is sent again": Mutation("", "if mixed and operation.frees:", "if False:"),
    "what frees is sent again without end": Mutation("", "if mixed and operation.frees:", "if operation.frees:"),
    "numbers do not grow": Mutation("", "made = Call(self, position.sequence + 1,", "made = Call(self, position.sequence,"),
    "the stamp is not named": Mutation("", "            stamp or number,\n", "            number,\n"),
    "calls are not bounded": Mutation("", "_first(self.queue, MOST_OPERATIONS - len(again))", "_first(self.queue, 10**9)"),
    "bytes are not bounded": Mutation("", "if operations and (size > MOST_BYTES or", "if operations and (False or"),
    "close goes with others": Mutation("", "(size > MOST_BYTES or operation.words[0] == _CLOSE)", "(size > MOST_BYTES)"),
    "others go with close": Mutation("", "            operations.append(operation)\n            if operation.words[0] == _CLOSE:\n                break\n", "            operations.append(operation)\n"),
    "a call is taken from the queue and stays in it": Mutation("", "                remove(operation)  # usually the first one in the queue", "                pass"),
    "a fenced lane sends": Mutation("", "        if self._fenced:\n            return None\n", ""),
    "a fenced lane has work": Mutation("", "        if self._fenced:\n            return False\n", ""),
    "operations do not wait for the former self": Mutation("", "return self.queue if first or deferred is None else deferred", "return self.queue"),
    "what waited is lost": Mutation("", "            self.catch_up(deferred, _first(deferred, sys.maxsize))", "            deferred.clear()"),
    "an unanswered call frees whatever is in it": Mutation("", "frees = frees and operation.frees", "frees = True"),
    "contents are mixed up": Mutation("", "answer.append(next(contents, []))", "answer.append([])"),
    "runs are short of a field": Mutation("", "                answer.append(None)\n", "                pass\n"),
    "an operation forgets where it was sent": Mutation("", "                operation.sent = (call, place, sent)", "                operation.sent = (call, place, None)"),
    "the places of many are counted as one": Mutation("", "            place += operation.count", "            place += 1"),
    "many are told one answer": Mutation("", "answers[at:behind] if operation.count > 1 else answers[at]", "answers[at]"),
    "many are counted as one": Mutation("", "count = carried[0].count if len(carried) == 1 else sum([o.count for o in carried])", "count = len(carried)"),
    "the digest is of nothing": Mutation("", 'self.digest = digest = b"%d" % zlib.crc32(body)', 'self.digest = digest = b"0"'),
    "any call is answered by a lane that is gone": Mutation("", "        if call.operations[0].words[0] != _CLOSE:\n            return []\n        return [(operation, int", "        return [(operation, int"),
}  # fmt: skip


def checks_of(modules: tuple[Any, ...], parameter: str) -> Iterator[Callable[..., Any]]:
    """Tests of the thing under test, and of nothing but it and one parametrized argument."""
    for module in modules:
        for name, function in vars(module).items():
            if not name.startswith("test_"):
                continue
            names = [*inspect.signature(function).parameters]
            marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
            if names == [parameter]:
                yield function
            elif len(marks) == 1 and names == [parameter, marks[0].args[0]]:
                for value in marks[0].args[1]:
                    yield _with(function, names[1], value)


def _with(function: Callable[..., Any], name: str, value: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(lab: Any) -> Any:
        return function(lab, **{name: value})

    return call


def check(server: Redis, namespace: str, library_: Any, lanes: Any = shipped_lane) -> str:
    """Run all checks until one fails; the result says which, or is empty."""

    def play_schedules(lab: Lab) -> None:
        run_random(lab, 3, 6, 40)

    def play_scenario(lab: Lab) -> None:
        scripts = test_scenarios.SCENARIOS["reap beside leave"]
        for order in list(test_scenarios.interleavings([3, 3, 1]))[::9]:
            test_scenarios.play(lab, scripts, order)

    checks = [play_schedules, play_scenario, *checks_of(MODULES, "lab")]
    for number, function in enumerate(checks):
        lab = Lab(server, f"{namespace}-{number}", library_, lanes=lanes)
        try:
            function(lab)
        except (AssertionError, redis.RedisError, ValueError, KeyError, TypeError, IndexError) as e:
            return f"{function.__name__}: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        except (AttributeError, pytest.fail.Exception) as e:
            return f"{function.__name__}: {e!r}"
        finally:
            lab.close()
    return ""


def load(server: Redis, namespace: str, body: str) -> Any:
    made = make_library(f"{namespace}.clock", body)
    with server.client() as client:
        client.function_load(made.source, replace=True)
    return made


def unload(server: Redis, namespace: str, made: Any) -> None:
    with server.client() as client:
        client.function_delete(made.name)
        client.delete(f"{namespace}.clock")


def mutated(mutation: Mutation, files: dict[str, str]) -> str:
    body = files[mutation.file]
    assert body.count(mutation.old) == 1, "the text has changed: adapt the mutation"
    return body.replace(mutation.old, mutation.new)


def lua_files() -> dict[str, str]:
    folder = Path(library.__file__).parent.parent / "_lua"
    return {name: (folder / f"{name}.lua").read_text() for name in library.FILES}


def test_the_library_as_it_is_passes(server: Redis, namespace: str) -> None:
    made = load(server, namespace, text())
    try:
        assert check(server, namespace, made) == ""
    finally:
        unload(server, namespace, made)


@pytest.mark.slow
@pytest.mark.parametrize("name", LUA)
def test_faults_in_the_lua_text_show(server: Redis, namespace: str, name: str) -> None:
    files = lua_files()
    files[LUA[name].file] = mutated(LUA[name], files)
    made = load(server, namespace, "\n".join(files.values()))
    try:
        found = check(server, namespace, made)
    finally:
        unload(server, namespace, made)
    print(f"{name}: {found}")
    assert found, "nothing finds it"


def lane_tests() -> Any:
    path = Path(__file__).parent.parent / "unit" / "protocol" / "test_lane.py"
    spec = importlib.util.spec_from_file_location("lane_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", LANE)
def test_faults_in_the_lane_show(server: Redis, namespace: str, name: str) -> None:
    source = Path(shipped_lane.__file__).read_text()
    broken = types.ModuleType("broken_lane")
    exec(compile(mutated(LANE[name], {"": source}), "broken_lane", "exec"), broken.__dict__)  # noqa: S102
    for function in checks_of((lane_tests(),), "lanes"):
        try:
            function(broken)
        except Exception as error:  # noqa: BLE001 - a broken lane raises what it likes
            print(f"{name}: {function.__name__}: {error!r:.100}")
            return
    made = load(server, namespace, text())
    try:
        found = check(server, namespace, made, broken)
    finally:
        unload(server, namespace, made)
    print(f"{name}: {found}")
    assert found, "nothing finds it"
