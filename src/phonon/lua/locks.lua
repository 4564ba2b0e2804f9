-- The lock of a resource, exclusive or shared, and the semaphore: lock, unlock, renew, lockers.
-- A holder is one acquisition, named '<process id>/<number>', so that two threads of a process
-- exclude each other too. The name tells what is wanted, also of those who wait: an 's' follows the
-- number of a shared one, and the number of places where those are limited: '<process id>/12s5'.

-- How long a waiter stays in the queue without asking again.
local WAITER_MS = 10000
-- How long a waiter that was woken may take to come for the lock before the next one has it.
local WOKEN_MS = 2000
-- How long a wake-up may lie there. Whoever waits takes it at once; a waiter that has died, or lost
-- its connection, does not.
local UNTAKEN_MS = 200
-- Keys of locks expire this long after their last lease, should nobody be left to delete them.
local JANITOR_MS = 60000

local function is_shared(holder)
  return string.find(holder, 's%d*$') ~= nil
end

-- How many may share it; nil if any number may.
local function places_of(holder)
  return tonumber(string.match(holder, 's(%d+)$'))
end

local function process_of(holder)
  return string.match(holder, '^(.*)/')
end

-- The exclusive holder: {holder, until, token, since, thread}, or {} if there is none.
local function lock_of(r)
  local held = call('HMGET', r.lock, 'holder', 'until', 'token', 'since', 'thread')
  if held[1] and tonumber(held[2]) <= r.now then
    call('DEL', r.lock)
    return {}
  end
  return held
end

-- Beside its holders the hash counts how many each process has, as '@<process id>'.
local function drop_sharer(r, holder)
  if call('HDEL', r.sharers, holder) == 1 then
    local process = '@' .. process_of(holder)
    if call('HINCRBY', r.sharers, process, -1) <= 0 then
      call('HDEL', r.sharers, process)
    end
  end
  return call('ZREM', r.shared, holder)
end

-- How many hold it together, once those whose lease has run out are dropped.
local function sharers_of(r)
  if call('EXISTS', r.shared) == 0 then
    return 0
  end
  for _, holder in ipairs(call('ZRANGEBYSCORE', r.shared, '-inf', r.now)) do
    drop_sharer(r, holder)
  end
  return call('ZCARD', r.shared)
end

local function quit_queue(r, holder)
  call('ZREM', r.queue, holder)
  call('ZREM', r.waiting, holder)
  call('DEL', r.base .. ':wake:' .. holder)
end

-- Since when the wake-up of a waiter lies there; nil if none does.
local function woken_at(r, waiter)
  local time = redis.pcall('LINDEX', r.base .. ':wake:' .. waiter, 0)
  return type(time) == 'string' and tonumber(time)
end

-- Forget waiters that have not asked again in time, and those in front that have not noticed that
-- they were woken, except one that is asking now. Answers whether any are left.
local function anybody_waits(r, asking)
  if call('EXISTS', r.queue) == 0 then
    return false
  end
  for _, holder in ipairs(call('ZRANGEBYSCORE', r.waiting, '-inf', r.now)) do
    quit_queue(r, holder)
  end
  while true do
    local first = call('ZRANGE', r.queue, 0, 0)[1]
    local woken = first and woken_at(r, first)
    if not woken or first == asking or r.now - woken <= UNTAKEN_MS then
      return first ~= nil
    end
    quit_queue(r, first)
  end
end

-- Whoever waits in front of a holder and cannot go in together with it: the waiter, and until when
-- it counts as alive. To a shared holder that is an exclusive one; to an exclusive one, anybody;
-- where the places are limited, anybody as well.
local function waiter_in_front(r, holder)
  if not anybody_waits(r, holder) then
    return nil
  end
  local together = is_shared(holder) and not places_of(holder)
  local first = 0
  while true do
    local waiters = call('ZRANGE', r.queue, first, first + 99)
    for _, waiter in ipairs(waiters) do
      if waiter == holder then
        return nil
      end
      if not (together and is_shared(waiter)) then
        -- One that is queued without a deadline (its key was evicted) has until now.
        return waiter, tonumber(call('ZSCORE', r.waiting, waiter) or r.now)
      end
    end
    if #waiters < 100 then
      return nil
    end
    first = first + 100
  end
end

