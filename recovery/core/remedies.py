"""
What to do about a cause: a ladder of steps, the cheapest that can help first, each with its own budget.

Pure: the situation comes in, one step goes out. What was tried is read from the overrides in force and from the number of
failures since the last forgiveness, so nothing else has to be remembered: every failure so far led to one step, and those
that left no override were restarts.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal, NamedTuple

from pydantic import AwareDatetime, Field

from recovery.core.causes import Cause
from recovery.core.fleet import Frozen
from recovery.core.launch import ARGS, PORT, Override, has_flag, values_of, with_flag


class StepKind(StrEnum):
    """What a step of a repair does before the server is started again."""

    RESTART = "restart"  # nothing but starting it again
    FREE_GPU = "free_gpu"  # end our own strays on its cards first
    FREE_PORT = "free_port"  # end our own stray on its port first
    OVERRIDE = "override"  # one flag changed
    FALLBACK_ARGS = "fallback_args"  # the next of the model's fallback_args
    OTHER_PORT = "other_port"
    OTHER_GPU = "other_gpu"
    GIVE_UP = "give_up"  # a human is needed


class Situation(Frozen):
    """A failure, what was tried against it, and what else there is to try."""

    cause: Cause
    evidence: str = Field("", description="the line that gave the cause away; it ends up in the reason of giving up")
    advice: str = ""
    suggested: dict[str, float] = Field({}, description="values vLLM says would fit, see Diagnosis")
    failures: int = Field(1, ge=1, description="failures of this cause since the last forgiveness, this one included")
    failures_by_gpu: dict[int, int] = Field({}, description="failures while on a card, this one included; empty: not counted by card")
    overrides: tuple[Override, ...] = Field((), description="in force now, in order")
    args: tuple[str, ...] = Field((), description="the command line that failed, overrides applied")
    fallback_args: tuple[tuple[str, ...], ...] = ()
    gpus: tuple[int, ...] = Field((), description="its cards; empty: it has none, or all")
    spare_gpus: tuple[int, ...] = Field((), description="cards of the host that nobody uses and that are not known to be bad")
    port: int | None = None
    spare_ports: tuple[int, ...] = Field((), description="free ports of its range")
    strays: int = Field(0, ge=0, description="processes of its earlier runs on its cards or its port")
    port_holder: Literal["ours", "stranger"] | None = None
    remedies: bool = Field(True, description="the policy's `remedies`: off = only restart")
    at: AwareDatetime


class Step(Frozen):
    """One step. `overrides`, `port` and `gpus` are what the next start uses, whole."""

    kind: StepKind
    reason: str = Field(description="one sentence for the operator")
    overrides: tuple[Override, ...] = ()
    port: int | None = None
    gpus: tuple[int, ...] = ()
    unlimited: bool = Field(False, description="only `max_restarts` limits how often it is taken")

    @property
    def gives_up(self) -> bool:
        return self.kind is StepKind.GIVE_UP


UNLIMITED: Final = 1_000_000
"""The ladder sets no limit of its own here; `max_restarts` does."""

UTILIZATION: Final = 0.9
MAX_NUM_SEQS: Final = 256
"""What vLLM uses where the flag is not given (0.92 since 0.31, 1024 on large cards: near enough for a first step down)."""
SMALLEST_LEN: Final = 512
SMALLEST_UTILIZATION: Final = 0.5


class Rung(NamedTuple):
    kind: StepKind
    budget: int
    flag: str = ""


K = StepKind
_SHRINK: Final = (
    Rung(K.OVERRIDE, 2, "--max-model-len"),
    Rung(K.OVERRIDE, 2, "--max-num-seqs"),
    Rung(K.OVERRIDE, 2, "--gpu-memory-utilization"),
    Rung(K.OVERRIDE, 1, "--enforce-eager"),
    Rung(K.FALLBACK_ARGS, UNLIMITED),
)
_AGAIN: Final = (Rung(K.RESTART, UNLIMITED),)
_MAYBE_THE_CARD: Final = (Rung(K.RESTART, 2), Rung(K.OTHER_GPU, 3))
_NEVER: Final = ()

LADDERS: Final[Mapping[Cause, tuple[Rung, ...]]] = {
    Cause.CUDA_OOM_LOAD: (Rung(K.FREE_GPU, 2), *_SHRINK),
    # A fresh process has a clean allocator, so the first OOM while serving costs a restart and no quality.
    Cause.CUDA_OOM_SERVING: (Rung(K.FREE_GPU, 2), Rung(K.RESTART, 1), *_SHRINK),
    Cause.KV_CACHE_TOO_SMALL: (
        Rung(K.FREE_GPU, 2),
        Rung(K.OVERRIDE, 3, "--max-model-len"),
        Rung(K.OVERRIDE, 1, "--enforce-eager"),
        Rung(K.FALLBACK_ARGS, UNLIMITED),
    ),
    # The last run's memory may take seconds to come back; a stranger's does not.
    Cause.GPU_MEMORY_TAKEN: (
        Rung(K.FREE_GPU, 2),
        Rung(K.RESTART, 2),
        Rung(K.OTHER_GPU, 1),
        Rung(K.OVERRIDE, 1, "--gpu-memory-utilization"),
        Rung(K.FALLBACK_ARGS, UNLIMITED),
    ),
    Cause.PORT_IN_USE: (Rung(K.FREE_PORT, 3), Rung(K.OTHER_PORT, 5), Rung(K.RESTART, 3)),
    Cause.HOST_OOM: (Rung(K.RESTART, 2), Rung(K.FALLBACK_ARGS, UNLIMITED), *_AGAIN),
    Cause.DISK_FULL: (Rung(K.RESTART, 3),),
    Cause.GPU_LOST: (Rung(K.OTHER_GPU, UNLIMITED),),
    Cause.ILLEGAL_ACCESS: _MAYBE_THE_CARD,
    Cause.NCCL: _MAYBE_THE_CARD,
    Cause.STEP_TIMEOUT: _MAYBE_THE_CARD,
    Cause.ENGINE_HANG: _MAYBE_THE_CARD,
    Cause.ENGINE_DIED: _MAYBE_THE_CARD,
    Cause.WORKER_DIED: _MAYBE_THE_CARD,
    Cause.SEGFAULT: _MAYBE_THE_CARD,
    Cause.BAD_ARGUMENT: _NEVER,
    Cause.CONFIG_ERROR: _NEVER,
    Cause.MODEL_NOT_FOUND: _NEVER,
    Cause.MODEL_GATED: _NEVER,
    Cause.BAD_MODEL_FILES: _NEVER,
    Cause.BROKEN_INSTALL: _NEVER,
    Cause.NETWORK: _AGAIN,
    Cause.STARTUP_TIMEOUT: _AGAIN,
    Cause.SERVER_HANG: _AGAIN,
    Cause.KILLED: _AGAIN,
    Cause.CLEAN_EXIT: _AGAIN,
    Cause.UNKNOWN_EXIT: _AGAIN,
}


def next_step(now: Situation) -> Step:
    """The first rung of the cause's ladder that has budget left and something to do; giving up when there is none."""
    if not now.remedies and not now.cause.hopeless:
        return _again(now, "starting again; other remedies are switched off (`remedies: false`)")
    spent = _restarts_spent(now)
    for rung in LADDERS[now.cause]:
        if rung.kind in (K.FREE_GPU, K.FREE_PORT):
            used = now.failures - 1
        elif rung.kind is K.RESTART or (rung.kind is K.OTHER_GPU and not now.failures_by_gpu):
            used, spent = min(spent, rung.budget), max(0, spent - rung.budget)
        else:
            used = _used(now, rung)
        if used < rung.budget and (step := _TRY[rung.kind](now, rung)) is not None:
            return step
    if now.cause in _CARD and not _moved(now):
        return _again(now, f"starting again: {_times(now)}, and there is no other GPU to try")
    return _step(now, K.GIVE_UP, _why_give_up(now))


