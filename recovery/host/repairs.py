"""
From the end of a run to its cause and its remedy: gathers what the pure `diagnosis` and `remedies` weigh.

Evidence leaves the host only redacted; it is kept beside the incident, which names it.
"""

import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from recovery import __version__
from recovery.core import remedies
from recovery.core.causes import ADVICE, Cause
from recovery.core.diagnosis import Diagnosis, Evidence, GpuReading, diagnose, engine_died, has_cuda_oom
from recovery.core.failing import ExitSeen, Remedy
from recovery.core.fleet import Fleet, ModelSpec, Placement
from recovery.core.fleet_plan import own_turn, plan, spare_ports, uses
from recovery.core.host import ExitRecord, HostView
from recovery.core.instance import Desired, Instance
from recovery.core.launch import PORT, has_flag, launch
from recovery.core.redaction import RedactionConfig, redact_lines, redact_text, secret_values
from recovery.core.states import ENDING
from recovery.errors import ConfigError
from recovery.ports import Gpu, Host, Kernel

DIAGNOSED_BYTES = 262_144
"""What is read of a log at an exit, its head and its tail: the line that tells is near one of them."""
EVIDENCE_LINES = 200
EVIDENCE_LINE_CHARACTERS = 300
EVIDENCE_PROCESSES = 50
PORTS_OFFERED = 10
DISK_FULL_BYTES = 1 << 20
_PID = re.compile(r"^\(\w+ pid=(\d+)\)")
_VLLM = re.compile(r"(?:vLLM API server version|V1 LLM engine \(v)\s*([0-9][\w.+-]*)")


