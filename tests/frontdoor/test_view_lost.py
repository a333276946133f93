"""What the door does when nobody tells it anything any more, and before anybody has."""

import asyncio
import json
import subprocess
import sys

import httpx

from recovery.frontdoor.view import Model, Replica, Snapshot, View
from tests.frontdoor.world import ROOT, Door, Load, Sim, World, expected_text
from tests.helpers import wait_until

BODY = {"model": "m", "prompt": "Hello", "max_tokens": 4}


class TalkedTo(Door):
    """A door told by lines on its standard input."""

    def open(self, *lines: dict[str, object]) -> None:
        command = [
            sys.executable,
            "-m",
            "recovery.frontdoor",
            "--view",
            "-",
            "--port",
            "0",
            "--metrics-port",
            "0",
            "--reports",
            str(self.reports),
        ]
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        for line in lines:
            self.say(line)
        wait_until(lambda: "front door on" in self.text, within_s=60)
        words = self.text[self.text.index("front door on") :].split("\n")[0].replace(",", "").split()
        self.port, self.metrics_port = int(words[3]), int(words[-1])

    def say(self, line: dict[str, object]) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def silence(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.close()


def fleet(*sims: Sim, **row: object) -> dict[str, object]:
    return {"models": [{"name": "m", "replicas": [sim.row(**row) for sim in sims]}]}


def test_before_the_first_word_no_model_is_unknown(world: World) -> None:
    (sim,) = world.sims(1)
    door = TalkedTo(world.folder)
    world.parts.append(door)
    door.open()
    answer = httpx.post(f"{door.url}/v1/completions", json=BODY, timeout=60)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    door.say(fleet(sim))
    wait_until(lambda: httpx.post(f"{door.url}/v1/completions", json=BODY, timeout=60).status_code, 200, within_s=30)
    door.silence()


def test_while_the_source_is_away_the_door_finds_out_itself_who_is_back(world: World) -> None:
    """
    The last word was "starting"; the replica becomes ready while nobody can say so.
    """
    (sim,) = world.sims(1)
    door = TalkedTo(world.folder)
    world.parts.append(door)
    door.open(fleet(sim, routable=False, state="starting"))
    door.silence()
    wait_until(lambda: httpx.post(f"{door.url}/v1/completions", json=BODY, timeout=60).text, lambda t: expected_text("Hello", 4) in t, 60)


def test_kills_and_restarts_cost_nothing_while_the_source_is_away(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "100")
    door = TalkedTo(world.folder)
    world.parts.append(door)
    door.open(fleet(*sims, run="7"))
    door.silence()

    async def run() -> Load:
        async with Load(door, streaming=True, chat=False, tokens=50) as load:
            for victim in sims:
                await load.finished(16)
                victim.kill()
                await load.finished(16)
                victim.start()
                await asyncio.to_thread(victim.ready)
        return load

    assert asyncio.run(run()).failures() == []


def test_a_view_that_lost_its_source_forgets_nothing() -> None:
    one, two = (Replica(instance=f"m-{i}", model="m", host="h", port=1) for i in (0, 1))
    view = View()
    seen: list[Snapshot] = []
    view.listen(seen.append)
    assert not view.known and seen == []
    view.apply(Snapshot(models=(Model(name="m", replicas=(one,)),)))
    view.lost()
    assert not view.fed and [r.instance for r in view.snapshot.models[0].replicas] == ["m-0"] and len(seen) == 1
    view.apply(Snapshot(models=(Model(name="m", replicas=(two,)),)))
    assert view.fed and [r.instance for r in view.snapshot.models[0].replicas] == ["m-1"] and len(seen) == 2
