"""
Rows: compare and set, tokens, claims, what is due.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from recovery.adapters import rows
from recovery.core.change import Commit, Count, Incident, ModelEvent
from recovery.core.instance import Desired, LastExit, ProbeMemory
from recovery.core.states import State
from recovery.errors import LeaseHeldError, SchemaError, StaleTokenError, VersionConflictError
from tests.contract.world import World, instance, on_host


def at_once(number: int, act: Callable[[int], Any]) -> list[Any]:
    """Run `act(0)`, `act(1)`, … in threads that begin together; return results and errors."""
    ready, outcomes = threading.Barrier(number), [None] * number

    def run(index: int) -> None:
        ready.wait(60)
        try:
            outcomes[index] = act(index)
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def test_a_row_comes_back_as_it_was_written(world: World) -> None:
    now = world.store.now()
    row = instance(
        state=State.HEALTHY,
        token=1_795_553_060_411_234,
        run=1_795_553_060_411_234,
        base_url="http://gpu-1:8001/v1",
        due=now + 12.345678,
        look_at=now + 0.1,
        lease_until=now + 1 / 3,
        not_before=now,
        reason="läuft ☃",
        probe=ProbeMemory(failures=2, steps=12.5),
        last_exit=LastExit(token=4, at=now, signal=9),
        sees={"oom": 2},
    )
    written = world.put_new(row)
    assert written == row.evolve(version=written.version)
    assert world.store.load(row.id) == written
    assert world.store.load("nobody-0") is None
    read, at = world.store.load_now(row.id)
    assert read == written and now <= at <= world.store.now()
    assert world.store.load_now("nobody-0")[0] is None


def test_versions_rise_and_only_the_present_one_can_be_written_over(world: World) -> None:
    first = world.put_new(instance())
    second = world.put_next(first, reason="again")
    assert second.version > first.version > 0
    for stale in (0, first.version, second.version + 1):
        with pytest.raises(VersionConflictError, match="cannot commit vllm-0"):
            world.store.commit(Commit(after=first.evolve(reason="late"), expected_version=stale))
    assert world.store.load("vllm-0") == second


def test_a_row_that_is_absent_is_written_with_version_0_only(world: World) -> None:
    with pytest.raises(VersionConflictError):
        world.store.commit(Commit(after=instance(), expected_version=7))
    assert world.store.load("vllm-0") is None


def test_a_row_lost_and_written_again_never_takes_an_old_version(world: World) -> None:
    before = world.put_new(instance())
    world.store.delete(before.id)
    again = world.put_new(instance())
    assert again.version != before.version
    with pytest.raises(VersionConflictError):
        world.put_next(before, reason="decided on the row that was lost")


def test_of_many_commits_on_one_version_one_wins(world: World) -> None:
    row = world.put_new(instance())
    outcomes = at_once(16, lambda index: world.put_next(row, reason=f"by {index}"))
    won = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert len(won) == 1, outcomes
    assert [type(outcome) for outcome in outcomes if outcome is not won[0]] == [VersionConflictError] * 15
    assert world.store.load(row.id) == won[0]


def test_of_many_first_commits_one_wins(world: World) -> None:
    outcomes = at_once(12, lambda index: world.put_new(instance(reason=f"by {index}")))
    assert sum(isinstance(outcome, VersionConflictError) for outcome in outcomes) == 11


def test_no_commit_is_lost_when_everybody_reads_again(world: World) -> None:
    world.put_new(instance(attempt=0))

    def add(_: int) -> None:
        for _ in range(10):
            while True:
                row = world.store.load("vllm-0")
                try:
                    world.put_next(row, attempt=row.attempt + 1)
                    break
                except VersionConflictError:
                    continue

    assert at_once(4, add) == [None] * 4
    assert world.store.load("vllm-0").attempt == 40


def test_tokens_only_rise(world: World) -> None:
    row = world.put_new(instance(token=1_795_553_060_411_234))
    same = world.put_next(row, reason="same token")
    for lower in (1_795_553_060_411_233, 999_999_999_999_999, 0):
        with pytest.raises(StaleTokenError, match="1795553060411234"):
            world.put_next(same, token=lower)
    higher = world.put_next(same, token=10_000_000_000_000_000)
    assert world.store.load(row.id) == higher


def test_a_refused_commit_writes_nothing_at_all(world: World) -> None:
    row = world.put_new(instance(due=1.0))
    position, _ = world.store.snapshot()
    refused = {
        "events": (ModelEvent(kind="noise"),),
        "counts": (Count(name="noise_total"),),
        "incident": Incident(id="i1", model="vllm", instance="vllm-0", host="gpu-1", token=5, opened_at=1.0, cause="exit"),
    }
    with pytest.raises(VersionConflictError):
        world.store.commit(Commit(after=row.evolve(due=9.0), expected_version=row.version + 1, **refused))
    with pytest.raises(StaleTokenError):
        world.store.commit(Commit(after=row.evolve(token=1), expected_version=row.version, **refused))
    assert world.store.load(row.id) == row
    assert world.store.events("vllm", 10) == ()
    assert world.store.counters() == {}
    assert world.store.incidents(None, 10) == ()
    assert world.store.follow(position, 0) == ()


def test_ids_and_reading_many(world: World) -> None:
    written = [world.put_new(instance(name)) for name in ("b-1", "a-0", "b-0")]
    assert world.store.ids() == ("a-0", "b-0", "b-1")
    assert world.store.load_many(["b-1", "nobody-0", "a-0"]) == (written[0], written[1])
    assert world.store.load_many([]) == ()
    assert {row.id for row in world.store.load_all()} == {"a-0", "b-0", "b-1"}


def test_a_claim_takes_the_lease_and_is_due_at_its_end(world: World) -> None:
    row = world.put_new(instance(token=7))
    before = world.store.now()
    claimed = world.store.claim(row.id, 7, 10.0)
    after = world.store.now()
    assert claimed.version > row.version
    assert before + 10 - 0.001 <= claimed.lease_until <= after + 10.001
    assert claimed.due == claimed.lease_until
    assert claimed == row.evolve(version=claimed.version, lease_until=claimed.lease_until, due=claimed.due)
    assert world.store.load(row.id) == claimed
    with pytest.raises(VersionConflictError):
        world.put_next(row, reason="decided before the claim")


def test_a_claimed_row_is_delivered_again_when_the_lease_ends(world: World) -> None:
    world.put_new(instance(token=7))
    world.store.claim("vllm-0", 7, 0.2)
    assert world.store.hosts_with_rows() == ("gpu-1",)
    world.pass_time(0.25)
    assert world.store.pop_due("steps", "gpu-1", 4.0, 10) == ("vllm-0",)
    assert world.store.claim("vllm-0", 7, 10.0).token == 7


def test_of_many_claims_one_wins(world: World) -> None:
    world.put_new(instance(token=7))
    outcomes = at_once(12, lambda _: world.store.claim("vllm-0", 7, 30.0))
    assert sum(isinstance(outcome, LeaseHeldError) for outcome in outcomes) == 11


@pytest.mark.parametrize("token", [6, 8])
def test_a_claim_with_another_token_is_stale(world: World, token: int) -> None:
    row = world.put_new(instance(token=7))
    with pytest.raises(StaleTokenError, match="its token is 7"):
        world.store.claim(row.id, token, 10.0)
    assert world.store.load(row.id) == row


def test_a_claim_on_a_row_that_is_wanted_stopped_or_is_gone_is_stale(world: World) -> None:
    row = world.put_new(instance(token=7, desired=Desired.STOPPED))
    with pytest.raises(StaleTokenError, match="wanted stopped"):
        world.store.claim(row.id, 7, 10.0)
    with pytest.raises(StaleTokenError, match="no such instance"):
        world.store.claim("nobody-0", 7, 10.0)


def test_a_claim_waits_for_its_time(world: World) -> None:
    now = world.store.now()
    world.put_new(instance("early-0", token=7, not_before=now + 60))
    with pytest.raises(LeaseHeldError, match="not to start before"):
        world.store.claim("early-0", 7, 10.0)
    world.put_new(instance("past-0", token=7, not_before=now))
    assert world.store.claim("past-0", 7, 10.0).id == "past-0"


def test_a_claim_may_come_a_tenth_of_a_second_early(world: World) -> None:
    row = world.put_new(instance(token=7, not_before=world.store.now() + 1.0))
    world.pass_time(0.95)
    assert world.store.claim(row.id, 7, 10.0).lease_until > row.not_before


def test_a_commit_gives_the_lease_back(world: World) -> None:
    world.put_new(instance(token=7))
    claimed = world.store.claim("vllm-0", 7, 60.0)
    world.put_next(claimed, lease_until=0.0, due=None)
    assert world.store.claim("vllm-0", 7, 60.0).version > claimed.version


@pytest.mark.parametrize(("queue", "field"), [("steps", "due"), ("looks", "look_at")])
def test_what_is_due_is_given_once_and_pushed_on(world: World, queue: Any, field: str) -> None:
    now = world.store.now()
    world.put_new(instance("a-0", **{field: now - 2}))
    world.put_new(instance("b-0", **{field: now - 3}))
    world.put_new(instance("later-0", **{field: now + 600}))
    world.put_new(instance("never-0"))
    other = "looks" if queue == "steps" else "steps"
    assert world.store.pop_due(other, "gpu-1", 0.3, 10) == ()
    assert world.store.pop_due(queue, "gpu-2", 0.3, 10) == ()
    assert world.store.pop_due(queue, "gpu-1", 0.3, 1) == ("b-0",), "the one that waits longest comes first"
    assert world.store.pop_due(queue, "gpu-1", 600, 10) == ("a-0",)
    assert world.store.pop_due(queue, "gpu-1", 600, 0) == ()
    world.pass_time(0.35)
    assert world.store.pop_due(queue, "gpu-1", 600, 10) == ("b-0",), "pushed on, not removed"
    assert world.store.load("b-0").evolve(version=0).due == (now - 3 if field == "due" else None), "the row itself is not moved"


def test_what_is_due_is_given_to_one_of_many(world: World) -> None:
    now = world.store.now()
    for index in range(20):
        world.put_new(instance(f"m-{index}", due=now - 1))
    outcomes = at_once(8, lambda _: world.store.pop_due("steps", "gpu-1", 60, 5))
    given = [name for ids in outcomes for name in ids]
    assert sorted(given) == sorted(f"m-{index}" for index in range(20))


def test_a_commit_sets_and_clears_what_is_due(world: World) -> None:
    row = world.put_new(instance(due=1.0, look_at=1.0))
    row = world.put_next(row, due=None)
    assert world.store.pop_due("steps", "gpu-1", 60, 10) == ()
    assert world.store.pop_due("looks", "gpu-1", 0, 10) == ("vllm-0",)
    assert world.store.hosts_with_rows() == ("gpu-1",)
    world.put_next(row, look_at=None)
    assert world.store.pop_due("looks", "gpu-1", 0, 10) == ()
    assert world.store.hosts_with_rows() == ()


def test_a_row_that_moves_is_due_on_its_new_host_only(world: World) -> None:
    row = world.put_new(instance(due=1.0, look_at=1.0))
    world.put_new(instance("stays-0", due=1.0))
    row = world.put_next(row, placement=on_host(row, "gpu-2"))
    assert world.store.hosts_with_rows() == ("gpu-1", "gpu-2")
    assert world.store.pop_due("steps", "gpu-1", 0, 10) == ("stays-0",)
    assert world.store.pop_due("looks", "gpu-1", 0, 10) == ()
    assert world.store.pop_due("steps", "gpu-2", 0, 10) == ("vllm-0",)
    assert world.store.pop_due("looks", "gpu-2", 0, 10) == ("vllm-0",)
    world.put_next(row, placement=on_host(row, "gpu-3"))
    assert world.store.hosts_with_rows() == ("gpu-1", "gpu-3")


def test_a_deleted_row_is_gone_from_everywhere(world: World) -> None:
    row = world.put_new(instance(due=1.0, look_at=1.0, base_url="http://gpu-1:8001/v1", state=State.HEALTHY))
    position, _ = world.store.snapshot()
    world.store.delete(row.id)
    assert world.store.load(row.id) is None
    assert world.store.ids() == ()
    assert world.store.pop_due("steps", "gpu-1", 0, 10) == ()
    assert world.store.hosts_with_rows() == ()
    (change,) = world.store.follow(position, 0)
    assert (change.instance, change.model, change.state, change.run, change.routable) == ("vllm-0", "vllm", "deleted", None, False)
    assert change.version > row.version and change.base_url is None
    world.store.delete("nobody-0")
    assert world.store.follow(change.id, 0) == ()


def test_a_row_of_a_newer_schema_is_refused(world: World) -> None:
    world.put_new(instance())
    world.set_document("vllm-0", schema_version=2, a_field_of_the_future=True)
    with pytest.raises(SchemaError, match="upgrade this part"):
        world.store.load("vllm-0")


def test_a_row_of_a_newer_schema_hides_no_other(world: World) -> None:
    world.put_new(instance())
    other = world.put_new(instance(id="other-0", model="other"))
    world.set_document("vllm-0", schema_version=2, a_field_of_the_future=True)
    assert world.store.load_all() == world.store.snapshot()[1] == world.store.load_many(("other-0", "vllm-0")) == (other,)
    assert world.store.ids() == ("other-0", "vllm-0")
    (why,) = world.store.unreadable().items()
    assert why == ("vllm-0", "cannot read the row of 'vllm-0': it has schema 2, this part knows 1; upgrade this part")


def test_a_newer_schema_that_happens_to_fit_is_refused_too(world: World) -> None:
    world.put_new(instance())
    world.set_document("vllm-0", schema_version=2)
    with pytest.raises(SchemaError, match="schema 2"):
        world.store.load("vllm-0")


def test_a_row_that_cannot_be_read_says_which_field(world: World) -> None:
    world.put_new(instance())
    world.set_document("vllm-0", replica="many")
    with pytest.raises(SchemaError, match=r"'vllm-0'.*replica"):
        world.store.load("vllm-0")


def test_a_row_of_an_older_schema_is_migrated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    written = world.put_new(instance(reason="as it was"))
    world.set_document("vllm-0", schema_version=-1, reason="", why="as it was")
    with pytest.raises(SchemaError, match="no migration leads from schema -1"):
        world.store.load("vllm-0")

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in document.items() if name != "why"}, "reason": document["why"]}

    monkeypatch.setitem(rows.MIGRATIONS, -1, rename)
    monkeypatch.setitem(rows.MIGRATIONS, 0, lambda document: {**document, "reason": document["reason"].upper()})
    assert world.store.load("vllm-0") == written.evolve(reason="AS IT WAS"), "every step in its turn"
    world.put_next(world.store.load("vllm-0"))
    monkeypatch.undo()
    assert world.store.load("vllm-0").reason == "AS IT WAS", "the next commit wrote it in the new form"
