"""Each cause gets its own remedy: real workers and real servers, which fail as vLLM does."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recovery.core.change import Incident
from recovery.core.view import model_view
from recovery.metrics import FleetCollector
from tests.helpers import wait_until
from tests.loop.fleet import Fleet, Model, gone
from tests.loop.plane import HOST, PATIENCE_S, Plane, free_ports

LISTENER = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print('up', flush=True); time.sleep(900)"


def flags(model: Model) -> list[tuple[str, object]]:
    return [(step.flag, step.value) for step in model.row.overrides]


def command(model: Model) -> list[str]:
    """The command line of the living server."""
    return psutil.Process(model.pid).cmdline()


def kinds(incident: Incident) -> list[str]:
    """The steps taken, without what was only seen."""
    return [step["kind"] for step in incident.steps if step["kind"] not in ("failed", "started", "ready")]


def newest(model: Model) -> Incident:
    return model.plane.store.incidents(model.id, 1)[0]


def closed(model: Model) -> Incident:
    """Wait until the newest incident is closed."""
    wait_until(
        lambda: model.plane.store.incidents(model.id, 1), lambda found: found and found[0].closed_at is not None, within_s=PATIENCE_S
    )
    return newest(model)


@contextlib.contextmanager
def listening(port: int, marker: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on a port; with a marker it is one of ours."""
    env = {**os.environ, **({"RECOVERY_RUN": marker} if marker else {})}
    process = subprocess.Popen([sys.executable, "-c", LISTENER, str(port)], env=env, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# --- memory


def test_an_oom_at_load_gets_a_smaller_context_that_stays_until_a_reset(fleet: Fleet, plane: Plane) -> None:
    """
    Served degraded, shown so with the cause, kept across further restarts, undone by `recovery reset`.
    """
    one = fleet.model("oom", "--max-model-len", "8192", "--oom-above-len", "4096")
    one.serves()

    row, incident = one.row, closed(one)
    assert flags(one) == [("--max-model-len", "4096")]
    assert row.overrides[0].cause == incident.cause == "cuda_oom_load"
    assert (kinds(incident), incident.outcome, row.used) == (["override"], "recovered", 1)
    assert "4096" in command(one)
    view = model_view([row], plane.store.now(), {HOST})
    assert view.degraded_since is not None and view.instances[0].overrides[0].cause == "cuda_oom_load"
    degraded = next(family for family in FleetCollector(plane.store).collect() if family.name == "recovery_degraded")
    assert {sample.labels["model"]: sample.value for sample in degraded.samples}["oom"] == 1.0
    said = plane.run(sys.executable, "-m", "recovery.cli", "status").stdout
    assert "degraded since" in " ".join(said.split()) and "because of cuda_oom_load" in " ".join(said.split()), said

    first = one.kill()
    one.serves(but=first)
    assert flags(one) == [("--max-model-len", "4096")] and "4096" in command(one)

    done = plane.run(sys.executable, "-m", "recovery.cli", "reset", one.id)
    assert done.returncode == 0 and "keeps its changed flags until it is restarted" in " ".join(done.stdout.split())
    assert (flags(one), one.row.degraded_since) == ([], None)
    second = one.kill()
    one.serves(but=second)
    assert flags(one) == [("--max-model-len", "4096")] and one.row.used == 2  # the OOM is back, and so is its remedy


def test_the_ladder_goes_down_to_another_argument_list(fleet: Fleet) -> None:
    """
    What flags cannot mend is mended by `fallback_args`, each rung tried within its own budget.
    """
    smaller = ["-m", "recovery.simulator", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "smaller"]
    one = fleet.model(
        "ladder", "--max-model-len", "1024", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.6", "--load-error", "oom",
        fallback_args=[smaller], max_restarts=20, restart_delay=0.05, max_restart_delay=0.05,
    )  # fmt: skip
    one.serves()

    assert flags(one) == [
        ("--max-model-len", "512"),
        ("--max-num-seqs", "1"),
        ("--gpu-memory-utilization", "0.55"),
        ("--gpu-memory-utilization", "0.5"),
        ("--enforce-eager", None),
        ("args", tuple(smaller)),
    ]
    incident = closed(one)
    assert kinds(incident) == ["override"] * 5 + ["fallback_args"]
    outcomes = [step.get("outcome") for step in incident.steps if step["kind"] in ("override", "fallback_args")]
    assert outcomes == ["failed: cuda_oom_load"] * 5 + ["recovered"]
    assert "another argument list" in str(model_view([one.row], 0.0, {HOST}).instances[0].overrides)


def test_when_every_remedy_was_tried_a_human_is_asked(fleet: Fleet) -> None:
    one = fleet.model(
        "hopeless", "--max-model-len", "600", "--max-num-seqs", "1", "--gpu-memory-utilization", "0.5", "--load-error", "oom",
        max_restarts=20, restart_delay=0.05, max_restart_delay=0.05,
    )  # fmt: skip

    row = one.reaches("failed")

    assert flags(one) == [("--enforce-eager", None)]
    assert "every remedy was tried" in row.reason and "--gpu-memory-utilization" in row.reason
    incident = newest(one)
    assert (incident.outcome, kinds(incident)) == ("failed", ["override", "give_up"])


def test_max_restarts_ends_the_ladder(fleet: Fleet) -> None:
    one = fleet.model(
        "short", "--max-model-len", "65536", "--load-error", "oom", max_restarts=2, restart_delay=0.05, max_restart_delay=0.05
    )

    row = one.reaches("failed")

    assert flags(one) == [("--max-model-len", "32768"), ("--max-model-len", "16384")]
    assert "max restarts (2) reached" in row.reason
    assert (row.used, one.starts) == (2, 3)


def test_a_kv_cache_too_small_takes_the_number_of_the_message(fleet: Fleet) -> None:
    one = fleet.model("kv", "--max-model-len", "8192", "--kv-fits-len", "1792")
    one.serves()

    assert flags(one) == [("--max-model-len", "1792")]
    assert (closed(one).cause, one.row.used) == ("kv_cache_too_small", 1)


def test_an_oom_while_serving_costs_a_restart_first_and_then_quality(fleet: Fleet) -> None:
    one = fleet.model("served", "--max-model-len", "8192", "--serve-error", "oom", "--serve-error-after", "2", max_restarts=20)

    one.until(lambda row: row.overrides)

    assert flags(one)[0] == ("--max-model-len", "4096")
    assert one.row.overrides[0].cause == "cuda_oom_serving" and one.row.sees["cuda_oom_serving"] == 2


def test_with_remedies_off_it_is_only_started_again(fleet: Fleet) -> None:
    one = fleet.model("plain", "--load-error", "oom", remedies=False, max_restarts=1)

    one.reaches("failed")

    assert (flags(one), one.starts) == ([], 2)


# --- ports


def test_a_strangers_port_is_left_alone_and_another_is_taken(fleet: Fleet, plane: Plane) -> None:
    """
    Command line, base_url and probes follow; so does the change stream, which front doors read.
    """
    ports = free_ports(2)
    with listening(ports[0]) as stranger:
        one = fleet.model("taken", port_range=ports)
        one.serves()

        assert stranger.poll() is None
        assert (one.row.placement.port, one.row.base_url) == (ports[1], f"http://127.0.0.1:{ports[1]}/v1")
        assert command(one)[command(one).index("--port") + 1] == str(ports[1])
        assert one.row.degraded_since is None and one.row.used == 0
        moved = next(event for event in one.events if event["kind"] == "moved")
        assert "held by" in moved["text"] and moved["data"]["cause"] == "port_in_use"

    first = one.kill()
    one.serves(but=first)
    assert one.row.placement.port == ports[1]  # kept
    plane.call("recovery.reset", one.id)
    second = one.kill()
    one.serves(but=second)
    assert one.row.placement.port == ports[0]  # undone


def test_a_port_that_the_file_fixes_is_moved_too(fleet: Fleet) -> None:
    fixed, spare = free_ports(2)
    with listening(fixed) as stranger:
        one = fleet.model("fixed", "--port", str(fixed), endpoints={"base_url": f"http://127.0.0.1:{fixed}/v1"}, port_range=[spare, spare])
        args = fleet.plane.models["fixed"]["args"]
        at = args.index("{port}")
        fleet.change(one, args=[*args[: at - 1], *args[at + 1 :]])
        one.serves()

        assert stranger.poll() is None
        assert one.row.base_url == f"http://127.0.0.1:{spare}/v1"
        assert one.plane.host.listens(one.instance, spare)


def test_without_a_port_to_spare_the_start_fails_and_says_who_has_it(fleet: Fleet) -> None:
    port = free_ports(1)[0]
    with listening(port) as stranger:
        one = fleet.model("crowded", port_range=[port, port], max_restarts=1, join=False)
        fleet.join()
        row = one.reaches("failed")

        assert stranger.poll() is None
        assert f"pid {stranger.pid}" in row.reason + str(row.last_exit)


def test_a_left_over_of_ours_on_the_port_is_ended(fleet: Fleet, plane: Plane) -> None:
    """
    Of this instance or of another one; and another's live server is not touched.
    """
    one = fleet.model("left-over", autostart=False)
    other = fleet.model("bystander")
    other.serves()
    for owner in (one, other):
        with listening(one.port, f"{plane.home}/{owner.instance}/7") as stray:
            one.command("start")
            first = one.serves()

            assert stray.wait(PATIENCE_S) == -9
            assert one.row.placement.port == one.port
        one.command("stop")
        one.reaches("stopped")
        assert gone(first)
    assert other.starts == 1


def test_a_port_taken_while_it_loads_shows_in_its_log(fleet: Fleet) -> None:
    """
    Bound but not listened on, a port looks free; the server's own message is the cause, and another port the remedy.
    """
    ports = free_ports(2)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", ports[0]))
        one = fleet.model("bound", port_range=ports)
        one.serves()

    assert (one.row.placement.port, closed(one).cause) == (ports[1], "port_in_use")
    assert kinds(newest(one)) == ["other_port"]
    assert one.row.degraded_since is None


# --- what a restart cannot help


@pytest.mark.parametrize(
    ("name", "arguments", "cause", "says"),
    [
        ("bad-flag", ("--no-such-flag",), "bad_argument", "unrecognized arguments: --no-such-flag"),
        ("bad-value", ("--max-num-seqs", "x"), "bad_argument", "argument --max-num-seqs: invalid int value: 'x'"),
        ("no-model", ("--load-error", "bad-path"), "model_not_found", "Repo id must be in the form"),
        ("too-long", ("--load-error", "len-above-model"), "config_error", "ValidationError"),
        ("gated", ("--load-error", "gated"), "model_gated", "GatedRepoError"),
        ("broken", ("--load-error", "truncated-weights"), "bad_model_files", "SafetensorError"),
    ],
)
def test_what_fails_for_certain_is_not_tried_again(fleet: Fleet, name: str, arguments: tuple[str, ...], cause: str, says: str) -> None:
    """
    FAILED at once; the message names flag and reason; no restart is counted.
    """
    one = fleet.model(name, *arguments)

    row = one.reaches("failed")

    assert row.last_exit is not None and row.last_exit.cause == cause
    assert says in row.reason and "not started again" in row.reason
    assert (row.used, row.restarts_total, one.starts <= 1) == (0, 0, True)
    incident = newest(one)
    assert (incident.cause, incident.outcome, kinds(incident)) == (cause, "failed", ["give_up"])


def test_a_mended_file_and_a_reset_bring_it_back(fleet: Fleet) -> None:
    """
    The same outage goes on until it serves, and is closed as recovered then.
    """
    one = fleet.model("typo", "--max-model-lenn", "512")
    one.reaches("failed")
    opened = newest(one).id

    fleet.change(one, args=[arg for arg in fleet.plane.models["typo"]["args"] if arg not in ("--max-model-lenn", "512")])
    one.command("reset")
    one.serves()

    incident = closed(one)
    wait_until(lambda: newest(one).outcome, "recovered", within_s=PATIENCE_S)
    assert incident.id == opened


# --- incidents are what a human reads


def test_the_log_of_the_first_failing_run_is_the_evidence_and_holds_no_secret(fleet: Fleet, plane: Plane) -> None:
    one = fleet.model(
        "evidence", "--max-model-len", "8192", "--oom-above-len", "2048", "--say", "token is s3cr3t-of-the-model",
        env={"HF_TOKEN": "s3cr3t-of-the-model"},
    )  # fmt: skip
    one.serves()
    incident = closed(one)

    kept = plane.store.get(f"evidence:{incident.id}")
    text = "\n".join(kept["log"])
    assert "CUDA out of memory" in text and kept["run"] == incident.token
    assert "--max-model-len 8192" in kept["arguments"][0] and "s3cr3t" not in str(kept)
    assert kept["versions"]["recovery"] and kept["versions"]["vllm"] == "0.32.0" and kept["versions"]["driver"] == "570.86.10"
    assert len(kept["gpu"]) == 4 and kept["port"]["port"] == one.port
    assert len(kinds(incident)) == 2  # two steps, one outage, the evidence of the first
    tasks = [step["task"] for step in incident.steps if step["kind"] == "override"]
    assert len(set(tasks)) == 2
    assert plane.app.AsyncResult(tasks[-1]).name in ("recovery.restart_instance", None)


def test_a_hang_leaves_its_processes_in_the_evidence(fleet: Fleet, plane: Plane) -> None:
    """
    Collected before the kill: the frozen engine is still in the process table.
    """
    one = fleet.model("frozen")
    first = one.serves()
    engine = one.engine
    one.fault(engine_hang=True)

    one.serves(but=first)

    incident = closed(one)
    assert incident.cause == "engine_hang"
    kept = plane.store.get(f"evidence:{incident.id}")
    assert {each["pid"] for each in kept["processes"]} >= {first, engine}
    assert kept["probe"]["failures"] >= 2
    assert (kept["metrics"]["run"], kept["metrics"]["running"]) == (incident.token, 0)  # what it last said of itself
    assert incident.failed_at is not None and incident.detected_at is not None and incident.detected_at > incident.failed_at


def test_a_repair_is_only_closed_after_serving_for_a_while(fleet: Fleet, plane: Plane) -> None:
    """
    Each run answers and dies again before `validate_s`: one outage, and no step of it counts as a success.
    """
    one = fleet.model("relapse", "--crash-after", "2", validate_s=30, max_restarts=2)

    one.reaches("failed")

    found = plane.store.incidents(one.id, 10)
    assert len(found) == 1 and found[0].outcome == "failed" and found[0].validated_at is None
    assert [step.get("outcome") for step in found[0].steps if step["kind"] == "restart"] == ["failed: unknown_exit", "did not help"]


def test_the_post_mortem_and_the_metrics(fleet: Fleet, plane: Plane) -> None:
    one = fleet.model("mortem", "--max-model-len", "8192", "--kv-fits-len", "4096")
    one.serves()
    incident = closed(one)

    listed = plane.run(sys.executable, "-m", "recovery.cli", "incidents", one.id)
    assert incident.id in listed.stdout.replace("\n", "") and "kv_cache_too_small" in listed.stdout
    told = plane.run(sys.executable, "-m", "recovery.cli", "incident", incident.id).stdout
    for words in (
        "kv_cache_too_small",
        "To serve at least one request",
        "--max-model-len 4096",
        "recovered",
        "first good token",
        "--max-model-len 8192",
    ):
        assert words in told, told
    families = {family.name: family for family in FleetCollector(plane.store).collect()}
    for name in ("recovery_time_to_detect_seconds", "recovery_time_to_recover_seconds"):
        counted = [s for s in families[name].samples if s.name.endswith("_count") and s.labels["model"] == one.id]
        assert [(s.labels["cause"], s.value) for s in counted] == [("kv_cache_too_small", 1.0)]


def test_plan_shows_the_ladder_and_does_nothing(fleet: Fleet, plane: Plane) -> None:
    one = fleet.model("planned", "--max-model-len", "8192")
    one.serves()

    told = " ".join(plane.run(sys.executable, "-m", "recovery.cli", "plan", one.id, "--cause", "cuda_oom_load").stdout.split())

    for words in ("--max-model-len 4096", "--max-model-len 2048", "--max-num-seqs 64", "--enforce-eager", "give_up"):
        assert words in told, told
    assert (flags(one), one.starts) == ([], 1)


def test_the_webhook_is_told_at_open_and_close(fleet: Fleet, plane: Plane, listener) -> None:  # type: ignore[no-untyped-def]
    """
    A listener that refuses twice is asked again; what it gets holds the cause and the evidence.
    """
    listener.refuse = listener.refused + 2
    one = fleet.model("hooked")
    first = one.serves()
    one.kill()
    one.serves(but=first)
    incident = closed(one)

    wait_until(lambda: set(listener.events(incident.id)), {"incident.opened", "incident.closed"}, within_s=PATIENCE_S)

    last = next(told for told in listener.got if told["incident"]["id"] == incident.id and told["event"] == "incident.closed")
    assert (last["incident"]["cause"], last["incident"]["outcome"]) == ("killed", "recovered")
    assert last["incident"]["evidence"]["log"]
    for name in ("control", "host"):
        assert "hush" not in Path(plane.log_file(name)).read_text(errors="replace")


def test_a_server_that_outlives_its_engine_is_given_up_for_the_engines_cause(fleet: Fleet) -> None:
    """
    Its end would take a minute; the looks see only that it is no use, and the log says why.
    """
    one = fleet.model("outlived", "--serve-error", "oom", "--serve-error-after", "3", "--death-s", "60")
    first = one.serves()

    one.serves(but=first)

    incident = closed(one)
    assert incident.cause == "cuda_oom_serving" and "CUDA out of memory" in incident.evidence["line"]
    assert one.row.has_cuda_oom or one.row.sees["cuda_oom_serving"] == 1
