-- The exclusive lock of a resource: lock, unlock, renew. A holder is one acquisition
-- ('<process id>/<number>'), so two threads of a process exclude each other too.

-- How long a waiter stays in the queue without asking again.
local WAITER_MS = 10000
-- How long a waiter that was woken may take to come for the lock before the next one has it.
local WOKEN_MS = 2000
-- Keys of locks expire this long after their last lease, should nobody be left to delete them.
local JANITOR_MS = 60000

local function lock_of(r)
  local held = call('HMGET', r.lock, 'holder', 'until', 'token', 'pid', 'since')
  if held[1] and tonumber(held[2]) <= r.now then
    call('DEL', r.lock)
    return {}
  end
  return held
end

local function quit_queue(r, holder)
  call('ZREM', r.queue, holder)
  call('ZREM', r.waiting, holder)
  call('DEL', r.base .. ':wake:' .. holder)
end

-- The first waiter that is still alive, and until when it counts as such.
local function first_waiter(r)
  if call('EXISTS', r.queue) == 0 then
    return nil
  end
  for _, holder in ipairs(call('ZRANGEBYSCORE', r.waiting, '-inf', r.now)) do
    quit_queue(r, holder)
  end
  local first = call('ZRANGE', r.queue, 0, 0)[1]
  if not first then
    return nil
  end
  -- One that is queued without a deadline (its key was evicted) has until now.
  return first, tonumber(call('ZSCORE', r.waiting, first) or r.now)
end

local function wake_next(r)
  local first = first_waiter(r)
  if first then
    -- A wake-up that cannot be delivered does no harm: the waiter asks again by itself, later.
    if type(redis.pcall('RPUSH', r.base .. ':wake:' .. first, '1')) == 'number' then
      call('PEXPIRE', r.base .. ':wake:' .. first, WAITER_MS)
    end
    call('ZADD', r.waiting, r.now + WOKEN_MS, first)
  end
end

local function grant(r, holder, lease_ms)
  local token = next_token(r, 0)
  call('HSET', r.lock, 'holder', holder, 'pid', r.pid, 'token', string.format('%.0f', token),
    'until', r.now + lease_ms, 'since', r.now)
  call('PEXPIRE', r.lock, lease_ms + JANITOR_MS)
  return { 'granted', 0, token }
end

-- lock(pid, op, holder, lease_ms, '1' to queue up when it is taken)
-- answers {'granted', 0, token}
--         {'wait', clear, ms until it is worth asking again, owner pid, since ms}
--         {'busy', clear, ms the owner's lease still runs, owner pid, since ms}
step('lock', function(r, args)
  local holder, lease_ms = args[3], tonumber(args[4])
  local held = lock_of(r)
  if held[1] == holder then
    return { 'granted', 0, tonumber(held[3]) }
  end
  local first, first_until = first_waiter(r)
  if not held[1] and (not first or first == holder) then
    hold(r, true)
    if first then
      quit_queue(r, holder)
    end
    return grant(r, holder, lease_ms)
  end
  -- Taken, or free but promised to the waiter that was woken for it.
  local free_in = (held[1] and tonumber(held[2]) or first_until) - r.now
  local owner = held[4] or string.match(first, '^(.*)/')
  local since = tonumber(held[5] or r.now)
  if args[5] ~= '1' then
    return { 'busy', let_go(r), free_in, owner, since }
  end
  call('ZADD', r.waiting, r.now + WAITER_MS, holder)
  call('ZADD', r.queue, 'NX', r.micros, holder)
  call('PEXPIRE', r.queue, WAITER_MS + JANITOR_MS)
  call('PEXPIRE', r.waiting, WAITER_MS + JANITOR_MS)
  return { 'wait', let_go(r), math.min(free_in, WAITER_MS / 2), owner, since }
end)

-- unlock(pid, op, holder): release the lock, or leave its queue, and wake the next waiter.
-- answers {'released', clear} | {'lost', clear}   the lock was not the caller's (any more)
step('unlock', function(r, args)
  local holder = args[3]
  local held = lock_of(r)
  local mine = held[1] == holder
  if call('EXISTS', r.queue, r.waiting) > 0 then
    call('ZCARD', r.waiting)
    quit_queue(r, holder)
  end
  if mine then
    call('DEL', r.lock)
  end
  if mine or not held[1] then
    wake_next(r)
  end
  return { mine and 'released' or 'lost', let_go(r) }
end, true)

-- renew(pid, lease_ms, lock lease_ms, holder ...): prolong what the process still has here.
-- Repeating it is harmless: it brings nothing back that is gone.
-- answers {1 if a member, then 1 or 0 for each holder}
plain('renew', function(r, args)
  local answer = { 0 }
  if call('ZSCORE', r.members, r.pid) then
    call('ZADD', r.members, r.now + args[2], r.pid)
    answer[1] = 1
  end
  for i = 4, #args do
    local held = lock_of(r)
    local mine = held[1] == args[i]
    if mine then
      call('HSET', r.lock, 'until', r.now + args[3])
      call('PEXPIRE', r.lock, args[3] + JANITOR_MS)
    end
    answer[#answer + 1] = mine and 1 or 0
  end
  return answer
end, { 'allow-oom' })
