"""
The ladder of each cause, rung by rung, and what must never be tried.
"""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.core.causes import HOPELESS, Cause
from recovery.core.launch import ARGS, Override, values_of
from recovery.core.remedies import LADDERS, Situation, Step, StepKind, next_step, plan

AT = datetime(2026, 11, 24, tzinfo=UTC)
ARGS_32K = ("serve", "m", "--max-model-len", "32768", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.9")


def situation(cause: Cause, **changes: object) -> Situation:
    return Situation(**{"cause": cause, "at": AT, "args": ARGS_32K, **changes})


def said(steps: tuple[Step, ...]) -> list[tuple[str, object]]:
    """The steps in short: the kind, and what it changed."""
    short: list[tuple[str, object]] = []
    before: tuple[Override, ...] = ()
    for step in steps:
        new = step.overrides[len(before) :]
        before = step.overrides
        short.append((step.kind.value, (new[0].flag, new[0].value) if new else step.gpus))
    return short


# --- OOM


def test_an_oom_at_load_gets_smaller_step_by_step_and_then_gives_up():
    steps = plan(situation(Cause.CUDA_OOM_LOAD, fallback_args=(("serve", "small"),), evidence="torch.OutOfMemoryError"))

    assert said(steps) == [
        ("override", ("--max-model-len", "16384")),
        ("override", ("--max-model-len", "8192")),
        ("override", ("--max-num-seqs", "16")),
        ("override", ("--max-num-seqs", "4")),
        ("override", ("--gpu-memory-utilization", "0.85")),
        ("override", ("--gpu-memory-utilization", "0.8")),
        ("override", ("--enforce-eager", None)),
        ("fallback_args", (ARGS, ("serve", "small"))),
        ("give_up", ()),
    ]
    assert "every remedy was tried: torch.OutOfMemoryError" in steps[-1].reason
    assert all(override.cause == "cuda_oom_load" and override.since == AT for override in steps[-1].overrides)


def test_the_number_that_vllm_names_comes_first():
    step = next_step(situation(Cause.KV_CACHE_TOO_SMALL, suggested={"max_model_len": 1792}))

    assert (step.kind, step.overrides[0].flag, step.overrides[0].value) == (StepKind.OVERRIDE, "--max-model-len", "1792")
    assert "what vLLM says would fit" in step.reason


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("serve", "m"), "auto"),
        (("serve", "m", "--max-model-len=8192"), "4096"),
        (("serve", "m", "--max_model_len", "32k"), "16000"),
        (("serve", "m", "--max-model-len", "32K"), "16384"),
    ],
)
def test_the_context_is_only_ever_made_smaller(args, expected):
    assert next_step(situation(Cause.CUDA_OOM_LOAD, args=args)).overrides[0].value == expected


def test_a_suggestion_above_what_is_set_is_no_remedy():
    step = next_step(situation(Cause.CUDA_OOM_LOAD, suggested={"max_model_len": 100_000, "gpu_memory_utilization": 0.99}))

    assert step.overrides[0].value == "16384"


def test_what_cannot_get_smaller_is_skipped():
    args = ("serve", "m", "--max-model-len", "600", "--max-num-seqs", "2", "--gpu-memory-utilization", "0.52", "--enforce-eager")

    assert said(plan(situation(Cause.CUDA_OOM_LOAD, args=args))) == [("give_up", ())]


def test_our_own_strays_go_first_and_cost_nothing_of_the_ladder():
    first, second, *_ = plan(situation(Cause.CUDA_OOM_LOAD, strays=2))

    assert (first.kind, first.overrides) == (StepKind.FREE_GPU, ())
    assert second.overrides[0].flag == "--max-model-len"


def test_strays_that_will_not_go_do_not_hold_up_the_ladder():
    assert next_step(situation(Cause.CUDA_OOM_LOAD, strays=2, failures=2)).kind is StepKind.FREE_GPU
    assert next_step(situation(Cause.CUDA_OOM_LOAD, strays=2, failures=3)).kind is StepKind.OVERRIDE


