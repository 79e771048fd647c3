"""The Lua scripts of the way in: what is due, heartbeats and relief, unread losses, and who holds what."""

from __future__ import annotations

from orchestrator.brokers.redis.scripts import PRELUDE

#: What is due (and the inbox's new entries), at most `n`: {source, id, fields, count, history} each; then how many due
#: entries were gone, and milliseconds until the next is due (-1: none).
TAKE = (
    PRELUDE
    + """
local n, got, gone, wait = num(), {}, 0, -1
for i = 1, num() do
  local s = source()
  local due, there = key(s, 'due'), redis.call('EXISTS', s.stream) == 1
  if i == 1 then
    if not there then return {got, 0, -1} end
    flush_later(s.stream, s.base)
  elseif not there then
    gone = gone + redis.call('ZCARD', due)
    redis.call('DEL', due, key(s, 'history'))
  elseif not groups(s.stream)[s.group] then -- destroyed from outside: what is in an inbox is not settled
    redis.call('XGROUP', 'CREATE', s.stream, s.group, '0')
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, n - #got)) do
    local who, count, err = holder(s, id)
    if err then return redis.error_reply(err) end
    if who == '@delayed' then
      local entry = redis.call('XCLAIM', s.stream, s.group, s.me, 0, id, 'RETRYCOUNT', count + 1)[1]
      if entry then
        got[#got + 1] = {i - 1, id, entry[2], count + 1, redis.call('HGET', key(s, 'history'), id)}
      else -- deleted from outside while it waited
        gone = gone + 1
        redis.call('XACK', s.stream, s.group, id)
        redis.call('HDEL', key(s, 'history'), id)
      end
    end
    redis.call('ZREM', due, id)
  end
  if i == 2 and there and #got < n then
    local read = redis.call('XREADGROUP', 'GROUP', s.group, s.me, 'COUNT', n - #got, 'STREAMS', s.stream, '>')
    for _, entry in ipairs(read and read[1][2] or {}) do
      got[#got + 1] = {1, entry[1], entry[2], 1, redis.call('HGET', key(s, 'history'), entry[1])}
    end
  end
  for _, waiting in ipairs({due, i == 1 and s.base .. ':later' or nil}) do
    local next = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')[2]
    if next and (wait < 0 or next - now < wait) then wait = math.max(0, next - now) end
  end
end
return {got, gone, wait}
"""
)

#: Heartbeat, retention by age, and (with `reap`) the entries of dead workers. `expected` is what the clock should show:
#: when it was set, or this host slept, heartbeats say nothing of who is alive. Answers {we had been given up, the
#: group's epoch, entries of a queue trimmed so far, entries of the dead that were deleted from outside, the time}.
BEAT = (
    PRELUDE
    + """
local lease, reap, expected, age, dead, all = num(), arg() == '1', num(), num(), {}, {}
for i = 1, num() do dead[i] = arg() end
for i = 1, num() do all[i] = source() end
reap = reap and math.abs(now - expected) < lease / 2
local main, gone, kept = all[1], 0, {}
local beat, meta = key(main, 'beat'), main.base .. ':meta'
for _, name in ipairs(dead) do redis.call('ZADD', beat, 0, name) end
local fresh = redis.call('ZADD', beat, now, main.me)
local seen = named(redis.call('ZRANGE', beat, 0, -1, 'WITHSCORES'))
trim_old(main.stream, main.base, age, main.queue)
local g = groups(main.stream)[main.group]
if g then redis.call('HSET', meta, 'position/' .. main.group, g['last-delivered-id']) end

-- true when nothing is left; what is left of a worker whose journal was read had not been started
local function relieve(s, name, unstarted)
  for _, p in ipairs(redis.call('XPENDING', s.stream, s.group, '-', '+', 500, name)) do
    local id, count = p[1], unstarted and math.max(0, p[4] - 1) or p[4]
    redis.call('ZADD', key(s, 'due'), now, id)
    if #redis.call('XCLAIM', s.stream, s.group, '@delayed', 0, id, 'JUSTID', 'RETRYCOUNT', count) == 0 then
      redis.call('ZREM', key(s, 'due'), id)
      redis.call('HDEL', key(s, 'history'), id)
      gone = gone + 1
    end
  end
  if #redis.call('XPENDING', s.stream, s.group, '-', '+', 1, name) > 0 then return false end
  redis.call('XGROUP', 'DELCONSUMER', s.stream, s.group, name)
  return true
end
for _, s in ipairs(all) do
  local consumers = redis.pcall('XINFO', 'CONSUMERS', s.stream, s.group)
  if failed(consumers) then consumers = {} end
  for _, flat in ipairs(consumers) do
    local c = named(flat)
    local at = tonumber(seen[c.name] or -1)
    if c.name == '@delayed' then -- each must have a due time, whatever became of the zset
      if reap and c.pending > redis.call('ZCARD', key(s, 'due')) then
        for _, p in ipairs(redis.call('XPENDING', s.stream, s.group, '-', '+', 10000, '@delayed')) do
          redis.call('ZADD', key(s, 'due'), 'NX', now, p[1])
        end
      end
    elseif c.name == main.me or not (at == 0 or reap and at > 0 and now - at > lease) then
      kept[c.name] = true -- new here, or heard of by a clock that was set back since: its lease begins
      if at < 0 or at > now + lease then redis.call('ZADD', beat, now, c.name) end
    elseif not relieve(s, c.name, at == 0) then
      kept[c.name] = true
    end
  end
end
for name, at in pairs(seen) do
  at = tonumber(at)
  if not kept[name] and (at == 0 or reap and now - at > lease) then redis.call('ZREM', beat, name) end
end
return {fresh, redis.call('HGET', meta, 'epoch/' .. main.group) or '0',
        tonumber(redis.call('HGET', meta, 'trimmed') or 0), gone, now}
"""
)

