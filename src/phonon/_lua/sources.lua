-- Sources of messages: ordered ones with positions, unordered ones with ids. Data and the books about
-- it are written by one operation, so a crash never comes between the two.

TYPES.source = 'hash'

-- Ids are kept in sets by time, each for half of the window, so that a whole set expires at once.
local SHARES = 2

-- claim(source, epoch or 0, position or ''): become the only reader of an ordered source here.
-- Epoch 0 asks for a new epoch, which the caller names in the other partitions, so that all claims have
-- one order. A position moves the source there; '' keeps it.
-- answers { CLAIMED, epoch, position } | { REFUSED, epoch of the later claim, position }
operation(CLAIM, 4, function(c, o, i)
  local source, epoch, position = c.T .. 'source:' .. o[i + 1], o[i + 2], o[i + 3]
  local known = call('HMGET', source, 'epoch', 'position')
  local last = tonumber(known[1] or 0)
  if epoch == 0 then
    epoch = math.max(next_token(c), last + 1)
  elseif epoch < last then
    return { REFUSED, last, known[2] or '' }
  end
  if position == '' then
    position = known[2] or ''
    call('HSET', source, 'epoch', fmt(epoch))
  else
    call('HSET', source, 'epoch', fmt(epoch), 'position', position)
  end
  return { CLAIMED, epoch, position }
end)

-- drop source(source, epoch): forget where an ordered source is.
-- answers { CLAIMED, epoch, '' } | { REFUSED, epoch, position }
operation(DROP_SOURCE, 3, function(c, o, i)
  local source, epoch = c.T .. 'source:' .. o[i + 1], o[i + 2]
  local known = call('HMGET', source, 'epoch', 'position')
  if tonumber(known[1] or 0) > epoch then
    return { REFUSED, tonumber(known[1]), known[2] or '' }
  end
  call('DEL', source)
  return { CLAIMED, epoch, '' }
end)

-- Put a partial aside whose resource has a key of a foreign type. Its message counts as taken all the
-- same: refusing it would hold up all messages behind it.
local function put_aside(c, resource, partial, problem)
  local T, token = c.T, next_token(c)
  local text = text_of(problem, T, { resource })
  call('RPUSH', T .. 'dead:' .. fmt(token) .. ':' .. resource, partial)
  redis.pcall('HSET', T .. 'parked:' .. resource, fmt(token), cmsgpack.pack({
    error = text, attempts = 0, owner = c.pid, since = now_ms(c), at = now_ms(c),
  }))
  redis.pcall('SADD', T .. 'parked', resource)
  return text
end

-- Append many partials: resource, partial, resource, ... Nothing is raised from here on.
-- answers INGESTED | { INGESTED, { place, partials, ... } of those with some to merge, { place, error, ... } }
local function append_all(c, items)
  local T, pid, many, wrong = c.T, c.pid, {}, {}
  for j = 1, #items, 2 do
    local resource, partial = items[j], items[j + 1]
    local partials = T .. 'partials:' .. resource
    local total = redis.pcall('RPUSH', partials, partial)
    local times = total
    if type(total) == 'number' then
      times = redis.pcall('HINCRBY', T .. 'members:' .. resource, pid, 1)
      if type(times) ~= 'number' then
        call('RPOP', partials)
      end
    end
    if type(times) ~= 'number' then
      wrong[#wrong + 1] = (j - 1) / 2
      wrong[#wrong + 1] = put_aside(c, resource, partial, times)
    else
      if times == 1 then
        track_member(c, resource)
      end
      if total % COMPACT_AT == 0 then
        many[#many + 1] = (j - 1) / 2
        many[#many + 1] = total
      end
    end
  end
  if #many + #wrong == 0 then
    return INGESTED
  end
  return { INGESTED, many, wrong }
end

-- ingest(source, epoch, position, next position, items): append the items of an ordered source from one
-- position to the next, if the source is at the first position and has not been claimed since. After a
-- refused ingest the next one is refused as well, so no message is ever skipped.
-- answers as append_all | { REFUSED, epoch, position }, and nothing is stored
operation(INGEST, 6, function(c, o, i)
  local source = c.T .. 'source:' .. o[i + 1]
  local known = call('HMGET', source, 'epoch', 'position')
  local epoch, position = tonumber(known[1] or 0), known[2] or ''
  if epoch ~= o[i + 2] or position ~= o[i + 3] then
    return { REFUSED, epoch, position }
  end
  last_token(c)
  call('HSET', source, 'position', o[i + 4])
  return append_all(c, o[i + 5])
end)

-- ingest new(scope, window ms, ids, items): append the items of messages with these ids, unless one of
-- them was stored before. A partial may be merged from several messages, so it is all or none.
-- answers as append_all | { SEEN, ids that were stored before }, and nothing is stored
operation(INGEST_NEW, 5, function(c, o, i)
  local ids = o[i + 3]
  local share = math.ceil(o[i + 2] / SHARES)
  local latest = math.floor(now_ms(c) / share)
  local prefix = c.T .. 'ids:' .. fmt(share) .. '.'
  local seen = {}
  -- Look into the next share too: a replica that was promoted may have a clock that is behind.
  for n = latest - SHARES, latest + 1 do
    local set = prefix .. fmt(n) .. ':' .. o[i + 1]
    if call('EXISTS', set) == 1 then
      for j = 1, #ids, MOST_VALUES do
        local last = math.min(j + MOST_VALUES - 1, #ids)
        for k, found in ipairs(call('SMISMEMBER', set, unpack(ids, j, last))) do
          if found == 1 then
            seen[#seen + 1] = ids[j + k - 1]
          end
        end
      end
    end
  end
  if #seen > 0 then
    return { SEEN, seen }
  end
  last_token(c)
  local set = prefix .. fmt(latest) .. ':' .. o[i + 1]
  for j = 1, #ids, MOST_VALUES do
    call('SADD', set, unpack(ids, j, math.min(j + MOST_VALUES - 1, #ids)))
  end
  call('PEXPIRE', set, fmt((SHARES + 2) * share))
  return append_all(c, o[i + 4])
end)

-- source(name): where an ordered source is. answers { epoch, position }, false where there is none
read('source', function(T, args)
  return call('HMGET', T .. 'source:' .. args[1], 'epoch', 'position')
end)
