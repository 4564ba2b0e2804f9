-- The lock of a resource, exclusive or shared, and the semaphore: lock, unlock, renew.
-- A holder is one acquisition, named '<process>/<number>', so that two threads of a process exclude
-- each other too. The names of holders and waiters tell the kind of lock: an 's' follows the number of
-- a shared one, and then the number of places if that is limited: '<process>/12s5'.
-- A lock lasts as long as its process's lease, unless it was given a lease of its own.
-- One hash has all holders: one exclusive, or those that share.

-- Milliseconds that a wake-up may lie in a mailbox. A living waiter takes it at once, a dead one never.
local UNTAKEN_US = 200000
-- Milliseconds within which a waiter that has taken its wake-up must ask for the lock.
local COMING_US = 2000000
-- A waiter asks again by then, in case its wake-up was lost.
local ASK_AGAIN_MS = 5000

local function is_shared(holder)
  return string.find(holder, 's%d*$') ~= nil
end

-- The number of holders that may share the lock; nil if any number may.
local function places_of(holder)
  return tonumber(string.match(holder, 's(%d+)$'))
end

-- The token of a grant, since when in ms, and the thread.
local function parts_of(grant)
  local token, since, thread = string.match(grant, '^(%d+) (%d+) (.*)$')
  return tonumber(token), tonumber(since), thread
end

-- lasts: the holder is known to have no lease of its own.
local function free(c, resource, holder, lasts)
  if not lasts then
    call('ZREM', c.T .. 'leases:' .. resource, holder)
  end
  return call('HDEL', c.T .. 'lock:' .. resource, holder) == 1
end

-- Read the keys of a lock before anything is written: that raises if one is of a foreign type. Not
-- needed if no other key of the lock exists. Answers the holder of the exclusive lock and its grant, or
-- nothing, and the numbers of sharers, waiters, waiters that were woken, and leases. count: the number of
-- holders, if it was read already.
local function look_at_lock(c, resource, count)
  local T = c.T
  local lock, held, grant = T .. 'lock:' .. resource, nil, nil
  local sharers = count or call('HLEN', lock)
  if sharers == 1 then
    local only = call('HGETALL', lock)
    if not is_shared(only[1]) then
      held, grant, sharers = only[1], only[2], 0
    end
  end
  return held, grant, sharers, call('ZCARD', T .. 'queue:' .. resource),
    call('HLEN', T .. 'woken:' .. resource), call('ZCARD', T .. 'leases:' .. resource)
end

-- Free the locks whose lease is over, and answer the same.
local function current_lock(c, resource, count)
  local held, grant, sharers, waiters, woken, leased = look_at_lock(c, resource, count)
  if leased > 0 then
    local leases = c.T .. 'leases:' .. resource
    for _, holder in ipairs(call('ZRANGEBYSCORE', leases, '-inf', fmt(now_ms(c)))) do
      free(c, resource, holder)
    end
    return look_at_lock(c, resource)
  end
  return held, grant, sharers, waiters, woken, leased
end

local function quit_queue(c, resource, holder)
  call('ZREM', c.T .. 'queue:' .. resource, holder)
  if call('HDEL', c.T .. 'woken:' .. resource, holder) == 1 then
    redis.pcall('LREM', c.T .. 'mailbox:' .. process_of(holder), 0, holder)
  end
end

-- Drop waiters at the front that ignored their wake-up, except one that is asking now. Answers the
-- first waiter then, and when it was woken.
local function first_waiter(c, resource, asking)
  local T = c.T
  while true do
    local first = call('ZRANGE', T .. 'queue:' .. resource, 0, 0)[1]
    if not first then
      return nil
    end
    local woken = tonumber(call('HGET', T .. 'woken:' .. resource, first) or nil)
    if not woken or first == asking then
      return first, woken
    end
    local lies = redis.pcall('LPOS', T .. 'mailbox:' .. process_of(first), first)
    if now(c) - woken <= (type(lies) == 'number' and UNTAKEN_US or COMING_US) then
      return first, woken
    end
    quit_queue(c, resource, first)
  end
end

-- The waiter that has to be served before a holder, and when it was woken. Before a shared holder that
-- is an exclusive waiter; before an exclusive one, or where places are limited, any waiter.
local function waiter_in_front(c, resource, holder)
  local first, woken = first_waiter(c, resource, holder)
  if not first or first == holder then
    return nil
  end
  local together = is_shared(holder) and not places_of(holder)
  if not together then
    return first, woken
  end
  local at = 0
  while true do
    local waiters = call('ZRANGE', c.T .. 'queue:' .. resource, at, at + 99)
    for _, waiter in ipairs(waiters) do
      if waiter == holder then
        return nil
      end
      if not is_shared(waiter) then
        if waiter ~= first then
          woken = tonumber(call('HGET', c.T .. 'woken:' .. resource, waiter) or nil)
        end
        return waiter, woken
      end
    end
    if #waiters < 100 then
      return nil
    end
    at = at + 100
  end
