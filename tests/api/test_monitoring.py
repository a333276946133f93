"""Prometheus: what a scrape says, that alerts and dashboard speak of series that exist, and Debian's promtool on all of it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import recovery
from recovery.adapters.vllm_metrics import TrafficKeeper
from recovery.core import counting
from recovery.core.instance import ProbeMemory
from recovery.core.passing import KEY, Latencies, Passed
from recovery.core.states import State
from recovery.frontdoor.meters import Meters
from tests.api.conftest import Api, Fleet, MakeApi
from tests.helpers import wait_until

FOLDER = Path(recovery.__file__).parent / "monitoring"
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 2.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 1.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="m"}} {few}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="1.0",model_name="m"}} {all}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} {all}
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{{engine="0",le="5.0",model_name="m"}} {all}
vllm:e2e_request_latency_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} {all}
# TYPE vllm:request_success counter
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="m"}} {all}
vllm:request_success_total{{engine="0",finished_reason="error",model_name="m"}} {few}
"""


def scrape(api: Api) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(api.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def full_fleet(fleet: Fleet) -> None:
    """A fleet of which every series has something to say."""
    card = {"index": 0, "name": "H100", "used_bytes": 3, "total_bytes": 80, "utilization": 0.5, "lost": False}
    fleet.hosts["gpu-1"] = {"gpus": [card], "served_at": fleet.store.now()}
    fleet.add(probe=ProbeMemory(last_at=1.0, duration_s=0.02), degraded_since=1.0)
    fleet.add(model="down", state=State.RESTARTING, run=None, not_before=fleet.store.now() + 60, attempt=2)
    keeper = TrafficKeeper(fleet.store)
    keeper.take("vllm-0", 7, VLLM.format(few=0, all=0))
    keeper.take("vllm-0", 7, VLLM.format(few=5, all=10))
    made = counting.restarted("vllm", "gpu-1", "killed") + counting.restarted("vllm", "gpu-1", "operator", manual=True)
    made += counting.failed("vllm", "gpu-1", "killed") + counting.incident_closed("vllm", "killed", "recovered")
    made += counting.detected("vllm", "killed", 0.2) + counting.ready("vllm", 30) + counting.recovered("vllm", "killed", 31)
    fleet.store.count(made)
    wait_until(lambda: fleet.store.hosts()["gpu-1"]["gpus"], [card], within_s=60)


def test_the_specifications_series_have_its_names_and_its_label(api: Api, fleet: Fleet):
    full_fleet(fleet)
    found = scrape(api)

    assert found["fluidmcp_server_restarts_total"] == {(("server", "vllm"),): 2, (("server", "down"),): 0}
    assert found["fluidmcp_server_status"] == {(("server", "vllm"),): 1, (("server", "down"),): 0}
    assert set(found["fluidmcp_server_uptime_seconds"]) == {(("server", "vllm"),)}
    assert found["fluidmcp_server_uptime_seconds"][(("server", "vllm"),)] > 125


def test_ours_say_what_is_in_redis(api: Api, fleet: Fleet):
    full_fleet(fleet)
    found = scrape(api)
    down = (("host", "gpu-1"), ("instance", "down-0"), ("model", "down"))

    assert found["recovery_state"][(*down, ("state", "restarting"))] == 1
    assert 50 < found["recovery_backoff_remaining_seconds"][down] <= 60
    assert found["recovery_attempt"][down] == 2
    assert found["recovery_gpu_memory_used_bytes"] == {(("gpu", "0"), ("host", "gpu-1"), ("name", "H100")): 3}
    assert found["recovery_restarts_total"][(("by", "policy"), ("cause", "killed"), ("host", "gpu-1"), ("model", "vllm"))] == 1
    assert found["recovery_time_to_ready_seconds_bucket"][(("le", "40.0"), ("model", "vllm"))] == 1
    assert found["recovery_time_to_ready_seconds_sum"][(("model", "vllm"),)] == 30
    assert found["recovery_oom_total"][(("host", "gpu-1"), ("model", "down"), ("where", "gpu"))] == 0, "told from zero"
    assert found["recovery_host_up"][(("host", "gpu-1"),)] == 1
    assert found["recovery_queue_depth"][(("queue", "control"),)] == 0
    assert found["recovery_tick_age_seconds"][()] < 60


def test_the_servers_and_the_doors_own_figures_are_told_per_model(api: Api, fleet: Fleet):
    full_fleet(fleet)
    found = scrape(api)

    assert found["recovery_model_requests_running"] == {(("model", "vllm"),): 2}
    assert found["recovery_model_kv_cache_usage_ratio"] == {(("model", "vllm"),): 0.25}
    assert found["recovery_model_ttft_seconds"][(("model", "vllm"), ("percentile", "p50"))] == pytest.approx(0.1)
    assert found["recovery_model_error_ratio"] == {(("model", "vllm"),): pytest.approx(1 / 3)}
    told = Passed(codes={"200": 3}, held=1, window=Latencies(ttft={"0.1": 3, "+Inf": 3})).model_dump(mode="json")
    for door in ("one", "two"):
        fleet.store.put(f"{KEY}{door}", {"vllm": told}, 60)
    passed = wait_until(lambda: api.client.get("/api/llm/door").json()["models"], within_s=60)
    assert (passed["vllm"]["doors"], passed["vllm"]["requests"], passed["vllm"]["held"]) == (2, 6, 2)
    assert passed["vllm"]["ttft_seconds"]["0.5"] == pytest.approx(0.05)
    loads = wait_until(lambda: api.client.get("/api/llm/load").json()["loads"], within_s=60)
    assert loads["vllm"]["ttft_seconds"]["0.5"] == pytest.approx(0.1)


def test_without_cards_there_are_no_series_and_no_error(api: Api, fleet: Fleet):
    fleet.add()

    found = scrape(api)

    assert not [name for name in found if name.startswith("recovery_gpu")]
    assert not [name for name in found if name.startswith("recovery_model_")]


def test_two_processes_give_the_same_answer_and_a_new_one_too(make_api: MakeApi, fleet: Fleet):
    full_fleet(fleet)
    one, two = make_api(), make_api()
    before = counters(scrape(one))
    assert counters(scrape(two)) == before

    one.stop()
    fleet.store.count(counting.restarted("vllm", "gpu-1", "killed"))

    after = counters(scrape(make_api()))
    assert all(after[key] >= value for key, value in before.items()), "counters never fall"
    assert after != before


def counters(found: dict[str, Any]) -> dict[Any, float]:
    """The samples that must never fall."""
    return {(name, labels): value for name, each in found.items() if name.endswith("_total") for labels, value in each.items()}


def _expressions() -> list[str]:
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def _doors() -> set[str]:
    """The series of a front door with something to say of everything."""
    meters = Meters()
    meter = meters.model("vllm")
    for counter in (meter.retried, meter.continued, meter.refused, meter.cut, meter.fallback):
        counter["x"] += 1
    meter.replica("vllm-0").codes[200] += 1
    return {sample.name for family in meters.collect() for sample in family.samples}


def test_the_dashboard_shows_what_the_front_door_did():
    shown = " ".join(_expressions())
    for what in ("held", "holding", "retried", "continued", "refused", "cut", "fallback", "ttft_seconds", "inter_token_seconds"):
        assert f"recovery_frontdoor_{what}" in shown, what


def test_alerts_and_dashboard_speak_only_of_series_that_exist(api: Api, fleet: Fleet):
    full_fleet(fleet)
    told = set(scrape(api)) | _doors()
    texts = [*_expressions(), (FOLDER / "alerts.yml").read_text()]
    spoken = {name for text in texts for name in re.findall(r"\b(?:recovery|fluidmcp_server)_[a-z_0-9]+", text)}

    assert len(spoken) > 25
    assert spoken <= told


def promtool(*arguments: str | Path) -> str:
    """Run Debian's promtool; without it the run fails in CI and this test is left out at home."""
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: apt-get install prometheus")
        pytest.skip("promtool is not installed")
    done = subprocess.run([found, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_passes_the_rules_and_their_tests():
    assert "SUCCESS" in promtool("check", "rules", "alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_every_alert_has_a_test():
    alerts = set(re.findall(r"alert: (\w+)", (FOLDER / "alerts.yml").read_text()))

    assert alerts == set(re.findall(r"alertname: (\w+)", (FOLDER / "alerts_test.yml").read_text()))


def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path):
    plain = [text.replace("$model", "m").replace("$host", "h") for text in _expressions()]
    rules = [{"record": f"panel_{number}", "expr": text} for number, text in enumerate(plain)]
    (tmp_path / "panels.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", tmp_path / "panels.json")


def test_a_scrape_passes_promtools_lint(api: Api, fleet: Fleet):
    full_fleet(fleet)
    found = shutil.which("promtool")
    if found is None:
        promtool()
    done = subprocess.run(
        [str(found), "check", "metrics"], input=api.client.get("/metrics").text, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stdout + done.stderr