def plan(now: Situation, limit: int = 30) -> tuple[Step, ...]:
    """
    Every step left, should the same failure come back after each; the last one gives up, or is a restart without limit.

    This is what `recovery plan MODEL` shows.
    """
    steps: list[Step] = []
    while len(steps) < limit and not (steps and (steps[-1].gives_up or steps[-1].unlimited)):
        steps.append(next_step(now))
        now = _after(now, steps[-1])
    return tuple(steps)


_CARD: Final = frozenset(cause for cause, ladder in LADDERS.items() if ladder is _MAYBE_THE_CARD)


def _restarts_spent(now: Situation) -> int:
    """How many steps against this cause left no override."""
    if now.cause in _CARD and now.failures_by_gpu and now.gpus:
        return max(now.failures_by_gpu.get(gpu, 1) for gpu in now.gpus) - 1
    return max(0, now.failures - 1 - sum(step.cause == now.cause for step in now.overrides))


def _moved(now: Situation) -> int:
    """How many other cards were tried: cards with failures that are no longer its own."""
    return len([gpu for gpu in now.failures_by_gpu if gpu not in now.gpus]) if now.gpus else 0


def _used(now: Situation, rung: Rung) -> int:
    """Steps taken on a rung that leaves its mark."""
    if rung.kind is K.OTHER_GPU:
        return _moved(now)
    flag = {K.FALLBACK_ARGS: ARGS, K.OTHER_PORT: PORT}.get(rung.kind, rung.flag)
    return sum(step.flag == flag for step in now.overrides)


