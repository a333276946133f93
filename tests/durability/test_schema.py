"""State of another version: what a newer part wrote is left alone and said to be so, what an older one wrote is taken along."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from recovery.adapters import rows
from recovery.adapters.last_known import LastKnownStore
from recovery.adapters.redis_store import RedisStore
from recovery.core.change import Commit
from recovery.core.commanding import Command, Verb
from recovery.core.fleet import Placement, Policy
from recovery.core.instance import SCHEMA, Instance
from recovery.core.states import State
from recovery.errors import SchemaError, VersionConflictError
from recovery.service import Service
from tests.cli.installation import PATIENCE_S, Installation, installation
from tests.helpers import RedisServer, wait_until

OLDER = SCHEMA - 1
LEASE_S = 15.0
MIGRATING = """
import sys
if sys.argv[:1] != ["-c"]:
    from recovery.adapters import rows
    rows.MIGRATIONS[{older}] = lambda found: {{"reason": found["why"], **{{name: found[name] for name in found if name != "why"}}}}
"""
"""What the next version but one would ship, were the present one its successor: an older row called `reason` by another name."""

Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


class Nobody:
    """A sender whose messages are all lost."""

    def send(self, task: str, kwargs: dict[str, Any], **_timing: Any) -> str | None:
        return None


def newer(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "schema_version": SCHEMA + 1, "a_field_of_the_future": True}


def older(found: dict[str, Any]) -> dict[str, Any]:
    kept = {name: found[name] for name in found if name != "reason"}
    return {**kept, "schema_version": OLDER, "why": found["reason"]}


def written_by_another(monkeypatch: pytest.MonkeyPatch, store: RedisStore, instance_id: str, rewrite: Rewrite) -> bytes:
    """Let a part of another version commit this row through the real script; its document."""

    def commit() -> bool:
        row = store.load(instance_id)
        assert row is not None
        try:
            store.commit(Commit(after=row, expected_version=row.version))
        except VersionConflictError:
            return False
        return True

    with monkeypatch.context() as other:
        other.setattr(rows, "encode", lambda row: json.dumps(rewrite(row.model_dump(mode="json"))).encode())
        wait_until(commit, within_s=PATIENCE_S)
    return document(store, instance_id)


def document(store: RedisStore, instance_id: str) -> bytes:
    with store.url.client() as client:
        found = client.hget(store.keys.row(instance_id), "doc")
    assert isinstance(found, bytes)
    return found


@pytest.fixture(scope="module")
def one() -> Iterator[Installation]:
    with installation("a", "b") as made:
        fleet = json.loads(made.fleet.read_text())
        for name, model in fleet["llmModels"].items():
            model["args"] += ["--served-model-name", name]
        fleet["addresses"] = {"here": "127.0.0.1", "there": "127.0.0.1"}
        fleet["llmModels"]["a"] |= {"host": "here"}
        fleet["llmModels"]["b"] |= {"hosts": ["here", "there"], "reschedule": True, "lease_s": LEASE_S}
        made.fleet.write_text(json.dumps(fleet))
        made.up()
        yield made


def test_a_newer_row_is_left_alone_and_everybody_says_so(one: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """API, command line and workers say what it is and what to do; the model serves on; the other one is repaired as ever."""
    old = {name: one.serves(name) for name in one.models}
    wait_until(lambda: next(row.leased for row in one.wired.store.load_all() if row.id == "b-0"), True, within_s=PATIENCE_S)
    kept = written_by_another(monkeypatch, one.wired.store, "b-0", newer)
    text = f"cannot read the row of 'b-0': it has schema {SCHEMA + 1}, this part knows {SCHEMA}; upgrade this part"
    api = httpx.Client(base_url=f"http://127.0.0.1:{one.api}", timeout=PATIENCE_S)

    wait_until(lambda: api.get("/api/llm/models/b").json().get("detail"), text, within_s=PATIENCE_S)
    assert api.get("/api/llm/models/b").status_code == 503
    assert api.get("/api/llm/models/a").json()["is_healthy"]
    assert [model["id"] for model in api.get("/api/llm/models").json()["models"]] == ["a"]
    assert api.get("/readyz").text == "ok\n1 instances are left alone, since a newer version wrote them: upgrade this part"
    assert "recovery_rows_unreadable 1.0" in api.get("/metrics").text

    status, command, doctor = one.run("status"), one.run("restart", "b"), one.run("doctor")
    assert (status.returncode, "a-0" in status.stdout, f"warning: {text}" in status.stderr) == (0, True, True), status
    assert (command.returncode, command.stderr) == (1, f"error: {text}\n")
    assert (doctor.returncode, f"row: {text}" in doctor.stdout) == (1, True), doctor

    os.kill(old["a"], signal.SIGKILL)
    one.serves("a", but=old["a"])
    asked = {"model": "b", "prompt": "x", "max_tokens": 1}
    served = httpx.post(f"http://127.0.0.1:{one.front}/v1/completions", json=asked, timeout=PATIENCE_S)
    assert served.status_code == 200, served.text
    assert (served.status_code, one.server("b"), document(one.wired.store, "b-0")) == (200, old["b"], kept)
    with pytest.raises(SchemaError, match="upgrade this part"):  # what the control worker answers a script with
        Service(one.wired.store, Nobody()).command("b", Command(verb=Verb.RESTART))

    heard = one.wired.store.now()  # the host beats, takes tasks, and puts off the end of the lease for longer than that lasts
    wait_until(lambda: one.wired.store.hosts()["here"]["served_at"] > heard + LEASE_S + 5, within_s=PATIENCE_S)
    assert one.server("b") == old["b"]
    for part in ("host", "api", "door"):
        wait_until(lambda log=one.home / "logs" / f"{part}.log": text in log.read_text(), within_s=PATIENCE_S)


def test_an_older_row_is_read_and_written_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All parts take it along: nothing is restarted for it, and the next commit writes it in the present form."""
    (tmp_path / "sitecustomize.py").write_text(MIGRATING.format(older=OLDER))
    with installation("a", PYTHONPATH=str(tmp_path)) as one:
        one.up()
        server = one.serves("a")
        kept = written_by_another(monkeypatch, one.wired.store, "a-0", older)
        assert json.loads(kept)["why"]
        wait_until(lambda: "a-0" in (status := one.run("status")).stdout and not status.stderr, within_s=PATIENCE_S)
        assert one.server("a") == server

        os.kill(server, signal.SIGKILL)

        one.serves("a", but=server)
        found = json.loads(document(one.wired.store, "a-0"))
        assert (found["schema_version"], found["restarts_total"], "why" in found) == (SCHEMA, 1, False)
        assert "cannot read" not in "".join(log.read_text() for log in (one.home / "logs").glob("*.log"))


def test_the_front_door_goes_on_with_what_it_knew(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows keep a model that a newer part has written; where that runs it learns from the stream of changes."""
    store, door = RedisStore(own_redis.url), LastKnownStore(own_redis.url)
    place = Placement(host="h", port=9, replica=0)
    row = Instance(id="a-0", model="a", policy=Policy(), placement=place, base_url="http://h:9/v1", state=State.HEALTHY, token=5, run=5)
    store.commit(Commit(after=row, expected_version=0))
    position, (seen,) = door.snapshot()

    moved = seen.evolve(base_url="http://h:10/v1", token=6, run=6)
    with monkeypatch.context() as other:
        other.setattr(rows, "encode", lambda row: json.dumps(newer(row.model_dump(mode="json"))).encode())
        store.commit(Commit(after=moved, expected_version=seen.version))
    assert len(door.follow(position, 0.0) or ()) == 1

    assert store.load_all() == () and [(row.base_url, row.run) for row in door.load_all()] == [("http://h:10/v1", 6)]
    assert LastKnownStore(own_redis.url).load_all() == (), "one that has never known it knows nothing"
