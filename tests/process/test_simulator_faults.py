"""The simulator's bad manners: each by flag or over the admin endpoint, and what is seen of it from outside."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from recovery.simulator.journal import identity
from recovery.simulator.lines import CONFIG_ERRORS, LOAD_ERRORS, SERVE_ERRORS
from recovery.simulator.tokens import decode, encode, generate
from tests.process.simulated import PATIENCE_S, Server, alive, free_port, wait_until

Start = Callable[..., Server]
HELLO = encode("Hello")
SLOW = ("--tokens-per-s", "20")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Begin a server without waiting for it."""
    servers: list[Server] = []

    def begin(*arguments: str, **more: Any) -> Server:
        servers.append(Server(tmp_path, *arguments, **more))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def up(start: Start) -> Start:
    """Begin a server and wait until it serves."""
    return lambda *arguments, **more: start(*arguments, **more).ready()


class Stream(threading.Thread):
    """A completion stream, read in the background: `events` so far, and how it ended."""

    def __init__(self, server: Server, max_tokens: int = 4000, prompt: str = "Hello") -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.error = ""
        self._server, self._body = server, {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "return_token_ids": True}
        self.start()

    def run(self) -> None:
        url = f"http://127.0.0.1:{self._server.port}/v1/completions"
        try:
            with httpx.stream("POST", url, json=self._body, timeout=PATIENCE_S, trust_env=False) as answer:
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line:
                        self.events.append(orjson.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = type(error).__name__

    def begun(self) -> "Stream":
        wait_until(lambda: len(self.events) > 0)
        return self

    def ended(self) -> "Stream":
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if "choices" in event for row in event["choices"] for token in row.get("token_ids") or []]

    @property
    def last_error(self) -> Any:
        return self.events[-1].get("error", {}).get("type")


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


# --- the engine child ---


def test_the_engine_is_a_child_of_the_same_session_with_vllms_title(up):
    server = up()
    stat = Path(f"/proc/{server.engine}/stat").read_text().rpartition(")")[2].split()
    assert (int(stat[1]), int(stat[3])) == (server.pid, server.pid)
    assert comm(server.engine) == "VLLM::EngineCor"
    assert Path(f"/proc/{server.engine}/cmdline").read_bytes().rstrip(b"\0") == b"VLLM::EngineCore"
    assert sorted(server.strays()) == sorted([server.pid, server.engine])
    descriptors = {str(entry.readlink()) for entry in Path(f"/proc/{server.engine}/fd").iterdir()}
    assert sum(name.startswith("socket:") for name in descriptors) == 1, "nothing but its own socket reaches it"


@pytest.mark.parametrize(("noenv", "marked"), [("1", True), ("", False)])
def test_the_title_wipes_the_environment_unless_told_not_to(up, noenv, marked):
    server = up(SPT_NOENV=noenv)
    environ = Path(f"/proc/{server.engine}/environ").read_bytes()
    assert (f"RECOVERY_RUN={server.marker}".encode() in environ) is marked


def test_a_stopped_engine_looks_healthy_and_gives_no_token(up):
    server = up(*SLOW)
    stream = Stream(server, 40).begun()
    os.kill(server.engine, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{server.engine}/stat").read_text().rpartition(")")[2].split()[0], "T")
    steps = server.metric("vllm:iteration_tokens_total_count")
    with pytest.raises(httpx.ReadTimeout):
        server.complete(max_tokens=1, timeout=0.5)
    assert [server.status(path) for path in ("/health", "/ping", "/v1/models", "/metrics")] == [200] * 4
    assert server.metric("vllm:iteration_tokens_total_count") == steps
    assert server.metric("vllm:num_requests_running") == 1
    os.kill(server.engine, signal.SIGCONT)
    assert stream.ended().tokens == generate(HELLO, 40)


@pytest.mark.parametrize("hung", [False, True])
def test_an_engine_with_nothing_to_do_does_not_wake(up, hung):
    server = up()
    server.fault(engine_hang=hung)
    if hung:
        Stream(server)
        wait_until(lambda: server.get("/admin/state").json()["in_flight"], 1)

    def wakes() -> list[str]:
        status = Path(f"/proc/{server.engine}/status").read_text().splitlines()
        stat = Path(f"/proc/{server.engine}/stat").read_text().rpartition(")")[2].split()
        return [line for line in status if "ctxt_switches" in line] + stat[11:13]

    def quiet() -> bool:
        before = wakes()
        assert {server.status() for _ in range(50)} == {200}
        return wakes() == before

    wait_until(quiet)


