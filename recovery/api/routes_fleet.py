"""Tasks, hosts, who one is, sessions of the page, liveness and metrics."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Path, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from recovery import __version__
from recovery.api.auth import COOKIE, SESSION_S, Caller, Gate, Reader
from recovery.api.limits import limited
from recovery.api.schemas import PROBLEM, GpuView, HostList, HostView, TaskView, WhoView, answers
from recovery.api.state import Here
from recovery.api.web import Json
from recovery.core.watching import Traces, remarks, unrepairable
from recovery.metrics import FleetCollector

router = APIRouter(tags=["fleet"])
bare = APIRouter(tags=["health"])

TaskId = Annotated[str, Path(pattern=r"^[0-9a-f-]{36}$", max_length=36, description="as a command answered it")]
READY: dict[int | str, dict[str, Any]] = {
    503: {"content": PROBLEM, "description": "Redis is away, the clock does not tick, or every host is deaf"}
}


@router.get("/tasks/{task_id}", response_model=TaskView, responses=answers(404), summary="What became of a command")
async def task(_: Reader, here: Here, task_id: TaskId) -> Response:
    """How far a command is, for a day after it was sent."""
    kept, found, outcome = await here.commands.task(task_id)
    result = found.result if isinstance(found.result, dict) else {}
    told = TaskView(
        task_id=task_id,
        command=str(kept["command"]),
        model=str(kept["model"]),
        at=float(kept["at"]),
        status=found.status,
        accepted=bool(result.get("accepted")) if found.status == "done" else None,
        outcome=outcome.result if outcome is not None else None,
        detail=(outcome.why if outcome is not None else str(result.get("reason") or "")) or None,
    )
    return Json(told.model_dump())


@router.get("/hosts", response_model=HostList, responses=answers(), summary="The GPU hosts")
async def hosts(_: Reader, here: Here) -> Response:
    """Every host heard of within a day: heartbeat, clock, cards."""
    await here.board.ready()
    here.board.check()
    shown = tuple(host_view(name, beat, here.board.now) for name, beat in sorted(here.board.hosts.items()))
    return Json(HostList(hosts=shown).model_dump())


def host_view(name: str, beat: dict[str, Any], now: float) -> HostView:
    """Return what is shown of a heartbeat; what is missing or odd in it is left out."""
    wall = beat.get("wall")
    skew = round(wall - float(beat["at"]), 3) if isinstance(wall, int | float) else None
    return HostView(
        host=name,
        alive=bool(beat.get("alive", True)),
        age_seconds=round(max(0.0, now - float(beat["at"])), 3),
        clock_skew_seconds=skew,
        gpus=tuple(
            GpuView(
                index=int(gpu["index"]),
                name=str(gpu.get("name", "")),
                used_bytes=int(gpu.get("used_bytes", 0)),
                total_bytes=int(gpu.get("total_bytes", 0)),
                utilization=gpu.get("utilization"),
                lost=bool(gpu.get("lost")),
            )
            for gpu in beat.get("gpus", ())
        ),
    )


@router.get("/me", response_model=WhoView, responses=answers(), summary="Who one is")
async def me(caller: Reader, request: Request) -> Response:
    """The role of the caller, which tells the page which buttons to offer."""
    return Json(_who(caller, request.app.state.gate))


def _who(caller: Caller, gate: Gate) -> dict[str, Any]:
    return WhoView(role=caller.role.name.lower(), by=caller.by, secure=gate.secure, version=__version__).model_dump()


@router.post(
    "/session",
    response_model=WhoView,
    responses=answers(429),
    dependencies=[limited("session")],
    summary="Log the page in",
)
async def open_session(request: Request, here: Here) -> Response:
    """Trade the bearer token of this request for the page's cookie, which no script can read."""
    gate: Gate = request.app.state.gate
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    name = await to_thread.run_sync(gate.open_session, token.strip() if scheme.lower() == "bearer" else "", limiter=here.readers)
    role = gate.role_of(token.strip())
    if name is None or role is None:
        raise HTTPException(401, "This token is not known", {"www-authenticate": "Bearer"})
    answer = Json(_who(Caller(role, "session"), gate))
    answer.set_cookie(
        COOKIE, name, max_age=int(SESSION_S), path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return answer


@router.delete("/session", status_code=204, response_class=Response, responses=answers(), summary="Log the page out")
async def close_session(request: Request, here: Here) -> Response:
    """End the page's session."""
    gate: Gate = request.app.state.gate
    name = request.cookies.get(COOKIE)
    if name:
        await to_thread.run_sync(gate.close_session, name[:128], limiter=here.readers)
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@bare.get("/livez", response_class=PlainTextResponse, summary="This process lives")
async def livez() -> str:
    """Answers as long as the event loop turns; asks nothing else."""
    return "ok"


@bare.get("/readyz", response_class=PlainTextResponse, responses=READY, summary="This process can do its work")
async def readyz(here: Here) -> str:
    """200 when Redis answers, the clock ticks and some host takes tasks; without these nothing is repaired. Lesser troubles are told."""
    board = here.board
    board.check()
    ticked = await to_thread.run_sync(here.store.get, "tick", limiter=here.readers)
    traces = Traces(now=board.now, tick_at=ticked, hosts={name: {**beat, "age_s": board.age_s(name)} for name, beat in board.hosts.items()})
    if (why := unrepairable(traces)) is not None:
        raise HTTPException(503, why, {"retry-after": "2"})
    return "\n".join(("ok", *remarks(traces, len(board.unreadable))))


@bare.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **answers()},
    summary="For Prometheus",
)
async def metrics(_: Reader, here: Here) -> Response:
    """Read from Redis at this moment, so that any API process gives the same answer."""
    registry = CollectorRegistry(auto_describe=False)
    collector = FleetCollector(here.store)
    body = await to_thread.run_sync(_rendered, registry, collector, limiter=here.readers)
    return Response(body, media_type=CONTENT_TYPE_LATEST)


def _rendered(registry: CollectorRegistry, collector: FleetCollector) -> bytes:
    registry.register(collector)
    return generate_latest(registry)
