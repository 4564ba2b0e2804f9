-- One call of a lane: replay detection, then the operations in turn, then the books.
--
-- apply(T, process, number of the lane, sequence, stamp of the answer before, operations, digest)
-- answers { packed answers, stamp [, packed contents of those that are RUN or AGAIN] }
--
-- Refused are, as errors: PHONONFENCED, PHONONSTALE (an older call, nothing happens), PHONONLOST
-- (the server lost writes of this lane, or took others in their place), each with the last sequence.

-- Contents of the batches in answers. A repeat reads them again, and learns that another process has
-- the batch by now from an entry that is false.
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

local function repeat_call(c, lane, sequence, words, packed, stamp)
  -- WAIT and WAITAOF wait for what their own connection wrote last. A repeat may come over another
  -- connection than the call did, so it writes as well, for its confirmation to mean something.
  call('HSET', lane, 'sequence', sequence)
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
  local new, anew, gone = {}, {}, {}
  for resource, class in pairs(c.registry) do
    if not class then
      gone[#gone + 1] = resource
    elseif class == MEMBER then
      new[#new + 1] = ms_text(c)
      new[#new + 1] = resource
    else
      local score = now_ms(c)
      if class == LOCKER then
        score = -score
      elseif class == BATCH then
        score = BATCH_SCORE + score
      end
      anew[#anew + 1] = fmt(score)
      anew[#anew + 1] = resource
    end
  end
  zadd(registry, 'NX', new)
  zadd(registry, nil, anew)
  for j = 1, #gone, MOST_VALUES do
    call('ZREM', registry, unpack(gone, j, math.min(j + MOST_VALUES - 1, #gone)))
  end
end

local function apply(keys, args)
  call = redis.call
  local T, pid, number, sequence = keys[1], args[1], args[2], tonumber(args[3])
  local lane = T .. 'lane:' .. pid
  local known = call('HMGET', lane, 'sequence', 'number', 'stamp', 'digest', 'fenced')
  local last = tonumber(known[1] or 0)
  if known[5] then
    return redis.error_reply('PHONONFENCED ' .. fmt(last))
  end
  if known[2] ~= number or sequence > last + 1 then
    return redis.error_reply('PHONONLOST ' .. (known[2] == number and fmt(last) or '0'))
  end
  if sequence < last then
    return redis.error_reply('PHONONSTALE ' .. fmt(last))
  end
  local words = cmsgpack.unpack(args[5])
  local c = { T = T, pid = pid, registry = {}, bytes = 0 }
  if sequence == last then
    -- An empty call asks what became of a refused one with its number.
    if #words > 0 and known[4] ~= args[6] then
      return redis.error_reply('PHONONLOST ' .. fmt(last))
    end
    return repeat_call(c, lane, args[3], words, call('HGET', lane, 'answers'), known[3] or '')
  end
  if (known[3] or '') ~= args[4] then
    return redis.error_reply('PHONONLOST ' .. fmt(last))
  end
  local registry = T .. 'registry:' .. pid
  if #words > 0 then -- an empty call touches no registry
    local proof = redis.pcall('ZCARD', registry) -- of its type, before anything is written
    if type(proof) ~= 'number' then
      return redis.error_reply(text_of(proof, T, { pid }))
    end
  end
  local answers, contents, at, count = {}, nil, 1, 0
  while at <= #words do
    local step = operations[words[at]]
    if not step then
      return redis.error_reply('PHONONSTATE unknown operation ' .. tostring(words[at]))
    end
    local ok, answer, content = pcall(step[2], c, words, at)
    if not ok then
      answer = { FAILED, text_of(answer, T, { words[at + 1] }) }
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
  local stamp = stamp_of(c)
  if c.closed then
    call('DEL', lane, T .. 'mailbox:' .. pid)
    call('SREM', T .. 'lanes', pid)
    if call('EXISTS', T .. 'lanes') == 0 and call('EXISTS', T .. 'token') == 1 then
      call('PEXPIRE', T .. 'token', WEEK_MS)
    end
  else
    if c.token then
      call('SET', T .. 'token', fmt(c.token))
    end
    call('HSET', lane, 'sequence', args[3], 'answers', packed, 'stamp', stamp, 'digest', args[6])
  end
  if contents then
    return { packed, stamp, cmsgpack.pack(contents) }
  end
  return { packed, stamp }
end

redis.register_function(NAME .. '_apply', apply)
-- For calls that free memory, or ask: a server that is full still runs them.
redis.register_function({ function_name = NAME .. '_apply_free', callback = apply, flags = { 'allow-oom' } })
