"""The Lua scripts: what has to happen on the server in one step. Every walk through this adapter ends in one of them;
here is what they share, and the one that publishes and settles.

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

from functools import cache
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


@cache
def _digest(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


async def run(client: Any, script: str, keys: list[str], args: list[object]) -> Any:
    """Runs a script, sending its text only to a server that does not know it. Raises the library's errors."""
    digest = _digest(script)
    try:
        return await client.execute_command("EVALSHA", digest, len(keys), *keys, *args)
    except NoScriptError:
        return await client.execute_command("EVAL", script, len(keys), *keys, *args)
