"""`python -m tests.cli.render_readme`: writes the tables of the README and of `docs/` anew, from the code and the measured figures."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recovery.cli.exits import MEANINGS
from recovery.core.causes import ADVICE, Cause
from recovery.core.continuation import REASONS
from recovery.core.remedies import LADDERS, UNLIMITED, Rung, StepKind
from recovery.core.states import TRANSITIONS
from recovery.settings import settings_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = (README, *(ROOT / "docs" / name for name in ("architecture.md", "runbook.md", "reliability.md")))
FIGURES = ROOT / "docs/figures/control-plane.json"
CHAOS_FIGURES = ROOT / "docs/figures/chaos.json"
DOOR_FIGURES = ROOT / "docs/figures/front-door.json"
VLLM_FIGURES = ROOT / "docs/figures/vllm.json"
SECTIONS = {"environment": "Environment", "fleet": "Fleet file", "model": "Model"}


def exits() -> str:
    """The exit codes."""
    return _table(("code", "means"), [(str(code.value), text) for code, text in MEANINGS.items()])


def states() -> str:
    """The transition table: one row per state."""
    rows = []
    for state, moves in TRANSITIONS.items():
        rows.append((f"`{state.value}`", ", ".join(f"{event.value} → `{to.value}`" for event, to in moves.items())))
    return _table(("state", "when → next"), rows)


def reasons() -> str:
    """Which streams are not continued, and why."""
    return _table(("code", "why the stream ends with an error event instead"), [(f"`{code}`", text) for code, text in REASONS.items()])


def settings() -> str:
    """Every setting, by section."""
    parts = []
    for section, title in SECTIONS.items():
        rows = [
            (f"`{row.name}`", f"`{row.default}`" if row.default else "", row.unit, row.meaning)
            for row in settings_table()
            if row.section == section
        ]
        parts.append(f"### {title}\n\n{_table(('name', 'default', 'unit', 'meaning'), rows)}")
    return "\n\n".join(parts)


def diagram() -> str:
    """The transition table as a Mermaid diagram: one arrow for all events of a pair."""
    arrows = {}
    for state, moves in TRANSITIONS.items():
        for event, to in moves.items():
            if to is not state:
                arrows.setdefault((state.value, to.value), []).append(event.value)
    lines = (f"    {one} --> {other}: {', '.join(events)}" for (one, other), events in arrows.items())
    return "\n".join(("```mermaid", "stateDiagram-v2", *lines, "```"))


STEPS = {
    StepKind.RESTART: "starts it again",
    StepKind.FREE_GPU: "ends what is left of its own earlier runs on its cards",
    StepKind.FREE_PORT: "ends what is left of its own earlier runs on its port",
    StepKind.OVERRIDE: "changes `{flag}`",
    StepKind.FALLBACK_ARGS: "takes the next of `fallback_args`",
    StepKind.OTHER_PORT: "takes another port of its range",
    StepKind.OTHER_GPU: "takes another card that nobody uses",
    StepKind.GIVE_UP: "gives up",
}


def cause(which: Cause) -> str:
    """What is done about a cause, and what the operator is told to do."""
    ladder = LADDERS[which]
    steps = [_rung(rung) for rung in ladder]
    if not steps:
        done = "nothing: the same command line fails again for certain; the instance is `failed` at once"
    else:
        done = "; then ".join(steps) + ("" if ladder[-1].budget == UNLIMITED and ladder[-1].kind is StepKind.RESTART else "; then gives up")
    return f"- **By itself:** {done}.\n- **You:** {ADVICE[which]}."


def _rung(rung: Rung) -> str:
    often = "" if rung.budget in (1, UNLIMITED) else f", up to {rung.budget} times"
    return STEPS[rung.kind].format(flag=rung.flag) + often


def figures() -> str:
    """What was measured, from the JSON that `make bench` wrote."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return "\n\n".join((_kill(found["kill"]), _hang(found), _idle(found), _look(found["probe"]), _where(found)))


def _kill(found: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{each[part]:.1f}" for part in ("median", "p75", "max")), str(each["n"]))
        for name, each in sorted(found.items(), key=lambda pair: pair[1]["median"] if isinstance(pair[1], dict) else 0.0)
        if isinstance(each, dict)
    ]
    return f"SIGKILL of a server → its successor's exec, in milliseconds:\n\n{_table(('', 'median', 'p75', 'worst', 'n'), rows)}"


