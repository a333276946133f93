"""
What happened and what happens: history, incidents, logs, and all of it live as server-sent events.

A stream holds no thread: it is woken by the board when its model changes, and looks every few seconds besides. Events
carry their ids, so a browser that comes back goes on where it was cut (`Last-Event-ID`).
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from anyio import to_thread
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent

from recovery.adapters.vllm_metrics import memories
from recovery.api import logs
from recovery.api.auth import Reader
from recovery.api.limits import limited
from recovery.api.schemas import EventList, IncidentList, LoadList, LoadView, LogView, PassageList, PassageView, answers
from recovery.api.state import MAX_STREAMS, Here, ModelId, Shared
from recovery.api.web import Json
from recovery.core.passing import KEY as FIGURES
from recovery.core.passing import Passage, passages
from recovery.core.summary import Load, load_of
from recovery.errors import RecoveryError, StoreUnavailableError

router = APIRouter(tags=["watch"])

PING_S = 15
LOOK_AGAIN_S = 3.0
"""A stream looks this often even when nothing woke it: not every line of a history changes a row."""
FOLLOW_LOGS_S = 1.0
PAGE = 500
EVENT_ID = r"^[0-9]{1,19}-[0-9]{1,19}$"
"""A stream's ids are two numbers of 64 bits; nineteen digits always fit."""
STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


def _stream(source: AsyncIterator[ServerSentEvent], here: Shared) -> Response:
    async def counted() -> AsyncIterator[ServerSentEvent]:
        with here.stream():
            async for event in source:
                yield event

    if here.streams >= MAX_STREAMS:
        raise HTTPException(503, "Too many open streams", {"retry-after": "10"})
    return EventSourceResponse(counted(), ping=PING_S, headers={"x-accel-buffering": "no"})


@router.get(
    "/stream",
    response_class=Response,
    responses={200: {"content": STREAM, "description": "`fleet` once, then `models` with what changed"}, **answers()},
    summary="The fleet, live",
)
async def stream_fleet(_: Reader, here: Here) -> Response:
    """Server-sent events: `fleet` (everything) at first, then `models` (a list of those that changed), `lost` while Redis is away."""
    await here.board.ready()
    return _stream(_fleet_events(here), here)


async def _fleet_events(here: Shared) -> AsyncIterator[ServerSentEvent]:
    with here.board.watch() as watch:
        told = False
        while True:
            try:
                if not told:
                    yield ServerSentEvent(event="fleet", data=here.board.fleet_json().decode())
                    told = True
                changed = await watch.wait(LOOK_AGAIN_S)
                here.board.check()
                if changed:
                    known = [model for model in sorted(changed) if model in here.board.known]
                    gone = sorted(changed - set(known))
                    models = ",".join(here.board.model_json(model).decode() for model in known)
                    body = f'{{"at":{here.board.now!r},"gone":{orjson.dumps(gone).decode()},"models":[{models}]}}'
                    yield ServerSentEvent(event="models", data=body)
            except StoreUnavailableError as error:
                yield JSONServerSentEvent(event="lost", data={"detail": str(error)})
                told = False
                await asyncio.sleep(LOOK_AGAIN_S)


@router.get("/load", response_model=LoadList, responses=answers(), summary="What the models serve")
async def loads(_: Reader, here: Here) -> Response:
    """Requests, cache and latencies per model, from the servers' own metrics, over the last minute or two."""
    await here.board.ready()
    here.board.check()
    kept = await to_thread.run_sync(memories, here.store, limiter=here.readers)
    found = {model: load_of((kept[row.id] for row in rows if row.id in kept), here.board.now) for model, rows in here.board.known.items()}
    return Json({"loads": {model: _load_view(load).model_dump() for model, load in found.items() if load is not None}})


@router.get("/door", response_model=PassageList, responses=answers(), summary="What the front doors did")
async def door_figures(_: Reader, here: Here) -> Response:
    """Requests held, retried, continued and refused per model since the doors started, and their latencies now."""
    await here.board.ready()
    here.board.check()
    kept = await to_thread.run_sync(here.store.get_many, FIGURES, limiter=here.readers)
    return Json({"models": {model: _passage_view(found).model_dump() for model, found in passages(kept.values()).items()}})


def _passage_view(found: Passage) -> PassageView:
    told = found.model_dump()
    return PassageView(**{name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name: value for name, value in told.items()})


def _load_view(load: Load) -> LoadView:
    return LoadView(
        at=load.at,
        window_seconds=load.window_s,
        running=load.running,
        waiting=load.waiting,
        kv_cache_usage=load.kv_cache_usage,
        ttft_seconds=load.ttft_s,
        e2e_seconds=load.e2e_s,
        finished=load.finished,
        error_rate=load.error_rate,
    )