def _step(now: Situation, kind: StepKind, reason: str, *, gpus: Sequence[int] = (), add: Override | None = None) -> Step:
    overrides = (*now.overrides, add) if add else now.overrides
    port = int(str(add.value)) if add and add.flag == PORT else now.port
    return Step(kind=kind, reason=reason, overrides=overrides, port=port, gpus=tuple(gpus) or now.gpus)


def _override(now: Situation, flag: str, value: str | tuple[str, ...] | None) -> Override:
    return Override(flag=flag, value=value, cause=now.cause.value, since=now.at)


def _times(now: Situation) -> str:
    cause = now.cause.value.replace("_", " ")
    return cause if now.failures == 1 else f"{cause}, {now.failures} times"


def _again(now: Situation, reason: str) -> Step:
    return _step(now, K.RESTART, reason).model_copy(update={"unlimited": True})


def _restart(now: Situation, rung: Rung) -> Step:
    reason = f"starting again after {_times(now)}"
    return _again(now, reason) if rung.budget == UNLIMITED else _step(now, K.RESTART, reason)


def _free_gpu(now: Situation, rung: Rung) -> Step | None:
    if not now.strays:
        return None
    return _step(now, K.FREE_GPU, f"ending {now.strays} of our own left-over processes that hold memory of its cards")


def _free_port(now: Situation, rung: Rung) -> Step | None:
    if now.port_holder != "ours" and not now.strays:
        return None
    return _step(now, K.FREE_PORT, f"ending our own left-over process that holds port {now.port}")


def _other_port(now: Situation, rung: Rung) -> Step | None:
    port = next((port for port in now.spare_ports if port != now.port), None)
    if port is None:
        return None
    reason = f"moving to port {port}: {now.port or 'its port'} is taken by a process that is not ours"
    return _step(now, K.OTHER_PORT, reason, add=_override(now, PORT, str(port)))


def _other_gpu(now: Situation, rung: Rung) -> Step | None:
    wanted = len(now.gpus)
    others = [gpu for gpu in now.spare_gpus if gpu not in now.gpus and not now.failures_by_gpu.get(gpu)]
    if not wanted or len(others) < wanted:
        return None
    new = tuple(others[:wanted])
    return _step(now, K.OTHER_GPU, f"moving from GPU {_list(now.gpus)} to GPU {_list(new)} after {_times(now)}", gpus=new)


def _fallback_args(now: Situation, rung: Rung) -> Step | None:
    tried = sum(step.flag == ARGS for step in now.overrides)
    if tried >= len(now.fallback_args):
        return None
    reason = f"falling back to argument list {tried + 1} of {len(now.fallback_args)} after {_times(now)}"
    return _step(now, K.FALLBACK_ARGS, reason, add=_override(now, ARGS, now.fallback_args[tried]))


def _change_flag(now: Situation, rung: Rung) -> Step | None:
    """The next smaller value of the rung's flag, or None where it cannot get any smaller."""
    chosen = _SMALLER[rung.flag](now)
    if chosen is None:
        return None
    value, why = chosen
    said = rung.flag if value is None else f"{rung.flag} {value}"
    return _step(now, K.OVERRIDE, f"trying {said} ({why}) after {_times(now)}", add=_override(now, rung.flag, value))


def _fits(now: Situation, setting: str, current: float | None, *, at_least: float) -> float | None:
    """What vLLM says would fit, where that is less than what is set and still of use."""
    fits = now.suggested.get(setting)
    return fits if fits is not None and at_least <= fits and (current is None or fits < current) else None