def _hang(found: dict[str, Any]) -> str:
    rows = [
        (text, *(f"{found[name][part]:.1f}" for part in ("median", "max")), str(found[name]["n"]))
        for name, text in (
            ("hang_defaults", "the defaults (interval 30 s, time-out 10 s, `restart_delay` 5 s)"),
            ("hang_quick", "interval 5 s, time-outs 2 s, `restart_delay` 0"),
        )
    ]
    return f"A server accepts and never answers → its successor's exec, in seconds:\n\n{_table(('', 'median', 'worst', 'n'), rows)}"


def _idle(found: dict[str, Any]) -> str:
    few, many = found["idle_10"], found["idle_100"]
    rows = [
        (name, f"{few['parts'][name]:.2f}", f"{used:.2f}", f"{many['memory'][name]['rss_mb']:.0f}", f"{many['memory'][name]['uss_mb']:.0f}")
        for name, used in sorted(many["parts"].items(), key=lambda pair: -pair[1])
    ]
    head = ("part", "CPU s/min at 10", "at 100", "RSS MB", "USS MB")
    total = ("**all**", f"{few['all']:.2f}", f"{many['all']:.2f}", "", "")
    slope = found["cpu_ms_per_instance_and_look"]
    probe = (
        f"From 10 to 100 instances all parts together use {slope:.1f} ms more per look; that holds what else grows with the instances "
        "(keepers, reconciling, the door's looks). Memory is that at 100."
    )
    return f"Idle, a look at every instance each 30 s (`keepers`: one per instance, together):\n\n{_table(head, [*rows, total])}\n\n{probe}"


def _look(found: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{each[count][part] / 1000:.2f}" for count in ("1", "50") for part in ("median", "p95")))
        for name, each in found["contestants"].items()
    ]
    rounds = next(iter(found["contestants"].values()))["1"]["n"]
    head = ("", "1 in flight, median", "p95", "50 in flight, median", "p95")
    text = (
        "CPU of the asking side for one look at one server (`/health`, `/v1/models`, 40 kB of `/metrics`, on a new connection; httpx "
        f"keeps its own), in milliseconds; {rounds} rounds of {found['looks_per_round']}:"
    )
    return f"{text}\n\n{_table(head, rows)}"


def api() -> str:
    """What the management API costs, from the same JSON."""
    found = json.loads(FIGURES.read_text())["api"]
    rows = [
        (size, f"{each['per_s']:.0f}", f"{each['p99_ms']:.1f}", f"{each['bytes'] / 1024:.0f}", f"{each['scrape_ms']:.0f}")
        for size, each in found["sizes"].items()
    ]
    head = ("instances", "`GET /api/llm/models` a second", "p99 ms", "KiB each", "a scrape of `/metrics`, ms")
    page = f"The status page weighs {found['page']['bytes'] / 1024:.0f} KiB in {found['page']['files']} files, uncompressed."
    return f"{_table(head, rows)}\n\nEight connections kept alive. {page} Load of the machine: {found['load_1m']:g} ({found['commit']})."


def _where(found: dict[str, Any]) -> str:
    where = found["machine"]
    loads = (f"{text} {found[name]['load_1m']:g} ({found[name]['commit']})" for name, text in LOADS.items())
    machine = f"{where['cores']} cores, Linux {where['kernel'].split('-')[0]}, Python {where['python']}, {where['at']} UTC"
    return f"{machine}. Load of the machine at the end of each (and commit): {', '.join(loads)}."


def vllm() -> str:
    """What `make bench-vllm` measured on a real vLLM."""
    found = json.loads(VLLM_FIGURES.read_text())
    head = ("fault", "cause", "what was done", "until it ended", "seen after", "next exec after", "first good token after")
    keys = ("to_end_s", "to_detect_s", "to_exec_s", "to_first_token_s")
    rows = [
        (name, f"`{row['cause']}`", f"`{row['remedy']}`", *(_seconds(row[key]) for key in keys)) for name, row in found["faults"].items()
    ]
    bare, machine = found["bare_start_s"], found["machine"]
    return (
        f"{_table(head, rows)}\n\nIn seconds. A bare `vllm serve` took {bare['median']:g} s from exec to its first token in the same run "
        f"({machine['cores']} cores, load average {machine['load_average']:g})."
    )