def test_the_first_oom_while_serving_is_answered_by_a_restart_alone():
    first, second, *_ = plan(situation(Cause.CUDA_OOM_SERVING))

    assert (first.kind, first.overrides) == (StepKind.RESTART, ())
    assert second.overrides[0].flag == "--max-model-len"


def test_what_worked_is_kept_and_the_next_failure_goes_on_from_there():
    first = next_step(situation(Cause.CUDA_OOM_LOAD))
    second = next_step(situation(Cause.CUDA_OOM_SERVING, failures=2, overrides=first.overrides, args=("--max-model-len", "16384")))

    assert [(each.flag, each.value, each.cause) for each in second.overrides] == [
        ("--max-model-len", "16384", "cuda_oom_load"),
        ("--max-model-len", "8192", "cuda_oom_serving"),
    ]


def test_memory_taken_by_a_stranger_is_waited_for_then_fled_then_lived_with():
    now = situation(Cause.GPU_MEMORY_TAKEN, gpus=(0,), spare_gpus=(3,), suggested={"gpu_memory_utilization": 0.28})

    assert said(plan(now)) == [
        ("restart", (0,)),
        ("restart", (0,)),
        ("other_gpu", (3,)),
        ("override", ("--gpu-memory-utilization", "0.28")),
        ("give_up", (3,)),
    ]


def test_steps_that_leave_no_mark_are_counted_by_failures():
    def after(failures: int) -> StepKind:
        return next_step(situation(Cause.GPU_MEMORY_TAKEN, gpus=(0,), spare_gpus=(3,), failures=failures)).kind

    assert [after(n) for n in (1, 2, 3, 4)] == [StepKind.RESTART, StepKind.RESTART, StepKind.OTHER_GPU, StepKind.GIVE_UP]


# --- port


def test_our_own_stray_on_the_port_is_ended_and_a_strangers_port_is_left():
    ours = next_step(situation(Cause.PORT_IN_USE, port=8100, port_holder="ours", spare_ports=(8101,)))
    stranger = next_step(situation(Cause.PORT_IN_USE, port=8100, port_holder="stranger", spare_ports=(8100, 8101)))

    assert (ours.kind, ours.port, ours.overrides) == (StepKind.FREE_PORT, 8100, ())
    assert (stranger.kind, stranger.port, stranger.overrides[0].flag) == (StepKind.OTHER_PORT, 8101, "--port")


def test_without_another_port_it_waits_a_while_and_gives_up():
    steps = plan(situation(Cause.PORT_IN_USE, port=8100, port_holder="stranger", evidence="[Errno 98]"))

    assert [step.kind.value for step in steps] == ["restart", "restart", "restart", "give_up"]


# --- never again


@pytest.mark.parametrize("cause", sorted(HOPELESS))
@pytest.mark.parametrize("remedies", [True, False])
def test_a_configuration_error_is_never_retried_and_its_reason_is_told(cause, remedies):
    now = situation(cause, evidence="unrecognized arguments: --no-such-flag", advice="Mend it", strays=3, remedies=remedies)

    [step] = plan(now)

    assert step.gives_up
    assert "unrecognized arguments: --no-such-flag. Mend it" in step.reason


# --- the card


def test_repeated_engine_deaths_on_one_gpu_lead_to_another_and_then_to_a_human():
    now = situation(Cause.ILLEGAL_ACCESS, gpus=(0,), spare_gpus=(1,), failures_by_gpu={0: 1}, evidence="an illegal memory access")

    steps = plan(now)

    assert said(steps) == [
        ("restart", (0,)),
        ("restart", (0,)),
        ("other_gpu", (1,)),
        ("restart", (1,)),
        ("restart", (1,)),
        ("give_up", (1,)),
    ]
    assert "on GPU 0,1: an illegal memory access" in steps[-1].reason


