"""`status` and the commands that steer a model: start, stop, restart, check, reset."""

import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from recovery.cli.asking import ask, err, out, rows_of, wired, within
from recovery.cli.exits import Exit, TimedOutError
from recovery.core.commanding import Verb
from recovery.core.instance import Instance
from recovery.core.states import State
from recovery.core.view import FleetView, InstanceView, fleet_view
from recovery.errors import ConflictError, HostAwayError, StoreUnavailableError, UnknownModelError
from recovery.service import outcome_of

STEERING = "Models"
SLACK_S = 30.0
COLOURS = {State.HEALTHY: "green", State.FAILED: "red", State.UNHEALTHY: "red", State.STOPPED: "dim", State.COMPLETED: "dim"}

Model = Annotated[str, typer.Argument(help="id of a model in the fleet file")]
Json = Annotated[bool, typer.Option("--json", help="as JSON, for scripts")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="wait for the outcome and show the way there")]
Limit = Annotated[float | None, typer.Option("--timeout", help="seconds to wait [default: by the model's settings]", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    for command in (status, start, stop, restart, check, reset):
        app.command(rich_help_panel=STEERING)(command)


def status(
    model: Annotated[str | None, typer.Argument(help="only this model", show_default=False)] = None,
    json: Json = False,
) -> int:
    """What runs where, how it is, and what is about to happen."""
    store = wired().store
    rows, now, hosts, ticked, unreadable = within(
        lambda: (store.load_all(), store.now(), store.hosts(), store.get("tick"), store.unreadable())
    )
    if model is not None:
        rows = rows_of(model)
    view = fleet_view(rows, now, hosts)
    if json:
        out.print_json(view.model_dump_json())
    else:
        _print_status(view, now)
        if ticked is None or now - float(ticked) > 10.0:
            err.print("warning: the clock does not tick: no beat or no control worker runs, so nothing is repaired (`recovery up`)")
    for why in unreadable.values():
        err.print(f"warning: {why}; it is left alone until then")
    return Exit.OK


def _print_status(view: FleetView, now: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("INSTANCE", "STATE", "UP", "RESTARTS", "WHERE", "NOTE"):
        table.add_column(name, overflow="fold", no_wrap=name != "NOTE")
    for model in view.models:
        for each in model.instances:
            state = f"[{COLOURS.get(each.state, 'yellow')}]{each.state.value}[/]" if each.host_alive else "[red]host away[/]"
            where = f"{each.host}:{each.port}" if each.port else each.host
            table.add_row(each.id, state, _span(each.uptime_seconds), _restarts(each, model.max_restarts), where, _note(each, now))
    out.print(table) if view.models else out.print("no models yet: is `recovery up`, or a host's worker, running?")


def _restarts(each: InstanceView, limit: int) -> str:
    return f"{each.restart_count}/{limit}" if limit else f"{each.restart_count}"


def _note(each: InstanceView, now: float) -> str:
    if each.next_restart_at is not None and each.next_restart_at > now:
        return f"next start in {each.next_restart_at - now:.0f} s: {each.reason}"
    if each.is_healthy and each.degraded_since is not None:
        since = datetime.fromtimestamp(each.degraded_since).strftime("%m-%d %H:%M")
        changed = ", ".join(f"{step.flag} {step.value or ''}".strip() for step in each.overrides)
        return f"degraded since {since} ({changed}) because of {', '.join(dict.fromkeys(step.cause for step in each.overrides))}"
    return each.health_message or ""


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def start(model: Model, wait: Wait = True, timeout: Limit = None) -> int:
    """Start a model that is down; one that runs is left alone."""
    return _steer(Verb.START, model, wait=wait, timeout=timeout)


def stop(
    model: Model,
    force: Annotated[bool, typer.Option("--force", help="SIGKILL at once, no drain and no grace")] = False,
    wait: Wait = True,
    timeout: Limit = None,
) -> int:
    """Stop a model. It stays down, also with --force, until `recovery start`."""
    return _steer(Verb.STOP, model, wait=wait, timeout=timeout, force=force, stay_down=True)


def restart(
    model: Model,
    wait: Annotated[bool, typer.Option("--wait", help="wait until it serves again and show the way there")] = False,
    timeout: Limit = None,
) -> int:
    """Restart a model, whatever its policy says and however much of its budget is spent; uses no budget."""
    return _steer(Verb.RESTART, model, wait=wait, timeout=timeout, override=True)


def check(model: Model) -> int:
    """Look at a model now, not at its next interval."""
    rows_of(model)
    before = within(wired().store.now)
    _accepted(ask("recovery.check", model, by="command line"))
    until = time.monotonic() + max(row.policy.health_check_timeout for row in rows_of(model)) + 10.0
    while True:
        rows = rows_of(model)
        looked = [row for row in rows if row.probe.last_at is not None and row.probe.last_at >= before]
        if len(looked) == len(rows) or time.monotonic() >= until:
            break
        time.sleep(0.1)
    for row in rows:
        fresh = row in looked
        took = f" in {row.probe.duration_s * 1000:.0f} ms" if row.probe.duration_s is not None and fresh else ""
        said = (row.probe.message or f"answered{took}") if fresh else f"not looked at: {row.reason or row.state.value}"
        out.print(f"{row.id}: {row.state.value}, {said}")
    return Exit.OK if all(row.routable for row in looked) and looked else Exit.REFUSED


def reset(model: Model) -> int:
    """Clear a model's restart budget, backoff and changed flags; one that gave up starts again."""
    rows_of(model)
    out.print(_accepted(ask("recovery.reset", model, by="command line"))["reason"])
    return Exit.OK


def _steer(verb: Verb, model: str, *, wait: bool, timeout: float | None, **options: Any) -> int:
    rows = rows_of(model)
    answer = _accepted(ask(f"recovery.{verb.value}", model, by="command line", **options))
    out.print(f"{model}: {answer['reason']}")
    if not wait:
        return Exit.OK
    return _watch(verb, model, answer["token"], _patience(verb, rows) if timeout is None else timeout)


def _accepted(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a task if it was accepted; else what it says, as an error."""
    if answer["accepted"]:
        return answer
    match answer["status"]:
        case "unknown_model":
            raise UnknownModelError(answer["reason"])
        case "unavailable":
            raise StoreUnavailableError(answer["reason"])
        case _:
            raise ConflictError(answer["reason"])


def _patience(verb: Verb, rows: tuple[Instance, ...]) -> float:
    """As long as the settings allow for the way there."""
    ending = max(row.policy.drain_timeout_s + row.policy.stop_grace_s + row.policy.kill_deadline_s for row in rows)
    loading = 0.0 if verb is Verb.STOP else max(row.policy.startup_timeout_s for row in rows)
    return ending + loading + SLACK_S


def _watch(verb: Verb, model: str, token: int | None, timeout: float) -> int:
    """Show every state on the way to the outcome."""
    shown: dict[str, State] = {}
    began = time.monotonic()
    with err.status(f"{verb.value} of {model}") as progress:
        while True:
            rows = rows_of(model)
            _show_moves(rows, shown)
            outcome = outcome_of(rows, verb, token)
            if outcome is not None:
                break
            _check_hosts(rows)
            if time.monotonic() - began >= timeout:
                states = ", ".join(f"{row.id} is {row.state.value} ({row.reason})" for row in rows)
                raise TimedOutError(f"cannot wait any longer for the {verb.value} of {model}: after {timeout:g} s {states}; it goes on")
            waiting = ", ".join(f"{row.id} {row.state.value}" for row in rows)
            progress.update(f"{waiting}  {time.monotonic() - began:.0f} s")
            time.sleep(0.1)
    if outcome == "failed":
        failed = next(row for row in rows if row.state is State.FAILED)
        advice = failed.last_exit.advice if failed.last_exit is not None else ""
        raise ConflictError(f"{failed.id} has failed: {failed.reason}{f'. {advice}' if advice else ''} (`recovery logs {failed.id}`)")
    return Exit.OK


def _show_moves(rows: tuple[Instance, ...], shown: dict[str, State]) -> None:
    for row in rows:
        if shown.get(row.id) is not row.state:
            shown[row.id] = row.state
            clock = datetime.fromtimestamp(row.entered_at).strftime("%H:%M:%S")
            out.print(f"{clock}  {row.id} {row.state.value}{f': {row.reason}' if row.reason else ''}")


def _check_hosts(rows: tuple[Instance, ...]) -> None:
    alive = within(wired().store.hosts)
    away = sorted({row.placement.host for row in rows} - set(alive))
    if away:
        raise HostAwayError(f"cannot see host {', '.join(away)}: no heartbeat. The command is noted and is carried out when it is back")
