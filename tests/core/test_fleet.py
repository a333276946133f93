"""The models of the fleet file: defaults, FluidMCP's files, what may leave the host."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from recovery.core.fleet import Fleet, FluidMcpModelKeys, ModelSpec, Policy, digest
from recovery.core.fleet_file import fleet_schema, load_fleet_text

EXAMPLES = Path(__file__).parents[2] / "examples"

SPECIFICATION = {
    "llmModels": {
        "vllm": {
            "command": "vllm",
            "args": ["serve", "facebook/opt-125m", "--port", "8001"],
            "endpoints": {"base_url": "http://localhost:8001/v1"},
            "restart_policy": "on-failure",
            "max_restarts": 3,
            "restart_delay": 5,
        }
    }
}

FLUIDMCP = {
    "_comment": "every key that its code or its examples know",
    "mcpServers": {"files": {"command": "npx", "args": ["-y", "some-server"], "env": {"TOKEN": "t"}}},
    "replicateModels": {"old": {"model": "a/b", "api_key": "${KEY}"}},
    "github_token": "ghp_not_a_real_one",
    "llmModels": {
        "local": {
            "type": "vllm",
            "command": "vllm",
            "args": ["serve", "some/model", "--port", "8001", "--host", "0.0.0.0"],
            "env": {"CUDA_VISIBLE_DEVICES": "1"},
            "endpoints": {"base_url": "http://localhost:8001/v1"},
            "capabilities": ["text"],
            "tooling": {"enabled": True},
            "timeouts": {"streaming": None},
            "shutdown_timeout": 20,
            "restart_policy": "on-failure",
            "restart_delay": 300,
        },
        "high-level": {
            "model": "other/model",
            "port": 8002,
            "profile": "production",
            "config": {"gpu_memory_utilization": 0.45, "tensor_parallel_size": 2},
            "env": {},
        },
        "cloud": {"type": "replicate", "model": "c/d", "api_key": "${K}", "default_params": {}, "timeout": 120, "max_retries": 3},
        "elsewhere": {"type": "vllm", "endpoints": {"base_url": "http://other-machine:8000/v1"}},
    },
}


def test_the_specifications_example_has_the_specifications_defaults():
    policy = load_fleet_text(json.dumps(SPECIFICATION)).models["vllm"].policy

    assert (policy.restart_policy, policy.max_restarts, policy.restart_delay) == ("on-failure", 3, 5)
    assert (policy.health_check_timeout, policy.health_check_interval) == (10.0, 30)
    assert Policy().restart_policy == "no"


def test_a_file_written_for_fluidmcp_loads_unchanged():
    fleet = load_fleet_text(json.dumps(FLUIDMCP))

    assert list(fleet.models) == ["local", "high-level"]
    assert fleet.unsupervised == ("cloud", "elsewhere")
    assert fleet.models["local"].stop_grace_s == 20


def test_fluidmcps_high_level_form_starts_the_same_server():
    spec = load_fleet_text(json.dumps(FLUIDMCP)).models["high-level"]

    assert spec.command == "vllm"
    assert spec.args[:6] == ("serve", "other/model", "--port", "8002", "--host", "0.0.0.0")
    flags = dict(zip(spec.args[6::2], spec.args[7::2], strict=True))
    assert flags["--gpu-memory-utilization"] == "0.45"  # the entry's own value, not the profile's 0.85
    assert flags["--max-num-seqs"] == "64"
    assert flags["--tensor-parallel-size"] == "2"
    assert spec.endpoints.base_url == "http://localhost:8002/v1"


def test_a_delay_above_the_default_cap_raises_the_cap():
    assert load_fleet_text(json.dumps(FLUIDMCP)).models["local"].max_restart_delay == 300


def test_what_leaves_the_host_holds_no_secret():
    secret = "hf_secret"
    spec = ModelSpec(command="vllm", args=("--api-key", secret), env={"HF_TOKEN": secret}, api_key=secret, max_restarts=7)

    assert secret not in spec.policy.model_dump_json()
    assert spec.policy.max_restarts == 7
    assert secret not in repr(spec)


def test_fluidmcps_own_keys_are_neither_kept_in_dumps_nor_shown():
    fleet = load_fleet_text(json.dumps(FLUIDMCP))
    shown = fleet.model_dump_json() + repr(fleet)

    for foreign in ("mcpServers", "replicateModels", "github_token", *FluidMcpModelKeys.model_fields):
        assert not re.search(rf'"{foreign}":|\b{foreign}=', shown), foreign


def test_a_policy_from_a_row_reads_back():
    policy = Policy(restart_policy="always", restart_delay=0.5)

    assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_models_cannot_be_changed_and_know_no_other_keys():
    with pytest.raises(ValidationError):
        Policy().max_restarts = 9
    with pytest.raises(ValidationError):
        Policy(max_restart=9)


def test_the_digest_follows_the_content_alone():
    spec = ModelSpec(command="vllm", args=("serve", "x"), env={"A": "1", "B": "2"})

    assert digest(spec) == digest(ModelSpec(command="vllm", args=("serve", "x"), env={"B": "2", "A": "1"}))
    assert digest(spec) == digest(ModelSpec.model_validate_json(spec.model_dump_json()))
    for change in ({"args": ("serve", "y")}, {"env": {"A": "1"}}, {"restart_delay": 6}, {"replicas": 2}):
        assert digest(spec) != digest(ModelSpec(**{**spec.model_dump(), **change})), change


def test_a_fleet_made_in_code_is_checked_like_a_file():
    with pytest.raises(ValidationError, match="replicas need"):
        Fleet(llmModels={"a": ModelSpec(command="vllm", replicas=2)})


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_shipped_examples_load_and_fit_the_schema(path):
    fleet = load_fleet_text(path.read_text(), host="this-host")

    assert fleet.models
    jsonschema.validate(json.loads(path.read_text()), fleet_schema())


def test_the_schema_takes_fluidmcps_file_and_refuses_a_misspelt_key():
    jsonschema.Draft202012Validator.check_schema(fleet_schema())
    jsonschema.validate(FLUIDMCP, fleet_schema())
    wrong = {"llmModels": {"vllm": {"command": "vllm", "max_restart": 3}}}
    with pytest.raises(jsonschema.ValidationError, match="max_restart"):
        jsonschema.validate(wrong, fleet_schema())


def test_every_setting_of_the_schema_says_what_it_is():
    definitions = fleet_schema()["$defs"]
    for name in ("ModelSpec", "Endpoints"):
        for key, entry in definitions[name]["properties"].items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{key} has no description"
    for key in Policy.model_fields:
        if key.endswith("_s"):
            assert definitions["ModelSpec"]["properties"][key].get("unit") == "s", key