end

local function wake(c, resource, waiter)
  -- A wake-up is not renewed: otherwise the lock would wait without end for a waiter that died.
  if call('HSETNX', c.T .. 'woken:' .. resource, waiter, fmt(now(c))) == 1 then
    send_mail(c.T, waiter)
  end
end

-- Whether a waiter can be granted the lock beside so many holders.
local function fits(waiter, inside)
  return inside < (places_of(waiter) or is_shared(waiter) and math.huge or 1)
end

-- Wake the waiters that can be granted the lock now: the first one, and if it is shared also the shared
-- ones behind it, up to the first exclusive one, or as many as there are places left. held, sharers:
-- the exclusive holder, and how many others there are.
local function wake_next(c, resource, held, sharers)
  local inside = held and math.huge or sharers
  local first = first_waiter(c, resource)
  if not first then
    return
  end
  if not is_shared(first) then
    if fits(first, inside) then
      wake(c, resource, first)
    end
    return
  end
  local at = 0
  repeat
    local waiters = call('ZRANGE', c.T .. 'queue:' .. resource, at, at + 99)
    for _, waiter in ipairs(waiters) do
      if not fits(waiter, inside) then
        return
      end
      wake(c, resource, waiter)
      inside = is_shared(waiter) and inside + 1 or math.huge
    end
    at = at + 100
  until #waiters < 100
end

local function grant(c, resource, holder, lease_ms, thread)
  local T, token = c.T, next_token(c)
  local since = ms_text(c)
  if lease_ms > 0 then
    call('ZADD', T .. 'leases:' .. resource, fmt(now_ms(c) + lease_ms), holder)
  end
  if c.alone then
    call('ZADD', c.alone, '-' .. since, resource)
  elseif c.registry[resource] ~= BATCH then
    track(c, resource, LOCKER)
  end
  local text = token == c.now and c.now_text or fmt(token)
  call('HSET', T .. 'lock:' .. resource, holder, text .. ' ' .. since .. ' ' .. thread)
  return { GRANTED, token }
end

-- One of the holders, for a message: holder, ms until its own lease is over or -1, since, thread.
local function somebody(c, resource, holder, granted, leased)
  if not holder then
    holder, granted = unpack(call('HGETALL', c.T .. 'lock:' .. resource), 1, 2)
    if not holder then
      return nil
    end
  end
  local _, since, thread = parts_of(granted)
  local till = leased > 0 and call('ZRANGE', c.T .. 'leases:' .. resource, 0, 0, 'WITHSCORES')[2]
  return holder, till and math.max(1, tonumber(till) - now_ms(c)) or -1, since, thread
end

