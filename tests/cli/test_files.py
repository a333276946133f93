"""Commands that need no fleet that runs, and starts that are refused before anything is started."""

import json
import socket
from pathlib import Path

import pytest

from recovery.cli import run
from recovery.cli.exits import MEANINGS, Exit
from tests.cli import render_readme
from tests.cli.installation import Installation, free_ports, installation, model

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOVERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECOVERY_HOST", "here")
    monkeypatch.delenv("REDIS_URL", raising=False)


def _file(folder: Path, models: object) -> str:
    path = folder / "fleet.json"
    path.write_text(json.dumps({"llmModels": models}))
    return str(path)


def test_validate_says_what_would_run_where(tmp_path: Path, capsys: Said) -> None:
    assert run(["validate", _file(tmp_path, {"a": model(8500, replicas=1)})]) == Exit.OK
    said = capsys.readouterr().out
    assert "a-0" in said and "here:8500" in said and "1 models" in said


def test_validate_says_what_it_leaves_alone(tmp_path: Path, capsys: Said) -> None:
    fleet = {"a": model(8500), "cloud": {"type": "replicate", "model": "m/n"}}
    assert run(["validate", _file(tmp_path, fleet)]) == Exit.OK
    said = capsys.readouterr().out
    assert "cloud                not supervised" in said and "1 models, 1 instances" in said


def test_validate_tells_every_fault_at_once(tmp_path: Path, capsys: Said) -> None:
    faulty = {"a": {**model(8500), "max_restarts": -1, "restart_policy": "sometimes", "gpu": 1}}
    assert run(["validate", _file(tmp_path, faulty)]) == Exit.USAGE
    said = capsys.readouterr().err
    for word in ("llmModels.a.max_restarts", "llmModels.a.restart_policy", "llmModels.a.gpu", "on-failure"):
        assert word in said


def test_validate_finds_a_model_on_a_port_of_ours(tmp_path: Path, capsys: Said) -> None:
    assert run(["validate", _file(tmp_path, {"a": model(8000)})]) == Exit.USAGE
    assert "RECOVERY_FRONT_PORT" in capsys.readouterr().err


def test_schema_is_json(capsys: Said) -> None:
    assert run(["schema"]) == Exit.OK
    assert "llmModels" in json.loads(capsys.readouterr().out)["properties"]


def test_diagnose_names_the_cause(tmp_path: Path, capsys: Said) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("ERROR 11-24 10:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    assert run(["diagnose", str(log), "--exit-code", "1", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["cause"] == "cuda_oom_load"
    assert run(["diagnose", str(log)]) == Exit.OK
    assert "CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["restart"], ["logs", "a", "--lines", "0"], ["diagnose", "/nonexistent/file"]])
def test_what_cannot_be_meant_is_usage(arguments: list[str]) -> None:
    assert run(arguments) == Exit.USAGE


def test_redis_that_is_not_there_is_an_error_with_advice(capsys: Said) -> None:
    for command in (["status"], ["restart", "a"], ["incidents"]):
        assert run(command) == Exit.AWAY
        assert "recovery up" in capsys.readouterr().err


def test_every_exit_code_is_in_the_help_of_the_command(capsys: Said) -> None:
    run(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for code in MEANINGS:
        assert f"{code.value} " in said


def test_the_readme_is_as_the_code_has_it() -> None:
    """`make readme` writes it."""
    text = render_readme.README.read_text()
    assert render_readme.rendered(text) == text


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    with installation("a") as made, socket.socket() as taken:
        taken.bind(("127.0.0.1", made.front))
        taken.listen()
        done = made.run("up", "--fleet", str(made.fleet))
        assert (done.returncode, "RECOVERY_FRONT_PORT" in done.stderr, "(pid " in done.stderr) == (Exit.USAGE, True, True), done.stderr
        _nothing_was_started(made)


def test_a_model_on_a_port_of_a_part_is_told_before_anything_starts() -> None:
    with installation("a") as made:
        made.fleet.write_text(json.dumps({"llmModels": {"a": model(made.api)}}))
        done = made.run("up", "--fleet", str(made.fleet))
        assert (done.returncode, "RECOVERY_API_PORT" in done.stderr) == (Exit.USAGE, True), done.stderr
        _nothing_was_started(made)


def test_an_up_without_a_fleet_file_says_how_to_name_one() -> None:
    with installation("a") as made:
        done = made.run("up")
        assert (done.returncode, "--fleet" in done.stderr) == (Exit.USAGE, True)
        _nothing_was_started(made)


def _nothing_was_started(made: Installation) -> None:
    assert (made.part_pids(), made.redis_pid()) == ({}, None)
    assert free_ports(1)
