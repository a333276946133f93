"""Puts the management API together. `create_app` takes everything it needs, so a test can build one on any store."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

from recovery import __version__
from recovery.adapters.rate_limits import RateLimits
from recovery.api import routes_fleet, routes_models, routes_page, routes_watch
from recovery.api.auth import Gate, Reader
from recovery.api.board import Board
from recovery.api.commands import Commands
from recovery.api.schemas import Problem
from recovery.api.state import Shared
from recovery.api.tasks import TaskQueue
from recovery.api.web import Json, Shield, install_errors
from recovery.ports import Store
from recovery.settings import Settings

STATIC = Path(__file__).parent / "page" / "static"
ABOUT = """
Sees and steers a fleet of vLLM servers.

Every path below `/api/llm` answers under `/llm` as well. Errors are always `{"detail": text}`. With tokens in use every
request carries `Authorization: Bearer <token>`; a token has the role `read`, `operate` or `admin`.
"""


def create_app(settings: Settings, store: Store, queue: TaskQueue, limits: RateLimits) -> FastAPI:
    """Return the API over this store and task queue; it follows the store while it serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        board = Board(store)
        app.state.shared = Shared(store, board, Commands(board, queue, store))
        board.start()
        try:
            yield
        finally:
            board.stop()

    app = FastAPI(
        title="vLLM recovery",
        version=__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.gate = Gate(settings, store)
    app.state.limits = limits
    install_errors(app)
    for routes in (routes_models.router, routes_watch.router):
        app.include_router(routes, prefix="/api/llm")
        app.include_router(routes, prefix="/llm", include_in_schema=False)
    app.include_router(routes_fleet.router, prefix="/api")
    app.include_router(routes_fleet.bare)
    app.include_router(routes_page.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(_: Reader) -> Response:
        return Json(_document(app))

    app.add_middleware(Shield, secure=settings.secure)
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    document = app.openapi()
    document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    open_paths = ("/livez", "/readyz", "/api/session")
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in open_paths else [{"token": []}]
    return document
