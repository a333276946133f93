"""
What holds for every request: body limit, security headers, same-origin rule, one form of errors.

Plain ASGI, because Starlette's own middleware class would buffer the streams.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recovery.errors import ConflictError, HostAwayError, RecoveryError, SchemaError, StoreUnavailableError, UnknownModelError

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024
"""Bytes of a request's body. No endpoint needs more than a token."""
RETRY_AFTER_S = 2
"""Told with a 503: Redis restarts in about a second, a host's heartbeat comes every three."""
UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Json(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body; bytes are taken as JSON that is made already."""
        return content if isinstance(content, bytes) else orjson.dumps(content)


def error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Json:
    """Return an answer of the one form that errors have."""
    return Json({"detail": detail}, status_code=status, headers=dict(headers or {}))


class Shield:
    """
    Refuses what no endpoint should see, and adds the security headers.

    - A body above `MAX_BODY`: 413; one that does not tell its length: 411.
    - A request that changes something and comes from a page of another origin: 403. Browsers tell by `Origin` and
      `Sec-Fetch-Site`; curl sends neither.
    - Where no token is asked for, any other name than this machine's own in `Host`: 403. A page that lets its own name
      point at 127.0.0.1 would otherwise be inside.
    """

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._secure = secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        sender = _with_headers(send, scope["path"])
        if refused is not None:
            await refused(scope, receive, sender)
            return
        await self._app(scope, receive, sender)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._secure and _host_name(headers.get("host", "")) not in LOOPBACK:
            return error(403, "Without tokens this API answers to localhost only; set FMCP_BEARER_TOKEN to use another name")
        if scope["method"] in UNSAFE and _foreign(headers):
            return error(403, "Requests from pages of another origin are refused")
        if "transfer-encoding" in headers:
            return error(411, "A body needs a Content-Length; no endpoint here takes a stream", {"connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return error(413, f"Request body is larger than {MAX_BODY} bytes", {"connection": "close"})
        return None


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _foreign(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        return True
    return headers.get("sec-fetch-site") in ("cross-site", "same-site")


def _with_headers(send: Send, path: str) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            # Modules import each other without the stamp of the page, so a browser has to ask whether they changed.
            headers.setdefault("cache-control", "no-cache" if path.startswith("/static/") else "no-store")
        await send(message)

    return sender


def install_errors(app: FastAPI) -> None:
    """Give every error the form `{"detail": text}`, whoever raised it."""

    async def http(_: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        detail = problem.detail if isinstance(problem.detail, str) else HTTPStatus(problem.status_code).phrase
        return error(problem.status_code, detail, problem.headers)

    async def invalid(_: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        return error(422, "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in problem.errors()))

    async def ours(_: Request, problem: Exception) -> Response:
        if isinstance(problem, UnknownModelError):
            return error(404, str(problem))
        if isinstance(problem, ConflictError):
            return error(409, str(problem))
        if isinstance(problem, StoreUnavailableError | HostAwayError):
            return error(503, str(problem), {"retry-after": str(RETRY_AFTER_S)})
        if isinstance(problem, SchemaError):
            return error(503, str(problem))
        log.error("cannot answer: %s", problem)
        return error(500, "Internal error; see the log of the management API")

    async def surprise(_: Request, problem: Exception) -> Response:
        log.error("cannot answer", exc_info=problem)
        return error(500, "Internal error; see the log of the management API")

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(RecoveryError, ours)
    app.add_exception_handler(Exception, surprise)
