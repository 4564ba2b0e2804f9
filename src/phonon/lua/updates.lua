-- Partials and batches: append, candidates, session, compact; complete, fail, resume, fetch.

-- Bytes of partials that are merged at once.
local MOST_MERGED = 16 * 1024 * 1024

local STORED = constant('stored')

-- append(pid, op, lease_ms, partial): store a partial. The process joins in the same step, so
-- that stored data always has a member who answers for it.
-- answers {'stored', 0}
--         {'stored', 0, partials}   there are so many by now that it is time to merge some
step('append', function(r, args)
  call('LLEN', r.partials)
  call('HLEN', r.modified)
  enter(r, args[3])
  local count = call('RPUSH', r.partials, args[4])
  call('HINCRBY', r.modified, r.pid, 1)
  if count % COMPACT_AT == 0 then
    return { 'stored', 0, count }
  end
  return STORED
end)

-- How many of the partials belong to sessions that have ended and wait for the running batch.
local function due_of(r)
  return tonumber(call('HGET', r.running, 'due') or 0) or 0
end

-- candidates(pid, first, last): which of these partials are worth merging, all of one session or
-- all due: those from the first one on that is at most twice as large as all behind it together.
-- What is left in front of them is more than twice as large, and so on, so there is little of it;
-- and whatever is merged again has grown by half.
-- answers {where they begin, how many they are: 0 or at least 2, partial ...}   as many as fit
plain('candidates', function(r, args)
  local first, last = tonumber(args[2]), tonumber(args[3])
  last = math.min(last, call('LLEN', r.partials) - 1)
  local due = due_of(r)
  if first < due and due <= last then
    if due - first > last + 1 - due then
      last = due - 1
    else
      first = due
    end
  end
  local behind, begin = 0, last + 1
  for i = last, first, -1 do
    local size = #call('LINDEX', r.partials, i)
    if behind + size > MOST_MERGED then
      break
    end
    if size <= 2 * behind then
      begin = i
    end
    behind = behind + size
  end
  return add_piece(r.partials, { begin, last - begin + 1 }, begin, last)
end, { 'no-writes' })

-- session(pid, first, last): answers partials that are not in a batch, as many as fit
plain('session', function(r, args)
  return add_piece(r.partials, {}, tonumber(args[2]), tonumber(args[3]))
end, { 'no-writes' })

