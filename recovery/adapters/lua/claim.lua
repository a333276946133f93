-- Take the lease to start one run. The row's due becomes the lease's end, so that a claimant that dies is called again.
--
-- KEYS  row, queue_hosts
-- ARGV  due_stem, id, token, lease_s, early_s (how much before not_before a claim is still right)
-- Answers {'ok', version, lease_until, due, doc}, {'absent'}, {'token', stored}, {'desired', stored},
-- {'lease', until} or {'early', not_before}.

local row, queue_hosts = KEYS[1], KEYS[2]
local due_stem, id, token, lease_s, early_s = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])

local stored = redis.call('HMGET', row, 'version', 'token', 'desired', 'lease_until', 'not_before', 'host', 'doc')
local version, stored_token, desired, lease_until, not_before, host, doc = unpack(stored, 1, 7)
if not version then
  return {'absent'}
end
if stored_token ~= token then
  return {'token', stored_token}
end
if desired ~= 'running' then
  return {'desired', desired}
end

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
if tonumber(lease_until) > now then
  return {'lease', lease_until}
end
if now < tonumber(not_before) - early_s then
  return {'early', not_before}
end

local next_version = string.format('%.0f', tonumber(time[1]) * 1e6 + tonumber(time[2]))
if tonumber(next_version) <= tonumber(version) then
  next_version = string.format('%.0f', tonumber(version) + 1)
end
local till = string.format('%.6f', now + lease_s)
redis.call('HSET', row, 'version', next_version, 'lease_until', till, 'due', till)
redis.call('ZADD', due_stem .. host, till, id)
redis.call('SADD', queue_hosts, host)
return {'ok', next_version, till, till, doc}