def test_without_another_gpu_the_restart_budget_alone_decides():
    for gpus in ((), (0,)):
        steps = plan(situation(Cause.ENGINE_DIED, gpus=gpus))

        assert [step.kind.value for step in steps] == ["restart", "restart", "restart"]
        assert steps[-1].unlimited and "no other GPU" in steps[-1].reason
        assert next_step(situation(Cause.ENGINE_DIED, gpus=gpus, failures=90)).kind is StepKind.RESTART


def test_a_model_of_several_gpus_moves_only_where_there_are_as_many():
    few = situation(Cause.NCCL, gpus=(0, 1), spare_gpus=(2,), failures=3)
    enough = situation(Cause.NCCL, gpus=(0, 1), spare_gpus=(2, 3), failures=3)

    assert next_step(few).kind is StepKind.RESTART
    assert next_step(enough).gpus == (2, 3)


def test_a_card_it_already_failed_on_is_not_tried_again():
    now = situation(Cause.NCCL, gpus=(0,), spare_gpus=(1, 2), failures_by_gpu={0: 3, 1: 3})

    assert next_step(now).gpus == (2,)


def test_a_lost_gpu_is_left_at_once_and_never_restarted_on():
    assert next_step(situation(Cause.GPU_LOST, gpus=(0,), spare_gpus=(1,))).gpus == (1,)
    gone = next_step(situation(Cause.GPU_LOST, gpus=(0,), evidence="Xid 79"))
    assert gone.gives_up and "GPU 0 is lost" in gone.reason and "Xid 79" in gone.reason
    assert next_step(situation(Cause.GPU_LOST, evidence="Xid 79")).gives_up


# --- all of them


def test_remedies_switched_off_means_restarts_only():
    for cause in set(Cause) - HOPELESS:
        step = next_step(situation(cause, remedies=False, strays=2, port_holder="ours", gpus=(0,), spare_gpus=(1,)))

        assert (step.kind, step.overrides, step.gpus) == (StepKind.RESTART, (), (0,))


def test_every_cause_has_a_ladder():
    assert set(LADDERS) == set(Cause)


situations = st.builds(
    Situation,
    cause=st.sampled_from(Cause),
    suggested=st.dictionaries(
        st.sampled_from(["max_model_len", "max_num_seqs", "gpu_memory_utilization"]), st.floats(0.05, 1e6, allow_nan=False), max_size=3
    ),
    failures=st.integers(1, 6),
    args=st.sampled_from([(), ("serve", "m"), ARGS_32K, ("--max-model-len", "auto", "--enforce-eager"), ("--max-num-seqs=x",)]),
    fallback_args=st.sampled_from([(), (("serve", "a"),), (("serve", "a"), ("serve", "b", "--max-model-len", "1024"))]),
    gpus=st.sampled_from([(), (0,), (0, 1)]),
    spare_gpus=st.sampled_from([(), (2,), (2, 3, 4, 5)]),
    failures_by_gpu=st.sampled_from([{}, {0: 1}, {0: 2, 1: 1}]),
    port=st.none() | st.just(8100),
    spare_ports=st.sampled_from([(), (8100, 8101), (8102, 8103, 8104)]),
    strays=st.integers(0, 2),
    port_holder=st.sampled_from([None, "ours", "stranger"]),
    remedies=st.booleans(),
    at=st.just(AT),
)


@given(situations)
def test_every_plan_ends_and_only_ever_makes_things_smaller(now):
    steps = plan(now)

    assert steps[-1].gives_up or steps[-1].unlimited
    assert not any(step.gives_up or step.unlimited for step in steps[:-1])
    for flag in ("--max-model-len", "--max-num-seqs", "--gpu-memory-utilization"):
        values = [each.value for each in steps[-1].overrides if each.flag == flag and each.value != "auto"]
        numbers = [float(str(value)) for value in values]
        given = values_of(now.args, flag)
        if given and given[0].replace(".", "").isdigit():
            numbers = [float(given[0]), *numbers]
        if ARGS not in [each.flag for each in steps[-1].overrides]:
            assert numbers == sorted(numbers, reverse=True)
        assert all(number > 0 for number in numbers)
    assert all(step.reason for step in steps)
