"""The Lua scripts: what has to happen on the server in one step. Every walk through this adapter ends in one of them.

Keys: `base` is the stream's name made into a hash tag, so that whatever lies beside a stream shares its slot.

    base:meta                 hash    labels (channel, group/<g>), positions, loss counters
    base:id:<message id>      string  publish dedup
    base:later                zset    delayed publishes by due time
    base:g:<group>:due        zset    entries that wait under the consumer @delayed, by due time
    base:g:<group>:history    hash    entry id -> History
    base:g:<group>:beat       zset    consumer -> time of its last heartbeat (0: it is known to be dead)
    base:g:<group>:inbox      stream  redrives for this group alone

Times are milliseconds of the server's clock. A script answers with words for what the caller has to decide about.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any

from redis.exceptions import NoScriptError

PRELUDE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local at = 0
local function arg() at = at + 1; return ARGV[at] end
local function num() return tonumber(arg()) end
local function source() return {stream = arg(), base = arg(), group = arg(), me = arg(), queue = arg() == '1'} end
local function key(s, what) return s.base .. ':g:' .. s.group .. ':' .. what end
local function failed(r) return type(r) == 'table' and r.err end
local function number(id) local a, b = string.match(id, '(%d+)-(%d+)'); return tonumber(a), tonumber(b) end
local function before(x, y)
  local a, b = number(x)
  local c, d = number(y)
  return a < c or (a == c and b < d)
end
local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
local function groups(stream)
  local found = {}
  local all = redis.pcall('XINFO', 'GROUPS', stream)
  if failed(all) then return found end
  for _, flat in ipairs(all) do
    local g = named(flat)
    found[g.name] = g
  end
  return found
end
-- who holds an entry ('' nobody), how often it was handed out; or an error
local function holder(s, id)
  local p = redis.pcall('XPENDING', s.stream, s.group, id, id, 1)
  if failed(p) then return nil, 0, p.err end
  if #p == 0 then return '', 0 end
  return p[1][2], p[1][4]
end
-- drops the oldest entries of a stream that is ours. What that loses is found out by the readers: of a queue by the
-- number kept here, of a log by its counters, or before 7.0 by the first unread entry of each group
local function trim_to(stream, base, how, limit, queue)
  if not queue then
    for name, g in pairs(groups(stream)) do
      if g['entries-read'] == nil then
        local last, field = g['last-delivered-id'], 'next/' .. name
        local known = redis.call('HGET', base .. ':meta', field)
        local first = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
        if first and not (known and before(last, known)) then
          redis.pcall('HSET', base .. ':meta', field, first[1])
        end
      end
    end
  end
  local n = redis.call('XTRIM', stream, how, '=', limit)
  if n > 0 and queue then redis.pcall('HINCRBY', base .. ':meta', 'trimmed', n) end
  return n
end
-- by age; looked at first: once a script has written, even nothing, the server no longer refuses it for lack of memory
local function trim_old(stream, base, age, queue)
  if age <= 0 or #redis.call('XRANGE', stream, '-', now - age - 1, 'COUNT', 1) == 0 then return end
  trim_to(stream, base, 'MINID', now - age, queue)
end
-- publishes whose time has come
local function flush_later(stream, base)
  for _, packed in ipairs(redis.call('ZRANGEBYSCORE', base .. ':later', '-inf', now, 'LIMIT', 0, 200)) do
    if failed(redis.pcall('XADD', stream, '*', unpack(cmsgpack.unpack(packed)[2]))) then return end
    redis.call('ZREM', base .. ':later', packed)
  end
end
"""

