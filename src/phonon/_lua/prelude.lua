-- Shared by all files: the clock, tokens, the registry, and how operations are registered.
-- README.md beside this file has the table of keys. Operation and answer codes (JOIN, HELD, ...)
-- are constants that _protocol/library.py puts in front of this text.

-- redis.call, which does not exist yet while the library is being loaded.
local call

local WEEK_MS = 604800000
-- Partials sent along with a batch; the client fetches the rest piece by piece.
local FIRST_PARTIALS = 128
-- Partials are read so many at a time.
local PIECE = 16
-- The content of one batch, and of all batches in one answer, bytes.
local PIECE_BYTES = 1048576
local ANSWER_BYTES = 4194304
-- Each time the number of partials has grown by this, the process that stored the last one merges some.
local COMPACT_AT = 64
-- Lua's unpack() fails at 8,001 values.
local MOST_VALUES = 4000

-- Scores in a registry. A lock comes first, with minus its time of grant; then memberships, with their
-- time of joining; then running batches; then resources that a reaper left, or could not reap.
local BATCH_SCORE = 1125899906842624 -- 2^50, added to the time in ms
local LEFT_SCORE = 4503599627370496 -- 2^52
local MEMBER, MEMBER_ANEW, LOCKER, BATCH = 'member', 'anew', 'lock', 'batch'

-- The time: microseconds, or seconds and microseconds as the server answers them.
local function clock()
  local set = TEST_CLOCK and call('GET', TEST_CLOCK)
  if set then
    return set
  end
  local time = call('TIME')
  return time[1], time[2]
end

local function micros()
  local seconds, rest = clock()
  return rest and seconds * 1000000 + rest or tonumber(seconds)
end

-- Lua's own conversion to text loses digits of numbers above 2^47.
local function fmt(number)
  return string.format('%d', number)
end

-- A call has one time. Numbers are made of it only where they are needed, because that costs more.
local function time_of(c)
  if not c.seconds then
    c.seconds, c.rest = clock()
  end
  return c.seconds, c.rest
end

local function now(c)
  if not c.now then
    local seconds, rest = time_of(c)
    c.now = rest and seconds * 1000000 + rest or tonumber(seconds)
  end
  return c.now
end

local function now_ms(c)
  return math.floor(now(c) / 1000)
end

-- The text of now(c).
local function now_text(c)
  if not c.now_text then
    local seconds, rest = time_of(c)
    c.now_text = rest and #rest == 6 and seconds .. rest or fmt(now(c))
  end
  return c.now_text
end

-- The text of now_ms(c).
local function ms_text(c)
  if not c.ms_text then
    c.ms_text = string.sub(now_text(c), 1, -4)
  end
  return c.ms_text
end

-- A number greater than all that this partition has handed out. It follows the clock, so it still
-- grows when the partition's last token was lost with the server's data.
local function last_token(c)
  if not c.last_token then
    c.last_token = tonumber(call('GET', c.T .. 'token') or 0)
  end
  return c.last_token
end

local function next_token(c)
  local at, last = now(c), c.last_token
  local unread = not last
  if unread then
    -- One command reads the last token and stores this one: nearly always the clock is ahead of it.
    last = tonumber(call('SET', c.T .. 'token', now_text(c), 'GET') or 0)
  end
  local token = math.max(last + 1, at)
  if token > at or not unread then
    c.token = token -- to be stored with the books of the call
  end
  c.last_token = token
  return token
end

local function store_token(c)
  if c.token then
    call('SET', c.T .. 'token', fmt(c.token))
  end
end

-- A lane after its last call: its state, which is fenced once the process is dead, and the parts of
-- the state: the number of the lane, the sequence of the call, the digest of its operations. The state
-- is '<number>' at first, and then '<number> <sequence> <digest> <time>'.
local function lane_of(lane)
  local known = call('HMGET', lane, 'state', 'fenced')
  local state = known[1] or known[2]
  if not state then
    return nil
  end
  local number, sequence, digest = string.match(state, '^(%d+) ?(%d*) ?(%d*)')
  return state, not known[1], number, tonumber(sequence) or 0, digest
end

local function process_of(holder)
  return string.match(holder, '^(.*)/') or holder
end

local function state_error(key, wrong)
  error({ err = 'PHONONSTATE ' .. key .. ' ' .. wrong })
end

-- Note that the caller is responsible for a resource. The registry is written once a call.
local function track(c, resource, class)
  c.registry[resource] = class
end

-- Note that the caller is a member. If the same call gave it a batch or a lock, that stays the class.
local function track_member(c, resource)
  local class = c.registry[resource]
  if not class then
    c.registry[resource] = class == nil and MEMBER or MEMBER_ANEW
  end
end

local function untrack(c, resource)
  c.registry[resource] = false
end

-- settle reads by pcall, because it comes after writes: a key of a foreign type must not make an
-- operation fail that is done. The caller owns nothing in such a key.
local function is_mine(c, resource, owner)
  if owner == nil then
    owner = redis.pcall('HGET', c.T .. 'running:' .. resource, 'owner')
  end
  return owner == c.pid
end

local function is_among(c, holders)
  for _, holder in ipairs(holders) do
    if process_of(holder) == c.pid then
      return true
    end
  end
  return false
end

