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

from typing import TYPE_CHECKING

from orchestrator.brokers.base import Outgoing
from orchestrator.brokers.redis.entries import FIELDS, headers_of
from orchestrator.brokers.redis.link import base
from orchestrator.topology.model import Channel, Mode, Overflow

if TYPE_CHECKING:
    from orchestrator.brokers.redis.pump import Op

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

#: Publish, settle, give back, mark: many at once. Answers {number of the act, word, ...} for those that were not done.
COMMIT = (
    PRELUDE
    + """
local channels, shapes, sources, answers, number_of = {}, {}, {}, {}, 0
for i = 1, num() do -- outputs with the same fields on the same channel; event_id and payload are the 1st and 5th field
  local c = {stream = arg(), base = arg(), window = arg(), events = num(), bytes = num(), age = num(),
             queue = arg() == '1', reject = arg() == '1'}
  c.dedup, c.ids, c.bounded = c.window ~= '0', c.base .. ':id:', c.events > 0 or c.bytes > 0
  c = channels[c.stream] or c
  channels[c.stream] = c
  local shape = {c = c, plain = arg() == '1', n = num()}
  shape.add = {'XADD', c.stream, '*'}
  for f = 1, shape.n do shape.add[2 * f + 2] = arg() end
  shapes[i] = shape
end
for i = 1, num() do -- who holds what most of the batch settles is asked for once
  local s = source()
  s.mine, s.settled, s.forgotten = {}, {}, {}
  local first, last, most = arg(), arg(), arg()
  local held = most ~= '0' and redis.pcall('XPENDING', s.stream, s.group, first, last, most, s.me)
  if held and not failed(held) then
    for _, p in ipairs(held) do s.mine[p[1]] = true end
  end
  sources[i] = s
end

local function look(c)
  local kind = redis.call('TYPE', c.stream).ok
  c.len, c.used, c.each = 0, 0, 0
  if kind == 'none' then c.wrong = 'MISSING' return end
  if kind ~= 'stream' then c.wrong = 'WRONGTYPE ' .. c.stream .. ' is a ' .. kind .. ', not a stream' return end
  flush_later(c.stream, c.base)
  trim_old(c.stream, c.base, c.age, c.queue)
  if not c.bounded then return end
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
-- how many entries have to go for one more; or why it is refused
local function excess(c, size)
  if c.wrong then return 0, c.wrong end
  if not c.bounded then return 0 end
  local n = 0
  if c.events > 0 then n = c.len + 1 - c.events end
  if c.bytes > 0 and c.used + size > c.bytes then
    if size > c.bytes then return 0, 'LARGE ' .. c.bytes end
    n = math.max(n, math.min(c.len, math.ceil((c.used + size - c.bytes) / math.max(c.each, 1))))
  end
  if n > 0 and c.reject and (c.queue or not handled(c, n)) then return 0, 'FULL' end
  return n
end
local function put(o)
  local c, add, last = o.c, o.shape.add, 3 + 2 * o.shape.n
  if c.dedup then
    local fresh = redis.pcall('SET', o.id, '1', 'NX', 'PX', c.window)
    if failed(fresh) then return fresh.err end
    if not fresh then return end
    o.known = true
  end
  local n, why = excess(c, o.size)
  if why then return why end
  if n > 0 then
    n = trim_to(c.stream, c.base, 'MAXLEN', c.len - n, c.queue)
    c.len, c.used = c.len - n, c.used - n * c.each
  end
  for f = 1, o.shape.n do add[2 * f + 3] = ARGV[o.at + f] end
  local r
  if o.delay > 0 then
    o.later = cmsgpack.pack({o.id, {unpack(add, 4, last)}})
    r = redis.pcall('ZADD', c.base .. ':later', now + o.delay, o.later)
  else
    r = redis.pcall(unpack(add, 1, last))
  end
  if failed(r) then return r.err end
  o.added = r
  c.len, c.used = c.len + 1, c.used + o.size
end
local function put_all(outs)
  for _, o in ipairs(outs) do -- looked at before anything is written
    if not o.c.len then look(o.c) end
    local _, why = excess(o.c, o.size)
    if why and not (o.c.dedup and redis.call('EXISTS', o.id) == 1) then return why end
  end
  for i, o in ipairs(outs) do
    local ok, why = pcall(put, o) -- no error may leave an id behind whose event was not published
    if not ok then why = failed(why) or tostring(why) end
    if why then
      for k = i, 1, -1 do
        local u = outs[k]
        if u.later then redis.call('ZREM', u.c.base .. ':later', u.later)
        elseif u.added then redis.call('XDEL', u.c.stream, u.added) end
        if u.known then redis.call('DEL', u.id) end
      end
      return why
    end
  end
end
local function outputs()
  local outs = {}
  for i = 1, num() do
    local shape, id, delay = shapes[num()], nil, 0
    if not shape.plain then id, delay = arg(), num() end
    outs[i] = {c = shape.c, shape = shape, delay = delay, at = at, size = #ARGV[at + 5] + 100,
               id = shape.c.ids .. (id or ARGV[at + 1])}
    at = at + shape.n
  end
  return outs
end
-- why an entry is not `owner`'s, and how often it was handed out
local function foreign(s, id, owner)
  local who, had, err = holder(s, id)
  return err or (who == '' and 'GONE') or (who ~= owner and 'TAKEN') or nil, had
end
local function settle(s, id, outs, force, forget)
  local why = not s.mine[id] and foreign(s, id, s.me)
  if why and not force then return why end
  local refused = outs and put_all(outs)
  if refused or why then return refused end
  s.settled[#s.settled + 1] = id
  if forget then s.forgotten[#s.forgotten + 1] = id end
end
local function back(s, id, owner, history, delay, count)
  local why, had = foreign(s, id, owner)
  if why then return why end
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
local function mark(s, id, history)
  local why = foreign(s, id, s.me)
  if why then return why end
  return failed(redis.pcall('HSET', key(s, 'history'), id, history))
end
local function try(act, ...)
  number_of = number_of + 1
  local ok, why = pcall(act, ...) -- what came before has happened, and is not done again
  if not ok then why = failed(why) or tostring(why) end
  if why then
    answers[#answers + 1] = number_of
    answers[#answers + 1] = why
  end
end
for i = 1, num() do
  local act, s = arg(), sources[num()]
  if act == 'ack' then
    for k = 1, num() do
      try(settle, s, arg())
    end
  elseif act == 'publish' then
    try(put_all, outputs())
  else
    local id = arg()
    if act == 'settle' then
      local force, forget = arg() == '1', arg() == '1'
      try(settle, s, id, outputs(), force, forget)
    elseif act == 'back' then
      try(back, s, id, arg(), arg(), num(), arg())
    else
      try(mark, s, id, arg())
    end
  end
end
for _, s in ipairs(sources) do -- last, and in one go
  if #s.settled > 0 then
    redis.call('XACK', s.stream, s.group, unpack(s.settled))
    if s.queue then redis.call('XDEL', s.stream, unpack(s.settled)) end
  end
  if #s.forgotten > 0 then redis.call('HDEL', key(s, 'history'), unpack(s.forgotten)) end
end
return answers
"""
)


