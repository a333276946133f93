"""Faulty fleet files: every fault at once, with its path, what is allowed, and no secret."""

import json

import pytest

from recovery.core.fleet_file import load_fleet_text
from recovery.errors import ConfigError

GOOD = {"command": "vllm", "args": ["serve", "m", "--port", "{port}"], "endpoints": {"base_url": "http://{host}:{port}/v1"}}


def problems(data, host="here"):
    """The faults of a file with this content."""
    with pytest.raises(ConfigError) as caught:
        load_fleet_text(data if isinstance(data, str) else json.dumps(data), host)
    assert all(line in str(caught.value) for line in caught.value.problems)
    return caught.value.problems


def model(**changes):
    """A file with one model that is right but for these keys."""
    return {"llmModels": {"m": {**GOOD, **changes}}}


def test_the_unchanged_model_of_these_tests_is_right():
    assert load_fleet_text(json.dumps(model()), "here").models["m"].command == "vllm"


@pytest.mark.parametrize(
    ("changes", "path", "says"),
    [
        ({"restart_policy": "sometimes"}, "restart_policy", "'no', 'on-failure' or 'always'"),
        ({"max_restarts": -1}, "max_restarts", "greater than or equal to 0"),
        ({"max_restarts": "3"}, "max_restarts", "valid integer"),
        ({"max_restarts": True}, "max_restarts", "valid integer"),
        ({"max_restarts": 2.5}, "max_restarts", "valid integer"),
        ({"restart_delay": "5"}, "restart_delay", "valid number"),
        ({"restart_jitter": 1.5}, "restart_jitter", "less than or equal to 1"),
        ({"health_check_interval": 0}, "health_check_interval", "greater than"),
        ({"max_restart_delay": 7200}, "max_restart_delay", "(7200 s) must be below visibility_timeout (3600 s)"),
        ({"restart_delay": 60, "max_restart_delay": 10}, "max_restart_delay", "must not be below restart_delay (60 s)"),
        ({"restart_polcy": "no"}, "restart_polcy", "unknown key; did you mean restart_policy?"),
        ({"endpoints": {"base_url": "localhost:8001"}}, "endpoints.base_url", "http:// or https://"),
        ({"endpoints": {"base_url": "http://{host}:{prt}"}}, "endpoints.base_url", "unknown placeholder {prt}"),
        ({"endpoints": {"url": "http://x"}}, "endpoints.url", "Allowed: base_url"),
        ({"args": "serve m"}, "args", "must be a list"),
        ({"args": ["--port", 8001]}, "args[1]", "valid string"),
        ({"args": ["--port", "{port}", "{gpu}"]}, "args[2]", "did you mean {gpus}?"),
        ({"env": {"PORT": "{Port}", "P": "{port}"}}, "env.PORT", "did you mean {port}?"),
        ({"env": {"RECOVERY_RUN": "x"}}, "env.RECOVERY_RUN", "choose another name"),
        ({"command": None}, "endpoints.base_url", ""),
        ({"replicas": 0}, "replicas", "greater than or equal to 1"),
        ({"replicas": 2, "args": ["serve"], "endpoints": {}}, "replicas", "2 replicas need {port}"),
        ({"args": ["serve", "m"]}, "endpoints.base_url", "neither args nor env tell the server its port"),
        ({"endpoints": {"base_url": "http://localhost:8001/v1"}}, "endpoints.base_url", "write {port} here too"),
        (
            {"args": ["--port=8002"], "endpoints": {"base_url": "http://localhost:8001/v1"}},
            "endpoints.base_url",
            "leads to port 8001, but args say --port 8002",
        ),
        ({"args": ["--port", "99999"], "endpoints": {}}, "args", "99999 is not a port"),
        ({"endpoints": {"base_url": "http://localhost:99999/v1"}, "args": []}, "endpoints.base_url", "0-65535"),
        ({"port_range": [9000, 8000]}, "port_range", "first port 9000 is above last port 8000"),
        ({"port_range": [8000]}, "port_range", "[first, last]"),
        ({"port_range": [8000, 70000]}, "port_range[1]", "less than or equal to 65535"),
        ({"port_range": [8000, 8001], "replicas": 3}, "port_range", "no port left in 8000-8001 on host here for replica 2"),
        ({"hosts": []}, "hosts", "at least one GPU host"),
        ({"hosts": ["a", "a"]}, "hosts", "twice"),
        ({"hosts": ["a/b"]}, "hosts[0]", "must be a host name"),
        ({"host": "a", "hosts": ["b"]}, "hosts", "keep one"),
        ({"hosts": ["a", "b"], "endpoints": {"base_url": "http://localhost:{port}/v1"}}, "endpoints.base_url", "write {host}"),
        ({"reschedule": True}, "reschedule", "at least two hosts"),
        ({"gpus": [0, 0]}, "gpus", "twice"),
        ({"gpus": [0], "gpus_per_replica": 2}, "gpus_per_replica", "gpus has 1"),
        ({"gpus": [0], "env": {"CUDA_VISIBLE_DEVICES": "1"}}, "env.CUDA_VISIBLE_DEVICES", "keep one"),
        ({"args": ["--port", "{port}", "{gpus}"]}, "gpus", "no gpus are given"),
        ({"fallback": "nobody"}, "fallback", "no supervised model 'nobody'"),
        ({"fallback": "m"}, "fallback", "m -> m"),
        ({"fallback_args": ["serve"]}, "fallback_args[0]", "must be a list"),
        ({"profile": "huge"}, "", "development, production, high-throughput"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_fault_is_named_with_its_path_and_what_is_allowed(changes, path, says):
    if changes == {"command": None}:  # an entry without a command is somebody else's server, and must then say where
        changes, path, says = {"command": None, "endpoints": {}}, "command", "is missing"
    found = problems(model(**changes))

    prefix = f"llmModels.m.{path}:" if path else "llmModels.m:"
    assert [line for line in found if line.startswith(prefix) and says in line], found
    assert len(found) == 1, f"one fault, but told {len(found)} times: {found}"


def test_every_fault_is_told_at_once():
    found = problems(
        {
            "hosts": ["gpu-1"],
            "redact_patterns": ["("],
            "llmModel": {},
            "llmModels": {
                "a": {**GOOD, "restart_policy": "x", "max_restart_delay": 7200, "replicas": 0},
                "b": {**GOOD, "args": ["{prot}"], "stop_grace": 1},
                "../c": GOOD,
                "d": [],
            },
        }
    )
    paths = {line.split(":")[0] for line in found}

    assert paths >= {
        "llmModel",
        "redact_patterns[0]",
        "llmModels.a.restart_policy",
        "llmModels.a.max_restart_delay",
        "llmModels.a.replicas",
        "llmModels.b.stop_grace",
        "llmModels.b.args[0]",
        "llmModels.../c",
        "llmModels.d",
    }


@pytest.mark.parametrize(
    "data",
    [
        model(comand="vllm", command=None, endpoints=None),
        {"hosts": [7], "llmModels": {"m": GOOD, "n": {**GOOD, "host": "gpu-1"}}},
        {**model(fallback="n"), "llmModels": {"m": {**GOOD, "fallback": "n"}, "n": {**GOOD, "command": 7}}},
    ],
    ids=["misspelt", "fleet", "fallback"],
)
def test_a_fault_invents_no_further_ones(data):
    data["llmModels"]["m"] = {key: value for key, value in data["llmModels"]["m"].items() if value is not None}

    assert len(problems(data)) == 1, problems(data)


@pytest.mark.parametrize("bad_id", ["", "a/b", "..", ".hidden", "a b", "a:b", "x" * 65, "a\n", "ä", "a."])
def test_ids_that_would_not_do_as_a_folder_or_key_are_refused(bad_id):
    assert any("the id must be" in line for line in problems({"llmModels": {bad_id: GOOD}}))


@pytest.mark.parametrize("good_id", ["vllm", "llama-3.1-70b", "A_b", "7b", "x" * 64])
def test_usual_ids_are_taken(good_id):
    assert load_fleet_text(json.dumps({"llmModels": {good_id: GOOD}})).models[good_id]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"llmModels": {\n  "a": {},\n}}', "line 3, column 1"),
        ("", "line 1, column 1"),
        ("[]", "one JSON object"),
        ('{"brake_window_s": NaN}', "NaN"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_what_is_not_json_is_told_with_line_and_column(text, says):
    assert says in problems(text)[0]


def test_a_key_that_stands_twice_is_a_fault():
    text = '{"llmModels": {"m": {"command": "a", "endpoints": {}, "command": "b"}, "m": {"command": "c"}}}'

    assert "llmModels.m: the key stands here twice; JSON would keep only the last" in problems(text)


def test_no_secret_is_repeated():
    secret = "s3cr3t-value"
    found = problems(
        {
            "redact_patterns": [["s3cr3t-value"]],
            "llmModels": {
                "m": {
                    "command": "vllm",
                    "args": ["--api-key", {"k": secret}, f"{secret}\0"],
                    "env": {"HF_TOKEN": f"{secret}\0", "X": [secret]},
                    "endpoints": {"base_url": f"user:{secret}@host"},
                    "fallback_args": [[f"{secret}\0"]],
                }
            },
        }
    )

    assert len(found) >= 6
    assert secret not in "\n".join(found)


def test_two_models_on_one_port_of_one_host_are_a_fault_and_on_two_hosts_are_none():
    fixed = {"command": "vllm", "args": ["serve", "m", "--port", "8001"]}

    assert "port 8001 on host here is taken by a" in problems({"llmModels": {"a": fixed, "b": fixed}})[0]
    load_fleet_text(json.dumps({"llmModels": {"a": {**fixed, "host": "x"}, "b": {**fixed, "host": "y"}}}))


def test_a_circle_of_fallbacks_is_a_fault_and_a_chain_is_none():
    def fleet(**fallbacks):
        return {"llmModels": {name: {**GOOD, **({"fallback": to} if to else {})} for name, to in fallbacks.items()}}

    load_fleet_text(json.dumps(fleet(a="b", b="c", c=None)))
    assert any("a -> b -> c -> a" in line for line in problems(fleet(a="b", b="c", c="a")))


def test_a_model_without_a_host_beside_one_with_is_a_fault():
    data = {"llmModels": {"a": {**GOOD, "host": "gpu-1"}, "b": GOOD}}

    assert problems(data)[0].startswith("llmModels.b.hosts:")
    load_fleet_text(json.dumps({**data, "hosts": ["gpu-2"]}))


def test_braces_that_are_no_placeholders_are_no_fault():
    args = ["--port", "{port}", "--compilation-config", '{"level":3}', "--chat-template", "{{ messages }}", "{model}", "{}"]

    assert load_fleet_text(json.dumps(model(args=args))).models["m"].args == tuple(args)


def test_comments_and_a_byte_order_mark_are_taken():
    assert load_fleet_text("\ufeff" + json.dumps({"_note": 1, "llmModels": {"m": {**GOOD, "_why": "x"}}})).models