@router.get(
    "/models/{model_id}/events",
    response_model=EventList,
    responses={200: {"content": STREAM}, **answers(404, 429)},
    dependencies=[limited("events")],
    summary="A model's history",
)
async def events(
    request: Request,
    _: Reader,
    here: Here,
    model_id: ModelId,
    count: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(pattern=EVENT_ID, description="only events after this id")] = None,
    follow: Annotated[bool, Query(description="as server-sent events, first the newest `count`")] = False,
) -> Response:
    """The newest events, oldest first. `follow=true`, or `Accept: text/event-stream`, goes on with what happens."""
    here.board.rows_of(model_id)
    if follow or "text/event-stream" in request.headers.get("accept", ""):
        last = request.headers.get("last-event-id")
        return _stream(_model_events(here, model_id, count, last if last and re.fullmatch(EVENT_ID, last) else after), here)
    found = await to_thread.run_sync(here.store.events, model_id, count, after, limiter=here.readers)
    return Json({"model_id": model_id, "events": [dict(each) for each in found]})


async def _model_events(here: Shared, model_id: str, count: int, after: str | None) -> AsyncIterator[ServerSentEvent]:
    with here.board.watch(model_id) as watch:
        last = after
        while True:
            try:
                first = last is None
                found = await to_thread.run_sync(here.store.events, model_id, count if first else PAGE, last, limiter=here.readers)
                for each in found:
                    last = each["id"]
                    yield ServerSentEvent(event="event", id=last, data=orjson.dumps(each).decode())
                last = last or "0-0"
            except StoreUnavailableError as error:
                yield JSONServerSentEvent(event="lost", data={"detail": str(error)})
                await asyncio.sleep(LOOK_AGAIN_S)
            await watch.wait(LOOK_AGAIN_S)


@router.get(
    "/models/{model_id}/incidents",
    response_model=IncidentList,
    responses=answers(404, 429),
    dependencies=[limited("events")],
    summary="A model's outages",
)
async def incidents(_: Reader, here: Here, model_id: ModelId, count: Annotated[int, Query(ge=1, le=200)] = 20) -> Response:
    """The newest outages first: cause, evidence, each repair step, and how it ended."""
    here.board.rows_of(model_id)
    found = await to_thread.run_sync(here.store.incidents, model_id, count, limiter=here.readers)
    return Json({"model_id": model_id, "incidents": [each.model_dump(mode="json") for each in found]})


@router.get(
    "/models/{model_id}/logs",
    response_model=LogView,
    responses={200: {"content": STREAM}, **answers(404, 429)},
    dependencies=[limited("logs")],
    summary="A server's log",
)
async def read_logs(
    _: Reader,
    here: Here,
    model_id: ModelId,
    lines: Annotated[int, Query(ge=1, le=10_000, description="number of recent lines")] = 100,
    run: Annotated[int | None, Query(ge=1, le=2**53, description="number of an earlier run")] = None,
    replica: Annotated[int | None, Query(ge=0, le=1000, description="default: the first in trouble, else the first")] = None,
    follow: Annotated[bool, Query(description="as server-sent events: `lines`, and `away` while the host is away")] = False,
) -> Response:
    """
    The last lines of a run, stdout and stderr together, without secrets.

    While the host is away: the tail kept in Redis, with `source` "redis".
    """
    row = logs.chosen(here, here.board.rows_of(model_id), replica)
    told = await logs.read(here, row, lines, run)
    if follow:
        return _stream(_log_lines(here, model_id, row.replica, told), here)
    return Json(logs.log_view(row, told).model_dump())


async def _log_lines(here: Shared, model_id: str, replica: int, told: dict[str, Any]) -> AsyncIterator[ServerSentEvent]:
    """Lines as they come, across runs: a new run's log follows on the old one's."""
    away = False
    while True:
        if told["lines"] or told["source"] == "redis":
            kept = {name: told.get(name) for name in ("lines", "run", "source", "at")}
            yield JSONServerSentEvent(event="lines", data=kept)
        after = told.get("end") if told["source"] == "host" else None
        while True:
            await asyncio.sleep(FOLLOW_LOGS_S)
            try:
                row = logs.chosen(here, here.board.rows_of(model_id), replica)
                if row.placement.host not in here.board.alive:
                    raise StoreUnavailableError(f"host '{row.placement.host}' has not been heard from")
                told = await logs.read(here, row, PAGE, after=after)
                away = False
                break
            except (RecoveryError, HTTPException) as error:
                if not away:
                    away = True
                    detail = error.detail if isinstance(error, HTTPException) else str(error)
                    yield JSONServerSentEvent(event="away", data={"detail": detail})
