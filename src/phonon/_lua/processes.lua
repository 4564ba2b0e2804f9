-- The processes of a namespace, and their lanes in a partition. Keys of the namespace begin with N.

-- The epoch names the data of this server. A server that lost its data has another one, or none.
local function epoch_of(N, make)
  local epoch = call('GET', N .. 'epoch')
  if not epoch and make then
    epoch = fmt(micros())
    call('SET', N .. 'epoch', epoch)
  end
  return epoch or ''
end

-- list(process, ttl ms, partitions, card, 1 to insist on the partitions): a process appears. A late
-- duplicate lists it again under another number, which no beat carries.
-- answers { epoch, number of the listing, partitions }
plain('list', function(N, args)
  local pid, ttl, partitions = args[1], args[2] * 1000, args[3]
  if args[5] == '1' then
    call('SET', N .. 'partitions', partitions)
  else
    call('SETNX', N .. 'partitions', partitions)
  end
  if call('ZADD', N .. 'processes', 'NX', fmt(micros() + ttl), pid) == 1 then
    call('HSET', N .. 'listings', pid, fmt(micros()))
    call('HSET', N .. 'cards', pid, args[4])
  end
  return { epoch_of(N, true), call('HGET', N .. 'listings', pid), tonumber(call('GET', N .. 'partitions')) }
end)

-- Dead processes are handed out to processes that beat, so many with each beat; a survivor that has taken
-- them over beats again. At first each dead process is handed to one survivor, which is mostly enough; after
-- some time to two, then to four: they share the work, and the death of one survivor does not stop it. It is
-- not handed to all at once: survivors that are slow because many processes died would become slower.
local HANDED_OUT = 4
local SHARERS = 16

-- The server's clock may be set forward. That happened if between two beats it has advanced by this part of
-- a lease (half an interval) more than the process's own clock. A beat that the network delays looks the
-- same, and does no harm. See MARGIN in identity.py.
local JUMP = 1 / 8

