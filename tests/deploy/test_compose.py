"""docker-compose.yml: valid, without secrets of its own, and each service does its work as it stands there."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.deploy.compose import FILE, ROOT, MissingVariableError, load, services
from tests.deploy.containers import Composed
from tests.helpers import wait_until

PATIENCE_S = 150.0
ALWAYS = {"redis", "beat", "control", "api", "door", "flower"}
SECRETS = ROOT / "examples/deploy/secrets.sh"


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    """The .env that the shipped script makes, for the profile cpu."""
    made = subprocess.run(
        ["sh", str(SECRETS)],
        env={"PATH": "/usr/bin:/bin", "COMPOSE_PROFILES": "cpu,monitoring", "FLEET_FILE": "fleet-cpu.json"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in made.stdout.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def composed(environ: dict[str, str]) -> Iterator[Composed]:
    """All services of the profiles cpu and monitoring, but Grafana, which no Debian package brings."""
    chosen = services(load(environ), "cpu", "monitoring")
    runnable = {name: each for name, each in chosen.items() if name != "grafana" and (name != "prometheus" or shutil.which("prometheus"))}
    if "prometheus" in runnable:  # the image's entry point
        runnable["prometheus"]["command"] = ["prometheus", *runnable["prometheus"]["command"]]
    made = Composed(runnable, {"metrics_token": environ["METRICS_TOKEN"]})
    try:
        yield made
    finally:
        made.close()


def test_it_is_a_compose_file_and_starts_what_it_says(environ: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    file = load(environ)
    assert set(services(file)) == ALWAYS
    assert set(services(file, "gpu")) == ALWAYS | {"gpu"}
    assert set(services(file, "cpu", "monitoring")) == ALWAYS | {"cpu", "prometheus", "grafana"}


def test_every_secret_is_demanded_and_none_has_a_default(environ: dict[str, str]) -> None:
    file = yaml.safe_load(FILE.read_text())
    demanded = set(re.findall(r"\$\{(\w+):\?", FILE.read_text()))
    assert {name for name in environ if "PASSWORD" in name or "TOKEN" in name} == demanded
    for name in demanded:
        with pytest.raises(MissingVariableError, match=f"{name}.*secrets.sh"):
            load({**environ, name: ""})
    for name, service in file["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|TOKEN|SECRET|AUTH$", key) and key != "HF_TOKEN":
                assert re.fullmatch(r"\$\{\w+:\?.*\}", str(value)), f"{name}: {key} has a value of its own"


def test_every_service_comes_back_is_watched_and_shows_itself_on_loopback_only(environ: dict[str, str]) -> None:
    file = load(environ)
    for name, service in file["services"].items():
        assert service["restart"] == "always", name
        assert service["init"] is True, name
        assert service["healthcheck"]["test"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
    for name in ("beat", "control", "api", "door", "flower"):
        assert file["services"][name]["read_only"] and file["services"][name]["cap_drop"] == ["ALL"], name
    assert file["services"]["gpu"]["user"] == "recovery"
    assert re.findall(r"^USER (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1] == "recovery"


def test_every_service_becomes_healthy_and_a_model_heals(composed: Composed, environ: dict[str, str]) -> None:
    """
    Each with its own command, environment, mounts and health check; then kill -9 of a server, and of the worker beside it.
    """
    for name, each in composed.containers.items():
        each.start()
        if name == "redis":
            wait_until(each.health, lambda seen: seen[0] == 0, within_s=PATIENCE_S)
    for each in composed.containers.values():
        wait_until(each.health, lambda seen: seen[0] == 0, within_s=PATIENCE_S)

    wait_until(lambda: _ready(composed), {"opt-0", "opt-1"}, within_s=PATIENCE_S)
    before = _servers(composed)
    assert set(before) == {"opt-0", "opt-1"}

    before["opt-0"].kill()
    wait_until(lambda: _servers(composed).get("opt-0"), lambda seen: seen not in (None, before["opt-0"]), within_s=PATIENCE_S)
    wait_until(lambda: _ready(composed), {"opt-0", "opt-1"}, within_s=PATIENCE_S)
    assert _servers(composed)["opt-1"] == before["opt-1"]

    # The worker dies, the part manager brings it back, the models never notice.
    healed = _servers(composed)
    worker = _worker(composed)
    worker.kill()
    wait_until(lambda: _worker(composed), lambda seen: seen != worker, within_s=PATIENCE_S)
    wait_until(composed["cpu"].health, lambda seen: seen[0] == 0, within_s=PATIENCE_S)
    assert _servers(composed) == healed

    asked = ("-d", json.dumps({"model": "opt", "prompt": "hello", "max_tokens": 3}), "-H", "content-type: application/json")
    said = composed["door"].run("curl", "-sS", "--fail-with-body", "http://127.0.0.1:8000/v1/completions", *asked)
    assert said.returncode == 0 and json.loads(said.stdout)["choices"], said.stdout + said.stderr

    _flower_shows_nothing_without_the_password(composed, environ["FLOWER_PASSWORD"])
    _prometheus_reads(composed)

    # Recreating the container drains: the models end in good order with it, and start again with the next one.
    assert composed["cpu"].signal(signal.SIGTERM) == 0
    assert _servers(composed) == {}
    composed["cpu"].start()
    wait_until(lambda: _ready(composed), {"opt-0", "opt-1"}, within_s=PATIENCE_S)


def test_a_health_check_says_no(composed: Composed) -> None:
    """
    Runs after the others are up: a part that is killed, or whose Redis is, is told as not healthy.
    """
    for name in ("beat", "api"):
        composed[name].signal(signal.SIGKILL)
    code, said = _asked(composed, "api")
    assert code == 1 and "does not answer on port 8099" in said
    wait_until(lambda: _asked(composed, "beat"), lambda seen: seen[0] == 1 and "no tick is sent" in seen[1], within_s=PATIENCE_S)
    assert _asked(composed, "control")[0] == 0  # it is not its fault
    composed["redis"].signal(signal.SIGKILL)
    code, said = _asked(composed, "host")
    assert code == 1 and "Redis" in said


def test_the_monitoring_configuration_is_good(tmp_path: Path) -> None:
    """
    promtool reads the Prometheus configuration with the rules it names; Grafana's provisioning names the folder that is mounted.
    """
    file = yaml.safe_load(FILE.read_text())["services"]
    mounts = dict(reversed(each.split(":")[:2]) for each in file["grafana"]["volumes"])
    source = yaml.safe_load((ROOT / "examples/deploy/monitoring/grafana/dashboards/recovery.yml").read_text())
    assert source["providers"][0]["options"]["path"] in mounts
    assert file["prometheus"]["network_mode"] == "service:door"
    assert "http://door:9090" in (ROOT / "examples/deploy/monitoring/grafana/datasources/prometheus.yml").read_text()

    text = (ROOT / "examples/deploy/monitoring/prometheus.yml").read_text()
    (tmp_path / "token").write_text("x")
    text = text.replace("/srv/rules", str(ROOT / "recovery/monitoring")).replace("/run/secrets/metrics_token", str(tmp_path / "token"))
    (tmp_path / "prometheus.yml").write_text(text)
    done = subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- looking ------------------------------------------------------------------------------------------------------------


def _ready(composed: Composed) -> set[str]:
    said = composed["control"].run("recovery", "status", "--json")
    assert said.returncode == 0, said.stderr
    found: Any = json.loads(said.stdout)
    return {each["id"] for model in found["models"] for each in model["instances"] if each["state"] == "healthy"}


def _servers(composed: Composed) -> dict[str, psutil.Process]:
    """The main process of each living server, by instance: the child of a keeper."""
    found = {}
    for process in composed.network.processes():
        try:
            run = process.environ().get("RECOVERY_RUN", "")
            parent = process.parent()
            if run and "--port" in process.cmdline() and parent is not None and any("keeper" in word for word in parent.cmdline()):
                found[run.split("/")[-2]] = process
        except psutil.Error:
            continue
    return found


def _worker(composed: Composed) -> psutil.Process | None:
    for process in composed.network.processes():
        try:
            if "gpu.models" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.Error:
            continue
    return None


def _asked(composed: Composed, part: str) -> tuple[int, str]:
    done = composed["flower"].run("python", "-m", "recovery.health", part)
    return done.returncode, done.stdout


def _flower_shows_nothing_without_the_password(composed: Composed, password: str) -> None:
    def status(path: str, *options: str) -> str:
        return (
            composed["flower"].run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:5555{path}", *options).stdout
        )

    for path in ("/metrics", "/", "/api/workers"):
        assert status(path) == "401", path
    assert status("/metrics", "-u", f"recovery:{password}") == "200"


def _prometheus_reads(composed: Composed) -> None:
    """Both targets are up: the API with its token, the door on its loopback."""
    if "prometheus" not in composed.containers:
        return

    def up() -> dict[str, str]:
        said = composed["prometheus"].run("curl", "-sS", "http://127.0.0.1:9090/api/v1/targets").stdout
        return {each["labels"]["job"]: each["health"] for each in json.loads(said)["data"]["activeTargets"]}

    wait_until(up, {"vllm-recovery": "up", "vllm-recovery-door": "up"}, within_s=PATIENCE_S)
