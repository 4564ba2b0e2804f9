-- Membership: join, modify, meet, leave. A leave may end the session and start its batch.

-- join(resource): answers JOINED
operation(JOIN, 2, function(c, o, i)
  local resource = o[i + 1]
  if call('HSETNX', c.T .. 'members:' .. resource, c.pid, 0) == 1 then
    track_member(c, resource)
  end
  return JOINED
end)

-- modify(resource, times): count modifications by the caller, which is or becomes a member.
-- answers JOINED
operation(MODIFY, 3, function(c, o, i)
  local resource = o[i + 1]
  call('HINCRBY', c.T .. 'members:' .. resource, c.pid, o[i + 2])
  track_member(c, resource)
  return JOINED
end)

-- restore(resource, {process, times, ...}): be a member again after a failed callback, with the
-- modifications of the session that had ended. answers JOINED
operation(RESTORE, 3, function(c, o, i)
  local resource, times = o[i + 1], o[i + 2]
  local members, left = c.T .. 'members:' .. resource, c.T .. 'left:' .. resource
  call('HLEN', left)
  call('HSETNX', members, c.pid, 0)
  for j = 1, #times, 2 do
    if times[j] == c.pid then
      call('HINCRBY', members, c.pid, times[j + 1])
    else
      call('HINCRBY', left, times[j], times[j + 1])
    end
  end
  track_member(c, resource)
  return JOINED
end)

-- Known parties: a session that ends only after so many different processes have been in it. The
-- hash has 'n', a field '@<first id>' for each process that has come, and a field '><waiter>' for
-- each waiter.

local function arrived(parties)
  local count = 0
  for _, field in ipairs(call('HKEYS', parties)) do
    if string.sub(field, 1, 1) == '@' then
      count = count + 1
    end
  end
  return count
end

-- A party has come or gone: each waiter checks if it still has to wait.
local function wake_parties(T, parties)
  for _, field in ipairs(call('HKEYS', parties)) do
    if string.sub(field, 1, 1) == '>' then
      send_mail(T, string.sub(field, 2))
    end
  end
end

-- All members have left. If a party is still to come, the session is not over. Its data about parties
-- expires only if no process comes for a week.
local function is_incomplete(c, resource)
  local parties = c.T .. 'parties:' .. resource
  if call('EXISTS', parties) == 0 then
    return false
  end
  wake_parties(c.T, parties)
  if arrived(parties) >= tonumber(call('HGET', parties, 'n') or 0) then
    call('DEL', parties)
    return false
  end
  call('PEXPIRE', parties, WEEK_MS)
  call('PEXPIRE', c.T .. 'left:' .. resource, WEEK_MS)
  return true
end

-- meet(resource, parties, first id): join a session of known parties; the greatest number counts.
-- answers JOINED
operation(MEET, 4, function(c, o, i)
  local resource = o[i + 1]
  local parties, left = c.T .. 'parties:' .. resource, c.T .. 'left:' .. resource
  local known = tonumber(call('HGET', parties, 'n') or 0)
  call('HLEN', left)
  if call('HSETNX', c.T .. 'members:' .. resource, c.pid, 0) == 1 then
    track_member(c, resource)
  end
  call('HSET', parties, 'n', math.max(o[i + 2], known), '@' .. o[i + 3], 1)
  call('PERSIST', parties)
  call('PERSIST', left)
  wake_parties(c.T, parties)
  return JOINED
end)

-- await(resource, waiter): ask for mail when a party comes or goes.
-- answers { MEETING, parties, those that have come, members, 1 if the caller is one of them }
operation(AWAIT, 3, function(c, o, i)
  local resource = o[i + 1]
  local parties, members = c.T .. 'parties:' .. resource, c.T .. 'members:' .. resource
  local known = tonumber(call('HGET', parties, 'n') or 0)
  local answer = { MEETING, known, arrived(parties), call('HLEN', members),
    call('HEXISTS', members, c.pid) }
  if known > 0 then
    call('HSET', parties, '>' .. o[i + 2], 1)
  end
  return answer
end)