local function holds_or_waits(c, resource)
  return is_among(c, redis.pcall('HKEYS', c.T .. 'lock:' .. resource))
    or is_among(c, redis.pcall('ZRANGE', c.T .. 'queue:' .. resource, 0, -1))
end

-- Correct the registry after an operation that ended a lock, membership or batch of the caller: enter
-- what the caller is still responsible for, or remove the resource. owner: the owner of the running
-- batch, false if there is none, nil to read it.
local function settle(c, resource, owner)
  local T = c.T
  if call('EXISTS', T .. 'members:' .. resource, T .. 'lock:' .. resource, T .. 'queue:' .. resource) > 0 then
    if is_mine(c, resource, owner) then
      return track(c, resource, BATCH)
    end
    if holds_or_waits(c, resource) then
      return track(c, resource, LOCKER)
    end
    if redis.pcall('HEXISTS', T .. 'members:' .. resource, c.pid) == 1 then
      return track(c, resource, MEMBER_ANEW)
    end
  elseif is_mine(c, resource, owner) then
    return track(c, resource, BATCH)
  end
  untrack(c, resource)
end

-- Redis's names of the types of keys: those of a resource, then that of a process.
local TYPES = {
  members = 'hash', left = 'hash', partials = 'list', running = 'hash', batch = 'list',
  parked = 'hash', parties = 'hash', lock = 'hash', leases = 'zset',
  queue = 'zset', woken = 'hash', registry = 'zset',
}

-- The types of keys that exist once a partition, or once a namespace.
local BOOKS = {
  token = 'string', lanes = 'set', handed = 'set', parked = 'set', processes = 'zset',
  listings = 'hash', cards = 'hash', reports = 'hash', reapers = 'hash', epoch = 'string',
  partitions = 'string',
}

-- The name of a key that holds a value of a foreign type, and that type; otherwise nil.
local function foreign(key, wanted)
  local found = redis.pcall('TYPE', key)
  if type(found) == 'table' and found.ok and found.ok ~= 'none' and found.ok ~= wanted then
    return 'WRONGTYPE ' .. key .. ' holds a ' .. found.ok .. ' where Phonon keeps a ' .. wanted
  end
end

-- The text of an error. Redis does not tell which key holds the value of a foreign type, so it is looked
-- for. names: the resources, or processes, whose keys may be the cause.
local function text_of(problem, T, names)
  local text = type(problem) == 'table' and problem.err or tostring(problem)
  if string.find(text, 'WRONGTYPE', 1, true) then
    for kind, wanted in pairs(BOOKS) do
      local named = foreign(T .. kind, wanted)
      if named then
        return named
      end
    end
    for _, name in ipairs(names) do
      for kind, wanted in pairs(TYPES) do
        local named = foreign(T .. kind .. ':' .. tostring(name), wanted)
        if named then
          return named
        end
      end
    end
  end
  return text
end

-- Operations by code: { how many words, the function(c, words, at), whether it proves the registry }. A
-- function first takes the steps that can raise (a read proves a key's type), then those that must not
-- happen twice.
local operations = {}

local function operation(code, words, body, proves)
  operations[code] = { words, body, proves }
end

-- An operation that proves the registry itself, and is alone in its call, gets the key as c.alone. It
-- writes there before it writes what the entry is for, or proves it by this: a command less for a lock.
local function prove_registry(c)
  if c.alone then
    call('ZCARD', c.alone)
    c.alone = false
  end
end

-- A mailbox that no waiter reads any more expires after this time.
local MAILBOX_MS = 10000

-- Tell a waiter to ask again.
local function send_mail(T, holder)
  local mailbox = T .. 'mailbox:' .. process_of(holder)
  -- A mailbox of a foreign type must not fail the step that frees a lock: the waiter asks again.
  if type(redis.pcall('RPUSH', mailbox, holder)) == 'number' then
    call('PEXPIRE', mailbox, MAILBOX_MS)
  end
end

-- Register a function that only reads, outside of lanes. It gets the prefix and the arguments.
local function read(name, body)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = { 'no-writes' },
    callback = function(keys, args)
      call = redis.call
      local ok, answer = pcall(body, keys[1], args)
      if not ok then
        return redis.error_reply(text_of(answer, keys[1], args))
      end
      return answer
    end,
  })
end

-- Register a function outside of lanes that writes, and can be repeated without harm.
local function plain(name, body)
  redis.register_function({
    function_name = NAME .. '_' .. name,
    flags = { 'allow-oom' },
    callback = function(keys, args)
      call = redis.call
      local ok, answer = pcall(body, keys[1], args)
      if not ok then
        return redis.error_reply(text_of(answer, keys[1], args))
      end
      return answer
    end,
  })
end

-- Add elements of a list to an answer, up to the last one or as many as fit, but at least one.
local function add_piece(list, answer, first, last)
  local bytes = 0
  for i = first, last, PIECE do
    local piece = call('LRANGE', list, i, math.min(i + PIECE - 1, last))
    for _, partial in ipairs(piece) do
      bytes = bytes + #partial
      if bytes > PIECE_BYTES and bytes > #partial then
        return answer, bytes
      end
      answer[#answer + 1] = partial
    end
    if #piece < PIECE then
      break
    end
  end
  return answer, bytes
end
