-- What every step shares: keys, the clock, tokens, operation numbers, and what a process holds.
-- The key table is in README.md beside this file.

-- redis.call, which does not exist yet while the library is being loaded.
local call

-- How long a resource's memory (last token, last operation of each process) outlives its last use.
-- Longer than any client goes on repeating a call, so that no repeat meets an empty memory.
local MEMORY_MS = 60000
-- A process that is busy with a resource pushes that expiry only this often.
local PUSH_MS = 10000
-- Tokens set aside behind a batch's own: one with partials of several classes gives each class a
-- token between its token and the next.
local SPARE_TOKENS = 1023
-- Partials sent along with a batch; the rest is fetched piece by piece, so no answer is unbounded.
local FIRST_PARTIALS = 128
-- Partials are read so many at a time, and sent up to so many bytes.
local PIECE = 16
local PIECE_BYTES = 1024 * 1024
-- Whenever so many partials more have come together, whoever stored the last one merges some.
local COMPACT_AT = 64

-- The server's clock: milliseconds since the epoch, and microseconds for tokens.
local function clock()
  local time = call('TIME')
  local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
  if TEST_CLOCK then
    micros = micros + tonumber(call('GET', TEST_CLOCK) or 0) * 1000
  end
  return math.floor(micros / 1000), micros
end

-- A resource's keys are made when they are first used: r.members is base .. ':members'.
local SUFFIXES = {
  members = ':members', modified = ':modified', partials = ':partials', running = ':running',
  batch = ':batch', parked = ':parked', lock = ':lock', queue = ':queue', waiting = ':waiting',
  parties = ':parties', shared = ':shared', sharers = ':sharers', memory = ':memory', fence = ':fence',
}
local Keys = {
  __index = function(r, name)
    local suffix = SUFFIXES[name]
    if not suffix then
      return nil
    end
    local key = r.base .. suffix
    rawset(r, name, key)
    return key
  end,
}