def door() -> str:
    """What `make bench-frontdoor` measured: one row per way to the same replicas."""
    found = json.loads(DOOR_FIGURES.read_text())
    columns = {
        "requests/s": ("requests_per_s", 1, ".0f"),
        "CPU µs per request": ("cpu_us_per_request", 1, ".0f"),
        "p50 ms, 1 client": ("p50_us_1", 1000, ".2f"),
        "p50 ms, 16 clients": ("p50_us_16", 1000, ".2f"),
        "p99 ms, 16": ("p99_us_16", 1000, ".1f"),
        "first event ms, 16": ("ttft_p50_us_16", 1000, ".1f"),
        "token delay ms p50": ("delay_p50_us", 1000, ".1f"),
        "p99": ("delay_p99_us", 1000, ".1f"),
        "CPU µs per token": ("cpu_us_per_token", 1, ".0f"),
        "RSS MiB": ("rss_mib", 1, ".0f"),
    }
    rows = []
    for name, row in found["median_of_rounds"].items():
        cells = (format(row[key] / unit, shape) for key, unit, shape in columns.values())
        rows.append((name, *(cell if float(cell) else "" for cell in cells)))
    return (
        f"{_table(('', *columns), rows)}\n\nTwo replicas that answer at once; tokens: {found['streams']} streams of 20 a second. "
        f"{found['cores']} cores, load average {found['load_average']:.1f} at the end."
    )


def chaos() -> str:
    """What `make chaos-long` measured: one row per kind of fault, over all its runs."""
    runs = json.loads(CHAOS_FIGURES.read_text())["runs"]
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["faults"]))
    rows = [_kind(kind, [run["faults"][kind] for run in runs if kind in run["faults"]]) for kind in kinds]
    every = _kind("**all**", [each for run in runs for each in run["faults"].values()])
    return _table(("fault", "times", "survived", "median s", "worst s"), [*rows, every])


def chaos_short() -> str:
    """The same in one row per run."""
    found = json.loads(CHAOS_FIGURES.read_text())
    head = ("seed", "faults", "survived", "repairs", "median s", "worst s", "two runs at once", "lost repairs", "budgets exceeded")
    rows = []
    for run in found["runs"]:
        _, times, survived, median, worst = _kind("", list(run["faults"].values()))
        bad = (str(run[name]) for name in ("overlaps", "lost_repairs", "budget_breaks"))
        rows.append((str(run["seed"]), times, survived, str(run["repairs"]), median, worst, *bad))
    where, minutes = found["machine"], found["runs"][0]["seconds"] / 60
    machine = (
        f"{where['cores']} cores, Linux {where['kernel'].split('-')[0]}, Python {where['python']}, {where['at']} UTC ({found['commit']})"
    )
    return f"{_table(head, rows)}\n\n{minutes:.0f} minutes each, {len(found['runs'][0]['faults'])} kinds of faults; {machine}."


def _kind(name: str, figures: list[dict[str, Any]]) -> tuple[str, ...]:
    took = [each for figure in figures for each in figure["took_s"]]
    times, survived = (sum(figure[count] for figure in figures) for count in ("times", "survived"))
    return name, str(times), str(survived), f"{statistics.median(took):.1f}", f"{max(took):.1f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


LOADS = {
    "kill": "kill",
    "hang_defaults": "hang, defaults",
    "hang_quick": "hang, quick",
    "idle_10": "idle at 10",
    "idle_100": "at 100",
    "probe": "a look",
}
BLOCKS: dict[str, Callable[[], str]] = {
    "exits": exits,
    "states": states,
    "settings": settings,
    "reasons": reasons,
    "diagram": diagram,
    "figures": figures,
    "api": api,
    "door": door,
    "vllm": vllm,
    "chaos": chaos,
    "chaos short": chaos_short,
}
BLOCKS |= {f"cause {each.value}": (lambda each=each: cause(each)) for each in Cause}  # type: ignore[misc]


def rendered(text: str) -> str:
    """A document with its generated blocks as the code has them."""
    for name, block in BLOCKS.items():
        if f"<!-- generated: {name} -->" not in text:
            continue
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = block()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))