local function wake(r, waiter)
  -- A wake-up that cannot be delivered does no harm: the waiter asks again by itself, later.
  if type(redis.pcall('RPUSH', r.base .. ':wake:' .. waiter, r.now)) == 'number' then
    call('PEXPIRE', r.base .. ':wake:' .. waiter, WAITER_MS)
  end
  -- It is not given more time each time it is woken: it may have died.
  call('ZADD', r.waiting, 'LT', r.now + WOKEN_MS, waiter)
end

-- Wake whoever can go in now: the first waiter, and if it shares those behind it that share too,
-- up to the first that does not, or as many as there are places left.
local function wake_next(r)
  if not anybody_waits(r) then
    return
  end
  local inside = sharers_of(r)
  local first = 0
  repeat
    local waiters = call('ZRANGE', r.queue, first, first + 99)
    for _, waiter in ipairs(waiters) do
      if inside >= (places_of(waiter) or is_shared(waiter) and math.huge or 1) then
        return
      end
      wake(r, waiter)
      inside = is_shared(waiter) and inside + 1 or math.huge
    end
    first = first + 100
  until #waiters < 100
end

local function grant(r, holder, lease_ms, thread)
  local token = next_token(r, 0)
  local text = string.format('%d', token)
  if is_shared(holder) then
    if call('EXISTS', r.shared) == 0 then
      call('DEL', r.sharers) -- left of some whose other key was deleted or evicted
    end
    call('ZADD', r.shared, r.now + lease_ms, holder)
    call('HSET', r.sharers, holder, text .. ' ' .. r.now .. ' ' .. thread)
    call('HINCRBY', r.sharers, '@' .. r.pid, 1)
    -- Longer leases of others stay.
    for _, key in ipairs({ r.shared, r.sharers }) do
      if call('PTTL', key) < lease_ms + JANITOR_MS then
        call('PEXPIRE', key, lease_ms + JANITOR_MS)
      end
    end
  else
    call('HSET', r.lock, 'holder', holder, 'pid', r.pid, 'token', text,
      'until', r.now + lease_ms, 'since', r.now, 'thread', thread)
    call('PEXPIRE', r.lock, lease_ms + JANITOR_MS)
  end
  return { 'granted', 0, token }
end

-- One of those who hold it, for a message: holder, until, since, thread.
local function somebody(r, held)
  if held[1] then
    return held[1], tonumber(held[2]), tonumber(held[4] or r.now), held[5] or ''
  end
  local first = call('ZRANGE', r.shared, 0, 0, 'WITHSCORES')
  if not first[1] then
    return nil
  end
  local since, thread = string.match(call('HGET', r.sharers, first[1]) or '', '^%d+ (%d+) (.*)$')
  return first[1], tonumber(first[2]), tonumber(since or r.now), thread or ''
end