-- The resource that a call is about. keys: base [, the caller's registry, if it is on this server].
local function open(keys, args)
  call = redis.call
  local now, micros = clock()
  return setmetatable({
    base = keys[1], registry = keys[2] or false, pid = args[1], now = now, micros = micros,
  }, Keys)
end

-- How far a token is ahead of the clock, milliseconds.
local function lead_of(r, token)
  return math.ceil(token / 1000) - r.now
end

-- A number greater than all that this resource has handed out. It follows the clock (one token a
-- microsecond), so that it still grows after the memory has expired. The memory covers a clock that
-- was set back, and stays until the clock has overtaken tokens that were handed out faster.
local function next_token(r, spare)
  local token = math.max(r.last_token + 1, r.micros)
  r.last_token, r.is_token_new = token + spare, true -- to be remembered with the answer
  return token
end

-- What a registry holds once its process is dead and all it was responsible for is taken over.
local TOMBSTONE = 'dead'

local function refuse_the_dead(pid)
  error({ err = 'PHONONDEAD ' .. pid .. ' was declared dead and others have taken over' })
end

-- Enter a resource into a registry. Whoever does so under a name that is dead learns it here: what
-- it would be responsible for, nobody would ever find. first: there is a lock, which survivors see
-- to before the rest, and in order of the scores; so that is a time below zero.
-- answers 1 if it is new there
local function enter_registry(registry, base, now, pid, first)
  local added = redis.pcall('ZADD', registry, first and 'LT' or 'NX', first and -now or now, base)
  if type(added) == 'number' then
    return added
  end
  if redis.pcall('GET', registry) == TOMBSTONE then
    refuse_the_dead(pid)
  end
  error(added)
end

-- The registry names whatever a process may be responsible for, and since when. It is written
-- before anything else of a step, and cleared when the resource no longer names the process.
-- On a cluster it was written by a call before this one, and the process may have been declared
-- dead in between.
local function hold(r, first)
  if r.registry then
    enter_registry(r.registry, r.base, r.now, r.pid, first)
  elseif call('SISMEMBER', r.fence, r.pid) == 1 then
    refuse_the_dead(r.pid)
  end
end

-- Answers 1 when the process has nothing more to do with the resource. On a cluster the registry
-- lives elsewhere and the caller clears it, with this answer in hand. It runs after a step's last
-- write, so it must not raise: a key of a foreign type counts as not ours.
-- nothing_else: the step knows that the process is no member, and that there is no batch or lock.
local function let_go(r, nothing_else)
  local pcall = redis.pcall
  if not nothing_else and pcall('EXISTS', r.members, r.running, r.lock, r.sharers) ~= 0 and (type(pcall('ZSCORE', r.members, r.pid)) == 'string'
    or pcall('HGET', r.running, 'owner') == r.pid
    or pcall('HGET', r.lock, 'pid') == r.pid
    or type(pcall('HGET', r.sharers, '@' .. r.pid)) == 'string') then
    return 0
  end
  if r.registry then
    pcall('ZREM', r.registry, r.base)
  end
  return 1
end

-- Add elements of a list to an answer, up to the last one or as far as they fit, but one at least.
local function add_piece(list, answer, first, last)
  local bytes = 0
  for i = first, last, PIECE do
    local piece = call('LRANGE', list, i, math.min(i + PIECE - 1, last))
    for _, partial in ipairs(piece) do
      bytes = bytes + #partial
      if bytes > PIECE_BYTES and bytes > #partial then
        return answer
      end
      answer[#answer + 1] = partial
    end
    if #piece < PIECE then
      break
    end
  end
  return answer
end

-- Add the batch's content to an answer {'run' or 'again', clear, token, ...}. It is not part of
-- what is remembered: a repeated call reads it afresh, and learns it if the batch was taken over.
-- content: what a step knows to be all of a batch that it has just started.
local function deliver(r, answer, content)
  if answer[1] ~= 'run' and answer[1] ~= 'again' then
    return answer
  end
  local delivered = {}
  for i, value in ipairs(answer) do
    delivered[i] = value
  end
  if content then
    delivered[#answer + 1], delivered[#answer + 2], delivered[#answer + 3] = 0, #content, content
    return delivered
  end
  local running = call('HMGET', r.running, 'owner', 'token', 'attempt')
  if running[1] ~= r.pid or tonumber(running[2]) ~= answer[3] then
    delivered[1], delivered[2] = 'lost', let_go(r)
    return delivered
  end
  delivered[#answer + 1] = tonumber(running[3])
  delivered[#answer + 2] = call('LLEN', r.batch)
  delivered[#answer + 3] = add_piece(r.batch, {}, 0, FIRST_PARTIALS - 1)
  return delivered
end

-- Let the memory live on. It covers tokens that were handed out faster than the clock goes.
local function push_expiry(r)
  call('PEXPIRE', r.memory, math.max(MEMORY_MS, lead_of(r, r.last_token)) + PUSH_MS)
end

-- A process's last operation on a resource: '<number> <ms> <packed answer>', where ms is when it
-- last pushed the memory's expiry.
local function recall(r)
  local memory = call('HMGET', r.memory, r.pid, 'token')
  local record = memory[1]
  r.last_token = tonumber(memory[2] or 0)
  if not record then
    return nil
  end
  local number_end = string.find(record, ' ', 1, true)
  local last = tonumber(string.sub(record, 1, number_end - 1))
  local pushed_end = string.find(record, ' ', number_end + 1, true)
  if r.op > last then
    r.pushed_text = string.sub(record, number_end + 1, pushed_end - 1)
    r.pushed = tonumber(r.pushed_text)
    return nil
  end
  if r.op < last then
    return redis.error_reply('PHONONSTALE operation ' .. r.number .. ' came after ' .. last)
  end
  -- WAIT and WAITAOF wait for what their own connection has written last. A repeat may come over
  -- another one than the call did, so it has to write as well, for them to mean what it answers.
  push_expiry(r)
  return cmsgpack.unpack(string.sub(record, pushed_end + 1))
end

-- Forget processes that have been silent for longer than any of them repeats a call. Without it
-- a resource that is never idle would remember every process that ever touched it.
local function prune(r)
  local records = call('HGETALL', r.memory)
  for i = 1, #records, 2 do
    local at = string.match(records[i + 1], '^%d+ (%d+) ')
    if at and tonumber(at) < r.now - MEMORY_MS - PUSH_MS then
      call('HDEL', r.memory, records[i])
    end
  end
end

-- Answers that never differ, packed when they are first remembered.
local PACKED = {}

local function pack(answer)
  local packed = PACKED[answer]
  if not packed then
    packed = cmsgpack.pack(answer)
    if PACKED[answer] == false then
      PACKED[answer] = packed
    end
  end
  return packed
end

local function remember(r, answer)
  local push = not r.pushed or r.now - r.pushed > PUSH_MS
    or r.is_token_new and lead_of(r, r.last_token) > MEMORY_MS
  local record = r.number .. ' ' .. (push and r.now or r.pushed_text) .. ' ' .. pack(answer)
  local new
  if r.is_token_new then
    local token = string.format('%d', r.last_token)
    new = call('HSET', r.memory, r.pid, record, 'token', token)
  else
    new = call('HSET', r.memory, r.pid, record)
  end
  if push then
    push_expiry(r)
    if new > 0 and call('HLEN', r.memory) % 32 == 0 then
      prune(r)
    end
  end
end

-- An answer that never differs.
local function constant(kind, clear)
  local answer = { kind, clear or 0 }
  PACKED[answer] = false
  return answer
end

-- Register a step that changes state. args: process id, operation number, then the step's own
-- from args[3]. A repeat (same number) gets the same answer and changes nothing.
-- The body returns the answer, and the content of a batch if it has that at hand.
-- A step that raises half way would leave what it wrote, unremembered, so every body first does
-- what can raise (a read of each key proves its type), and then what must not be done twice.
-- frees: the step makes room, so a server that is out of memory still has to run it.
local function step(name, body, frees)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = frees and { 'allow-oom' } or {},
    callback = function(keys, args)
      local r = open(keys, args)
      r.number = args[2]
      r.op = tonumber(r.number)
      local answer, content = recall(r), nil
      if not answer then
        answer, content = body(r, args)
        if not answer.err then
          remember(r, answer)
        end
      end
      if answer.err then
        return answer
      end
      return deliver(r, answer, content)
    end,
  })
end

-- Register a function that only reads, or whose repetition is harmless by itself.
local function plain(name, body, flags)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = flags,
    callback = function(keys, args)
      return body(open(keys, args), args)
    end,
  })
end