def _model_len(now: Situation) -> tuple[str, str] | None:
    given = next(iter(values_of(now.args, "--max-model-len")), None)
    current = _number(given)
    if fits := _fits(now, "max_model_len", current, at_least=16):
        return str(int(fits)), "what vLLM says would fit"
    if given is None:
        return "auto", "what fits in its memory"  # vLLM since 0.11
    if current is None or current // 2 < SMALLEST_LEN:
        return None
    return str(int(current // 2)), f"half of {int(current)}"


def _num_seqs(now: Situation) -> tuple[str, str] | None:
    current = _number(next(iter(values_of(now.args, "--max-num-seqs")), None))
    if fits := _fits(now, "max_num_seqs", current, at_least=1):
        return str(int(fits)), "half of what it could not warm up"
    smaller = int((current or MAX_NUM_SEQS) // 4)
    return (str(smaller), f"a quarter of {int(current or MAX_NUM_SEQS)}") if smaller else None


def _utilization(now: Situation) -> tuple[str, str] | None:
    current = _number(next(iter(values_of(now.args, "--gpu-memory-utilization")), None)) or UTILIZATION
    if fits := _fits(now, "gpu_memory_utilization", current, at_least=0.05):
        return f"{fits:g}", "what is free on the card"
    if now.cause is Cause.GPU_MEMORY_TAKEN:
        return None
    lower = round(current - 0.05, 2)
    return (f"{lower:g}", f"below {current:g}") if lower >= SMALLEST_UTILIZATION else None


def _eager(now: Situation) -> tuple[None, str] | None:
    return None if has_flag(now.args, "--enforce-eager") else (None, "no memory for CUDA graphs")


def _number(text: str | None) -> float | None:
    """The number a flag was given; vLLM also takes 32k and 32K, 1m and so on."""
    scale = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}
    try:
        return float(text[:-1]) * scale[text[-1]] if text and text[-1] in scale else float(text or "")
    except ValueError:
        return None


_SMALLER: Final[Mapping[str, Callable[[Situation], tuple[str | None, str] | None]]] = {
    "--max-model-len": _model_len,
    "--max-num-seqs": _num_seqs,
    "--gpu-memory-utilization": _utilization,
    "--enforce-eager": _eager,
}
_TRY: Final[Mapping[StepKind, Callable[[Situation, Rung], Step | None]]] = {
    K.RESTART: _restart,
    K.FREE_GPU: _free_gpu,
    K.FREE_PORT: _free_port,
    K.OVERRIDE: _change_flag,
    K.FALLBACK_ARGS: _fallback_args,
    K.OTHER_PORT: _other_port,
    K.OTHER_GPU: _other_gpu,
}


def _why_give_up(now: Situation) -> str:
    """Why no step is left, in a sentence that names what to mend."""
    said = now.evidence or now.cause.value.replace("_", " ")
    if now.cause.hopeless:
        why = f"not started again, it would fail the same way: {said}"
    elif now.cause is Cause.GPU_LOST:
        why = f"GPU {_list(now.gpus) or 'of this model'} is lost and there is no other to move to: {said}"
    elif now.cause in _CARD:
        why = f"{_times(now)}, on GPU {_list(sorted({*now.failures_by_gpu, *now.gpus}))}: {said}"
    else:
        why = f"every remedy was tried: {said}"
    return f"{why}. {now.advice}".strip()


def _list(gpus: Sequence[int]) -> str:
    return ",".join(map(str, gpus))


def _after(now: Situation, step: Step) -> Situation:
    """The situation after `step` was taken and the same failure came back."""
    args = now.args
    for new in step.overrides[len(now.overrides) :]:
        args = new.value if isinstance(new.value, tuple) else with_flag(args, new.flag, new.value)
    by_gpu = {**now.failures_by_gpu}
    if now.gpus:
        for gpu in now.gpus:
            by_gpu.setdefault(gpu, now.failures)
        for gpu in step.gpus:
            by_gpu[gpu] = by_gpu.get(gpu, 0) + 1
    freed = step.kind in (K.FREE_GPU, K.FREE_PORT)
    return Situation(
        cause=now.cause,
        evidence=now.evidence,
        advice=now.advice,
        suggested=now.suggested,
        failures=now.failures + 1,
        failures_by_gpu=by_gpu,
        overrides=step.overrides,
        args=args,
        fallback_args=now.fallback_args,
        gpus=step.gpus,
        spare_gpus=tuple(gpu for gpu in now.spare_gpus if gpu not in step.gpus),
        port=step.port,
        spare_ports=tuple(port for port in now.spare_ports if port != step.port),
        strays=0 if freed else now.strays,
        port_holder=None if freed else now.port_holder,
        remedies=now.remedies,
        at=now.at,
    )
