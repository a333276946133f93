"""
The models: look, restart, stop, start, check, reset. The specification's endpoints, and this project's beside them.

A command that waits answers with what became of it. `?wait=false` answers 202 at once; so does a command that is still
under way when `?timeout=` ends.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response

from recovery.api.auth import Operator, Reader, Role
from recovery.api.commands import ANSWER_S, QUICK_S, Sent
from recovery.api.limits import limited
from recovery.api.schemas import EXAMPLE_MODEL, Accepted, Commanded, Restarted, answers
from recovery.api.state import Here, ModelId, Shared
from recovery.api.web import Json
from recovery.core.commanding import Verb
from recovery.core.instance import Instance
from recovery.core.states import PROBED
from recovery.core.view import CheckView, FleetView, ModelView, check_view, model_view
from recovery.errors import HostAwayError

router = APIRouter(tags=["models"])

Wait = Annotated[bool, Query(description="wait for the outcome; false answers 202 with the task's id")]
Timeout = Annotated[float, Query(ge=0, le=3600, description="seconds to wait for the outcome; 202 when it is still under way then")]

OK: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"example": {"models": [EXAMPLE_MODEL], "total": 1, "at": 1705423900.0}}}}
}
ONE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"example": EXAMPLE_MODEL}}}}
UNDER_WAY: dict[int | str, dict[str, Any]] = {202: {"model": Accepted, "description": "Accepted, and still under way"}}
CHECK_SLACK_S = 5.0


@router.get("/models", response_model=FleetView, responses={**OK, **answers()}, summary="All models")
async def list_models(_: Reader, here: Here) -> Response:
    """Every model with its instances, sorted by id."""
    await here.board.ready()
    return Json(here.board.fleet_json())


@router.get("/models/{model_id}", response_model=ModelView, responses={**ONE, **answers(404)}, summary="One model")
async def get_model(_: Reader, here: Here, model_id: ModelId) -> Response:
    """One model with its instances."""
    await here.board.ready()
    return Json(here.board.model_json(model_id))


@router.post(
    "/models/{model_id}/restart",
    response_model=Restarted,
    responses={**UNDER_WAY, **answers(404, 409, 429, 502)},
    dependencies=[limited("restart")],
    summary="Restart a model",
)
async def restart(
    caller: Operator,
    here: Here,
    model_id: ModelId,
    override: Annotated[bool, Query(description="also when the policy is 'no', the budget is spent or a host is away; role admin")] = False,
    wait: Wait = True,
    timeout: Timeout = 600.0,
) -> Response:
    """
    Restart every instance: drained, ended, started again at once. Uses no budget and sleeps no backoff.

    409 with the specification's text when the policy is `no` or the budget is spent.
    """
    if override and caller.role < Role.ADMIN:
        raise HTTPException(403, f"override=true needs the role admin; yours is {caller.role.name.lower()}")
    rows = here.board.rows_of(model_id)
    if not override:
        _all_here(here, rows, "nothing was changed")
    sent = await here.commands.send(Verb.RESTART, model_id, {"override": override}, answer_s=ANSWER_S if wait else QUICK_S)
    if not await _done(here, sent, wait, timeout, "did not come back"):
        return _under_way(sent, "Restart", model_id)
    model = here.board.model(model_id)
    return Json(
        Restarted(
            message=f"LLM model '{model_id}' restarted successfully",
            restart_count=model.restart_count,
            uptime_seconds=model.uptime_seconds,
            restarts_total=model.restarts_total,
            task_id=sent.task_id,
        ).model_dump()
    )


@router.post(
    "/models/{model_id}/stop",
    response_model=Commanded,
    responses={**UNDER_WAY, **answers(404, 409, 429, 502)},
    dependencies=[limited("stop")],
    summary="Stop a model",
)
async def stop(
    _: Operator,
    here: Here,
    model_id: ModelId,
    force: Annotated[bool, Query(description="SIGKILL at once, handled as a crash: the policy decides whether it comes back")] = False,
    stay_down: Annotated[bool, Query(description="with force: it stays down")] = False,
    wait: Wait = True,
    timeout: Timeout = 600.0,
) -> Response:
    """
    Stop a model: it stays down until it is started. SIGTERM, grace, SIGKILL; then nothing of it is left.

    `force=true` kills it and handles that as a crash, as the specification's recovery test expects: the answer says
    whether and when it comes back. `force=true&stay_down=true` kills it for good.
    """
    crash = force and not stay_down
    rows = here.board.rows_of(model_id)
    if crash:
        _all_here(here, rows, "nothing was changed")
    options = {"force": force, "stay_down": not crash}
    sent = await here.commands.send(Verb.STOP, model_id, options, answer_s=ANSWER_S if wait else QUICK_S, crash=crash)
    _all_here(here, rows, "the stop is noted and will be carried out when it is back")
    if not await _done(here, sent, wait, timeout, "could not be stopped"):
        return _under_way(sent, "Stop", model_id)
    model = here.board.model(model_id)
    message = f"LLM model '{model_id}' stopped {'forcefully' if force else 'gracefully'}"
    if crash:
        message += _comes_back(model, here.board.now)
    return _commanded(model, sent, message, crash=crash)


@router.post(
    "/models/{model_id}/start",
    response_model=Commanded,
    responses={**UNDER_WAY, **answers(404, 409, 429, 502)},
    dependencies=[limited("start")],
    summary="Start a model",
)
async def start(_: Operator, here: Here, model_id: ModelId, wait: Wait = True, timeout: Timeout = 600.0) -> Response:
    """Start a model that is down; one that runs is left alone."""
    rows = here.board.rows_of(model_id)
    sent = await here.commands.send(Verb.START, model_id, {}, answer_s=ANSWER_S if wait else QUICK_S)
    _all_here(here, rows, "the start is noted and will be carried out when it is back")
    if not await _done(here, sent, wait, timeout, "did not start"):
        return _under_way(sent, "Start", model_id)
    return _commanded(here.board.model(model_id), sent, f"LLM model '{model_id}' started successfully")


@router.post(
    "/models/{model_id}/reset",
    response_model=Commanded,
    responses=answers(404, 409, 429),
    dependencies=[limited("reset")],
    summary="Clear a model's restart budget",
)
async def reset(_: Operator, here: Here, model_id: ModelId) -> Response:
    """Clear budget, backoff and changed flags; a model that had given up starts again."""
    sent = await here.commands.send(Verb.RESET, model_id, {})
    rows = await here.read_rows(model_id)
    return _commanded(model_view(rows, here.board.now, here.board.alive), sent, f"Restart budget of LLM model '{model_id}' reset")


@router.post(
    "/models/{model_id}/health-check",
    response_model=CheckView,
    responses=answers(404, 409, 429),
    dependencies=[limited("check")],
    summary="Look at a model now",
)
async def health_check(_: Operator, here: Here, model_id: ModelId) -> Response:
    """Ask the server now and answer with what was seen. A model without a process answers at once, as not healthy."""
    rows = here.board.rows_of(model_id)
    _all_here(here, rows, "nothing was looked at")
    before = {row.id: row.probe.last_at for row in rows if row.state in PROBED and row.run is not None}
    if before:
        await here.commands.send(Verb.CHECK, model_id, {})
        policy = rows[0].policy
        within_s = policy.health_check_timeout + (policy.completion_timeout_s if policy.completion_check else 0.0) + CHECK_SLACK_S
        if not await here.commands.looked(model_id, before, within_s):
            hosts = ", ".join(sorted({f"'{row.placement.host}'" for row in rows}))
            raise HostAwayError(f"no look at LLM model '{model_id}' came back within {within_s:g} s from host {hosts}")
    return Json(check_view(here.board.model(model_id)).model_dump(mode="json"))


def _all_here(here: Shared, rows: Sequence[Instance], what: str) -> None:
    """Raise `HostAwayError` when a host of these rows has no fresh heartbeat."""
    away = sorted({row.placement.host for row in rows} - here.board.alive)
    if away:
        age_s = here.board.age_s(away[0])
        since = f"for {age_s:.0f} s" if age_s is not None else "at all"
        names = ", ".join(f"'{host}'" for host in away)
        raise HostAwayError(f"host {names} has not been heard from {since}: {what}")


async def _done(here: Shared, sent: Sent, wait: bool, timeout: float, failed: str) -> bool:
    """Wait for the outcome. False: still under way. 502 when it failed, 409 when a newer command took over."""
    if not wait or sent.asked is None:
        return False
    found = await here.commands.outcome(sent, timeout)
    if found.result == "failed":
        raise HTTPException(502, f"LLM model '{sent.model}' {failed}: {found.why}")
    if found.result == "superseded":
        raise HTTPException(409, f"Another command took over: {found.why}")
    return found.result == "done"


def _under_way(sent: Sent, what: str, model: str) -> Response:
    link = f"/api/tasks/{sent.task_id}"
    told = Accepted(message=f"{what} of LLM model '{model}' accepted", task_id=sent.task_id, link=link)
    return Json(told.model_dump(), status_code=202, headers={"location": link})


def _commanded(model: ModelView, sent: Sent, message: str, *, crash: bool = False) -> Response:
    told = Commanded(
        message=message,
        task_id=sent.task_id,
        restart_count=model.restart_count,
        state=model.state.value,
        next_restart_at=model.next_restart_at if crash else None,
        comes_back=_returns(model) if crash else None,
    )
    return Json(told.model_dump())


def _returns(model: ModelView) -> bool:
    return any(each.state.value in ("restarting", "starting", "recycling", "healthy") for each in model.instances)


def _comes_back(model: ModelView, now: float) -> str:
    if not _returns(model):
        return f"; it stays down: {model.reason}"
    if model.next_restart_at is None:
        return "; it is starting again"
    return f"; it starts again in {max(0.0, model.next_restart_at - now):.1f} s"
