-- Taking over what a dead process has left of a resource.

-- A process that is paused between the two calls that an operation takes on a cluster may go on
-- with the second one after its death: the resource itself has to know that it is dead.
local FENCE_MS = 24 * 3600 * 1000

-- recover(pid, op, dead id, '1' if it died, lease_ms [, the dead one's registry, if it is on this
--         server [, the heir that was listed]]):
-- drop a dead member, free its locks, and take over its batch, under the same token, or that of the
-- session of which it was the last member. Its registry forgets the resource in the same moment:
-- should it only have been paused, and go on before it is buried, it enters the resource anew.
-- (Not if another heir has the batch: the caller lists that one, and then calls again.)
-- answers {'run', 0, token, crashes, attempt, count, partials}   crashes: owners that have died
--         {'later', 0, token, ms}    the batch has failed before; the next attempt is due then
--         {'free', clear, owner}     nothing for the caller to execute; owner: who has a batch, or ''
step('recover', function(r, args)
  local dead = args[3]
  local held = lock_of(r)
  sharers_of(r)
  local sharers = call('ZRANGE', r.shared, 0, -1)
  local running = call('HMGET', r.running, 'owner', 'token', 'retry_at')
  local total = call('LLEN', r.partials)
  call('LLEN', r.batch)
  call('HLEN', r.modified)
  call('HLEN', r.parties)
  call('ZCARD', r.members)
  local waiters = call('ZRANGE', r.queue, 0, -1)
  call('ZCARD', r.waiting)
  if running[1] == dead or not running[1] and total > 0 then
    if not running[1] and call('EXISTS', r.batch) == 1 then
      return redis.error_reply('PHONONSTATE ' .. r.batch .. ' exists although nothing is running')
    end
    hold(r)
  end
  if not r.registry then
    call('SADD', r.fence, dead)
    call('PEXPIRE', r.fence, FENCE_MS)
  end
  call('ZREM', r.members, dead)
  local owner = running[1] or ''
  if args[6] and (owner == dead or owner == args[7] or string.sub(owner, 1, 6) ~= 'class:') then
    redis.pcall('ZREM', args[6], r.base)  -- a tombstone names nothing
  end
  local in_the_way = held[1] and process_of(held[1]) == dead
  if in_the_way then
    call('DEL', r.lock)
  end
  for _, holder in ipairs(sharers) do
    if process_of(holder) == dead then
      drop_sharer(r, holder)
      in_the_way = true
    end
  end
  for _, holder in ipairs(waiters) do
    if process_of(holder) == dead then
      quit_queue(r, holder)
      in_the_way = in_the_way or not held[1]
    end
  end
  if in_the_way then
    wake_next(r)
  end
  local ended = remaining(r) == 0
  if call('EXISTS', r.parties) == 1 then
    wake_parties(r)
  end
  if ended and not is_incomplete(r, args[5]) then
    call('DEL', r.modified)
  end
  if ended then
    if running[1] and total > 0 then
      call('HSET', r.running, 'due', total)
    end
  end
  if running[1] == dead then
    call('HSET', r.running, 'owner', r.pid)
    local token, due_in = tonumber(running[2]), tonumber(running[3] or 0) - r.now
    if due_in > 0 then
      return { 'later', 0, token, due_in }
    end
    return { 'run', 0, token, call('HINCRBY', r.running, 'crashes', args[4]) }
  end
  if ended and total > 0 and not running[1] then
    return { 'run', 0, start(r, total, total), 0 }
  end
  return { 'free', let_go(r), running[1] or '' }
end, true)