def test_a_killed_engine_ends_the_server_with_0(up):
    server = up(*SLOW, "--death-s", "2")
    stream = Stream(server).begun()
    os.kill(server.engine, signal.SIGKILL)
    wait_until(lambda: server.status(), 503)
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 500
    assert server.status("/v1/models") == 200
    stream.ended()
    assert (stream.done, stream.last_error) == (True, "InternalServerError")
    assert server.wait() == 0
    assert "EngineDeadError: EngineCore encountered an issue." in server.out
    assert "EngineDeadError" not in server.err
    assert server.strays() == []


def test_kept_alive_on_engine_death_it_stays_unhealthy(up):
    server = up(VLLM_KEEP_ALIVE_ON_ENGINE_DEATH="1")
    server.fault(kill_engine=9)
    wait_until(lambda: server.status(), 503)
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 500
    assert server.process.poll() is None
    assert server.terminate() == 0


def test_an_engine_killed_while_loading_fails_the_start(start):
    server = start("--load-s", "60")
    wait_until(lambda: "Initializing a V1 LLM engine" in server.out)
    os.kill(server.engine, signal.SIGKILL)
    assert server.wait() == 1
    assert "Engine core initialization failed" in server.err


def test_a_killed_server_leaves_its_engine_behind(up):
    server = up()
    engine = server.engine
    server.process.kill()
    assert server.wait() == -9
    assert server.strays() == [engine]
    os.kill(engine, signal.SIGTERM)
    wait_until(lambda: alive(engine), False)


# --- load ---


def test_it_refuses_connections_while_it_loads(start):
    server = start("--load-s", "1")
    wait_until(lambda: "Initializing a V1 LLM engine" in server.out)
    assert server.status() == "ConnectError"
    server.ready()
    assert server.status() == 200


