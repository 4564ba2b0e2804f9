-- Partials and batches: append, compact; complete, fail, resume, hand off; replay, discard.

-- append(resource, partial): join and store, so that stored data always has a member that answers
-- for it. answers STORED, or the number of partials if it is time to merge some
operation(APPEND, 3, function(c, o, i)
  local resource = o[i + 1]
  local partials = c.T .. 'partials:' .. resource
  local total = call('RPUSH', partials, o[i + 2])
  local times = redis.pcall('HINCRBY', c.T .. 'members:' .. resource, c.pid, 1)
  if type(times) ~= 'number' then
    call('RPOP', partials)
    error(times)
  end
  if times == 1 then
    track_member(c, resource)
  end
  if total % COMPACT_AT == 0 then
    return total
  end
  return STORED
end)

-- The number of partials, if some are due. A read that can fail comes before the running batch is
-- given up.
local function total_if_due(c, resource, due)
  if due == 0 then
    return 0
  end
  last_token(c)
  return call('LLEN', c.T .. 'partials:' .. resource)
end

-- Answer two things: does the caller own the batch of that token, and how many partials wait for its end.
local function owns(c, resource, token)
  local running = call('HMGET', c.T .. 'running:' .. resource, 'owner', 'token', 'due')
  return running[1] == c.pid and tonumber(running[2]) == token, tonumber(running[3] or 0)
end

-- Start the next batch, after the running one is gone. If a session ended meanwhile, this owner gets
-- its batch. Partials behind the due ones belong to the session after that.
local function next_batch(c, resource, due, total, otherwise)
  if due > 0 and total > 0 then
    return { AGAIN, 0, 0, start(c, resource, math.min(due, total), total), math.min(due, total), 0, 0 }
  end
  settle(c, resource, false)
  return otherwise
end

-- complete(resource, token): answers DONE | LOST | { AGAIN, 0, 0, token, partials, 0, 0 }, content
operation(COMPLETE, 3, function(c, o, i)
  local resource = o[i + 1]
  local mine, due = owns(c, resource, o[i + 2])
  if not mine then
    settle(c, resource)
    return LOST
  end
  local total = total_if_due(c, resource, due)
  call('DEL', c.T .. 'running:' .. resource, c.T .. 'batch:' .. resource)
  return next_batch(c, resource, due, total, DONE)
end)

-- fail(resource, token, error, delay ms, most attempts): execute raised. Keep the batch for a retry,
-- or park it so that it does not hold up what came after.
-- answers { RETRY, attempts so far } | PARKED | LOST | { AGAIN, ... }, content
operation(FAIL, 6, function(c, o, i)
  local resource, token, T = o[i + 1], o[i + 2], c.T
  local running, batch = T .. 'running:' .. resource, T .. 'batch:' .. resource
  local mine, due = owns(c, resource, token)
  if not mine then
    settle(c, resource)
    return LOST
  end
  call('HLEN', T .. 'parked:' .. resource)
  call('SCARD', T .. 'parked')
  local total = total_if_due(c, resource, due)
  if call('LLEN', batch) == 0 then
    state_error(batch, 'is missing although it is running')
  end
  local attempts = call('HINCRBY', running, 'attempt', 1)
  if attempts < o[i + 5] then
    call('HSET', running, 'error', o[i + 3], 'retry_at', fmt(now_ms(c) + o[i + 4]))
    return { RETRY, attempts }
  end
  local since = tonumber(call('HGET', running, 'since') or 0)
  call('RENAME', batch, T .. 'dead:' .. fmt(token) .. ':' .. resource)
  call('HSET', T .. 'parked:' .. resource, fmt(token), cmsgpack.pack({
    error = o[i + 3], attempts = attempts, owner = c.pid, since = since, at = now_ms(c),
  }))
  call('SADD', T .. 'parked', resource)
  call('DEL', running)
  return next_batch(c, resource, due, total, PARKED)
end)

