-- Return what is due and push it on, so that nobody else delivers it at once and a lost delivery is made again.
--
-- KEYS  the queue (a sorted set: score = when to deliver)
-- ARGV  push_s, limit

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.6f', now), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  redis.call('ZADD', KEYS[1], string.format('%.6f', now + tonumber(ARGV[1])), id)
end
return ids
