-- The processes of a namespace. keys: the processes' sorted set.

-- beat(pid, ttl_ms): prolong this process's life.
-- answers {1 if it was known and alive, server time ms, ids of dead processes ...}
redis.register_function({
  function_name = NAME .. '_beat',
  flags = { 'allow-oom' },
  callback = function(keys, args)
    call = redis.call
    local now = clock()
    local deadline = call('ZSCORE', keys[1], args[1])
    local answer = { (deadline and tonumber(deadline) > now) and 1 or 0, now }
    call('ZADD', keys[1], now + args[2], args[1])
    local dead = call('ZRANGEBYSCORE', keys[1], '-inf', now, 'LIMIT', 0, 100)
    for _, pid in ipairs(dead) do
      answer[#answer + 1] = pid
    end
    return answer
  end,
})

-- alive(): answers the ids of the processes that live
redis.register_function({
  function_name = NAME .. '_alive',
  flags = { 'no-writes' },
  callback = function(keys)
    call = redis.call
    local now = clock()
    return call('ZRANGEBYSCORE', keys[1], '(' .. now, '+inf')
  end,
})