-- lock(pid, op, holder, lease_ms, '1' to queue up when it is taken, thread)
-- answers {'granted', 0, token}
--         {'wait', clear, ms until it is worth asking again, holder, since ms, thread}
--         {'busy', clear, ms the holder's lease still runs, holder, since ms, thread}
step('lock', function(r, args)
  local holder, lease_ms, thread = args[3], tonumber(args[4]), args[6] or ''
  local places = places_of(holder)
  local held, sharers, first, first_until = {}, 0, nil, nil
  local others = call('EXISTS', r.lock, r.shared, r.queue) > 0 -- most often there is nobody
  if others then
    held = lock_of(r)
    sharers = sharers_of(r)
  end
  if held[1] == holder then
    return { 'granted', 0, tonumber(held[3]) }
  end
  local has = sharers > 0 and call('HGET', r.sharers, holder)
  if has then
    return { 'granted', 0, tonumber(string.match(has, '^%d+')) }
  end
  local free = not held[1]
  if is_shared(holder) then
    free = free and sharers < (places or math.huge)
  else
    free = free and sharers == 0
  end
  if others then
    first, first_until = waiter_in_front(r, holder)
  end
  if free and not first then
    hold(r, true)
    if others then
      quit_queue(r, holder)
    end
    local granted = grant(r, holder, lease_ms, thread)
    if places then
      wake_next(r) -- whoever is next may have come for one of the places before it was its turn
    end
    return granted
  end
  -- Taken, or free but promised to the waiter that was woken for it.
  local owner, free_at, since, by = somebody(r, held)
  if free or not owner then
    if first_until > r.now + WOKEN_MS then
      wake_next(r) -- whoever was woken in its place has not come
    end
    local woken = woken_at(r, first)
    owner, free_at, since, by = first, woken and woken + UNTAKEN_MS + 1 or first_until, r.now, ''
  end
  local free_in = free_at - r.now
  if args[5] ~= '1' then
    return { 'busy', let_go(r), free_in, owner, since, by }
  end
  call('ZADD', r.waiting, r.now + WAITER_MS, holder)
  call('ZADD', r.queue, 'NX', r.micros, holder)
  call('DEL', r.base .. ':wake:' .. holder) -- earlier ones: what they told of, it has seen by now
  call('PEXPIRE', r.queue, WAITER_MS + JANITOR_MS)
  call('PEXPIRE', r.waiting, WAITER_MS + JANITOR_MS)
  return { 'wait', let_go(r), math.max(1, math.min(free_in, WAITER_MS / 2)), owner, since, by }
end)

local RELEASED = { [0] = constant('released', 0), constant('released', 1) }
local LOST = { [0] = constant('lost', 0), constant('lost', 1) }

-- unlock(pid, op, holder): release the lock, or leave its queue, and wake whoever is next.
-- answers {'released', clear} | {'lost', clear}   the lock was not the caller's (any more)
step('unlock', function(r, args)
  local holder = args[3]
  local held = lock_of(r)
  local others = call('EXISTS', r.shared, r.sharers, r.queue, r.waiting) > 0 -- most often there is nobody
  local mine = held[1] == holder
  if others then
    sharers_of(r)
    call('ZCARD', r.waiting)
    quit_queue(r, holder)
  end
  if mine then
    call('DEL', r.lock)
  elseif others and is_shared(holder) then
    mine = drop_sharer(r, holder) == 1
  end
  if others and (mine or not held[1]) then
    wake_next(r)
  end
  return (mine and RELEASED or LOST)[let_go(r)]
end, true)

-- renew(pid, lease_ms, holder, lock lease_ms, holder, lock lease_ms ...): prolong what the process
-- still has here. Repeating it, however late, is harmless: it brings nothing back that is gone, and
-- makes nothing shorter.
-- answers {1 if a member, then 1 or 0 for each holder}
plain('renew', function(r, args)
  local answer = { 0 }
  if call('ZSCORE', r.members, r.pid) then
    call('ZADD', r.members, r.now + args[2], r.pid)
    answer[1] = 1
  end
  for i = 3, #args, 2 do
    local holder, lease_ms = args[i], tonumber(args[i + 1])
    local mine
    if is_shared(holder) then
      sharers_of(r)
      call('ZADD', r.shared, 'XX', 'GT', r.now + lease_ms, holder)
      mine = call('ZSCORE', r.shared, holder)
      if mine then
        call('PEXPIRE', r.shared, lease_ms + JANITOR_MS, 'GT')
        call('PEXPIRE', r.sharers, lease_ms + JANITOR_MS, 'GT')
      end
    else
      local held = lock_of(r)
      mine = held[1] == holder
      if mine and tonumber(held[2]) < r.now + lease_ms then
        call('HSET', r.lock, 'until', r.now + lease_ms)
        call('PEXPIRE', r.lock, lease_ms + JANITOR_MS)
      end
    end
    answer[#answer + 1] = mine and 1 or 0
  end
  return answer
end, { 'allow-oom' })

-- lockers(): answers {holder, token, since ms, ms left of its lease, thread, ... , '', waiter ...}
plain('lockers', function(r)
  local answer = {}
  local function add(holder, token, since, left, thread)
    for _, value in ipairs({ holder, tonumber(token), tonumber(since), left, thread }) do
      answer[#answer + 1] = value
    end
  end
  local held = call('HMGET', r.lock, 'holder', 'until', 'token', 'since', 'thread')
  if held[1] and tonumber(held[2]) > r.now then
    add(held[1], held[3], held[4], tonumber(held[2]) - r.now, held[5] or '')
  end
  local shared = call('ZRANGEBYSCORE', r.shared, '(' .. r.now, '+inf', 'WITHSCORES')
  for i = 1, #shared, 2 do
    local record = call('HGET', r.sharers, shared[i]) or ''
    local token, since, thread = string.match(record, '^(%d+) (%d+) (.*)$')
    add(shared[i], token or 0, since or r.now, tonumber(shared[i + 1]) - r.now, thread or '')
  end
  answer[#answer + 1] = ''
  for _, waiter in ipairs(call('ZRANGE', r.queue, 0, -1)) do
    if tonumber(call('ZSCORE', r.waiting, waiter) or 0) > r.now then
      answer[#answer + 1] = waiter
    end
  end
  return answer
end, { 'no-writes' })
