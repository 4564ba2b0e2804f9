-- Membership: join, leave, count. A leave ends a session and may start its batch.

local function enter(r, lease_ms)
  hold(r)
  local is_new = call('ZADD', r.members, r.now + lease_ms, r.pid) == 1
  if is_new and call('EXISTS', r.parties) == 1 then
    -- Nobody was there, so these were to expire.
    call('PERSIST', r.parties)
    call('PERSIST', r.modified)
  end
end

local function live(r)
  return call('ZCOUNT', r.members, '(' .. r.now, '+inf')
end

-- How many members are left, once those whose lease has run out are dropped: they answer for
-- nothing any more.
local function remaining(r)
  local left = call('ZCARD', r.members)
  if left > 0 then
    for _, pid in ipairs(call('ZRANGEBYSCORE', r.members, '-inf', r.now)) do
      left = left - call('ZREM', r.members, pid)
    end
  end
  return left
end

-- The batch is there; from now on it is running, and the caller's. Returns its token.
local function run(r)
  local token = next_token(r, SPARE_TOKENS)
  call('HSET', r.running, 'owner', r.pid, 'token', string.format('%d', token),
    'attempt', 0, 'since', r.now)
  return token
end

-- Move the first n of all partials into a new running batch that the caller owns.
local function start(r, n, total)
  if n >= total then
    call('RENAME', r.partials, r.batch)
  else
    for _ = 1, n do
      call('LMOVE', r.partials, r.batch, 'LEFT', 'RIGHT')
    end
  end
  return run(r)
end

-- The session's modifications as {pid, times, pid, times, ...}.
local function modifications(r)
  local counts = call('HGETALL', r.modified)
  for i = 2, #counts, 2 do
    counts[i] = tonumber(counts[i])
  end
  return counts
end

local JOINED = constant('joined')

-- join(pid, op, lease_ms [, pid, times ...]): add or renew the member. The pairs put back
-- modifications that a failed callback was about to act on.
-- answers {'joined', 0}
step('join', function(r, args)
  if #args > 3 then
    call('HLEN', r.modified)
  end
  enter(r, args[3])
  for i = 4, #args, 2 do
    call('HINCRBY', r.modified, args[i], args[i + 1])
  end
  return JOINED
end)

-- Known parties: a session that is over only when so many different processes have been in it.
-- The hash has 'n', a field '@<id>' for each process that has come, and '>' .. waiter for those
-- who wait for the others.

local function arrived(r)
  local count = 0
  for _, field in ipairs(call('HKEYS', r.parties)) do
    if string.sub(field, 1, 1) == '@' then
      count = count + 1
    end
  end
  return count
end

-- Somebody has come or gone: those who wait see whether that was all they waited for.
local function wake_parties(r)
  for _, field in ipairs(call('HKEYS', r.parties)) do
    if string.sub(field, 1, 1) == '>' then
      local key = r.base .. ':wake:' .. string.sub(field, 2)
      if type(redis.pcall('RPUSH', key, '1')) == 'number' then
        call('PEXPIRE', key, 10000)
      end
    end
  end
end

-- All members have left. Is somebody still to come? Then what there is waits for so long.
local function is_incomplete(r, lease_ms)
  if call('EXISTS', r.parties) == 0 then
    return false
  end
  wake_parties(r)
  if arrived(r) >= tonumber(call('HGET', r.parties, 'n') or 0) then
    call('DEL', r.parties)
    return false
  end
  call('PEXPIRE', r.parties, lease_ms)
  call('PEXPIRE', r.modified, lease_ms)
  return true
end

local MET = constant('met')

-- meet(pid, op, lease_ms, parties): join a session of known parties. The greatest number counts.
-- answers {'met', 0}
step('meet', function(r, args)
  call('HLEN', r.modified)
  local parties = math.max(tonumber(args[4]), tonumber(call('HGET', r.parties, 'n') or 0))
  enter(r, args[3])
  call('HSET', r.parties, 'n', parties, '@' .. r.pid, 1)
  wake_parties(r)
  return MET
end)