-- resume(resource, token): take a batch of the caller's up again.
-- answers { RUN, 0, 0, token, partials, attempts, crashes }, content | LOST
operation(RESUME, 3, function(c, o, i)
  local resource, token = o[i + 1], o[i + 2]
  local running = c.T .. 'running:' .. resource
  if not owns(c, resource, token) then
    settle(c, resource)
    return LOST
  end
  local known = call('HMGET', running, 'attempt', 'crashes')
  local total = call('LLEN', c.T .. 'batch:' .. resource)
  call('HDEL', running, 'retry_at')
  return { RUN, 0, 0, token, total, tonumber(known[1] or 0), tonumber(known[2] or 0) }
end)

-- hand off(resource, token, class queue): leave a batch to a process that knows its class. The queue
-- is treated like a dead process, whose id it stands for. answers HANDED | LOST
operation(HAND_OFF, 4, function(c, o, i)
  local resource, queue, T = o[i + 1], o[i + 3], c.T
  if not owns(c, resource, o[i + 2]) then
    settle(c, resource)
    return LOST
  end
  call('SCARD', T .. 'handed')
  call('ZADD', T .. 'registry:' .. queue, 'NX', fmt(now_ms(c)), resource)
  call('SADD', T .. 'handed', queue)
  call('HSET', T .. 'running:' .. resource, 'owner', queue)
  call('HDEL', T .. 'running:' .. resource, 'retry_at')
  settle(c, resource, queue)
  return HANDED
end)

-- Remove a resource from the index of parked batches when it has none any more.
local function unpark(T, resource, token)
  call('HDEL', T .. 'parked:' .. resource, token)
  if call('EXISTS', T .. 'parked:' .. resource) == 0 then
    call('SREM', T .. 'parked', resource)
  end
end

-- replay(resource, token): execute a parked batch after all, under a token of its own, because later
-- batches may have been applied since.
-- answers { RUN, 0, 0, new token, partials, 0, 0 }, content | RUNNING | MISSING
operation(REPLAY, 3, function(c, o, i)
  local resource, token, T = o[i + 1], fmt(o[i + 2]), c.T
  local dead, batch = T .. 'dead:' .. token .. ':' .. resource, T .. 'batch:' .. resource
  local running = T .. 'running:' .. resource
  local total = call('LLEN', dead)
  if total == 0 or call('HEXISTS', T .. 'parked:' .. resource, token) == 0 then
    return MISSING
  end
  call('SCARD', T .. 'parked')
  if call('EXISTS', running, batch) > 0 then
    return RUNNING
  end
  local new = next_token(c)
  call('RENAME', dead, batch)
  unpark(T, resource, token)
  call('HSET', running, 'owner', c.pid, 'token', fmt(new), 'since', fmt(now_ms(c)))
  track(c, resource, BATCH)
  return { RUN, 0, 0, new, total, 0, 0 }
end)

-- discard(resource, token): delete a parked batch. answers DISCARDED | MISSING
operation(DISCARD, 3, function(c, o, i)
  local resource, token, T = o[i + 1], fmt(o[i + 2]), c.T
  call('SCARD', T .. 'parked')
  if call('HEXISTS', T .. 'parked:' .. resource, token) == 0 then
    return MISSING
  end
  call('DEL', T .. 'dead:' .. token .. ':' .. resource)
  unpark(T, resource, token)
  return DISCARDED
end)

