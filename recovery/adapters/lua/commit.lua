-- Compare and set of one row, with everything that must be written beside it. Not for Redis Cluster: the keys of a
-- row's former host and of evicted incidents are made here from their stems.
--
-- KEYS  row, rows, queue_hosts, due, looks, changes, events, counters, incidents
-- ARGV  see redis_store.py, RedisStore.commit: the two are read side by side
-- Answers {'ok', version}, {'version', stored} or {'token', stored}.

local row, rows, queue_hosts, due_key, looks_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local changes, events, counters, incidents = KEYS[6], KEYS[7], KEYS[8], KEYS[9]

local position = 0
local function take()
  position = position + 1
  return ARGV[position]
end

-- Whole numbers travel as strings: above 2^53 a Lua number would lie, and Lua prints large ones in scientific form.
local function higher(a, b)
  return #a > #b or (#a == #b and a > b)
end

local due_stem, looks_stem, incident_stem = take(), take(), take()
local id, expected, token, host = take(), take(), take(), take()
local desired, not_before, lease_until, due, look_at, doc = take(), take(), take(), take(), take(), take()

local stored = redis.call('HMGET', row, 'version', 'token', 'host')
local stored_version = stored[1] or '0'
if stored_version ~= expected then
  return {'version', stored_version}
end
if stored[2] and higher(stored[2], token) then
  return {'token', stored[2]}
end

-- A version is the time in microseconds, and always above the last one: a row that was lost and written again can never
-- take the number of another one, so a decision made on a row that Redis forgot is refused like any other stale one.
local time = redis.call('TIME')
local version = string.format('%.0f', tonumber(time[1]) * 1e6 + tonumber(time[2]))
if not higher(version, expected) then
  version = string.format('%.0f', tonumber(expected) + 1)
end

redis.call('HSET', row, 'version', version, 'token', token, 'host', host, 'desired', desired, 'not_before', not_before,
  'lease_until', lease_until, 'due', due, 'doc', doc)
redis.call('SADD', rows, id)

local function settle(key, score)
  if score == '' then
    redis.call('ZREM', key, id)
  else
    redis.call('ZADD', key, score, id)
  end
end

local function note_host(name, due_of, looks_of)
  if redis.call('EXISTS', due_of, looks_of) == 0 then
    redis.call('SREM', queue_hosts, name)
  else
    redis.call('SADD', queue_hosts, name)
  end
end

local former = stored[3]
if former and former ~= host then
  redis.call('ZREM', due_stem .. former, id)
  redis.call('ZREM', looks_stem .. former, id)
  note_host(former, due_stem .. former, looks_stem .. former)
end
settle(due_key, due)
settle(looks_key, look_at)
note_host(host, due_key, looks_key)

local changes_kept, model, state, run, base_url, routable = take(), take(), take(), take(), take(), take()
redis.call('XADD', changes, 'MAXLEN', '~', changes_kept, '*', 'instance', id, 'model', model, 'version', version,
  'state', state, 'run', run, 'base_url', base_url, 'routable', routable)

local history_ttl_s, events_kept, event_count = take(), take(), tonumber(take())
for _ = 1, event_count do
  redis.call('XADD', events, 'MAXLEN', '~', events_kept, '*', 'kind', take(), 'text', take(), 'data', take())
end
if event_count > 0 then
  redis.call('EXPIRE', events, history_ttl_s)
end

for _ = 1, tonumber(take()) do
  redis.call('HINCRBYFLOAT', counters, take(), take())
end

local incidents_kept, incident_id, member, opened_at, body = take(), take(), take(), take(), take()
if incident_id ~= '' then
  redis.call('SET', incident_stem .. incident_id, body, 'EX', history_ttl_s)
  redis.call('ZADD', incidents, opened_at, member)
  -- A member is "id model", so that the incidents of one model are found without reading the others.
  for _, evicted in ipairs(redis.call('ZRANGE', incidents, 0, -(tonumber(incidents_kept) + 1))) do
    redis.call('ZREM', incidents, evicted)
    redis.call('DEL', incident_stem .. string.match(evicted, '^[^ ]+'))
  end
end

return {'ok', version}
