-- What every step shares: keys, the clock, tokens, operation numbers, and what a process holds.
-- The key table is in README.md beside this file.

local function call(...)
  return redis.call(...)
end

-- How long a resource's memory (last token, last operation of each process) outlives its last use.
-- Longer than any client goes on repeating a call, so that no repeat meets an empty memory.
local MEMORY_MS = 60000
-- Tokens of one resource are at least this far apart: a batch with partials of several classes
-- gives each class a token of its own between its token and the next.
local TOKEN_STRIDE = 1024
-- Partials sent along with a batch; the rest is fetched piece by piece, so no answer is unbounded.
local FIRST_PARTIALS = 128

-- The server's clock: milliseconds since the epoch, and microseconds for tokens.
local function clock()
  local time = call('TIME')
  local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
  if TEST_CLOCK then
    micros = micros + tonumber(call('GET', TEST_CLOCK) or 0) * 1000
  end
  return math.floor(micros / 1000), micros
end

-- The resource that a call is about. keys: base [, the caller's registry, if it is on this server].
local function open(keys, args)
  local base = keys[1]
  local now, micros = clock()
  return {
    base = base,
    registry = keys[2],
    pid = args[1],
    now = now,
    micros = micros,
    members = base .. ':members',
    ledger = base .. ':ledger',
    partials = base .. ':partials',
    running = base .. ':running',
    batch = base .. ':batch',
    parked = base .. ':parked',
    lock = base .. ':lock',
    queue = base .. ':queue',
    waiting = base .. ':waiting',
    memory = base .. ':memory',
  }
end

-- A number greater than all that this resource has handed out. It follows the clock, so that it
-- still grows after the memory has expired; the memory covers a clock that was set back.
local function next_token(r)
  local last = tonumber(call('HGET', r.memory, 'token') or 0)
  local token = math.max(last + TOKEN_STRIDE, r.micros)
  call('HSET', r.memory, 'token', string.format('%.0f', token))
  return token
end

-- The registry names whatever a process may be responsible for. It is written before anything
-- else of a step, and cleared when the resource no longer names the process.
local function hold(r)
  if r.registry then
    call('SADD', r.registry, r.base)
  end
end

-- Answers 1 when the process has nothing more to do with the resource. On a cluster the registry
-- lives elsewhere and the caller clears it, with this answer in hand. It runs after a step's last
-- write, so it must not raise: a key of a foreign type counts as not ours.
local function let_go(r)
  if type(redis.pcall('ZSCORE', r.members, r.pid)) == 'string'
    or redis.pcall('HGET', r.running, 'owner') == r.pid
    or redis.pcall('HGET', r.lock, 'pid') == r.pid then
    return 0
  end
  if r.registry then
    redis.pcall('SREM', r.registry, r.base)
  end
  return 1
end

-- Add the batch's content to an answer {'run' or 'again', clear, token, ...}. It is not part of
-- what is remembered: a repeated call reads it afresh, and learns it if the batch was taken over.
local function deliver(r, answer)
  if answer[1] ~= 'run' and answer[1] ~= 'again' then
    return answer
  end
  local running = call('HMGET', r.running, 'owner', 'token', 'attempt')
  if running[1] ~= r.pid or tonumber(running[2]) ~= answer[3] then
    return { 'lost', answer[2] }
  end
  local delivered = {}
  for i, value in ipairs(answer) do
    delivered[i] = value
  end
  delivered[#answer + 1] = tonumber(running[3])
  delivered[#answer + 2] = call('LLEN', r.batch)
  delivered[#answer + 3] = call('LRANGE', r.batch, 0, FIRST_PARTIALS - 1)
  return delivered
end

-- A process's last operation on a resource: '<number> <ms> <packed answer>'.
local function recall(r)
  local record = call('HGET', r.memory, r.pid)
  if not record then
    return nil
  end
  local number, packed = string.match(record, '^(%d+) %d+ ()')
  local last = tonumber(number)
  if r.op > last then
    return nil
  end
  if r.op < last then
    return redis.error_reply('PHONONSTALE operation ' .. r.op .. ' came after ' .. number)
  end
  return cmsgpack.unpack(string.sub(record, packed))
end

-- Forget processes that have been silent for longer than any of them repeats a call. Without it
-- a resource that is never idle would remember every process that ever touched it.
local function prune(r)
  local records = call('HGETALL', r.memory)
  for i = 1, #records, 2 do
    local at = string.match(records[i + 1], '^%d+ (%d+) ')
    if at and tonumber(at) < r.now - MEMORY_MS then
      call('HDEL', r.memory, records[i])
    end
  end
end

local function remember(r, answer)
  local record = string.format('%d %.0f ', r.op, r.now) .. cmsgpack.pack(answer)
  local new = call('HSET', r.memory, r.pid, record)
  if new == 1 and call('HLEN', r.memory) % 32 == 0 then
    prune(r)
  end
  call('PEXPIRE', r.memory, MEMORY_MS)
end

-- Register a step that changes state. args: process id, operation number, then the step's own
-- from args[3]. A repeat (same number) gets the same answer and changes nothing.
-- A step that raises half way would leave what it wrote, unremembered, so every body first does
-- what can raise (a read of each key proves its type), and then what must not be done twice.
-- frees: the step makes room, so a server that is out of memory still has to run it.
local function step(name, body, frees)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = frees and { 'allow-oom' } or {},
    callback = function(keys, args)
      local r = open(keys, args)
      r.op = tonumber(args[2])
      local answer = recall(r)
      if not answer then
        answer = body(r, args)
        if not answer.err then
          remember(r, answer)
        end
      end
      if answer.err then
        return answer
      end
      return deliver(r, answer)
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