-- A process computes the same digest of the partials that it has read: see _core/compaction.py.
local function digest_of(partials)
  local parts = {}
  for _, partial in ipairs(partials) do
    parts[#parts + 1] = #partial .. ':'
    parts[#parts + 1] = partial
  end
  return redis.sha1hex(table.concat(parts))
end

-- compact(resource, first, n, digest, { merged partial, ... }): replace n partials by the merged ones,
-- if they still have that digest.
-- answers { COMPACTED, partials left } | CHANGED
operation(COMPACT, 6, function(c, o, i)
  local resource, first, n, digest, merged = o[i + 1], o[i + 2], o[i + 3], o[i + 4], o[i + 5]
  local partials, running = c.T .. 'partials:' .. resource, c.T .. 'running:' .. resource
  local behind = first + n
  local due = tonumber(call('HGET', running, 'due') or 0)
  local total = call('LLEN', partials)
  if behind > total or first < due and due < behind then
    return CHANGED
  end
  if digest_of(call('LRANGE', partials, first, behind - 1)) ~= digest then
    return CHANGED
  end
  local rest = call('LRANGE', partials, behind, -1)
  if first > 0 then
    call('LTRIM', partials, 0, first - 1)
  else
    call('DEL', partials)
  end
  for _, some in ipairs({ merged, rest }) do
    for j = 1, #some, MOST_VALUES do
      call('RPUSH', partials, unpack(some, j, math.min(j + MOST_VALUES - 1, #some)))
    end
  end
  if behind <= due then
    call('HSET', running, 'due', due - n + #merged)
  end
  return { COMPACTED, total - n + #merged }
end)

-- Bytes of partials that are merged at once.
local MOST_MERGED = 16777216

-- candidates(resource, first, last): the partials that are worth merging, all of one session or all
-- due. They begin with the first partial that is at most twice as large as all behind it together. Each
-- partial in front of it is more than twice as large as the rest, so those are few; and between two
-- merges a partial grows by half.
-- answers { where they begin, how many they are: 0 or at least 2, partial ... }   as many as fit
read('candidates', function(T, args)
  local partials = T .. 'partials:' .. args[1]
  local first, last = tonumber(args[2]), tonumber(args[3])
  last = math.min(last, call('LLEN', partials) - 1)
  local due = tonumber(call('HGET', T .. 'running:' .. args[1], 'due') or 0)
  if first < due and due <= last then
    if due - first > last + 1 - due then
      last = due - 1
    else
      first = due
    end
  end
  local behind, begin, from, piece = 0, last + 1, last + 1, nil
  for j = last, first, -1 do
    if j < from then
      from = math.max(first, from - PIECE)
      piece = call('LRANGE', partials, from, j)
    end
    local size = #piece[j - from + 1]
    if behind + size > MOST_MERGED then
      break
    end
    if j < last and size <= 2 * behind then
      begin = j
    end
    behind = behind + size
  end
  return (add_piece(partials, { begin, last - begin + 1 }, begin, last))
end)

-- session(resource, first, last): partials that are not in a batch, as many as fit
read('session', function(T, args)
  return (add_piece(T .. 'partials:' .. args[1], {}, tonumber(args[2]), tonumber(args[3])))
end)

-- fetch(process, resource, token, first, last): a piece of the running batch, as many as fit, or {}
-- when the batch is not that process's any more
read('fetch', function(T, args)
  local running = call('HMGET', T .. 'running:' .. args[2], 'owner', 'token')
  if running[1] ~= args[1] or running[2] ~= args[3] then
    return {}
  end
  return (add_piece(T .. 'batch:' .. args[2], {}, tonumber(args[4]), tonumber(args[5])))
end)

-- parked(): the resources of this partition that have parked batches
read('parked', function(T)
  return call('SMEMBERS', T .. 'parked')
end)

-- entries(resource): { token, entry as fail packed it, partials, ... }
read('entries', function(T, args)
  local entries, answer = call('HGETALL', T .. 'parked:' .. args[1]), {}
  for j = 1, #entries, 2 do
    answer[#answer + 1] = entries[j]
    answer[#answer + 1] = entries[j + 1]
    answer[#answer + 1] = call('LLEN', T .. 'dead:' .. entries[j] .. ':' .. args[1])
  end
  return answer
end)

-- look(resource, token, first, last): partials of a parked batch, as many as fit
read('look', function(T, args)
  return (add_piece(T .. 'dead:' .. args[2] .. ':' .. args[1], {}, tonumber(args[3]), tonumber(args[4])))
end)
