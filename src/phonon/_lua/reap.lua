-- Taking over a dead process's locks, memberships and batches in a partition.

-- Refuse all calls of a process from now on. A lane that was never used, or does not exist, needs no
-- marker: only `open` makes one, under another number.
local function fence(T, pid)
  local lane = T .. 'lane:' .. pid
  local state, fenced, _, sequence = lane_of(lane)
  if sequence == 0 then
    call('DEL', lane)
  elseif state then
    if not fenced then
      call('HSET', lane, 'fenced', state)
      call('HDEL', lane, 'state') -- so no call finds the state that it expects
    end
    call('PEXPIRE', lane, WEEK_MS)
  end
end

-- Take one resource over. died: true for a dead process, false for a class queue. Answers true if there
-- is a batch to execute, and it is left.
local function reap_one(c, resource, dead, recovers, died, out)
  local T, registry = c.T, c.T .. 'registry:' .. dead
  local members, running = T .. 'members:' .. resource, T .. 'running:' .. resource
  local partials, left = T .. 'partials:' .. resource, T .. 'left:' .. resource
  local parties = T .. 'parties:' .. resource
  local run = call('HMGET', running, 'owner', 'token', 'retry_at')
  local total = call('LLEN', partials)
  if not run[1] and total > 0 and call('EXISTS', T .. 'batch:' .. resource) == 1 then
    state_error(T .. 'batch:' .. resource, 'exists although nothing is running')
  end
  look_at_lock(c, resource)
  last_token(c)
  local holders = call('HKEYS', T .. 'lock:' .. resource)
  local waiters = call('ZRANGE', T .. 'queue:' .. resource, 0, -1)
  call('HLEN', left)
  local known = call('HLEN', parties)
  local times = call('HGET', members, dead)
  if times then
    call('HDEL', members, dead)
  end
  local others = call('HLEN', members)
  if times and times ~= '0' and (others > 0 or known > 0) then
    call('HINCRBY', left, dead, times)
  end
  local freed = false
  for _, holder in ipairs(holders) do
    if process_of(holder) == dead then
      freed = free(c, resource, holder) or freed
    end
  end
  for _, waiter in ipairs(waiters) do
    if process_of(waiter) == dead then
      quit_queue(c, resource, waiter)
      freed = true
    end
  end
  if freed then
    local held, _, sharers = look_at_lock(c, resource)
    wake_next(c, resource, held, sharers)
  end
  if others == 0 then
    if known == 0 or not is_incomplete(c, resource) then
      call('DEL', left)
    end
    if run[1] and total > 0 then
      call('HSET', running, 'due', total)
    end
  elseif known > 0 then
    wake_parties(T, parties)
  end
  local stays = false
  if run[1] == dead then
    if recovers then
      call('HSET', running, 'owner', c.pid)
      if died then
        call('HINCRBY', running, 'crashes', 1)
      end
      track(c, resource, BATCH)
      out[#out + 1] = resource
      out[#out + 1] = tonumber(run[2])
      out[#out + 1] = math.max(0, tonumber(run[3] or 0) - now_ms(c))
    else
      stays = true
    end
  elseif others == 0 and total > 0 and not run[1] then
    if recovers then
      out[#out + 1] = resource
      out[#out + 1] = start(c, resource, total, total)
      out[#out + 1] = 0
    else
      stays = true
    end
  end
  if stays then
    call('ZADD', registry, fmt(LEFT_SCORE), resource)
  else
    call('ZREM', registry, resource)
  end
  return stays
end

-- reap(dead process or class queue, most resources, 1 if the caller executes batches): fence the dead
-- process's lane, then take its resources over: locks first, then memberships, then batches. Survivors
-- share the work by calling it at the same time. A resource that the caller leaves because it executes
-- no batches is marked, so that it is not read again each time; one that cannot be reaped is marked too,
-- and does not block those behind it.
-- answers { REAPED, left for the caller, left in all, { resource, token, ms until due, ... },
--           { resource, error, ... }, resources taken over }
operation(REAP, 4, function(c, o, i)
  local dead, most, recovers, T = o[i + 1], o[i + 2], o[i + 3] == 1, c.T
  if dead == c.pid then
    error({ err = 'PHONONSTATE a process does not reap itself' })
  end
  local died = string.sub(dead, 1, 6) ~= 'class:'
  local registry = T .. 'registry:' .. dead
  call('ZCARD', registry)
  call('SCARD', T .. 'lanes')
  if died then
    fence(T, dead)
  end
  local upto = recovers and '(+inf' or '(' .. fmt(LEFT_SCORE)
  local out, wrong, taken = {}, {}, 0
  for _, resource in ipairs(call('ZRANGEBYSCORE', registry, '-inf', upto, 'LIMIT', 0, most)) do
    local ok, problem = pcall(reap_one, c, resource, dead, recovers, died, out)
    if ok then
      taken = taken + (problem and 0 or 1)
    else
      call('ZADD', registry, '+inf', resource)
      wrong[#wrong + 1] = resource
      wrong[#wrong + 1] = text_of(problem, T, { resource })
    end
  end
  local all = call('ZCARD', registry)
  if all == 0 then
    if died then
      call('DEL', T .. 'mailbox:' .. dead)
      call('SREM', T .. 'lanes', dead)
    else
      call('SREM', T .. 'handed', dead)
    end
  end
  return { REAPED, call('ZCOUNT', registry, '-inf', upto), all, out, wrong, taken }
end)

-- close(): the last operation of a process that stops, alone in its call. The lane is deleted if the
-- process is responsible for nothing any more. answers CLOSED | { LEFT_OVER, resources }
operation(CLOSE, 1, function(c)
  local left = call('ZCARD', c.T .. 'registry:' .. c.pid)
  if left > 0 then
    return { LEFT_OVER, left }
  end
  call('SCARD', c.T .. 'lanes')
  c.closed = true
  return CLOSED
end)