#: Unread entries that were trimmed since the last read, called just before the next one; -1: some, number unknown.
#: `how`: count (7.0, where the counters hold) or next (the first unread entry is remembered). While an entry is there
#: that the caller has read, nothing behind it can have been trimmed: that is the usual case, and settled first.
LOST = (
    "if ARGV[6] == 'count' and #redis.call('XRANGE', KEYS[1], '-', ARGV[7], 'COUNT', 1) > 0 then return 0 end"
    + PRELUDE
    + """
local s, how = source(), arg()
local g = groups(s.stream)[s.group]
if not g then return 0 end
local last, meta, lost = g['last-delivered-id'], s.base .. ':meta', 0
if how == 'count' then
  local read = g['entries-read']
  if not read then return 0 end
  local info = named(redis.call('XINFO', 'STREAM', s.stream))
  local first = info['first-entry']
  if first and not before(last, first[1]) then return 0 end
  lost = info['entries-added'] - read - info.length
  if lost <= 0 then return 0 end
  redis.call('XGROUP', 'SETID', s.stream, s.group, last, 'ENTRIESREAD', read + lost)
  redis.call('HINCRBY', meta, 'lost/' .. s.group, lost)
else
  local field = 'next/' .. s.group
  local next = redis.call('XRANGE', s.stream, '(' .. last, '+', 'COUNT', 1)[1]
  local known = redis.call('HGET', meta, field)
  if known and before(last, known) and (not next or before(known, next[1])) then
    lost = -1
    redis.call('HSET', meta, 'lost/' .. s.group, lost)
  end
  if next then redis.call('HSET', meta, field, next[1]) else redis.call('HDEL', meta, field) end
end
return lost
"""
)

#: For each id: 1 it is ours, 0 it is gone, 2 another has it. With `force` (the group was made anew) what nobody holds,
#: or what waits to run again, becomes ours.
MINE = (
    PRELUDE
    + """
local s, force, answers = source(), arg() == '1', {}
for i = 1, num() do
  local id = arg()
  local who = holder(s, id)
  if force and (who == '' or who == '@delayed') then
    redis.call('ZREM', key(s, 'due'), id)
    local got = redis.call('XCLAIM', s.stream, s.group, s.me, 0, id, 'FORCE', 'JUSTID')
    local there = #redis.call('XRANGE', s.stream, id, id) == 1
    if got[1] and there then who = s.me
    elseif got[1] then redis.call('XACK', s.stream, s.group, id) end
  end
  answers[i] = who == s.me and 1 or (who == '' or not who) and 0 or 2
end
return answers
"""
)

#: What recover needs of an entry: its history ('' fresh), or false when that consumer has it no more.
HELD = (
    PRELUDE
    + """
local s, id, owner = source(), arg(), arg()
return holder(s, id) == owner and (redis.call('HGET', key(s, 'history'), id) or '')
"""
)

#: The end of a consumer: its name goes when nothing is pending under it.
LEAVE = (
    PRELUDE
    + """
local beat = nil
for i = 1, num() do
  local s = source()
  beat = beat or key(s, 'beat')
  local left = redis.pcall('XPENDING', s.stream, s.group, '-', '+', 1, s.me)
  if not failed(left) then
    if #left > 0 then return 0 end
    redis.call('XGROUP', 'DELCONSUMER', s.stream, s.group, s.me)
  end
end
redis.call('ZREM', beat, ARGV[at - 1])
return 1
"""
)
