-- For operators: the content of a partition, in pages, and the few acts that change it by hand.
-- Reads are bounded in work, not only in number: a page ends after so many commands, wherever it is.
-- An act is logged in a capped stream, in the same step.

-- In a scope of its own: a chunk of Lua has 200 local variables at the most.
do

-- Commands that a page may cost, about 1 ms of the server's time.
local WORK = 600
-- Members, sharers or waiters that are looked at one by one.
local FEW = 64
-- Acts that are remembered, in each partition.
local MOST_ACTS = 1000

-- Compare members as the server orders those of one score: is a behind b? Lua's own comparison
-- follows the server's locale.
local function is_behind(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then
      return x > y
    end
  end
  return #a > #b
end

-- The rank of the first entry behind (score, member), which may have been removed itself.
local function rank_behind(registry, score, member)
  local low = call('ZCOUNT', registry, '-inf', '(' .. score)
  local high = low + call('ZCOUNT', registry, score, score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_behind(call('ZRANGE', registry, middle, middle)[1], member) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

local function is_wanted(resource, prefix)
  return prefix == '' or string.sub(resource, 1, #prefix) == prefix
end

-- A page of a registry. args: process, score and member of the last entry ('' at first), most
-- entries to answer, prefix of the resources. visit(resource, score, found) adds to found and
-- answers how many commands that took; nil: the rest below running batches is of no interest.
-- answers { score, member, found }: where to go on, '' at the end
local function walk(T, args, visit)
  local registry, most, prefix = T .. 'registry:' .. args[1], tonumber(args[4]), args[5]
  local at = args[2] == '' and 0 or rank_behind(registry, args[2], args[3])
  local work, found, count = 0, {}, 0
  while true do
    local page = call('ZRANGE', registry, at, at + 99, 'WITHSCORES')
    local jump = false
    for j = 1, #page, 2 do
      local before = #found
      local ok, cost = true, 0
      if is_wanted(page[j], prefix) then
        ok, cost = pcall(visit, page[j], tonumber(page[j + 1]), found)
      end
      if not ok then
        cost = 5 -- a key of a foreign type: it must not hide the others
      elseif not cost then
        jump = true
        break
      end
      work = work + 0.1 + cost
      if #found > before then
        count = count + 1
      end
      if work >= WORK or count >= most then
        return { page[j + 1], page[j], found }
      end
    end
    if jump then
      at = call('ZCOUNT', registry, '-inf', '(' .. fmt(BATCH_SCORE))
    elseif #page < 200 then
      return { '', '', found }
    else
      at = at + 100
    end
    work = work + 2
  end
end

-- The process whose entry stands for a thing that several processes have, the same in each listing.
local function first_of(names)
  local first = names[1]
  for _, name in ipairs(names) do
    if is_behind(first, name) then
      first = name
    end
  end
  return first
end

local function since_of(score)
  if score >= BATCH_SCORE then
    return score < LEFT_SCORE and score - BATCH_SCORE or 0
  end
  return math.abs(score)
end

local function bytes_of(key)
  local bytes = redis.pcall('MEMORY', 'USAGE', key)
  return type(bytes) == 'number' and bytes or -1
end

local function add(found, ...)
  for _, value in ipairs({ ... }) do
    found[#found + 1] = value
  end
end

-- admin_owners(): { { process with a lane here, ... }, { class queue, ... } }
read('admin_owners', function(T)
  return { call('SMEMBERS', T .. 'lanes'), call('SMEMBERS', T .. 'handed') }
end)

-- admin_roster(cursor): a page of the processes.
-- answers { now us, partitions or '', next cursor, { process, deadline us, card, report, ... } }
read('admin_roster', function(N, args)
  local scan = call('ZSCAN', N .. 'processes', args[1], 'COUNT', 50)
  local found = {}
  for j = 1, #scan[2], 2 do
    local pid = scan[2][j]
    add(found, pid, scan[2][j + 1], call('HGET', N .. 'cards', pid) or '',
      call('HGET', N .. 'reports', pid) or '')
  end
  return { micros(), call('GET', N .. 'partitions') or '', scan[1], found }
end)

-- admin_holdings(process, ...): for each process the counts of what it may be responsible for here:
-- { locks, memberships, batches, left to others, oldest membership ms or 0, oldest batch ms or 0,
--   calls, 1 if fenced, ... }
read('admin_holdings', function(T, args)
  local answer = {}
  for _, pid in ipairs(args) do
    local registry = T .. 'registry:' .. pid
    local batch, left = fmt(BATCH_SCORE), fmt(LEFT_SCORE)
    local member = call('ZRANGEBYSCORE', registry, 0, '(' .. batch, 'WITHSCORES', 'LIMIT', 0, 1)
    local running = call('ZRANGEBYSCORE', registry, batch, '(' .. left, 'WITHSCORES', 'LIMIT', 0, 1)
    local _, fenced, _, sequence = lane_of(T .. 'lane:' .. pid)
    add(answer, call('ZCOUNT', registry, '-inf', '(0'), call('ZCOUNT', registry, 0, '(' .. batch),
      call('ZCOUNT', registry, batch, '(' .. left), call('ZCOUNT', registry, left, '+inf'),
      tonumber(member[2] or 0), running[2] and tonumber(running[2]) - BATCH_SCORE or 0,
      sequence or 0, fenced and 1 or 0)
  end
  return answer
end)

-- admin_sessions(process, score, member, most, prefix, began before ms or ''): open sessions.
-- answers walk's, with { { resource, since ms, members, modifications or -1, partials, bytes or -1,
-- 1 if other processes' pages may have it too }, ... }
read('admin_sessions', function(T, args)
  local pid, before = args[1], tonumber(args[6])
  return walk(T, args, function(resource, score, found)
    if before and score > before and score < BATCH_SCORE then
      return nil -- those behind are younger
    end
    local members, left = T .. 'members:' .. resource, T .. 'left:' .. resource
    if call('HEXISTS', members, pid) == 0 then
      return 1
    end
    local count = call('HLEN', members)
    local since, modifications, cost = since_of(score), -1, 7
    if count <= FEW then
      local all, names = call('HGETALL', members), {}
      modifications = 0
      for j = 1, #all, 2 do
        names[#names + 1] = all[j]
        modifications = modifications + all[j + 1]
      end
      if count > 1 then
        if first_of(names) ~= pid then
          return 3 + count / 8
        end
        for _, name in ipairs(names) do
          local theirs = tonumber(call('ZSCORE', T .. 'registry:' .. name, resource) or nil)
          if theirs and since_of(theirs) > 0 then
            since = math.min(since, since_of(theirs))
          end
        end
        cost = cost + count
      end
      if call('HLEN', left) <= FEW then
        for _, times in ipairs(call('HVALS', left)) do
          modifications = modifications + times
        end
      end
    end
    if before and since > before then
      return cost
    end
    local partials = T .. 'partials:' .. resource
    add(found, { resource, since, count, modifications, call('LLEN', partials),
      call('EXISTS', partials) == 1 and bytes_of(partials) or 0, count > FEW and 1 or 0 })
    return cost
  end)
end)

-- admin_locks(process, score, member, most, prefix): locks that are held or waited for.
-- answers walk's, with { { resource, { holder, token, since ms, ms left of its own lease or -1, thread,
-- ... }, holders, { waiter, ... }, waiters, 1 if other processes' pages may have it too }, ... }
read('admin_locks', function(T, args)
  local pid, at = args[1], math.floor(micros() / 1000)
  return walk(T, args, function(resource, score, found)
    if score >= 0 and score < BATCH_SCORE then
      return nil
    end
    local lock, queue = T .. 'lock:' .. resource, T .. 'queue:' .. resource
    local holding, waiting = call('HLEN', lock), call('ZCARD', queue)
    local waiters = call('ZRANGE', queue, 0, 15)
    local found_there = holding <= FEW and call('HGETALL', lock) or {}
    local cost, many, speaker = 5, holding > FEW, nil
    if holding > 0 and not many then
      local names = {}
      for j = 1, #found_there, 2 do
        names[#names + 1] = process_of(found_there[j])
      end
      speaker = first_of(names)
    elseif waiting > 0 then
      speaker = process_of(waiters[1])
    elseif not many then
      return cost
    end
    if speaker ~= pid and not many then
      return cost
    end
    local holders = {}
    for j = 1, math.min(#found_there, 32), 2 do
      local holder, token, since, thread = found_there[j], parts_of(found_there[j + 1])
      local till = tonumber(call('ZSCORE', T .. 'leases:' .. resource, holder) or nil)
      add(holders, holder, token, since, till and math.max(0, till - at) or -1, thread)
    end
    add(found, { resource, holders, holding, waiters, waiting, many and 1 or 0 })
    return cost + #holders / 5
  end)
end)

-- admin_batches(process or class queue, score, member, most, prefix): its batches.
-- answers walk's, with { { resource, token or '0' where a session waits for a survivor, since ms,
-- attempts, error, retry at ms or 0, crashes, due, partials, bytes or -1 }, ... }
read('admin_batches', function(T, args)
  local pid = args[1]
  local is_queue = string.sub(pid, 1, 6) == 'class:'
  return walk(T, args, function(resource, score, found)
    if not is_queue and score < BATCH_SCORE then
      return nil
    end
    local run = call('HMGET', T .. 'running:' .. resource, 'owner', 'token', 'since', 'attempt', 'error',
      'retry_at', 'crashes', 'due')
    local list = 'batch:'
    if run[1] ~= pid then
      if run[1] or score < LEFT_SCORE or call('EXISTS', T .. 'partials:' .. resource) == 0 then
        return 2
      end
      list = 'partials:'
    end
    add(found, { resource, run[2] or '0', tonumber(run[3] or 0), tonumber(run[4] or 0), run[5] or '',
      tonumber(run[6] or 0), tonumber(run[7] or 0), tonumber(run[8] or 0),
      call('LLEN', T .. list .. resource), bytes_of(T .. list .. resource) })
    return 4
  end)
end)

-- Entries of a resource's dead letters: { token, entry, partials, bytes or -1, ... }
local function letters(T, resource, pairs_, found)
  for j = 1, #pairs_, 2 do
    local dead = T .. 'dead:' .. pairs_[j] .. ':' .. resource
    add(found, pairs_[j], pairs_[j + 1], call('LLEN', dead), bytes_of(dead))
  end
  return found
end

-- admin_parked(cursor, prefix): a page of the resources with dead letters.
-- answers { next cursor, { resource, { entries }, cursor for the rest of them or '0', ... } }
read('admin_parked', function(T, args)
  local scan = call('SSCAN', T .. 'parked', args[1], 'COUNT', 20)
  local found, bytes = {}, 0
  for _, resource in ipairs(scan[2]) do
    if is_wanted(resource, args[2]) then
      if call('HLEN', T .. 'parked:' .. resource) > FEW or bytes > PIECE_BYTES / 4 then
        add(found, resource, {}, 'more')
      else
        local entries = call('HGETALL', T .. 'parked:' .. resource)
        for _, text in ipairs(entries) do
          bytes = bytes + #text
        end
        add(found, resource, letters(T, resource, entries, {}), '0')
      end
    end
  end
  return { scan[1], found }
end)

-- admin_letters(resource, cursor): a page of one resource's dead letters.
-- answers { next cursor, { entries } }
read('admin_letters', function(T, args)
  local scan = call('HSCAN', T .. 'parked:' .. args[1], args[2], 'COUNT', 50)
  return { scan[1], letters(T, args[1], scan[2], {}) }
end)

-- admin_resource(resource): { { owner, token, since ms, attempts, error, retry at ms, crashes, due },
-- partials of the open session, partials of the batch, parties }
read('admin_resource', function(T, args)
  local r = args[1]
  local run = call('HMGET', T .. 'running:' .. r, 'owner', 'token', 'since', 'attempt', 'error',
    'retry_at', 'crashes', 'due')
  for j = 1, 8 do
    run[j] = run[j] or ''
  end
  return { run, call('LLEN', T .. 'partials:' .. r), call('LLEN', T .. 'batch:' .. r),
    tonumber(call('HGET', T .. 'parties:' .. r, 'n') or 0) }
end)

-- admin_content(kind, resource, first, last): partials: of the kind 'partials', 'batch', or 'dead:<token>'
read('admin_content', function(T, args)
  return (add_piece(T .. args[1] .. ':' .. args[2], {}, tonumber(args[3]), tonumber(args[4])))
end)

-- admin_acts(most): the last acts, newest first: { { id, { field, value, ... } }, ... }
read('admin_acts', function(T, args)
  return call('XREVRANGE', T .. 'acts', '+', '-', 'COUNT', args[1])
end)

-- Log an act: who did what to which resource.
local function record(T, who, act, resource, token, detail)
  call('XADD', T .. 'acts', 'MAXLEN', '~', MOST_ACTS, '*', 'who', who, 'act', act,
    'resource', resource, 'token', token, 'detail', detail)
end

-- admin_replay(resource, token, class queue, who): take a parked batch up again, by a process that
-- knows its class. answers { 'replayed', new token } | { 'running' } | { 'missing' }
plain('admin_replay', function(T, args)
  local resource, token, queue, who = args[1], args[2], args[3], args[4]
  local dead, batch = T .. 'dead:' .. token .. ':' .. resource, T .. 'batch:' .. resource
  local running, c = T .. 'running:' .. resource, { T = T }
  if call('LLEN', dead) == 0 or call('HEXISTS', T .. 'parked:' .. resource, token) == 0 then
    return { 'missing' }
  end
  call('SCARD', T .. 'parked')
  call('SCARD', T .. 'handed')
  call('ZCARD', T .. 'registry:' .. queue)
  call('XLEN', T .. 'acts')
  if call('EXISTS', running, batch) > 0 then
    return { 'running' }
  end
  local new = fmt(next_token(c))
  store_token(c)
  call('RENAME', dead, batch)
  unpark(T, resource, token)
  call('HSET', running, 'owner', queue, 'token', new, 'since', fmt(now_ms(c)))
  call('ZADD', T .. 'registry:' .. queue, fmt(now_ms(c)), resource)
  call('SADD', T .. 'handed', queue)
  record(T, who, 'replay', resource, token, new)
  return { 'replayed', new }
end)

-- admin_discard(resource, token, who): delete a parked batch. answers { 'discarded', partials } |
-- { 'missing' }
plain('admin_discard', function(T, args)
  local resource, token = args[1], args[2]
  local dead = T .. 'dead:' .. token .. ':' .. resource
  call('SCARD', T .. 'parked')
  call('XLEN', T .. 'acts')
  if call('HEXISTS', T .. 'parked:' .. resource, token) == 0 then
    return { 'missing' }
  end
  local size = call('LLEN', dead)
  call('DEL', dead)
  unpark(T, resource, token)
  record(T, args[3], 'discard', resource, token, size)
  return { 'discarded', size }
end)

-- admin_unlock(resource, token, who): break a lock that still has that token, and wake the next.
-- answers { 'broken', holder } | { 'missing' }
plain('admin_unlock', function(T, args)
  local resource, token, who = args[1], args[2], args[3]
  local holder
  local holders = call('HGETALL', T .. 'lock:' .. resource)
  for j = 1, #holders, 2 do
    if string.match(holders[j + 1], '^(%d+) ') == token then
      holder = holders[j]
    end
  end
  if not holder then
    return { 'missing' }
  end
  local c = { T = T, pid = process_of(holder), registry = {} }
  local registry = T .. 'registry:' .. c.pid
  look_at_lock(c, resource)
  call('ZCARD', registry)
  call('XLEN', T .. 'acts')
  free(c, resource, holder)
  local held, _, sharers = look_at_lock(c, resource)
  wake_next(c, resource, held, sharers)
  settle(c, resource)
  write_registry(c, registry)
  record(T, who, 'unlock', resource, token, holder)
  return { 'broken', holder }
end)

-- admin_expire(process, who): mark a process as dead. answers 'expired' | 'dead' | 'missing'
plain('admin_expire', function(N, args)
  local score = call('ZSCORE', N .. 'processes', args[1])
  call('XLEN', N .. 'acts')
  if not score then
    return 'missing'
  end
  if tonumber(score) == 0 then
    return 'dead'
  end
  call('ZADD', N .. 'processes', 'XX', 0, args[1])
  record(N, args[2], 'expire', args[1], '', '')
  return 'expired'
end)

end
