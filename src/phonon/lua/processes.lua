-- The processes of a namespace, and what each holds.

-- hold(base): enter a resource into a registry, which is the key, before a step in another slot.
-- answers 1 if it is new there
redis.register_function({
  function_name = NAME .. '_hold',
  flags = { 'allow-oom' },
  callback = function(keys, args)
    call = redis.call
    local now = clock()
    return call('HSETNX', keys[1], args[1], now)
  end,
})

-- Of the others the key is the processes' sorted set.

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