-- meeting(pid, waiter): answers {parties, processes that have come, members left, 1 if this
-- one is among them}. A waiter is told when one of these changes.
plain('meeting', function(r, args)
  local known = tonumber(call('HGET', r.parties, 'n') or 0)
  if known > 0 then
    call('HSET', r.parties, '>' .. args[2], 1)
  end
  return { known, arrived(r), live(r), call('ZSCORE', r.members, r.pid) and 1 or 0 }
end)

-- The session of one process that has stored nothing before: its partial is the batch. Of all this
-- nothing exists yet, and a member is in its registry.
local function leave_alone(r, partial)
  call('DEL', r.members)
  call('RPUSH', r.batch, partial)
  return { 'run', 0, run(r), 0, 1, { r.pid, 1 } }, { partial }
end

-- leave(pid, op, force, lease_ms, partial or ''): store the last partial, drop this member and
-- the expired ones. If nobody is left, or force is '1', the session's partials become a batch.
-- answers {'held', clear, 0, members left, was member [, partials]}   as append: it is time to merge
--         {'last', clear, 0, members left, was member, modifications}       nothing to execute
--         {'deferred', ... as last [, partials]}    a batch is running: its owner goes on with these
--         {'run', clear, token, members left, was member, modifications, attempt, count, partials}
step('leave', function(r, args)
  local force, partial = args[3] == '1', args[5]
  local running, total, modified, parties, many = false, 0, {}, 0, nil
  -- Most often there is nothing but members, and one look tells.
  local bare = call('EXISTS', r.partials, r.running, r.lock, r.sharers, r.modified, r.parties,
    r.batch) == 0
  if bare and partial ~= '' then
    local members = call('ZRANGE', r.members, 0, 1)
    if #members == 1 and members[1] == r.pid then
      return leave_alone(r, partial)
    end
    bare = false
  end
  if not bare then
    running = call('HGET', r.running, 'token')
    total = call('LLEN', r.partials)
    modified = modifications(r)
    parties = call('HLEN', r.parties)
    if not running and (total > 0 or partial ~= '') then
      if call('EXISTS', r.batch) == 1 then
        -- Never rename over it: whatever it is, somebody stored it.
        return redis.error_reply('PHONONSTATE ' .. r.batch .. ' exists although nothing is running')
      end
      hold(r)
    end
    if partial ~= '' then
      enter(r, args[4])
      total = call('RPUSH', r.partials, partial)
      call('HINCRBY', r.modified, r.pid, 1)
      modified = modifications(r)
      many = total % COMPACT_AT == 0 and total or nil
    end
  end
  local was_member = call('ZREM', r.members, r.pid)
  local left = remaining(r)
  if left > 0 and not force then
    if parties > 0 then
      wake_parties(r)
    end
    return { 'held', let_go(r, bare), 0, left, was_member, many }
  end
  if left == 0 and parties > 0 and is_incomplete(r, args[4]) then
    -- Whoever comes last will be the last. What is stored does not wait for that.
    was_member = 0
  elseif left == 0 and #modified > 0 then
    call('DEL', r.modified)
  end
  if total == 0 then
    return { 'last', let_go(r, bare), 0, left, was_member, modified }
  end
  if running then
    -- Batches run one after the other: the running one's owner takes these when it is done.
    call('HSET', r.running, 'due', total)
    return { 'deferred', let_go(r), 0, left, was_member, modified, many }
  end
  return { 'run', 0, start(r, total, total), left, was_member, modified }
end, true)

local COUNTED = constant('counted')

-- modify(pid, op, lease_ms, times): count modifications by this process, which is or becomes a
-- member: a count without a member would stay for ever.
-- answers {'counted', 0}
step('modify', function(r, args)
  call('HLEN', r.modified)
  enter(r, args[3])
  call('HINCRBY', r.modified, r.pid, args[4])
  return COUNTED
end)

-- count(): answers the number of live members
plain('count', live, { 'no-writes' })

-- members(): answers the ids of the live ones
plain('members', function(r)
  return call('ZRANGEBYSCORE', r.members, '(' .. r.now, '+inf')
end, { 'no-writes' })

-- modified(): answers {pid, times, ...}
plain('modified', modifications, { 'no-writes' })
