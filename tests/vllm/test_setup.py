"""
The build and its fault plugin do what the other tests of this folder rest on.
"""

import signal
import subprocess

from recovery.core.causes import Cause
from recovery.core.diagnosis import diagnose_text, scan
from recovery.core.fleet_file import load_fleet_text
from tests.vllm.conftest import BUILD
from tests.vllm.server import HOME

EXAMPLES = BUILD.parents[3] / "examples"


def test_a_second_build_has_nothing_to_do():
    done = subprocess.run([BUILD], capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stderr) == (0, f"vllm-cpu: {HOME} is up to date\n")


def test_a_fault_of_the_file_fires_once_and_the_log_tells_the_cause(bare_vllm):
    server = bare_vllm()
    assert server.wait_ready(), server.text()[-2000:]
    assert '"text"' in server.ask()
    server.fault.write_text("once oom")

    answer = server.ask()

    assert "500" in answer
    assert server.wait_exit(120) == 0
    assert not server.fault.exists()
    assert diagnose_text(server.text().splitlines(), exit_code=0).cause is Cause.CUDA_OOM_SERVING


def test_a_card_too_small_for_one_setting_is_large_enough_for_another(bare_vllm):
    too_small = {"FAULT_LOAD": "oom if max_model_len>1024"}
    fails = bare_vllm("--max-model-len", "2048", env=too_small)

    assert fails.wait_exit(300) == 1
    assert diagnose_text(fails.text().splitlines(), exit_code=1).cause is Cause.CUDA_OOM_LOAD
    fits = bare_vllm("--max-model-len", "1024", env=too_small)
    assert fits.wait_ready(), fits.text()[-2000:]


def test_the_example_for_a_machine_without_a_gpu_serves_and_its_pid_is_the_servers(bare_vllm, free_port):
    spec = load_fleet_text((EXAMPLES / "vllm-cpu.json").read_text(), "localhost").models["tiny"]
    args = [arg.replace("{host}", "127.0.0.1").replace("{port}", str(free_port)) for arg in spec.args]

    server = bare_vllm(command=[str(EXAMPLES.parent / spec.command), *args])

    assert server.wait_ready(), server.text()[-2000:]
    assert '"text"' in server.ask()
    assert f"Started server process [{server.process.pid}]" in server.text()
    server.send(signal.SIGTERM)
    assert server.wait_exit(120) == 0
    facts = scan(server.text().splitlines())
    assert facts.shut_down and not facts.fatal


def test_the_example_says_what_is_missing_where_nothing_is_built(tmp_path):
    done = subprocess.run([EXAMPLES / "vllm-cpu.sh"], env={"VLLM_CPU_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60)

    found = diagnose_text(done.stderr.splitlines(), exit_code=done.returncode)
    assert (done.returncode, found.cause) == (127, Cause.UNKNOWN_EXIT)
    assert "build it with tests/vllm/setup/build.sh" in found.evidence