-- forget(resource, waiter): the waiter waits no more. answers JOINED
operation(FORGET, 3, function(c, o, i)
  call('HDEL', c.T .. 'parties:' .. o[i + 1], '>' .. o[i + 2])
  return JOINED
end)

-- The first `due` of all partials become the running batch, which is the caller's.
local function start(c, resource, due, total)
  local T = c.T
  local batch, partials = T .. 'batch:' .. resource, T .. 'partials:' .. resource
  call('RENAME', partials, batch)
  if due < total then
    local rest = call('LRANGE', batch, due, -1)
    call('LTRIM', batch, 0, due - 1)
    for j = 1, #rest, MOST_VALUES do
      call('RPUSH', partials, unpack(rest, j, math.min(j + MOST_VALUES - 1, #rest)))
    end
  end
  local token = next_token(c)
  call('HSET', T .. 'running:' .. resource, 'owner', c.pid, 'token', fmt(token),
    'since', ms_text(c))
  track(c, resource, BATCH)
  return token
end

local FORCED, MODIFICATIONS = 1, 2

-- The session's modifications, the caller's included, as { process, times, ... }.
local function modifications(left, pid, count)
  local times = call('HGETALL', left)
  for j = 2, #times, 2 do
    times[j] = tonumber(times[j])
  end
  if count > 0 then
    for j = 1, #times, 2 do
      if times[j] == pid then
        times[j + 1] = times[j + 1] + count
        return times
      end
    end
    times[#times + 1] = pid
    times[#times + 1] = count
  end
  return times
end

-- leave(resource, flags, last partial or ''): flag 1 starts a batch although others are members;
-- flag 2 asks for the session's modifications.
-- answers { HELD, members left, 0, partials if it is time to merge some, or 0 }
--         { LAST, members left, 1 if the caller is told that it is the last [, modifications] }
--         { DEFERRED, as LAST [, false if there are none, partials if it is time to merge some] }
--         a batch is running: its owner goes on with this session's
--         { RUN, left, last, token, partials, attempts, crashes [, modifications] }, content: true if
--         that is only the partial that the caller has sent with this leave
operation(LEAVE, 4, function(c, o, i)
  local resource, flags, partial = o[i + 1], o[i + 2], o[i + 3]
  local T, pid = c.T, c.pid
  local members, partials = T .. 'members:' .. resource, T .. 'partials:' .. resource
  local running, left, batch = T .. 'running:' .. resource, T .. 'left:' .. resource, T .. 'batch:' .. resource
  local count = call('HLEN', members)
  if count == 1 and flags == 0 then
    -- The most frequent case: a session of one process, with no keys but its partials.
    local there = call('EXISTS', partials, running, left, batch, T .. 'lock:' .. resource,
      T .. 'queue:' .. resource, T .. 'parties:' .. resource)
    local total = there == 1 and call('LLEN', partials) or 0
    local alone = there == 0 or total > 0
    if alone and (total > 0 or partial ~= '') then
      last_token(c) -- proves its type
    end
    if alone and call('HDEL', members, pid) == 1 then
      local content
      if total > 0 then
        if partial ~= '' then
          total = call('RPUSH', partials, partial)
        end
        call('RENAME', partials, batch)
      elseif partial ~= '' then
        total = call('RPUSH', batch, partial)
        content = true
      else
        untrack(c, resource)
        return { LAST, 0, 1 }
      end
      local token = next_token(c)
      call('HSET', running, 'owner', pid, 'token', fmt(token), 'since', ms_text(c))
      track(c, resource, BATCH)
      return { RUN, 0, 1, token, total, 0, 0 }, content
    end
  end
  local force, wanted = flags % 2 == FORCED, flags >= MODIFICATIONS
  local total = call('LLEN', partials)
  local owner = call('HGET', running, 'owner')
  local times = call('HGET', members, pid)
  local known = call('HLEN', T .. 'parties:' .. resource)
  call('HLEN', left)
  if not owner and call('EXISTS', batch) == 1 then
    -- Never rename over a key that exists: its data would be lost.
    state_error(batch, 'exists although nothing is running')
  end
  local was_member = times or partial ~= ''
  local mine = tonumber(times or 0)
  if not owner and (force or count == (times and 1 or 0)) and (total > 0 or partial ~= '') then
    last_token(c)
  end
  if times then
    call('HDEL', members, pid)
    count = count - 1
  end
  local many = 0
  if partial ~= '' then
    total = call('RPUSH', partials, partial)
    mine = mine + 1
    many = total % COMPACT_AT == 0 and total or 0
  end
  local answer = { LAST, count, 0 }
  if count > 0 then
    if mine > 0 then
      call('HINCRBY', left, pid, mine)
    end
    if known > 0 then
      wake_parties(T, T .. 'parties:' .. resource)
    end
    if not force then
      settle(c, resource, owner)
      return { HELD, count, 0, many }
    end
    if wanted then
      answer[4] = modifications(left, pid, 0)
    end
  else
    if known > 0 then
      if mine > 0 then
        call('HINCRBY', left, pid, mine)
        mine = 0
      end
      if is_incomplete(c, resource) then
        was_member = false -- a party that is still to come will be the last one
      end
    end
    if was_member then
      if wanted then
        answer[4] = modifications(left, pid, mine)
      end
      call('DEL', left)
      answer[3] = 1
    end
  end
  if total == 0 then
    settle(c, resource, owner)
    return answer
  end
  if owner then
    call('HSET', running, 'due', total)
    settle(c, resource, owner)
    answer[1] = DEFERRED
    if many > 0 then
      answer[4], answer[5] = answer[4] or false, many
    end
    return answer
  end
  return { RUN, count, answer[3], start(c, resource, total, total), total, 0, 0, answer[4] }
end)

-- The registry with the changes of this call, which are not written yet.
local function is_tracked(c, resource)
  local class = c.registry[resource]
  if class == nil then
    return call('ZSCORE', c.T .. 'registry:' .. c.pid, resource)
  end
  return class
end

-- track(resource): enter a resource into the caller's registry. answers 1 if it is new there
operation(TRACK, 2, function(c, o, i)
  local resource = o[i + 1]
  if is_tracked(c, resource) then
    return 0
  end
  track_member(c, resource)
  return 1
end)

-- untrack(resource): the reverse. answers 1 if it was there
operation(UNTRACK, 2, function(c, o, i)
  local resource = o[i + 1]
  if is_tracked(c, resource) then
    untrack(c, resource)
    return 1
  end
  return 0
end)

-- count(resource): the number of members
read('count', function(T, args)
  return call('HLEN', T .. 'members:' .. args[1])
end)

-- members(resource): { process, since ms, ... }; since is 0 where it is not known
read('members', function(T, args)
  local answer = {}
  for _, pid in ipairs(call('HKEYS', T .. 'members:' .. args[1])) do
    local score = tonumber(call('ZSCORE', T .. 'registry:' .. pid, args[1]) or 0)
    if score >= BATCH_SCORE then
      score = score < LEFT_SCORE and score - BATCH_SCORE or 0
    end
    answer[#answer + 1] = pid
    answer[#answer + 1] = math.abs(score)
  end
  return answer
end)

-- modified(resource): { process, times, ... } of members and of those that have left the session
read('modified', function(T, args)
  local answer = {}
  for _, key in ipairs({ 'members:', 'left:' }) do
    for _, value in ipairs(call('HGETALL', T .. key .. args[1])) do
      answer[#answer + 1] = value
    end
  end
  return answer
end)

-- registry(process, first, last): a page of the resources that a process may be responsible for
read('registry', function(T, args)
  return call('ZRANGE', T .. 'registry:' .. args[1], args[2], args[3])
end)
