"""The walk's world on a real Redis: the same scripts, but for the clock that they read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import recovery.adapters.redis_store as real
from recovery.adapters.memory_store import ManualClock
from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from recovery.core.instance import Instance
from tests.durability.simworld import World

CLOCK = "walk:clock"


class LuaStore(RedisStore):
    """The real store, with a clock that is moved by hand, and a Redis that can be put back to what it was."""

    def __init__(self, url: RedisUrl) -> None:
        self.clock = ManualClock()
        super().__init__(url, "walk")
        self._beats: dict[str, tuple[float, dict[str, Any]]] = {}

    def _script(self, name: str) -> Callable[..., Any]:
        text = (Path(real.__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
        script: Callable[..., Any] = self._redis.register_script(
            text.replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')")
        )
        return script

    def begin(self) -> None:
        """An empty Redis and a fresh clock."""
        self.clock = ManualClock()
        self._beats = {}
        self._redis.flushdb()
        self.moved()

    def moved(self) -> None:
        """Tell Redis the time."""
        whole = int(self.clock.now)
        self._redis.hset(CLOCK, mapping={"s": whole, "us": int((self.clock.now - whole) * 1e6)})

    def now(self) -> float:
        return self.clock.now

    def load_now(self, instance_id: str) -> tuple[Instance | None, float]:
        return self.load(instance_id), self.now()

    def once(self, key: str, ttl_ms: int) -> bool:
        """Always: a doubled tick then does all its work twice, which is the harder case."""
        return True

    def beat(self, host: str, info: dict[str, Any], ttl_s: float) -> None:
        self._beats[host] = (self.clock.now + ttl_s, info)

    def hosts(self) -> dict[str, dict[str, Any]]:
        return {host: {**info, "age_s": 0.0} for host, (end, info) in self._beats.items() if end > self.clock.now}

    def save(self) -> object:
        """Everything that Redis holds."""
        names = [name for name in self._redis.keys("*") if name != CLOCK.encode()]
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.dump(name)
                pipe.pttl(name)
            said = pipe.execute()
        return list(zip(names, said[::2], said[1::2], strict=True))

    def restore(self, saved: Any) -> None:
        """Put it back."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.flushdb()
            for name, value, ttl_ms in saved:
                if value is not None:
                    pipe.restore(name, max(0, ttl_ms), value)
            pipe.execute()
        self.moved()

    def wipe(self) -> None:
        """Forget everything."""
        self.restore([])


def lua_world(store: LuaStore) -> World:
    """A fresh world on that store."""
    store.begin()
    return World(store, store.clock)