-- beat(process, ttl ms, epoch, number of the listing, 1 if it may mark, 1 if it executes batches, ms
-- for which the dead that it is told of are not handed to others, a report or nothing, µs by the
-- process's own clock since it sent the last beat that was answered): renew the process's lease, and
-- keep its report for operators.
-- A process whose deadline has passed is dead only once the beat of another one has marked it, with 0. A
-- beat that is overdue itself marks no process and gives the others time, because the server was away. A
-- beat that finds that the clock was set forward moves all deadlines with it.
-- answers { 'alive', ms until the next deadline or -1, processes alive, dead process ... } | { 'dead' }
--         { 'forgotten' }
plain('beat', function(N, args)
  local pid, ttl, at = args[1], args[2] * 1000, micros()
  local processes = N .. 'processes'
  local score = tonumber(call('ZSCORE', processes, pid) or nil)
  if epoch_of(N) ~= args[3] or not score or call('HGET', N .. 'listings', pid) ~= args[4] then
    return { 'forgotten' }
  end
  if score == 0 then
    return { 'dead' }
  end
  local jump = at - (score - ttl) - tonumber(args[9])
  if jump > ttl * JUMP then
    local others = call('ZRANGEBYSCORE', processes, '(0', '+inf', 'WITHSCORES')
    for j = 1, #others, 2 do
      -- At most a lease from now: the clock may have been set back before, and not all have beaten since.
      local deadline = tonumber(others[j + 1])
      call('ZADD', processes, fmt(math.max(deadline, math.min(deadline + jump, at + ttl))), others[j])
    end
  end
  for _, other in ipairs(call('ZRANGEBYSCORE', processes, '(0', fmt(at))) do
    if other ~= pid then
      if score <= at then
        call('ZADD', processes, fmt(at + ttl), other)
      elseif args[5] == '1' then
        call('ZADD', processes, 0, other)
      end
    end
  end
  call('ZADD', processes, fmt(at + ttl), pid)
  if args[8] ~= '' then
    call('HSET', N .. 'reports', pid, args[8])
  end
  local answer = { 'alive', -1, call('ZCOUNT', processes, '(0', '+inf') }
  local next_ones = call('ZRANGEBYSCORE', processes, '(' .. fmt(at), '+inf', 'WITHSCORES', 'LIMIT', 0, 2)
  for j = 1, #next_ones, 2 do
    if next_ones[j] ~= pid then
      answer[2] = math.ceil((tonumber(next_ones[j + 1]) - at) / 1000)
      break
    end
  end
  local dead = call('ZRANGEBYSCORE', processes, 0, 0)
  for _, other in ipairs(dead) do
    -- Processes that only reap are counted apart from those that also execute batches, which have to
    -- take over the rest.
    local field = args[6] .. other
    local known = call('HGET', N .. 'reapers', field)
    local till, more, sharers = 0, 0, 0.5
    if known then
      till, more, sharers = string.match(known, '^(%d+) (%d+) (%d+)$')
      till, more, sharers = tonumber(till), tonumber(more), tonumber(sharers)
    end
    if till <= at then
      sharers = math.min(sharers * 2, SHARERS)
      till, more = at + args[7] * 1000, sharers
    end
    if more > 0 then
      call('HSET', N .. 'reapers', field, fmt(till) .. ' ' .. fmt(more - 1) .. ' ' .. fmt(sharers))
      answer[#answer + 1] = other
      if #answer - 3 >= HANDED_OUT then
        break
      end
    end
  end
  return answer
end)

-- unlist(process): the process has left nothing behind. With the last one all data about processes goes.
plain('unlist', function(N, args)
  call('HDEL', N .. 'listings', args[1])
  call('HDEL', N .. 'cards', args[1])
  call('HDEL', N .. 'reports', args[1])
  call('HDEL', N .. 'reapers', '0' .. args[1], '1' .. args[1])
  local was = call('ZREM', N .. 'processes', args[1])
  if call('EXISTS', N .. 'processes') == 0 then
    call('DEL', N .. 'epoch')
  end
  return was
end)

-- expire(process): mark a process as dead, so that survivors take it over.
plain('expire', function(N, args)
  call('ZADD', N .. 'processes', 'XX', 0, args[1])
  return 1
end)

-- processes(): all that are listed, dead ones included
read('processes', function(N)
  return call('ZRANGE', N .. 'processes', 0, -1)
end)

-- cards(process, ...): where the processes run, as they said when they were listed, or ''
read('cards', function(N, args)
  local answer = {}
  for j, pid in ipairs(args) do
    answer[j] = call('HGET', N .. 'cards', pid) or ''
  end
  return answer
end)

-- open(process, partitions): make the lane, unless it exists. No other function makes lanes, so a call
-- of a lane that was closed, or was lost, is refused.
-- answers { number of the lane, partitions }; the number is '' if the process was fenced here
plain('open', function(T, args)
  local lane = T .. 'lane:' .. args[1]
  local other = call('SRANDMEMBER', T .. 'lanes')
  local partitions = other and call('HGET', T .. 'lane:' .. other, 'partitions') or args[2]
  if partitions ~= args[2] then
    return { '', tonumber(partitions) }
  end
  local state, fenced, number = lane_of(lane)
  if not state then
    local c = { T = T }
    number = fmt(next_token(c))
    store_token(c)
    call('HSET', lane, 'state', number, 'partitions', args[2])
    call('SADD', T .. 'lanes', args[1])
  elseif fenced then
    number = ''
  end
  return { number, tonumber(partitions) }
end)

-- fence(process): no call of this id is carried out here any more.
-- answers { sequence or -1 if nothing is known of the lane, answers, digest, number of the lane }
plain('fence', function(T, args)
  local lane = T .. 'lane:' .. args[1]
  local _, _, number, sequence, digest = lane_of(lane)
  local answers = call('HGET', lane, 'answers')
  fence(T, args[1])
  return { sequence or -1, answers or '', digest or '', number or '' }
end)

-- verify(process, before ms, page): the server's view of a lane, the class queues that wait, and some of
-- the batches and locks that the process has had since before then.
-- answers { sequence or -1, number, stamp, 1 if fenced, { queue, ... }, { resource, token, ... },
--           { resource, ... }, { resource that it neither holds nor waits for, ... } }
read('verify', function(T, args)
  local pid = args[1]
  local state, fenced, number, sequence = lane_of(T .. 'lane:' .. pid)
  local registry, batches = T .. 'registry:' .. pid, {}
  local at, size = args[3] * 64, 64
  for _, resource in ipairs(call('ZRANGEBYSCORE', registry, fmt(BATCH_SCORE), fmt(BATCH_SCORE + args[2]),
    'LIMIT', at, size)) do
    local run = call('HMGET', T .. 'running:' .. resource, 'owner', 'token')
    if run[1] == pid then
      batches[#batches + 1] = resource
      batches[#batches + 1] = tonumber(run[2])
    end
  end
  local locks = call('ZRANGEBYSCORE', registry, fmt(-args[2]), '(0', 'LIMIT', at, size)
  -- An operator may have deleted a lock's key by hand.
  local gone = {}
  for _, resource in ipairs(locks) do
    if not holds_or_waits({ T = T, pid = pid }, resource) then
      gone[#gone + 1] = resource
    end
  end
  return { sequence or -1, number or '', state ~= number and state or '', fenced and 1 or 0,
    call('SMEMBERS', T .. 'handed'), batches, locks, gone }
end)

-- survey(): the processes that have a lane in this partition
read('survey', function(T)
  return call('SMEMBERS', T .. 'lanes')
end)

-- rights(command, ...): the commands, of the steps and of these arguments, that the caller's user may not
-- run. A command that is refused inside a step would leave it half done: Redis does not roll back.
read('rights', function(T, args)
  local key, missing = T .. 'rights', {}
  for _, commands in ipairs({ COMMANDS, args }) do
    for _, command in ipairs(commands) do
      local name, sub = string.match(command, '^([^|]+)|?(.*)$')
      if not redis.acl_check_cmd(name, sub ~= '' and sub or key, key, key) then
        missing[#missing + 1] = command
      end
    end
  end
  return missing
end)
