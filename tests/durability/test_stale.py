"""A look that was asked for long ago is dropped: its rows have been delivered again meanwhile."""

from types import SimpleNamespace

import pytest

from recovery.adapters.memory_store import ManualClock, MemoryStore


@pytest.mark.parametrize(("age_s", "looked"), [(0.0, True), (9.0, True), (11.0, False), (3600.0, False)])
def test_a_late_message_is_dropped_by_redis_time(monkeypatch: pytest.MonkeyPatch, age_s: float, looked: bool) -> None:
    """Redis' clock decides, not Celery's `expires`, which compares the clocks of hosts."""
    from workers import tasks, watcher

    clock = ManualClock()
    submitted: list[list[str]] = []
    worker = SimpleNamespace(service=SimpleNamespace(store=MemoryStore(clock)), looks=SimpleNamespace(submit=submitted.append))
    monkeypatch.setattr(watcher, "current", lambda: worker)
    sent_at = clock.now
    clock.advance(age_s)
    tasks.probe_host(["m-0"], sent_at=sent_at)
    assert bool(submitted) is looked
