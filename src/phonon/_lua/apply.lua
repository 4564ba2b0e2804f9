-- One call of a lane: replay detection, then the operations in turn, then the books.
--
-- apply(T, process, stamp of the answer before, '<number of the lane> <sequence> <digest>', operations)
-- answers { packed answers, stamp [, packed contents of those that are RUN or AGAIN] }
--
-- The stamp is the lane's state, see lane_of. So one comparison shows that a call is the next one, and
-- one field records that for the call after it.
--
-- A refusal is an error with the last sequence: PHONONFENCED, PHONONSTALE (an older call, nothing
-- happens), or PHONONLOST (the server lost writes of this lane, or has others in their place).

-- Contents of the batches in answers. A repeat reads them again; false as an entry says that another
-- process has the batch by now.
local function first_contents(c, resource)
  if c.bytes >= ANSWER_BYTES then
    return {} -- the client fetches it
  end
  local content, bytes = add_piece(c.T .. 'batch:' .. resource, {}, 0, FIRST_PARTIALS - 1)
  c.bytes = c.bytes + bytes
  return content
end

local function contents_of(c, resource, token)
  local running = call('HMGET', c.T .. 'running:' .. resource, 'owner', 'token')
  if running[1] ~= c.pid or tonumber(running[2]) ~= token then
    return false
  end
  return first_contents(c, resource)
end

local function starts_batch(answer)
  return type(answer) == 'table' and (answer[1] == RUN or answer[1] == AGAIN)
end

local function repeat_call(c, lane, words, stamp)
  -- WAIT and WAITAOF wait for the last write of their own connection. A repeat may come over another
  -- connection than the call, so it writes as well: otherwise its confirmation would mean nothing.
  call('HSET', lane, 'state', stamp)
  local packed = call('HGET', lane, 'answers')
  local contents, at, any = {}, 1, false
  if #words > 0 then
    for _, answer in ipairs(cmsgpack.unpack(packed)) do
      if starts_batch(answer) then
        any = true
        contents[#contents + 1] = contents_of(c, words[at + 1], answer[4])
      end
      at = at + operations[words[at]][1]
    end
  end
  if any then
    return { packed, stamp, cmsgpack.pack(contents) }
  end
  return { packed, stamp }
end

local function zadd(registry, flag, pairs_)
  for j = 1, #pairs_, MOST_VALUES do
    local last = math.min(j + MOST_VALUES - 1, #pairs_)
    if flag then
      call('ZADD', registry, flag, unpack(pairs_, j, last))
    else
      call('ZADD', registry, unpack(pairs_, j, last))
    end
  end
end

local function write_registry(c, registry)
  if not next(c.registry) then
    return
  end
  local new, anew, gone
  for resource, class in pairs(c.registry) do
    if not class then
      gone = gone or {}
      gone[#gone + 1] = resource
    elseif class == MEMBER then
      new = new or {}
      new[#new + 1] = ms_text(c)
      new[#new + 1] = resource
    else
      local score = ms_text(c)
      if class == LOCKER then
        score = '-' .. score
      elseif class == BATCH then
        score = fmt(BATCH_SCORE + now_ms(c))
      end
      anew = anew or {}
      anew[#anew + 1] = score
      anew[#anew + 1] = resource
    end
  end
  if new then
    zadd(registry, 'NX', new)
  end
  if anew then
    zadd(registry, nil, anew)
  end
  for j = 1, gone and #gone or 0, MOST_VALUES do
    call('ZREM', registry, unpack(gone, j, math.min(j + MOST_VALUES - 1, #gone)))
  end
end

-- A call that is not the next one: a repeat, which is answered again, or one that is refused.
local function not_the_next(T, pid, lane, args)
  local state, fenced, known, last, digest = lane_of(lane)
  if fenced then
    return redis.error_reply('PHONONFENCED ' .. fmt(last))
  end
  local number, sequence, of = string.match(args[3], '^(%d+) (%d+) (%d+)$')
  sequence = tonumber(sequence)
  if known ~= number then
    return redis.error_reply('PHONONLOST 0')
  end
  if sequence < last then
    return redis.error_reply('PHONONSTALE ' .. fmt(last))
  end
  local words = cmsgpack.unpack(args[4])
  -- An empty call asks what became of a refused one with its number.
  if sequence == last and (digest == of or #words == 0) then
    return repeat_call({ T = T, pid = pid, bytes = 0 }, lane, words, state)
  end
  return redis.error_reply('PHONONLOST ' .. fmt(last))
end

local function apply(keys, args)
  call = redis.call
  local T, pid = keys[1], args[1]
  local lane = T .. 'lane:' .. pid
  if call('HGET', lane, 'state') ~= args[2] then
    return not_the_next(T, pid, lane, args)
  end
  local words = cmsgpack.unpack(args[4])
  local registry = T .. 'registry:' .. pid
  local first = operations[words[1]]
  local alone = first and first[3] and first[1] == #words
  if not alone and #words > 0 then -- an empty call touches no registry
    local proof = redis.pcall('ZCARD', registry) -- of its type, before anything is written
    if type(proof) ~= 'number' then
      return redis.error_reply(text_of(proof, T, { pid }))
    end
  end
  local c = { T = T, pid = pid, registry = {}, bytes = 0, alone = alone and registry }
  local answers, contents, at, count = {}, nil, 1, 0
  while at <= #words do
    local step = operations[words[at]]
    if not step then
      return redis.error_reply('PHONONSTATE unknown operation ' .. tostring(words[at]))
    end
    local ok, answer, content = pcall(step[2], c, words, at)
    if not ok then
      answer = { FAILED, text_of(answer, T, { words[at + 1], pid }) }
    end
    count = count + 1
    answers[count] = answer
    if starts_batch(answer) then
      contents = contents or {}
      contents[#contents + 1] = content or first_contents(c, words[at + 1])
    end
    at = at + step[1]
  end
  write_registry(c, registry)
  local packed = cmsgpack.pack(answers)
  local seconds, rest = time_of(c)
  local stamp = args[3] .. ' ' .. seconds .. '.' .. (rest or '')
  if c.closed then
    stamp = '' -- the lane is gone: a process that is declared dead meanwhile must not miss it
    call('DEL', lane, T .. 'mailbox:' .. pid)
    call('SREM', T .. 'lanes', pid)
    if call('EXISTS', T .. 'lanes') == 0 and call('EXISTS', T .. 'token') == 1 then
      call('PEXPIRE', T .. 'token', WEEK_MS)
    end
  else
    store_token(c)
    call('HSET', lane, 'state', stamp, 'answers', packed)
  end
  if contents then
    return { packed, stamp, cmsgpack.pack(contents) }
  end
  return { packed, stamp }
end

redis.register_function(NAME .. '_apply', apply)
-- For calls that free memory, or only ask: a full server still runs them.
redis.register_function({ function_name = NAME .. '_apply_free', callback = apply, flags = { 'allow-oom' } })