class Repairs:
    """One host's diagnoses and remedies. Holds no state."""

    def __init__(
        self,
        host: Host,
        gpu: Gpu,
        kernel: Kernel,
        operator_env: Mapping[str, str],
        home: Path,
        rows: Callable[[], Sequence[Instance]] = lambda: (),
    ) -> None:
        self._host, self._gpu, self._kernel, self._env, self._home, self._rows = host, gpu, kernel, operator_env, home, rows

    def cards(self) -> tuple[GpuReading, ...]:
        """This host's cards as they are now."""
        return self._gpu.readings()

    def exit_seen(self, row: Instance, record: ExitRecord, view: HostView, fleet: Fleet, *, at: float) -> ExitSeen:
        """The end of a run with its cause and what to do about it; `at` in Redis' time."""
        if view.rebooted():
            return ExitSeen(token=record.token, at=at, unknown=True, rebooted=True, cause="host_reboot")
        log = tuple(self._host.read_log(row.id, record.token, DIAGNOSED_BYTES).splitlines())
        was_ready = row.ready_at is not None and row.run == record.token
        asks = row.placement.port is not None and record.code not in (None, 0) and not was_ready
        holder = self._host.port_holder(row.placement.port or 0) if asks else None
        evidence = Evidence(
            exit_code=record.code,
            signal=record.signal,
            log=log,
            was_ready=was_ready,
            stopping=row.desired is Desired.STOPPED or row.state in ENDING,
            gpus=self._own_cards(row),
            xids=self._gpu.xids(row.placement.gpus, view.run.at if view.run is not None else record.at),
            kernel_oom=self._oom_killed(record, view, log),
            disk_full=self._full(),
            port_busy=None if holder is None or holder.ours else f"{holder.name} (pid {holder.pid})",
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
        """
        The next rung for a cause that a look found, or for a better one: a lost card, or what the log says of an engine that died.

        A server whose engine died may take seconds to end, and refuses connections meanwhile (VLLM-FACTS.md, section b).
        """
        log = tuple(self._host.read_log(row.id, row.run or row.token, DIAGNOSED_BYTES).splitlines())
        since = view.run.at if view.run is not None else 0.0
        told = Evidence(
            log=log if engine_died(log) else (),
            was_ready=row.ready_at is not None,
            gpus=self._own_cards(row),
            xids=self._gpu.xids(row.placement.gpus, since),
        )
        found = diagnose(told)
        if found.cause is not None:
            said = redact_text(found.evidence[:500], self.hidden(fleet, fleet.models.get(row.model)))
            return self.remedy(row, found, fleet, view).evolve(cause=found.cause.value, evidence=said)
        known = next((each for each in Cause if each.value == cause), None)
        return self.remedy(row, Diagnosis(cause=known, evidence=evidence, advice=ADVICE[known] if known else ""), fleet, view)

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
            spare_ports=self.spare_ports(row, fleet, spec) if found.cause is Cause.PORT_IN_USE else (),
            strays=self._left_overs(row, view),
            port_holder=None if holder is None else "ours" if holder.ours else "stranger",
            remedies=row.policy.remedies,
            at=datetime.fromtimestamp(row.entered_at, UTC),
        )

    def collect(self, row: Instance, token: int, fleet: Fleet, view: HostView) -> dict[str, Any]:
        """What a post-mortem wants and a restart destroys: log tail, processes, GPU, arguments; redacted."""
        spec = fleet.models.get(row.model)
        hide = self.hidden(fleet, spec)
        log = self._host.read_log(row.id, token, DIAGNOSED_BYTES).splitlines()
        made = launch(spec, row.placement, row.overrides, self._env) if spec is not None else None
        holder = self._host.port_holder(row.placement.port) if row.placement.port else None
        cards = self._gpu.readings()
        ended = view.gone is not None and view.gone.token == token
        return {
            "run": token,
            "log": [line[:EVIDENCE_LINE_CHARACTERS] for line in redact_lines(log[-EVIDENCE_LINES:], hide)],
            "processes": [each.model_dump() for each in (*view.members, *view.strays)[:EVIDENCE_PROCESSES]],
            "ended_by_keeper": view.gone.killed if ended and view.gone is not None else None,
            "port": {"port": row.placement.port, "held_by": holder.model_dump() if holder is not None else None},
            "gpu": [card.model_dump() for card in cards],
            "xids": list(self._gpu.xids(row.placement.gpus, view.run.at)) if view.run is not None else [],
            "arguments": redact_lines([" ".join(made.argv)], hide) if made is not None else [],
            "overrides": redact_lines([f"{each.flag} {each.value or ''}".strip() for each in row.overrides], hide),
            "probe": {**row.probe.model_dump(), "message": redact_text(row.probe.message or "", hide)},
            "versions": {
                "vllm": next((found[1] for line in log if (found := _VLLM.search(line))), None),
                "recovery": __version__,
                "python": platform.python_version(),
                "kernel": platform.release(),
                "driver": next((card.driver for card in cards if card.driver), None),
            },
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

    def spare_ports(self, row: Instance, fleet: Fleet, spec: ModelSpec) -> tuple[int, ...]:
        """Ports of the model's range that nobody has, now or by the plan; none where nothing tells the server its port."""
        if not (uses(spec, "port") or has_flag(spec.args, PORT)):
            return ()
        taken = {other.port for other in self._others(row)}  # a server that loads does not listen yet
        free = [port for port in spare_ports(fleet, row.model, row.placement.host) if port not in taken]
        offered = own_turn(free, row.id, fleet, row.placement.host)
        return tuple(islice((port for port in offered if self._host.port_holder(port) is None), PORTS_OFFERED))

    def _spare_gpus(self, row: Instance, fleet: Fleet, spec: ModelSpec) -> tuple[int, ...]:
        """Cards of the model's pool (else of the host) that belong to nobody, by the plan or by a remedy, and are not lost."""
        cards = self._gpu.readings()
        pool: Sequence[int] = spec.gpus or tuple(card.index for card in cards)
        planned = (each.placement for each in plan(fleet) if each.placement.host == row.placement.host and each.id != row.id)
        taken = {gpu for place in (*planned, *self._others(row)) for gpu in place.gpus}
        lost = {card.index for card in cards if card.lost} | {gpu for gpu in pool if row.sees.get(f"{Cause.GPU_LOST}@{gpu}")}
        return tuple(gpu for gpu in pool if gpu not in taken | lost)

    def _others(self, row: Instance) -> tuple[Placement, ...]:
        """Where the other instances of this host are now: a remedy may have moved them."""
        host = row.placement.host
        return tuple(other.placement for other in self._rows() if other.id != row.id and other.placement.host == host)

    def _own_cards(self, row: Instance) -> tuple[GpuReading, ...]:
        """Its cards as they are now; all where it names none."""
        return tuple(card for card in self._gpu.readings() if not row.placement.gpus or card.index in row.placement.gpus)

    def _left_overs(self, row: Instance, view: HostView) -> int:
        """Processes of any instance's runs that are over: ours, and of no use."""
        others = (self._host.look(other).strays for other in self._host.instances() if other != row.id)
        return len(view.strays) + sum(len(strays) for strays in others)

    def _full(self) -> str | None:
        try:
            return str(self._home) if shutil.disk_usage(self._home).free < DISK_FULL_BYTES else None
        except OSError:
            return None
