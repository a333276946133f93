"""What may go wrong while the simulator runs: set by flags, changed by POST /admin/fault."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class Faults:
    """Lasting faults. Times are seconds; 0, empty and false mean "off"."""

    hang: bool = False
    """The whole server accepts and never answers; the process is not stopped."""
    engine_hang: bool = False
    """The engine makes no step; /health stays 200 and the counters stand still."""
    busy: bool = False
    """Steps move, full batch, requests wait in the queue, /health takes `busy_health_s`."""
    busy_health_s: float = 40.0
    health_status: int = 0
    """What /health and /ping answer instead of 200."""
    health_delay_s: float = 0.0
    flap_s: float = 0.0
    """/health, /ping and /v1/models answer 503 during every second period of this length."""
    completion_status: int = 0
    """What completions and embeddings answer instead of 200, e.g. 500, 503 or 429."""
    ignore_sigterm: bool = False
    stuck_shutdown: bool = False
    """A SIGTERM while streams are open ends the engine, but the server waits for its connections for ever."""
    stall_after_tokens: int = 0
    """A stream goes silent after so many tokens."""
    cut_after_tokens: int = 0
    """A stream's connection is reset after so many tokens."""
    error_after_tokens: int = 0
    """A stream gets vLLM's error event and `[DONE]` after so many tokens, and the server lives on."""
    fault_streams: int = 0
    """How many more streams the three above may hit; 0: all."""
    poison: str = ""
    """A prompt that contains this text crashes the engine."""
    tokens_per_s: float = 500.0
    """Of one request. 0: as fast as it goes."""
    ttft_s: float = 0.005
    """From the start of a request (not counting its wait in the queue) to its first token."""
    step_delay_s: float = 0.0
    """Added to each step."""
    chunk_tokens: int = 1
    """Tokens per step and request."""
    eos_every: int = 0
    """About one in so many tokens ends the text; 0: only `max_tokens` and `stop` do."""

    def change(self, values: dict[str, Any]) -> None:
        """Set some of them; `ValueError` names a fault that does not exist or a value of another type."""
        kinds = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"cannot set {name!r}: known faults are {', '.join(sorted(kinds))}")
            wanted = kinds[name]
            if wanted is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if type(value) is not wanted:
                raise ValueError(f"cannot set {name!r} to {value!r}: it takes a {wanted.__name__}")
            setattr(self, name, value)


FAULT_NAMES = frozenset(field.name for field in fields(Faults))
ENGINE_FAULTS = frozenset({"engine_hang", "busy", "tokens_per_s", "ttft_s", "step_delay_s", "chunk_tokens", "eos_every", "ignore_sigterm"})
"""Those that the engine must be told of."""
