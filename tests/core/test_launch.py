"""Command lines, environments and addresses: what is executed, and where it answers."""

import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recovery.core.fleet import Endpoints, ModelSpec, Placement
from recovery.core.launch import Override, child_environment, launch, served_names, with_flag

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = Placement(host="gpu-1", port=8100, gpus=(2, 3), replica=1, address="10.0.0.1")


def spec(*args, url="http://{host}:{port}/v1", command="vllm", **more):
    """A model with these arguments."""
    return ModelSpec(command=command, args=args, endpoints=Endpoints(base_url=url), **more)


def step(flag, value=None):
    """One step of a repair."""
    return Override(flag=flag, value=value, cause="cuda_oom", since=NOW)


def test_the_four_placeholders_are_filled_everywhere():
    made = launch(spec("--port", "{port}", "--x={host}/{replica}", env={"G": "{gpus}", "P": "{port}"}), HERE)

    assert made.argv == ("vllm", "--port", "8100", "--x=10.0.0.1/1")
    assert (made.env["G"], made.env["P"]) == ("2,3", "8100")
    assert (made.base_url, made.port) == ("http://10.0.0.1:8100/v1", 8100)


@pytest.mark.parametrize("text", ['{"level":3}', "{{ messages }}", "{model}", "{}", "{Port}", "{port", '{"port": 1}', "{ port }"])
def test_other_braces_survive(text):
    assert launch(spec("--flag", text), HERE).argv[-1] == text


@given(
    st.text(alphabet='{}"portghsu :3', max_size=30).filter(lambda t: not any(f"{{{w}}}" in t for w in ("port", "host", "gpus", "replica")))
)
def test_text_without_a_placeholder_is_never_changed(text):
    assert launch(spec(text, env={"X": text}, url=None), HERE).argv[1] == text


def test_what_was_filled_in_is_not_filled_again():
    tricky = Placement(host="h", address="{port}", port=1)

    assert launch(spec("{host}", url=None), tricky).argv == ("vllm", "{port}")


def test_python_as_the_command_is_this_python():
    assert launch(spec("-m", "x", command="python"), HERE).argv[0] == sys.executable
    assert launch(spec("-m", "x", command="python3"), HERE).argv[0] == "python3"


@pytest.mark.parametrize(
    ("url", "base", "root"),
    [
        ("http://localhost:8001/v1", "http://localhost:8001/v1", "http://localhost:8001"),
        ("http://localhost:8001/v1/", "http://localhost:8001/v1", "http://localhost:8001"),
        ("http://localhost:8001", "http://localhost:8001", "http://localhost:8001"),
        ("http://localhost:8001/", "http://localhost:8001", "http://localhost:8001"),
        ("https://proxy/models/a/v1", "https://proxy/models/a/v1", "https://proxy/models/a"),
        ("http://localhost:8001/av1", "http://localhost:8001/av1", "http://localhost:8001/av1"),
        (None, None, None),
    ],
)
def test_b01_health_is_asked_at_the_servers_root_not_below_v1(url, base, root):
    made = launch(spec(url=url), Placement(host="h", port=8001))

    assert (made.base_url, made.root_url) == (base, root)


@pytest.mark.parametrize(
    ("args", "flag", "value", "wanted"),
    [
        (["serve", "m"], "--max-model-len", "2048", ["serve", "m", "--max-model-len", "2048"]),
        (["--max-model-len", "8192", "--x"], "--max-model-len", "2048", ["--max-model-len", "2048", "--x"]),
        (["--max-model-len=8192", "--x"], "--max-model-len", "2048", ["--max-model-len", "2048", "--x"]),
        (["--max_model_len", "8192"], "--max-model-len", "auto", ["--max-model-len", "auto"]),
        (["--max_model_len=8192"], "--max-model-len", "auto", ["--max-model-len", "auto"]),
        (["--max-model-len", "-1", "--x"], "--max-model-len", "2048", ["--max-model-len", "2048", "--x"]),
        (["--a", "1", "--b", "2", "--a=3"], "--a", "9", ["--a", "9", "--b", "2"]),
        (["--a-long", "1", "--a", "2"], "--a", "9", ["--a-long", "1", "--a", "9"]),
        (["--a", "--b", "2"], "--a", "9", ["--a", "9", "--b", "2"]),
        (["m"], "--enforce-eager", None, ["m", "--enforce-eager"]),
        (["--enforce-eager", "m"], "--enforce-eager", None, ["--enforce-eager", "m"]),
        (["--no-enforce-eager", "m"], "--enforce-eager", None, ["--enforce-eager", "m"]),
        (["--no_enforce_eager"], "--enforce-eager", None, ["--enforce-eager"]),
        (["--enforce-eager", "--enforce-eager"], "--enforce-eager", None, ["--enforce-eager"]),
    ],
)
def test_a_flag_is_replaced_in_every_spelling_and_added_where_it_is_missing(args, flag, value, wanted):
    assert list(with_flag(args, flag, value)) == wanted


def test_steps_are_applied_in_their_order_and_leave_the_rest_alone():
    model = spec("serve", "m", "--port", "{port}", "--compilation-config", '{"level":3}')
    steps = [step("--max-model-len", "4096"), step("--max-model-len", "2048"), step("--enforce-eager")]

    argv = launch(model, HERE, steps).argv
    assert argv[1:6] == ("serve", "m", "--port", "8100", "--compilation-config")
    assert argv[6:] == ('{"level":3}', "--max-model-len", "2048", "--enforce-eager")


