"""The Lua scripts of reconcile and operate: labels are compared, and what they guard is changed, in one step."""

from __future__ import annotations

from orchestrator.brokers.redis.scripts import PRELUDE

#: Makes and labels a stream, or with `group` a consumer group on it. `adopt`: heal, whoever made what is there.
CREATE = (
    PRELUDE
    + """
local stream, base, group, owner, label, position, adopt, queue, counts =
  arg(), arg(), arg(), arg(), arg(), arg(), arg() == '1', arg() == '1', arg() == '1'
local meta, field = base .. ':meta', group == '' and 'channel' or 'group/' .. group
local had = redis.call('HGET', meta, field)
if had and cjson.decode(had).owner ~= owner then return 'FOREIGN ' .. cjson.decode(had).owner end
local exists = redis.call('EXISTS', stream) == 1
if group == '' then
  if exists and not had and not adopt then return 'UNLABELLED' end
  if not exists then
    redis.call('XGROUP', 'CREATE', stream, '@new', '0', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, '@new')
  end
  if not had then redis.call('HSET', meta, 'channel', label) end
  return exists and 'OLD' or 'NEW'
end
if not exists then return 'MISSING' end
if groups(stream)[group] then
  if not had and not adopt then return 'UNLABELLED' end
  if not had then redis.call('HSET', meta, field, label) end
  return 'OLD'
end
local info = named(redis.call('XINFO', 'STREAM', stream))
local known = had and redis.call('HGET', meta, 'position/' .. group)
if known and (not adopt or before(position, known)) then position = known end -- it goes on where it was
if number(position) and before(info['last-generated-id'], position) or position == '0-0' then position = '0' end
local create = {'XGROUP', 'CREATE', stream, group, position}
if counts and position == '$' then
  create[6], create[7] = 'ENTRIESREAD', info['entries-added']
elseif counts and position == '0' then
  create[6], create[7] = 'ENTRIESREAD', info['entries-added'] - info.length
end
redis.call(unpack(create))
redis.call('HSET', meta, field, label, 'epoch/' .. group, clock[1] .. '.' .. clock[2])
if had then -- what was read and is not settled waits with its history; who is handling it may take it back first
  local s = {stream = stream, base = base, group = group}
  local waiting = redis.call('ZRANGE', key(s, 'due'), 0, -1)
  if queue and number(position) then
    for _, entry in ipairs(redis.call('XRANGE', stream, '-', position)) do
      if redis.call('ZADD', key(s, 'due'), 'NX', now + 5000, entry[1]) == 1 then waiting[#waiting + 1] = entry[1] end
    end
  end
  for _, id in ipairs(waiting) do
    redis.call('XCLAIM', stream, group, '@delayed', 0, id, 'FORCE', 'JUSTID', 'RETRYCOUNT', 0)
  end
end
return 'NEW'
"""
)

#: Deletes a stream or a group with everything beside it, only while label, last id and number are as planned.
DELETE = (
    PRELUDE
    + """
local stream, base, group, owner, label, last, most =
  arg(), arg(), arg(), arg(), arg(), arg(), num()
local meta, field = base .. ':meta', group == '' and 'channel' or 'group/' .. group
local function drop(g)
  local s = {base = base, group = g}
  local inbox = key(s, 'inbox')
  local i = {base = inbox, group = g}
  redis.call('DEL', key(s, 'due'), key(s, 'history'), key(s, 'beat'), inbox, key(i, 'due'), key(i, 'history'))
  redis.call('HDEL', meta, 'group/' .. g, 'position/' .. g, 'epoch/' .. g, 'lost/' .. g, 'next/' .. g)
end
local had = redis.call('HGET', meta, field)
local exists = redis.call('EXISTS', stream) == 1
if not had then return (exists and (group == '' or groups(stream)[group])) and 'UNLABELLED' or 'ABSENT' end
local said = cjson.decode(had)
if said.owner ~= owner then return 'FOREIGN ' .. said.owner end
if said.id ~= label then return 'CHANGED' end
if group ~= '' then
  local g = exists and groups(stream)[group]
  if g then
    if g.pending > most then return 'CHANGED' end
    redis.call('XGROUP', 'DESTROY', stream, group)
  end
  drop(group)
  return 'DELETED'
end
for _, name in ipairs(redis.call('HKEYS', meta)) do
  local g = string.match(name, '^group/(.*)$')
  local other = g and cjson.decode(redis.call('HGET', meta, name)).owner
  if other and other ~= owner then return 'FOREIGN ' .. other end
end
if exists then
  local info = named(redis.call('XINFO', 'STREAM', stream))
  if info['last-generated-id'] ~= last or info.length > most then return 'CHANGED' end
end
for _, name in ipairs(redis.call('HKEYS', meta)) do
  local g = string.match(name, '^group/(.*)$')
  if g then drop(g) end
end
redis.call('DEL', stream, meta, base .. ':later')
return 'DELETED'
"""
)

#: New settings in a label, while it is the one that was looked at.
RELABEL = """
local had = redis.call('HGET', KEYS[1], ARGV[1])
if not had then return 'CHANGED' end
had = cjson.decode(had)
if had.owner ~= ARGV[2] then return 'FOREIGN ' .. had.owner end
if had.id ~= ARGV[3] then return 'CHANGED' end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[4])
return 'UPDATED'
"""

#: One event for one subscription alone: into the inbox of its group.
REDRIVE = """
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
"""

#: One page of entries without their bodies, which may be large: {id, type or false, whether it is a dead letter} each.
#: With a group, of what is pending in it; what was deleted is as little to be read as a dead letter.
KINDS = (
    PRELUDE
    + """
local found, group = {}, ARGV[4]
local page
if group then page = redis.call('XPENDING', KEYS[1], group, ARGV[1], ARGV[2], ARGV[3])
else page = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3]) end
for i, entry in ipairs(page) do
  local there = not group and entry or redis.call('XRANGE', KEYS[1], entry[1], entry[1])[1]
  local fields = there and named(there[2]) or {}
  found[i] = {entry[1], fields.event_type or false, (not there or fields['dlq-agent']) and 1 or 0}
end
return found
"""
)

#: Lets entries of a queue be read again that its group has passed without settling (it reads more types now).
STRANDED = (
    PRELUDE
    + """
local s = source()
for i = 1, num() do
  local id = arg()
  if holder(s, id) == '' then
    redis.call('ZADD', key(s, 'due'), now, id)
    redis.call('XCLAIM', s.stream, s.group, '@delayed', 0, id, 'FORCE', 'JUSTID', 'RETRYCOUNT', 0)
  end
end
"""
)

#: Moves what is due of a channel that nobody may be reading, and trims it by age.
TEND = (
    PRELUDE
    + """
local stream, base, age, queue = arg(), arg(), num(), arg() == '1'
if redis.call('EXISTS', stream) == 0 then return -1 end
flush_later(stream, base)
trim_old(stream, base, age, queue)
return redis.call('XLEN', stream)
"""
)
