"""
From the end of a run to its cause and its remedy: gathers what the pure `diagnosis` and `remedies` weigh.

Evidence leaves the host only redacted; it is kept beside the incident, which names it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recovery.core import remedies
from recovery.core.causes import Cause
from recovery.core.diagnosis import Diagnosis, Evidence, GpuReading, diagnose, has_cuda_oom
from recovery.core.failing import ExitSeen, Remedy
from recovery.core.fleet import Fleet, ModelSpec
from recovery.core.fleet_plan import plan, spare_ports, uses
from recovery.core.host import ExitRecord, HostView
from recovery.core.instance import Desired, Instance
from recovery.core.launch import launch
from recovery.core.redaction import RedactionConfig, redact_lines, redact_text, secret_values
from recovery.core.states import PROBED
from recovery.errors import ConfigError
from recovery.ports import Gpu, Host, Kernel

DIAGNOSED_BYTES = 262_144
"""What is read of a log at an exit, its head and its tail: the line that tells is near one of them."""
EVIDENCE_LINES = 200
DISK_FULL_BYTES = 1 << 20
_PID = re.compile(r"^\(\w+ pid=(\d+)\)")


class Repairs:
    """One host's diagnoses and remedies. Holds no state."""

    def __init__(self, host: Host, gpu: Gpu, kernel: Kernel, operator_env: Mapping[str, str], home: Path) -> None:
        self._host, self._gpu, self._kernel, self._env, self._home = host, gpu, kernel, operator_env, home

    def cards(self) -> tuple[GpuReading, ...]:
        """This host's cards as they are now."""
        return self._gpu.readings()

    def exit_seen(self, row: Instance, record: ExitRecord, view: HostView, fleet: Fleet, *, at: float) -> ExitSeen:
        """The end of a run with its cause and what to do about it; `at` in Redis' time."""
        if view.rebooted():
            return ExitSeen(token=record.token, at=at, unknown=True, rebooted=True, cause="host_reboot")
        log = tuple(self._host.read_log(row.id, record.token, DIAGNOSED_BYTES).splitlines())
        evidence = Evidence(
            exit_code=record.code,
            signal=record.signal,
            log=log,
            was_ready=row.ready_at is not None and row.run == record.token,
            stopping=row.desired is Desired.STOPPED or row.state not in PROBED,
            gpus=self._gpu.readings(),
            xids=self._gpu.xids(row.placement.gpus, view.run.at if view.run is not None else record.at),
            kernel_oom=self._oom_killed(record, view, log),
            disk_full=self._full(),
        )
        found = diagnose(evidence)
        hide = self.hidden(fleet, fleet.models.get(row.model))
        return ExitSeen(
            token=record.token,
            at=at,
            code=record.code,
            signal=record.signal,
            unknown=record.unknown,
            clean=found.cause is Cause.CLEAN_EXIT,
            cause=found.cause.value if found.cause is not None else "exit",
            evidence=redact_text(found.evidence[:500], hide),
            advice=found.advice,
            cuda_oom=has_cuda_oom(log),
            remedy=self.remedy(row, found, fleet, view),
        )

    def remedy(self, row: Instance, found: Diagnosis, fleet: Fleet, view: HostView) -> Remedy:
        """The next rung for this cause, as the row takes it."""
        spec = fleet.models.get(row.model)
        if found.cause is None or spec is None:
            return Remedy()
        step = remedies.next_step(self.situation(row, found, fleet, spec, view))
        placement = row.placement.model_copy(update={"gpus": step.gpus, **({"port": step.port} if step.port else {})})
        return Remedy(
            kind=step.kind.value,
            reason=redact_text(step.reason, self.hidden(fleet, spec)),
            overrides=step.overrides,
            placement=placement if placement != row.placement else None,
            give_up=step.gives_up,
        )

    def remedy_for(self, row: Instance, cause: str, evidence: str, fleet: Fleet, view: HostView) -> Remedy:
        """The next rung for a cause that a look found: nothing has ended yet, so there is no log to weigh."""
        known = next((each for each in Cause if each.value == cause), None)
        return self.remedy(row, Diagnosis(cause=known, evidence=evidence), fleet, view)

    def plan(self, row: Instance, cause: str, fleet: Fleet, view: HostView) -> list[dict[str, Any]]:
        """Every rung left for this cause, should it come back after each; `ConfigError` names the causes there are."""
        known = next((each for each in Cause if each.value == cause), None)
        spec = fleet.models.get(row.model)
        if known is None or spec is None:
            raise ConfigError(f"cannot plan for cause {cause[:60]!r}; there are: {', '.join(each.value for each in Cause)}")
        hide = self.hidden(fleet, spec)
        evidence = row.last_exit.evidence if row.last_exit is not None and row.last_exit.cause == cause else ""
        found = Diagnosis(cause=known, evidence=evidence)
        steps = remedies.plan(self.situation(row, found, fleet, spec, view))
        return [{**step.model_dump(mode="json"), "reason": redact_text(step.reason, hide)} for step in steps]

    def situation(self, row: Instance, found: Diagnosis, fleet: Fleet, spec: ModelSpec, view: HostView) -> remedies.Situation:
        """What the ladder is asked about: the failure, what was tried, what there is to try."""
        assert found.cause is not None
        made = launch(spec, row.placement, row.overrides, self._env)
        movable = uses(spec, "port")
        holder = self._host.port_holder(made.port) if made.port else None
        return remedies.Situation(
            cause=found.cause,
            evidence=found.evidence,
            advice=found.advice,
            suggested=found.suggested,
            failures=row.sees.get(found.cause.value, 0) + 1,
            failures_by_gpu={gpu: row.sees.get(f"{found.cause.value}@{gpu}", 0) + 1 for gpu in row.placement.gpus}
            | {
                int(key.split("@")[1]): seen
                for key, seen in row.sees.items()
                if key.startswith(f"{found.cause.value}@") and int(key.split("@")[1]) not in row.placement.gpus
            },
            overrides=row.overrides,
            args=made.argv[1:],
            fallback_args=spec.fallback_args,
            gpus=row.placement.gpus,
            spare_gpus=self._spare_gpus(row, fleet, spec),
            port=made.port,
            spare_ports=self._spare_ports(fleet, row) if movable else (),
            strays=len(view.strays),
            port_holder=None if holder is None else "ours" if holder.ours else "stranger",
            remedies=row.policy.remedies,
            at=datetime.fromtimestamp(row.entered_at, UTC),
        )

    def collect(self, row: Instance, token: int, fleet: Fleet, view: HostView) -> dict[str, Any]:
        """What a post-mortem wants and a restart destroys: log tail, processes, GPU, arguments; redacted."""
        spec = fleet.models.get(row.model)
        hide = self.hidden(fleet, spec)
        tail = self._host.read_log(row.id, token, DIAGNOSED_BYTES).splitlines()[-EVIDENCE_LINES:]
        made = launch(spec, row.placement, row.overrides, self._env) if spec is not None else None
        holder = self._host.port_holder(row.placement.port) if row.placement.port else None
        return {
            "log": redact_lines(tail, hide),
            "run": token,
            "processes": [stray.model_dump() for stray in view.strays],
            "port": {"port": row.placement.port, "held_by": holder.model_dump() if holder is not None else None},
            "gpu": [reading.model_dump() for reading in self._gpu.readings()],
            "arguments": redact_lines([" ".join(made.argv)], hide) if made is not None else [],
            "probe": row.probe.model_dump(),
            "overrides": [override.model_dump(mode="json") for override in row.overrides],
        }

    def hidden(self, fleet: Fleet, spec: ModelSpec | None) -> RedactionConfig:
        """What must not leave this host in anything about this model."""
        secrets = secret_values([*self._env.items(), *(spec.env.items() if spec is not None else ())])
        return RedactionConfig(patterns=fleet.redact_patterns, prompts=fleet.redact_prompts, literals=secrets)

    def _oom_killed(self, record: ExitRecord, view: HostView, log: Sequence[str]) -> bool:
        """Whether the OOM killer took the server or a worker: vLLM then ends with 0, so the log is asked who there was."""
        lost = [line for line in log if "exit code: -9" in line or "SIGKILL" in line]
        if view.run is None or (record.signal != 9 and not lost):
            return False
        others = {int(found[1]) for line in log if (found := _PID.match(line))}
        return self._kernel.oom_killed(view.run.server_pid, view.run.at, others)

    def _spare_ports(self, fleet: Fleet, row: Instance) -> tuple[int, ...]:
        return tuple(port for port in spare_ports(fleet, row.model, row.placement.host) if self._host.port_holder(port) is None)[:10]

    def _spare_gpus(self, row: Instance, fleet: Fleet, spec: ModelSpec) -> tuple[int, ...]:
        """Cards of the model's pool (else of the host) that the plan gives to nobody and that no failure speaks against."""
        pool: Sequence[int] = spec.gpus or tuple(reading.index for reading in self._gpu.readings())
        taken = {
            gpu
            for planned in plan(fleet)
            if planned.placement.host == row.placement.host and planned.id != row.id
            for gpu in planned.placement.gpus
        }
        lost = {reading.index for reading in self._gpu.readings() if reading.lost}
        return tuple(gpu for gpu in pool if gpu not in taken | lost)

    def _full(self) -> str | None:
        try:
            return str(self._home) if shutil.disk_usage(self._home).free < DISK_FULL_BYTES else None
        except OSError:
            return None
