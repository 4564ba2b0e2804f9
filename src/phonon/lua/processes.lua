-- The processes of a namespace, what each holds, and how the dead are buried.

-- Register a function about one key other than a resource's.
local function about(name, body, flags)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = flags,
    callback = function(keys, args)
      call = redis.call
      return body(keys[1], args, clock()) -- milliseconds, microseconds
    end,
  })
end

-- hold(base, pid, '1' for a lock): enter a resource into a registry, which is the key, before a
-- step in another slot.
-- answers 1 if it is new there
about('hold', function(registry, args, now)
  return enter_registry(registry, args[1], now, args[2], args[3] == '1')
end, { 'allow-oom' })

-- A dead process's registry is worked off by any number of survivors, some resources at a time.
-- The times in it (below zero where there is a lock) say since when until then, and until when one
-- is in hand from then on.

-- claim(most, ms): take resources of a dead process in hand, for so long that they can be seen to.
-- answers {how many are left, with those in others' hands, base ...} | {-1} if it is buried
about('claim', function(registry, args, now)
  if redis.pcall('GET', registry) == TOMBSTONE then
    return { -1 }
  end
  local answer = { call('ZCARD', registry) }
  for i, base in ipairs(call('ZRANGEBYSCORE', registry, '-inf', now, 'LIMIT', 0, args[1])) do
    call('ZADD', registry, now + args[2], base)
    answer[i + 1] = base
  end
  return answer
end, { 'allow-oom' })

-- bury(ms): leave a tombstone in place of a dead process's registry, once it is empty, for so long
-- that the process, should it only have been paused, will have learned of it.
-- answers 1 if it is buried
about('bury', function(registry, args)
  if redis.pcall('GET', registry) == TOMBSTONE then
    return 1
  end
  if call('ZCARD', registry) > 0 then
    return 0
  end
  call('SET', registry, TOMBSTONE, 'PX', args[1])
  return 1
end, { 'allow-oom' })

-- Of the others the key is the processes' sorted set. Beside it is the epoch: when the first
-- process of this server's data appeared. A server that has lost its data has another one.
local function epoch_of(processes)
  return processes .. ':epoch'
end

-- beat(pid, ttl_ms, epoch, '1' if the server was not to be reached): prolong a process's life.
-- epoch is what the last beat answered, '' in the first one. Who is dead stays so, except after
-- an outage of the server during which nobody could beat: that is no death of anybody.
-- answers {'alive' | 'dead' | 'forgotten', epoch, now, ms until the next deadline or -1, dead id ...}
about('beat', function(processes, args, now)
  local pid, ttl, known = args[1], tonumber(args[2]), args[3]
  local epoch = call('GET', epoch_of(processes))
  local deadline = tonumber(call('ZSCORE', processes, pid) or 0)
  local kind = 'alive'
  if known ~= '' and known ~= epoch then
    kind = 'forgotten'
  elseif known ~= '' and deadline <= now then
    if args[4] == '1' and deadline > 0 and call('ZCOUNT', processes, '(' .. now, '+inf') == 0 then
      for _, other in ipairs(call('ZRANGEBYSCORE', processes, '(0', now)) do
        call('ZADD', processes, now + ttl, other)
      end
    else
      kind = 'dead'
    end
  end
  if not epoch then
    epoch = string.format('%d', now)
    call('SET', epoch_of(processes), epoch)
  end
  if kind == 'dead' then
    -- It may have done something since it was buried: whoever comes by looks once more.
    call('ZADD', processes, 'NX', now, pid)
  else
    call('ZADD', processes, now + ttl, pid)
  end
  local next_due = -1
  local living = call('ZRANGEBYSCORE', processes, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 2)
  for i = 1, #living, 2 do
    if living[i] ~= pid then
      next_due = tonumber(living[i + 1]) - now
      break
    end
  end
  local answer = { kind, epoch, now, next_due }
  for _, other in ipairs(call('ZRANGEBYSCORE', processes, '-inf', now, 'LIMIT', 0, 100)) do
    if other ~= pid then
      answer[#answer + 1] = other
    end
  end
  return answer
end, { 'allow-oom' })

-- announce(heir): list an heir, whose deadline is always over.
-- answers a mark, which is another one each time
about('announce', function(processes, args, _, micros)
  local mark = math.min(-micros, tonumber(call('ZSCORE', processes, args[1]) or 0) - 1)
  call('ZADD', processes, mark, args[1])
  return string.format('%.0f', mark)
end, { 'allow-oom' })

-- resign(pid [, mark]): remove a process, and with the last one all that is known of them. With a
-- mark remove an heir, if it was not announced since.
-- answers 1 if it was there
about('resign', function(processes, args)
  if args[2] and tonumber(call('ZSCORE', processes, args[1])) ~= tonumber(args[2]) then
    return 0
  end
  local was = call('ZREM', processes, args[1])
  if call('EXISTS', processes) == 0 then
    call('DEL', epoch_of(processes))
  end
  return was
end, { 'allow-oom' })

-- alive(): answers the ids of the processes that live
about('alive', function(processes, _, now)
  return call('ZRANGEBYSCORE', processes, '(' .. now, '+inf')
end, { 'no-writes' })
