"""
FluidMCP's other spellings of a model, told in ours.

Its `shutdown_timeout` is our `stop_grace_s`. Its file may give `model`, `config`, `profile` and `port` where we want `command` and
`args`: the flags and the values of the three profiles are those of Fluid-AI/fluidmcp, `fluidmcp/cli/services/vllm_config.py`,
so that the same server starts.
"""

from collections.abc import Mapping
from typing import Any, Final

DEFAULT_PORT: Final = 8001

PROFILES: Final[Mapping[str, Mapping[str, object]]] = {
    "development": {
        "gpu_memory_utilization": 0.5,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "max_model_len": 2048,
        "dtype": "float16",
    },
    "production": {
        "gpu_memory_utilization": 0.85,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "max_model_len": 4096,
        "dtype": "float16",
    },
    "high-throughput": {
        "gpu_memory_utilization": 0.9,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 16384,
        "max_model_len": 2048,
        "dtype": "float16",
    },
}
FLAG_KEYS: Final = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_model_len",
    "dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
)


def in_our_words(data: dict[Any, Any]) -> dict[Any, Any]:
    """
    The entry with `command`, `args` and a base_url made from the high-level form, and `stop_grace_s`; any other entry as it came.

    Raises ValueError with the reason where the form is incomplete; the caller adds the path.
    """
    if isinstance(data.get("shutdown_timeout"), int | float) and "stop_grace_s" not in data:
        data = {**data, "stop_grace_s": data["shutdown_timeout"]}
    if ({"config", "profile"} & data.keys()) and data.get("type", "vllm") == "vllm":
        return _expanded(data)
    return data


def _expanded(data: dict[Any, Any]) -> dict[Any, Any]:
    config, profile, model = data.get("config", {}), data.get("profile"), data.get("model")
    if profile is not None and (not isinstance(profile, str) or profile not in PROFILES):
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}")
    if not isinstance(config, dict) or (unknown := config.keys() - {*FLAG_KEYS, "port"}):
        allowed = ", ".join((*FLAG_KEYS, "port"))
        raise ValueError(
            "config must be an object" if not isinstance(config, dict) else f"config has {sorted(unknown)}; allowed: {allowed}"
        )
    if not isinstance(model, str) or not model:
        raise ValueError("model must name what to serve when config or profile is given")
    values = {**(PROFILES[profile] if profile else {}), **config}
    port = data.get("port", config.get("port", DEFAULT_PORT))
    args = ["serve", model, "--port", str(port), "--host", "0.0.0.0"]
    for key in FLAG_KEYS:
        if key in values:
            args += [f"--{key.replace('_', '-')}", str(values[key])]
    made = {"command": "vllm", "args": tuple(args), "endpoints": {"base_url": f"http://localhost:{port}/v1"}}
    return {**made, **data, "command": "vllm", "args": tuple(args)}