def loading(server: Server) -> Server:
    """Wait until its signal handlers are there, while it still loads."""

    def caught() -> bool:
        line = next(line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_until(caught)
    return server


def test_sigterm_while_loading_ends_it_by_that_signal(start):
    server = loading(start("--load-s", "60"))
    assert server.terminate() == -signal.SIGTERM
    assert server.strays() == []


def test_a_lost_sigterm_while_loading(start):
    server = loading(start("--load-s", "2", "--lose-sigterm"))
    server.process.terminate()
    server.ready()
    assert server.status() == 200
    assert server.terminate() == 0
    twice = loading(start("--load-s", "60", "--lose-sigterm"))
    twice.process.terminate()
    wait_until(lambda: int(Path(f"/proc/{twice.pid}/status").read_text().split("ShdPnd:")[1].split()[0], 16), 0)
    twice.process.terminate()
    # Both may be taken as one if they come close together; a third is then the second.
    wait_until(lambda: twice.process.poll() is not None or twice.process.terminate(), True)
    assert twice.wait() == -signal.SIGINT
    assert "KeyboardInterrupt: terminated" in twice.err


@pytest.mark.parametrize("kind", sorted({**LOAD_ERRORS, **CONFIG_ERRORS}))
def test_a_failed_start_prints_vllms_lines_and_exits_1(start, kind):
    server = start("--load-error", kind, "--max-model-len", "9000")
    assert server.wait() == 1
    table = LOAD_ERRORS.get(kind) or CONFIG_ERRORS.get(kind) or ()
    for number, _, text in table:
        head = text.partition("{")[0].split("] ", 1)[-1]
        assert head in (server.out, server.err)[number - 1], text
    assert ("Engine core initialization failed" in server.err) is (kind in LOAD_ERRORS)
    assert "{max_model_len}" not in server.out + server.err
    assert server.strays() == []


def test_out_of_memory_at_load_stands_on_stdout_only(start):
    server = start("--load-error", "oom", "--engine", "none")
    assert server.wait() == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate" in server.out
    assert "memory" not in server.err.lower()


@pytest.mark.parametrize(
    ("fault", "bad", "good", "line"),
    [
        (("--oom-above-len", "4096"), ("--max-model-len", "8192"), ("--max-model-len", "4096"), "CUDA out of memory. Tried"),
        (
            ("--oom-above-utilization", "0.8"),
            ("--gpu-memory-utilization", "0.9"),
            ("--gpu-memory-utilization", "0.8"),
            "CUDA out of memory",
        ),
        (("--oom-above-seqs", "64"), ("--max-num-seqs", "256"), ("--max-num-seqs", "64"), "warming up sampler"),
        (("--oom-unless-eager",), (), ("--enforce-eager",), "warming up sampler"),
        (("--kv-fits-len", "1792"), ("--max-model-len", "8192"), ("--max-model-len", "1792"), "estimated maximum model length is 1792"),
    ],
)
def test_each_rung_of_the_memory_ladder_helps(start, fault, bad, good, line):
    failing = start(*fault, *bad)
    assert failing.wait() == 1
    assert line in failing.out
    assert start(*fault, *good).ready().status() == 200


def test_a_bad_flag_or_value_exits_2(start):
    unknown = start("org/model", "--no-such-flag", "1")
    assert unknown.wait() == 2
    assert "vllm: error: unrecognized arguments: --no-such-flag 1" in unknown.err
    value = start("--max-model-len", "x")
    assert value.wait() == 2
    assert "vllm serve: error: argument --max-model-len: invalid int value: 'x'" in value.err


def test_a_port_somebody_listens_on(up, start):
    first = up()
    second = start(port=first.port)
    assert second.wait() == 1
    assert "OSError: [Errno 98] Address already in use" in second.err


def test_two_started_at_once_on_one_port_both_live_and_one_serves(start):
    port = free_port()
    first, second = start("--load-s", "3", port=port), start("--load-s", "3", port=port)
    first.ready()
    second.ready()
    pids = {first.get("/admin/state").json()["pid"] for _ in range(5)}
    assert len(pids) == 1
    assert first.process.poll() is None and second.process.poll() is None


def test_the_first_starts_fail(start, tmp_path):
    flags = ("--fail-first", "2", "--fail-file", str(tmp_path / "starts"))
    assert start(*flags, "--exit-code", "7").wait() == 7
    assert start(*flags, "--load-error", "nccl").wait() == 1
    assert start(*flags, "--load-error", "nccl").ready().status() == 200


# --- the ways to end ---


def test_sigterm_is_an_orderly_end(up):
    server = up()
    assert server.terminate() == 0
    assert "Shutting down FastAPI HTTP server." in server.out
    assert "Application shutdown complete." in server.err
    assert "EngineDeadError" not in server.out
    assert server.strays() == []


def test_sigterm_to_the_whole_group_is_no_engine_death(up):
    server = up()
    os.killpg(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert "EngineDeadError" not in server.out


def test_sigterm_without_drain_ends_streams_with_an_error_or_an_abort(up):
    server = up(*SLOW)
    first = Stream(server).begun()
    second = Stream(server).begun()
    assert server.terminate() == 0
    ends = [first.ended().events[-1], second.ended().events[-1]]
    assert (first.done, second.done) == (True, True)
    assert ends[0]["error"]["code"] == 500
    assert ends[1]["choices"][0]["finish_reason"] == "abort"


def test_sigterm_with_drain_finishes_what_is_in_flight_and_refuses_the_rest(up):
    server = up(*SLOW, "--shutdown-timeout", "60")
    stream = Stream(server, 60).begun()
    server.process.terminate()
    wait_until(lambda: server.post("/v1/completions", {"prompt": "x"}).status_code, 500)
    assert "cannot schedule new futures after shutdown" in server.post("/v1/completions", {"prompt": "x"}).text
    assert server.status() == 200
    server.fault(tokens_per_s=1000)
    assert stream.ended().tokens == generate(HELLO, 60)
    assert server.wait() == 0
    assert "EngineDeadError" in server.out, "vLLM prints it at the end of an orderly drain"


def test_sigterm_kills_a_stopped_engine(up):
    server = up()
    os.kill(server.engine, signal.SIGSTOP)
    assert server.terminate() == 0
    assert "EngineDeadError" not in server.out
    assert server.strays() == []


def test_an_ignored_sigterm(up):
    server = up("--ignore-sigterm")
    os.killpg(server.pid, signal.SIGTERM)
    assert server.status() == 200
    assert server.text() == decode(generate(HELLO, 16))
    server.fault(ignore_sigterm=False)
    assert server.terminate() == 0


def test_a_shutdown_stuck_on_open_streams(up):
    server = up(*SLOW, "--stuck-shutdown")
    Stream(server).begun()
    server.process.terminate()
    wait_until(lambda: "Waiting for connections to close" in server.err)
    wait_until(lambda: server.strays(), [server.pid])
    assert server.process.poll() is None


def test_crash_with_a_code_or_by_a_signal(start, up):
    assert start("--load-s", "60", "--crash-after", "0.2", "--exit-code", "137").wait() == 137
    assert start("--crash-after", "0.5", "--signal", "SEGV").wait() == -signal.SIGSEGV
    server = up("--engine", "none")
    server.fault(crash={"signal": 9})
    assert server.wait() == -9


def test_an_orderly_end_by_itself(start, up):
    assert start("--exit-after", "0.5").wait() == 0
    server = up()
    server.fault(exit=True)
    assert server.wait() == 0
    assert "Application shutdown complete." in server.err


@pytest.mark.parametrize("kind", sorted(SERVE_ERRORS))
@pytest.mark.parametrize("engine", ["process", "none"])
def test_a_failed_step_prints_vllms_lines_and_exits_0(up, kind, engine):
    server = up("--engine", engine)
    server.fault(serve_error=kind)
    assert server.wait() == 0
    for _, _, text in SERVE_ERRORS[kind]:
        assert text.split("] ", 1)[1] in server.out
        assert text.split("] ", 1)[1] not in server.err
    assert "EngineDeadError" in server.out


def test_a_step_that_fails_after_a_time(start):
    server = start("--serve-error", "oom", "--serve-error-after", "0.5")
    assert server.wait() == 0
    assert "CUDA out of memory" in server.out and "memory" not in server.err


def test_logs_go_to_stderr_where_vllm_is_told_so(up):
    server = up(VLLM_LOGGING_STREAM="ext://sys.stderr")
    server.fault(serve_error="oom")
    assert server.wait() == 0
    assert "CUDA out of memory" in server.err


# --- alive and bad ---


@pytest.mark.parametrize("flags", [("--hang-after", "0"), ()])
def test_a_hung_server_accepts_and_never_answers(up, flags):
    server = up(*flags, *SLOW)
    if not flags:
        stream = Stream(server, 30).begun()
        server.fault(hang=True)
    assert [server.status(path, timeout=0.5) for path in ("/health", "/v1/models", "/metrics")] == ["ReadTimeout"] * 3
    assert Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    if not flags:
        assert stream.is_alive()
    server.fault(hang=False)
    assert server.status() == 200
    if not flags:
        assert stream.ended().tokens == generate(HELLO, 30)


@pytest.mark.parametrize("engine", ["process", "none"])
def test_a_hung_engine_looks_healthy(up, engine):
    server = up("--engine", engine, "--engine-hang-after", "0")
    wait_until(lambda: server.get("/admin/state").json()["faults"]["engine_hang"])
    with pytest.raises(httpx.ReadTimeout):
        server.complete(timeout=0.5)
    assert server.status() == 200
    assert server.metric("vllm:iteration_tokens_total_count") == 0
    server.fault(engine_hang=False)
    assert server.text() == decode(generate(HELLO, 16))


def test_a_busy_server_moves_and_answers_late(up):
    server = up("--busy")
    with pytest.raises(httpx.ReadTimeout):
        server.complete(timeout=0.5)
    assert server.status(timeout=0.5) == "ReadTimeout"
    steps = server.metric("vllm:iteration_tokens_total_count")
    wait_until(lambda: server.metric("vllm:iteration_tokens_total_count") > steps)
    assert server.metric("vllm:num_requests_running") == 256
    server.fault(busy=False)
    assert server.text() == decode(generate(HELLO, 16))
    wait_until(lambda: server.metric("vllm:num_requests_running"), 0.0)


def test_health_may_flap_lie_and_be_late(up):
    server = up("--flap", "0.3")
    for expected in (200, 503, 200, 503):
        wait_until(lambda: server.status(), expected)
    server.fault(flap_s=0, health_status=418)
    assert (server.status(), server.status("/v1/models")) == (418, 200)
    server.fault(health_status=0, health_delay_s=30)
    assert server.status(timeout=0.5) == "ReadTimeout"
    server.fault(health_delay_s=0, completion_status=429)
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 429
    assert server.status() == 200


def test_a_poisonous_prompt_kills_and_others_do_not(up):
    server = up("--poison", "xyzzy")
    assert server.text() == decode(generate(HELLO, 16))
    assert server.post("/v1/completions", {"prompt": "say xyzzy now"}).status_code == 500
    assert server.wait() == 0
    assert "exit code: -11" in server.out


def test_streams_stall_break_or_are_cut_in_the_middle(up):
    server = up("--tokens-per-s", "100", "--cut-after-tokens", "5", "--fault-streams", "1")
    cut = Stream(server, 20).ended()
    assert (cut.tokens, cut.done, bool(cut.error)) == (generate(HELLO, 20)[:5], False, True)
    assert Stream(server, 20).ended().tokens == generate(HELLO, 20), "one stream only"
    server.fault(error_after_tokens=7)
    broken = Stream(server, 20).ended()
    assert (broken.tokens, broken.done, broken.last_error) == (generate(HELLO, 20)[:7], True, "InternalServerError")
    server.fault(error_after_tokens=0, stall_after_tokens=3)
    stalled = Stream(server, 20)
    wait_until(lambda: len(stalled.tokens), 3)
    assert stalled.is_alive() and server.text() == decode(generate(HELLO, 16))


def test_unknown_faults_and_values_are_named(up):
    server = up("--engine", "none")
    for body in ({"nonsense": 1}, {"hang": "yes"}, {"serve_error": "nonsense"}, {"tokens_per_s": True}):
        answer = server.post("/admin/fault", body)
        assert answer.status_code == 400, body
        assert "cannot" in answer.json()["error"]["message"]


def test_it_says_what_it_is_told(up):
    server = up("--say", "CUDA out of memory", "--say", "twice", "--say-on", "stderr")
    assert server.err.startswith("CUDA out of memory\ntwice\n")
    server.fault(say="hello", stream="stdout")
    wait_until(lambda: "\nhello\n" in server.out)


def test_the_fault_file_takes_effect_at_the_next_step(up, tmp_path):
    path = tmp_path / "fault"
    server = up("--fault-file", str(path))
    assert server.text() == decode(generate(HELLO, 16))
    path.write_text("oom")
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 500
    assert server.wait() == 0
    assert "CUDA out of memory" in server.out


def test_an_orphan_outlives_the_server_in_its_own_session(up):
    server = up("--orphan")
    (orphan,) = set(server.strays()) - {server.pid, server.engine}
    assert os.getsid(orphan) == orphan
    assert server.terminate() == 0
    assert server.strays() == [orphan]
    assert f"RECOVERY_RUN={server.marker}".encode() in Path(f"/proc/{orphan}/environ").read_bytes()


def test_without_an_engine_process_it_serves_the_same(up):
    server = up("--engine", "none")
    assert server.strays() == [server.pid]
    assert server.text() == decode(generate(HELLO, 16))
    assert server.terminate() == 0


# --- the journal ---


def journal(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def events(path: Path) -> list[tuple[Any, ...]]:
    return [(row["event"], row["instance"], row["token"], row.get("code", row.get("signal"))) for row in journal(path)]


@pytest.mark.parametrize(
    ("marker", "given", "expected"),
    [
        ("41", "", ("m@80", "41")),
        ("m-0:41", "", ("m-0", "41")),
        ("/home/x/m-0/41", "", ("m-0", "41")),
        ("/home/x/m-0/41", "mine", ("mine", "41")),
        ("", "", ("m@80", "")),
    ],
)
def test_the_marker_names_instance_and_token(marker, given, expected):
    assert identity(given, "m@80", {"RECOVERY_RUN": marker}) == expected


def test_every_exec_and_exit_is_written_down(up, start, tmp_path):
    path = tmp_path / "journal"
    server = up("--journal", str(path), RECOVERY_RUN="m-0:41")
    assert server.terminate() == 0
    assert start("--journal", str(path), "--load-error", "oom", RECOVERY_RUN="m-0:42").wait() == 1
    assert start("--journal", str(path), "--instance", "m-0", "--crash-after", "0", "--signal", "11", RECOVERY_RUN="43").wait() == -11
    wanted = [("41", 0), ("42", 1), ("43", 11)]
    assert events(path) == [row for token, end in wanted for row in (("exec", "m-0", token, None), ("exit", "m-0", token, end))]
    first = journal(path)[0]
    assert first["pid"] == server.pid and first["wall"] > 1e9 and first["boottime"] > 0


def test_a_second_living_run_is_an_overlap_and_a_killed_one_is_not(up, tmp_path):
    path = tmp_path / "journal"
    flags = ("--journal", str(path), "--instance", "m/0", "--engine", "none")
    first = up(*flags, RECOVERY_RUN="1")
    second = up(*flags, RECOVERY_RUN="2")
    first.process.kill()
    first.wait()
    third = up(*flags, RECOVERY_RUN="3")
    for server in (second, third):
        server.process.kill()
        server.wait()
    up(*flags, RECOVERY_RUN="4")
    assert [(row["event"], row["token"], row.get("part")) for row in journal(path)] == [
        ("exec", "1", None),
        ("exec", "2", None),
        ("overlap", "2", "server"),
        ("exec", "3", None),
        ("overlap", "3", "server"),
        ("exec", "4", None),
    ]


def test_an_engine_left_behind_is_an_overlap(up, tmp_path):
    path = tmp_path / "journal"
    first = up("--journal", str(path), "--instance", "m-0")
    first.process.kill()
    first.wait()
    up("--journal", str(path), "--instance", "m-0")
    assert [row["part"] for row in journal(path) if row["event"] == "overlap"] == ["engine"]