-- lock(resource, holder, 1 to queue up when it is taken, lease ms or 0, thread)
-- answers { GRANTED, token }
--         { WAIT, ms until it is worth asking again, holder, since ms, thread }
--         { BUSY, ms until the holder's own lease is over or -1, holder, since ms, thread }
operation(LOCK, 6, function(c, o, i)
  local resource, holder, queued, lease_ms, thread = o[i + 1], o[i + 2], o[i + 3], o[i + 4], o[i + 5]
  local T = c.T
  local lock, queue = T .. 'lock:' .. resource, T .. 'queue:' .. resource
  if call('EXISTS', lock, queue) == 0 then
    return grant(c, resource, holder, lease_ms, thread) -- the most frequent case: the lock is free
  end
  local count = call('HLEN', lock)
  if count == 0 and not is_shared(holder) and call('ZRANGE', queue, 0, 0)[1] == holder then
    call('HLEN', T .. 'woken:' .. resource) -- the next frequent: it is free, and the turn of this waiter
    local answer = grant(c, resource, holder, lease_ms, thread)
    quit_queue(c, resource, holder)
    return answer
  end
  prove_registry(c)
  local held, granted, sharers, waiters, many_woken, leased = current_lock(c, resource, count)
  local has = held == holder and granted or sharers > 0 and call('HGET', lock, holder)
  if has then
    return { GRANTED, (parts_of(has)) }
  end
  local places = places_of(holder)
  local room = not held
  if is_shared(holder) then
    room = room and sharers < (places or math.huge)
  else
    room = room and sharers == 0
  end
  local first, woken
  if room and waiters > 0 then
    first, woken = waiter_in_front(c, resource, holder)
  end
  if room and not first then
    local answer = grant(c, resource, holder, lease_ms, thread)
    if waiters > 0 then
      quit_queue(c, resource, holder)
    end
    if is_shared(holder) then
      wake_next(c, resource, nil, sharers + 1) -- this waiter may have taken a place before its turn
    end
    return answer
  end
  if room and not woken then
    wake_next(c, resource, nil, sharers) -- the waiter that was woken instead has not come
    woken, many_woken = now(c), 1
  end
  -- The lock is taken, or free but promised to the waiter that was woken for it.
  local owner, left_ms, since, by = somebody(c, resource, held, granted, leased)
  if room then
    owner, since, by = first, now_ms(c), ''
    left_ms = math.max(1, math.ceil((woken + UNTAKEN_US - now(c)) / 1000) + 1)
    if left_ms <= 1 then
      left_ms = math.max(1, math.ceil((woken + COMING_US - now(c)) / 1000) + 1)
    end
  end
  if queued == 0 then
    return { BUSY, left_ms, owner, since, by }
  end
  call('ZADD', queue, 'NX', fmt(now(c)), holder)
  if many_woken > 0 and call('HDEL', T .. 'woken:' .. resource, holder) == 1 then
    redis.pcall('LREM', T .. 'mailbox:' .. c.pid, 0, holder) -- this waiter has asked after its wake-up
  end
  if c.registry[resource] ~= BATCH then
    track(c, resource, LOCKER)
  end
  if left_ms < 0 or left_ms > ASK_AGAIN_MS then
    left_ms = ASK_AGAIN_MS
  end
  return { WAIT, left_ms, owner, since, by }
end, true)

-- unlock(resource, holder): release the lock, or leave its queue, and wake the next.
-- answers RELEASED | NOT_HELD: the lock was not this holder's (any more)
operation(UNLOCK, 3, function(c, o, i)
  local resource, holder, T = o[i + 1], o[i + 2], c.T
  local queue, leases = T .. 'queue:' .. resource, T .. 'leases:' .. resource
  -- The most frequent case is that none of these is there, and the caller has only the lock here.
  local members, running = T .. 'members:' .. resource, T .. 'running:' .. resource
  local there = call('EXISTS', queue, leases, members, running)
  if there < 2 and c.alone and not is_shared(holder) then
    -- The next frequent is that only others wait, and the first of them wants the lock for itself.
    local waiting = there == 0 and {} or call('ZRANGE', queue, 0, -1)
    local first = waiting[1]
    local wakes = first and not is_shared(first) and not is_among(c, waiting)
      and not call('HGET', T .. 'woken:' .. resource, first)
    if there == 0 or wakes then
      call('ZREM', c.alone, resource)
      if free(c, resource, holder, true) then
        if first then
          wake(c, resource, first)
        end
        return RELEASED
      end
    end
  end
  prove_registry(c)
  local more = there > 0 and call('EXISTS', members, running) or 0
  local held, sharers, waiters, leased, _ = nil, 0, 0, 0, nil
  if there > more then
    held, _, sharers, waiters, _, leased = current_lock(c, resource)
    if waiters > 0 and held ~= holder then -- a holder is not in the queue
      quit_queue(c, resource, holder)
    end
  end
  local mine = free(c, resource, holder, leased == 0)
  if waiters > 0 then
    if mine then
      held, sharers = nil, held and 0 or sharers - 1
    end
    wake_next(c, resource, held, sharers)
  end
  if more > 0 then
    settle(c, resource)
  elseif (waiters > 0 or is_shared(holder) or not mine) and holds_or_waits(c, resource) then
    track(c, resource, LOCKER)
  else
    untrack(c, resource)
  end
  return mine and RELEASED or NOT_HELD
end, true)

-- renew(resource, holder, lease ms): make the lease of a holder longer, never shorter; 0 only asks.
-- answers RENEWED | NOT_HELD
operation(RENEW, 4, function(c, o, i)
  local resource, holder, lease_ms, T = o[i + 1], o[i + 2], o[i + 3], c.T
  current_lock(c, resource)
  if call('HEXISTS', T .. 'lock:' .. resource, holder) == 0 then
    call('ZREM', T .. 'leases:' .. resource, holder)
    settle(c, resource)
    return NOT_HELD
  end
  if lease_ms > 0 and call('ZSCORE', T .. 'leases:' .. resource, holder) then
    call('ZADD', T .. 'leases:' .. resource, 'XX', 'GT', fmt(now_ms(c) + lease_ms), holder)
  end
  return RENEWED
end)

-- lockers(resource): { { holder, token, since ms, ms left of its own lease or -1, thread, ... },
-- { waiter, ... } }
read('lockers', function(T, args)
  local resource, at = args[1], math.floor(micros() / 1000)
  local holders, there = {}, call('HGETALL', T .. 'lock:' .. resource)
  for j = 1, #there, 2 do
    local till = tonumber(call('ZSCORE', T .. 'leases:' .. resource, there[j]) or nil)
    if not till or till > at then
      local token, since, thread = parts_of(there[j + 1])
      for _, value in ipairs({ there[j], token, since, till and till - at or -1, thread }) do
        holders[#holders + 1] = value
      end
    end
  end
  return { holders, call('ZRANGE', T .. 'queue:' .. resource, 0, -1) }
end)

-- nudge(process): wake the process's reader of mail, which finds out the reason.
plain('nudge', function(T, args)
  send_mail(T, args[1] .. '/')
  return 1
end)