def test_a_smaller_model_replaces_all_arguments_and_keeps_the_place():
    model = spec("serve", "big", "--port", "{port}")
    steps = [step("--max-num-seqs", "8"), step("args", ("serve", "small", "--port", "{port}")), step("--enforce-eager")]
    made = launch(model, HERE, steps)

    assert made.argv == ("vllm", "serve", "small", "--port", "8100", "--enforce-eager")
    assert made.served_names == ("small",)


def test_a_moved_port_is_known_to_everything_that_knows_the_port():
    filled = launch(spec("--port", "{port}", env={"P": "{port}"}), HERE, [step("--port", "8177")])
    assert filled.argv == ("vllm", "--port", "8177")
    assert (filled.port, filled.base_url, filled.env["P"]) == (8177, "http://10.0.0.1:8177/v1", "8177")

    literal = launch(spec("--port=8001", url="http://localhost:8001/v1"), Placement(host="h", port=8001), [step("--port", "8177")])
    assert literal.argv == ("vllm", "--port", "8177")
    assert literal.base_url == "http://localhost:8177/v1"

    by_url = launch(spec("serve", url="http://[::1]:8001/v1"), Placement(host="h", port=8001), [step("--port", "8177")])
    assert (by_url.argv, by_url.base_url) == (("vllm", "serve", "--port", "8177"), "http://[::1]:8177/v1")

    in_env = launch(spec("serve", env={"P": "{port}"}), HERE, [step("--port", "8177")])
    assert (in_env.argv, in_env.env["P"]) == (("vllm", "serve"), "8177")


def test_a_moved_port_outlives_a_later_change_of_all_arguments():
    steps = [step("--port", "8177"), step("args", ("serve", "small", "--port", "{port}"))]

    assert launch(spec("serve", "big", "--port", "{port}"), HERE, steps).argv[-1] == "8177"


@pytest.mark.parametrize(
    ("flag", "value"), [("args", "x"), ("args", None), ("--x", ("a",)), ("x", "1"), ("--port", "0"), ("--port", None), ("--x y", "1")]
)
def test_a_step_that_makes_no_sense_is_refused(flag, value):
    with pytest.raises(ValidationError):
        step(flag, value)


def test_b15_the_operators_environment_reaches_the_server_and_our_secrets_do_not():
    operator = {
        "PATH": "/bin",
        "HF_TOKEN": "t",
        "VLLM_USE_V1": "1",
        "NCCL_DEBUG": "INFO",
        "REDIS_URL": "redis://:pw@h",
        "FMCP_BEARER_TOKEN": "t",
        "FLOWER_BASIC_AUTH": "u:p",
        "CELERY_BROKER_URL": "redis://h",
        "RECOVERY_ADMIN_TOKENS": "t",
        "RECOVERY_RUN": "home/m-0/1",
    }
    env = child_environment(operator, {"PATH": "/opt", "REDIS_URL": "the model's own"}, Placement(host="h", gpus=(1,)))

    assert env == {
        "PATH": "/opt",
        "HF_TOKEN": "t",
        "VLLM_USE_V1": "1",
        "NCCL_DEBUG": "INFO",
        "RECOVERY_RUN": "home/m-0/1",
        "REDIS_URL": "the model's own",
        "CUDA_VISIBLE_DEVICES": "1",
    }


def test_without_gpus_in_the_file_the_operators_stay():
    assert child_environment({"CUDA_VISIBLE_DEVICES": "7"}, {}, Placement(host="h"))["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("args", "env", "api_key_env", "operator", "key"),
    [
        ((), {}, None, {}, None),
        (("--api-key", "a"), {"VLLM_API_KEY": "b"}, None, {}, "a"),
        (("--api_key=a",), {}, None, {}, "a"),
        ((), {"VLLM_API_KEY": "b"}, None, {"VLLM_API_KEY": "c"}, "b"),
        ((), {}, None, {"VLLM_API_KEY": "c"}, "c"),
        ((), {}, "MY_KEY", {"MY_KEY": "d"}, "d"),
        ((), {}, "MY_KEY", {}, None),
    ],
)
def test_the_key_for_probes_is_the_one_the_server_uses(args, env, api_key_env, operator, key):
    made = launch(spec("serve", "m", *args, env=env, api_key_env=api_key_env), HERE, (), operator)

    assert (made.api_key.get_secret_value() if made.api_key else None) == key
    if api_key_env and key:
        assert made.env["VLLM_API_KEY"] == key
    assert "'d'" not in repr(made)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["serve", "org/model", "--port", "1"], ("org/model",)),
        (["serve", "org/model", "--served-model-name", "a", "b", "--port", "1"], ("a", "b")),
        (["-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"], ("org/model",)),
        (["serve", "--model=org/model"], ("org/model",)),
        (["serve", "--port", "1"], ()),
        (["tests/server.py"], ()),
    ],
)
def test_the_names_a_server_answers_to(args, names):
    assert served_names(args) == names


def test_the_repr_of_a_launch_tells_no_secret():
    made = launch(spec("--api-key", "s3cret", env={"HF_TOKEN": "t0ken"}), HERE)

    assert "s3cret" not in repr(made) and "t0ken" not in repr(made)