-- Whoever has read the same partials has the same digest: see protocol/compaction.py.
local function digest_of(partials)
  local parts = {}
  for _, partial in ipairs(partials) do
    parts[#parts + 1] = #partial .. ':'
    parts[#parts + 1] = partial
  end
  return redis.sha1hex(table.concat(parts))
end

local CHANGED = constant('changed')

-- compact(pid, op, first, n, digest, merged partial ...): replace n partials by what they come to
-- when they are merged, if they are still those that the digest is of. It is their content that
-- counts; when they were stored, and by whom, is nothing to their merge.
-- answers {'compacted', 0, partials left} | {'changed', 0}
step('compact', function(r, args)
  local first, n = tonumber(args[3]), tonumber(args[4])
  local behind, merged = first + n, #args - 5
  local due = due_of(r)
  local total = call('LLEN', r.partials)
  if behind > total or first < due and due < behind then
    return CHANGED
  end
  if digest_of(call('LRANGE', r.partials, first, behind - 1)) ~= args[5] then
    return CHANGED
  end
  local rest = call('LRANGE', r.partials, behind, -1)
  if first > 0 then
    call('LTRIM', r.partials, 0, first - 1)
  else
    call('DEL', r.partials)
  end
  for i = 6, #args do
    call('RPUSH', r.partials, args[i])
  end
  for _, partial in ipairs(rest) do
    call('RPUSH', r.partials, partial)
  end
  if behind <= due then
    call('HSET', r.running, 'due', due - n + merged)
  end
  return { 'compacted', 0, total - n + merged }
end, true)

-- Whether the batch of that token is the caller's, and how many partials wait for it to end.
local function owns(r, token)
  local running = call('HMGET', r.running, 'owner', 'token', 'due')
  return running[1] == r.pid and running[2] == token, tonumber(running[3] or 0)
end

-- The running batch is out of the way. If a session ended meanwhile, its batch is this owner's.
-- due is what the running batch was told; partials behind it belong to the session after.
local function next_batch(r, due, otherwise)
  if due > 0 then
    return { 'again', 0, start(r, due, call('LLEN', r.partials)) }
  end
  return { otherwise, let_go(r) }
end

-- complete(pid, op, token): the batch is executed; drop it if it is still the caller's.
-- answers {'done', clear} | {'lost', clear} | {'again', 0, token, attempt, count, partials}
step('complete', function(r, args)
  local mine, due = owns(r, args[3])
  if not mine then
    return { 'lost', let_go(r) }
  end
  call('LLEN', r.batch)
  if due > 0 then
    call('LLEN', r.partials)
  end
  call('DEL', r.running, r.batch)
  return next_batch(r, due, 'done')
end, true)

-- fail(pid, op, token, error, delay_ms, most attempts): execute raised. Keep the batch for a
-- retry, or park it so that it does not hold up what came after.
-- answers {'retry', 0, token, attempts so far} | {'parked', clear} | {'lost', clear}
--         {'again', 0, token, attempt, count, partials}     parked, and the next session's batch
step('fail', function(r, args)
  local token = args[3]
  local mine, due = owns(r, token)
  if not mine then
    return { 'lost', let_go(r) }
  end
  call('HLEN', r.parked)
  call('LLEN', r.partials)
  if call('LLEN', r.batch) == 0 then
    return redis.error_reply('PHONONSTATE ' .. r.batch .. ' is missing although it is running')
  end
  local attempts = call('HINCRBY', r.running, 'attempt', 1)
  if attempts < tonumber(args[6]) then
    call('HSET', r.running, 'error', args[4], 'retry_at', r.now + args[5])
    return { 'retry', 0, tonumber(token), attempts }
  end
  local since = tonumber(call('HGET', r.running, 'since'))
  call('RENAME', r.batch, r.parked .. ':' .. token)
  call('HSET', r.parked, token, cmsgpack.pack({
    error = args[4], attempts = attempts, owner = r.pid, since = since, at = r.now,
  }))
  call('DEL', r.running)
  return next_batch(r, due, 'parked')
end, true)

-- resume(pid, op, token): the owner takes its batch up again, to retry it.
-- answers {'run', 0, token, attempt, count, partials} | {'lost', clear}
step('resume', function(r, args)
  if not owns(r, args[3]) then
    return { 'lost', let_go(r) }
  end
  call('LLEN', r.batch)
  call('HDEL', r.running, 'retry_at')
  return { 'run', 0, tonumber(args[3]) }
end, true)

-- entrust(pid, op, token, heir): leave a batch to whoever can execute it, in the hands of an heir,
-- which is treated as a dead process.
-- answers {'entrusted', clear} | {'lost', clear}
step('entrust', function(r, args)
  if not owns(r, args[3]) then
    return { 'lost', let_go(r) }
  end
  call('HSET', r.running, 'owner', args[4])
  call('HDEL', r.running, 'retry_at')
  return { 'entrusted', let_go(r) }
end, true)

-- Is this batch parked, with all that is needed to run it?
local function is_parked(r, token)
  return call('HEXISTS', r.parked, token) == 1 and call('LLEN', r.parked .. ':' .. token) > 0
end

-- replay(pid, op, token): execute a parked batch after all. It gets a token of its own, because
-- later batches may have been applied since.
-- answers {'run', 0, new token, attempt, count, partials}
--         {'busy', clear}   another batch is running
--         {'missing', clear}
step('replay', function(r, args)
  if not is_parked(r, args[3]) then
    return { 'missing', let_go(r) }
  end
  if call('EXISTS', r.running, r.batch) > 0 then
    return { 'busy', let_go(r) }
  end
  hold(r)
  call('RENAME', r.parked .. ':' .. args[3], r.batch)
  call('HDEL', r.parked, args[3])
  return { 'run', 0, run(r) }
end)

-- discard(pid, op, token): delete a parked batch.
-- answers {'discarded', clear} | {'missing', clear}
step('discard', function(r, args)
  local parked = call('HDEL', r.parked, args[3])
  call('DEL', r.parked .. ':' .. args[3])
  return { parked == 1 and 'discarded' or 'missing', let_go(r) }
end, true)

-- parked(): answers {token, entry, number of partials, ...}, an entry as fail packed it
plain('parked', function(r)
  local entries = call('HGETALL', r.parked)
  local answer = {}
  for i = 1, #entries, 2 do
    answer[#answer + 1] = entries[i]
    answer[#answer + 1] = entries[i + 1]
    answer[#answer + 1] = call('LLEN', r.parked .. ':' .. entries[i])
  end
  return answer
end, { 'no-writes' })

-- look(pid, token, first, last): answers partials of a parked batch, as many as fit
plain('look', function(r, args)
  return add_piece(r.parked .. ':' .. args[2], {}, tonumber(args[3]), tonumber(args[4]))
end, { 'no-writes' })

-- fetch(pid, token, first, last): a piece of the running batch
-- answers the partials, as many as fit, or {} when the batch is no longer the caller's
plain('fetch', function(r, args)
  if not owns(r, args[2]) then
    return {}
  end
  return add_piece(r.batch, {}, tonumber(args[3]), tonumber(args[4]))
end, { 'no-writes' })