class Source:
    """A stream as one consumer group reads it; `args` is how a script gets it."""

    def __init__(self, stream: str, group: str, me: str, *, queue: bool) -> None:
        self.stream, self.group = stream, group
        self.base = base(stream)
        self.args = (stream, self.base, group, me, int(queue))

    def key(self, what: str) -> str:
        return f"{self.base}:g:{self.group}:{what}"


def pack(batch: list[Op]) -> list[object]:
    """The script's arguments; what acts have in common is said once, and then called by its number."""
    acts, shapes = list[object](), dict[tuple[object, ...], int]()
    said: list[object] = []  # of the shapes of outputs
    sources: dict[Source, tuple[int, list[object]]] = {}  # number, and what is settled
    for op in batch:
        number = 0
        if op.source is not None:
            known = sources.get(op.source)
            if known is None:
                known = sources[op.source] = (len(sources) + 1, [])
            number, settled = known
            if op.act == "ack":
                settled += op.args
                acts += (op.act, number, len(op.args), *op.args)
                continue
            if op.act == "settle":
                settled.append(op.args[0])
        acts += (op.act, number, *op.args)
        if op.act in ("publish", "settle"):
            acts.append(len(op.outputs))
            for message in op.outputs:
                _output(message, shapes, said, acts)
    args = [len(shapes), *said, len(sources)]
    for source, (_, settled) in sources.items():
        args += source.args
        args += (settled[0], settled[-1], 2 * len(settled) + 16) if settled else ("", "", 0)
    return [*args, len(batch), *acts]


def _output(message: Outgoing, shapes: dict[tuple[object, ...], int], said: list[object], acts: list[object]) -> None:
    headers = headers_of(message)
    plain = message.message_id == message.event_id and not message.delay
    shape = (id(message.channel), plain, *headers)
    number = shapes.get(shape)
    if number is None:
        number = shapes[shape] = len(shapes) + 1
        said += (*channel_args(message.channel), int(plain), len(FIELDS) + len(headers), *FIELDS, *headers)
    acts.append(number)
    if not plain:
        acts += (message.message_id, int(message.delay * 1000))
    acts += (
        message.event_id, message.event_type, message.source_agent, message.correlation_id, message.body,
        *headers.values(),
    )  # fmt: skip


def channel_args(channel: Channel) -> tuple[object, ...]:
    """A channel as COMMIT gets it. What is external is never trimmed, bounded or emptied."""
    kept = channel.retention
    bounds = (kept.max_events or 0, kept.max_bytes or 0, int((kept.max_age or 0) * 1000))
    return (
        channel.address,
        base(channel.address),
        int(channel.dedup_window * 1000),
        *((0, 0, 0) if channel.external else bounds),
        int(is_queue(channel)),
        int(channel.overflow is Overflow.REJECT),
    )


def is_queue(channel: Channel) -> bool:
    """Whether settling deletes."""
    return channel.mode is Mode.QUEUE and not channel.external