#: Publish, settle, give back, mark: many at once, in the order given. Answers 1 or a word for each.
COMMIT = (
    PRELUDE
    + """
local channels, sources, answers = {}, {}, {}
for i = 1, num() do
  channels[i] = {stream = arg(), base = arg(), window = num(), events = num(), bytes = num(), age = num(),
                 queue = arg() == '1', reject = arg() == '1'}
end
for i = 1, num() do sources[i] = source() end

local function look(c)
  local kind = redis.call('TYPE', c.stream).ok
  c.len, c.used, c.each = 0, 0, 0
  if kind == 'none' then c.wrong = 'MISSING' return end
  if kind ~= 'stream' then c.wrong = 'WRONGTYPE ' .. c.stream .. ' is a ' .. kind .. ', not a stream' return end
  flush_later(c.stream, c.base)
  trim_old(c.stream, c.base, c.age, c.queue)
  c.len = redis.call('XLEN', c.stream)
  if c.bytes > 0 and c.len > 0 then
    c.used = redis.call('MEMORY', 'USAGE', c.stream, 'SAMPLES', 10)
    c.each = c.used / c.len
  end
end
-- how many of the oldest may go without losing what some group has not settled
local function handled(c, wanted)
  local safe = nil
  for name, g in pairs(groups(c.stream)) do
    local first = redis.call('XPENDING', c.stream, name)[2]
    local bound = first or g['last-delivered-id']
    if safe == nil or before(bound, safe.id) or bound == safe.id and first then
      safe = {id = bound, open = first and true}
    end
  end
  if safe == nil then return false end
  local oldest = redis.call('XRANGE', c.stream, '-', '+', 'COUNT', wanted)
  local last = oldest[#oldest]
  return #oldest == wanted and (before(last[1], safe.id) or (last[1] == safe.id and not safe.open))
end
-- makes room for one more; an error text when there is none
local function refuse(c, size)
  if not c.len then look(c) end
  if c.wrong then return c.wrong end
  local over = 0
  if c.events > 0 then over = c.len + 1 - c.events end
  if c.bytes > 0 and c.used + size > c.bytes then
    if size > c.bytes then return 'LARGE ' .. c.bytes end
    over = math.max(over, math.min(c.len, math.ceil((c.used + size - c.bytes) / math.max(c.each, 1))))
  end
  if over <= 0 then return end
  if c.reject and (c.queue or not handled(c, over)) then return 'FULL' end
  local n = trim_to(c.stream, c.base, 'MAXLEN', c.len - over, c.queue)
  c.len, c.used = c.len - n, c.used - n * c.each
end
local function dedup_key(o) return o.c.window > 0 and o.c.base .. ':id:' .. o.id end
local function put(o, undo)
  local c, id = o.c, dedup_key(o)
  if id then
    local fresh = redis.pcall('SET', id, '1', 'NX', 'PX', c.window)
    if failed(fresh) then return fresh.err end
    if not fresh then return end
    undo[#undo + 1] = {'DEL', id}
  end
  local why = refuse(c, o.size)
  if why then return why end
  if o.delay > 0 then
    local packed = cmsgpack.pack({o.id, o.fields})
    local r = redis.pcall('ZADD', c.base .. ':later', now + o.delay, packed)
    if failed(r) then return r.err end
    undo[#undo + 1] = {'ZREM', c.base .. ':later', packed}
  else
    local r = redis.pcall('XADD', c.stream, '*', unpack(o.fields))
    if failed(r) then return r.err end
    undo[#undo + 1] = {'XDEL', c.stream, r}
  end
  c.len = c.len + 1
  c.used = c.used + o.size
end
local function put_all(outs)
  for _, o in ipairs(outs) do -- looked at before anything is written
    local why, id = refuse(o.c, o.size), dedup_key(o)
    if why and not (id and redis.call('EXISTS', id) == 1) then return why end
  end
  local undo = {}
  for _, o in ipairs(outs) do
    local ok, why = pcall(put, o, undo) -- no error may leave an id behind whose event was not published
    if not ok then why = failed(why) or tostring(why) end
    if why then
      for i = #undo, 1, -1 do redis.call(unpack(undo[i])) end
      return why
    end
  end
end
local function outputs()
  local outs = {}
  for i = 1, num() do
    local o = {c = channels[num()], id = arg(), delay = num(), size = num(), fields = {}}
    local n = num()
    for f = 1, n do o.fields[f] = arg() end
    outs[i] = o
  end
  return outs
end

local acts = {}
function acts.publish()
  return put_all(outputs())
end
function acts.settle(s, id)
  local force, forget, outs = arg() == '1', arg() == '1', outputs()
  local who, _, err = holder(s, id)
  if not force then
    if err then return err end
    if who == '' then return 'GONE' end
    if who ~= s.me then return 'TAKEN' end
  end
  local why = put_all(outs)
  if why then return why end
  if err then return end
  redis.call('XACK', s.stream, s.group, id)
  if s.queue then redis.call('XDEL', s.stream, id) end
  if forget then redis.call('HDEL', key(s, 'history'), id) end
end
function acts.back(s, id)
  local owner, history, delay, count = arg(), arg(), num(), arg()
  local who, had, err = holder(s, id)
  if err then return err end
  if who == '' then return 'GONE' end
  if who ~= owner then return 'TAKEN' end
  local r = history ~= '' and redis.pcall('HSET', key(s, 'history'), id, history)
  if failed(r) then return r.err end
  r = redis.pcall('ZADD', key(s, 'due'), now + delay, id)
  if failed(r) then return r.err end
  local moved = redis.call('XCLAIM', s.stream, s.group, '@delayed', 0, id, 'JUSTID', 'RETRYCOUNT',
                           count == '' and had or count)
  if #moved > 0 then return end
  redis.call('ZREM', key(s, 'due'), id) -- 7.0 forgets what was deleted from outside; 6.2 notices when it is due
  redis.call('HDEL', key(s, 'history'), id)
  return 'DELETED'
end
function acts.mark(s, id)
  local history = arg()
  local who, _, err = holder(s, id)
  if err then return err end
  if who == '' then return 'GONE' end
  if who ~= s.me then return 'TAKEN' end
  local r = redis.pcall('HSET', key(s, 'history'), id, history)
  return failed(r)
end
for i = 1, num() do
  local act, s = arg(), sources[num()]
  answers[i] = acts[act](s, s and arg()) or 1
end
return answers
"""
)

