"""Two real servers behind the front door: a killed one costs no stream its text, and a roll under load no request."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import wait_until
from tests.loop.plane import Plane, plane
from tests.vllm.supervised import PATIENCE_S, Servers, Vllm, servers

TOKENS = 300


@pytest.fixture(scope="module", name="plane")
def _plane() -> Iterator[Plane]:
    with plane() as made:
        made.start("door")
        yield made


@pytest.fixture(scope="module")
def tiny(plane: Plane) -> Iterator[Vllm]:
    """Two replicas of one model."""
    with servers(plane) as fleet:
        yield two(fleet)


def two(fleet: Servers) -> Vllm:
    made = fleet.vllm("tiny", ports=2, replicas=2)
    wait_until(lambda: states(made), ["healthy", "healthy"], within_s=PATIENCE_S * 2)
    wait_until(lambda: stream(made, 2)[1], "length", within_s=PATIENCE_S)
    return made


def states(model: Vllm) -> list[str]:
    return [row.state.value for row in model.plane.store.load_all() if row.model == model.id]


def request(model: Vllm, **options: Any) -> urllib.request.Request:
    body = {"model": "tiny", "prompt": "Tell me", "temperature": 0, "ignore_eos": True, **options}
    url = f"http://127.0.0.1:{model.plane.settings.front_port}/v1/completions"
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})


def stream(model: Vllm, tokens: int, seen: list[str] | None = None) -> tuple[str, str | None]:
    """The text of a stream and how it finished; each piece of it goes into `seen` as it comes."""
    pieces, finish = seen if seen is not None else [], None
    with urllib.request.urlopen(request(model, max_tokens=tokens, stream=True), timeout=PATIENCE_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    pieces.append(choice["text"])
                    finish = choice["finish_reason"] or finish
    return "".join(pieces), finish


def busy(model: Vllm) -> list[str]:
    """The instances that have a request of the front door's."""
    reports = model.plane.store.get_many("door:")
    return sorted({key.split(":")[-2] for key, report in reports.items() if report.get("in_flight")})


def test_a_stream_survives_the_death_of_its_server(tiny: Vllm) -> None:
    """
    Cut in the middle and continued on the other replica: the joined text is that of an uninterrupted run.
    """
    whole = stream(tiny, TOKENS)
    assert whole[1] == "length"
    tiny.write_fault("slow:40")
    pieces: list[str] = []
    ended: list[tuple[str, str | None]] = []
    client = threading.Thread(target=lambda: ended.append(stream(tiny, TOKENS, pieces)), daemon=True)
    client.start()
    try:
        wait_until(lambda: len(pieces) > 20 and busy(tiny), within_s=PATIENCE_S)
        (instance,) = busy(tiny)
        run = tiny.plane.view(instance).run
        assert run is not None and len(pieces) < TOKENS // 2
        os.kill(run.server_pid, signal.SIGKILL)
        at_the_kill = len(pieces)
        tiny.clear_fault()
        client.join(PATIENCE_S)
    finally:
        tiny.clear_fault()

    assert ended == [whole]
    assert len(pieces) > at_the_kill
    wait_until(lambda: states(tiny), ["healthy", "healthy"], within_s=PATIENCE_S * 2)


def test_a_roll_under_load_fails_no_request(tiny: Vllm) -> None:
    """
    Both replicas are new afterwards, and every request got its whole answer.
    """
    before = {name: tiny.plane.view(name).run for name in ("tiny-0", "tiny-1")}
    failed: list[str] = []
    done, stop = [0], threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                with urllib.request.urlopen(request(tiny, max_tokens=20), timeout=PATIENCE_S) as answer:
                    choice = json.load(answer)["choices"][0]
                    if choice["finish_reason"] != "length":
                        failed.append(str(choice))
            except OSError as error:
                failed.append(str(error))
            done[0] += 1
            time.sleep(0.05)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(3)]
    for each in clients:
        each.start()
    assert tiny.plane.call("recovery.roll", "tiny")["accepted"]
    wait_until(lambda: (tiny.plane.store.get("roll:tiny") or {}).get("state"), "done", within_s=PATIENCE_S * 4)
    stop.set()
    for each in clients:
        each.join(PATIENCE_S)

    assert failed == [] and done[0] > 50
    for name, old in before.items():
        run = tiny.plane.view(name).run
        assert run is not None and old is not None and run.server_pid != old.server_pid