COMMIT_DIGEST = sha1(COMMIT.encode(), usedforsecurity=False).hexdigest()

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
local lease, reap, expected, age, deaths, sources = num(), arg() == '1', num(), num(), num(), num()
local dead, all = {}, {}
for i = 1, deaths do dead[i] = arg() end
for i = 1, sources do all[i] = source() end
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
#: `how`: count (7.0, where the counters hold) or next (the first unread entry is remembered).
LOST = (
    PRELUDE
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

#: For each id: 1 it is ours, 0 it is gone, 2 another has it. With `force` what nobody holds becomes ours.
MINE = (
    PRELUDE
    + """
local s, force, answers = source(), arg() == '1', {}
for i = 1, num() do
  local id = arg()
  local who = holder(s, id)
  if who == '' and force then
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

#: What recover needs: for each (id, consumer) its history ('' fresh), or false when that consumer has it no more.
HELD = (
    PRELUDE
    + """
local s, answers = source(), {}
for i = 1, num() do
  local id, owner = arg(), arg()
  local who, count = holder(s, id)
  answers[i] = who == owner and (redis.call('HGET', key(s, 'history'), id) or '')
end
return answers
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

_DIGESTS: dict[str, str] = {}


async def run(client: Any, script: str, keys: list[str], args: list[object]) -> Any:
    """Runs a script, sending its text only to a server that does not know it. Raises the library's errors."""
    digest = _DIGESTS.get(script)
    if digest is None:
        digest = _DIGESTS[script] = sha1(script.encode(), usedforsecurity=False).hexdigest()
    try:
        return await client.execute_command("EVALSHA", digest, len(keys), *keys, *args)
    except NoScriptError:
        return await client.execute_command("EVAL", script, len(keys), *keys, *args)
