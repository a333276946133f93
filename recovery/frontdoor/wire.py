"""Bytes of HTTP/1.1 and of OpenAI's errors."""

from http import HTTPStatus

import orjson

STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""RFC 9110, 7.6.1: never passed on."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "request_timeout", 413: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error",
    502: "upstream_error", 503: "unavailable_error",
}  # fmt: skip


def status_line(status: int) -> bytes:
    """The first line of an answer, also for statuses without a name."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> bytes:
    """An error in OpenAI's shape."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_event(status: int, message: str, code: str | None = None) -> bytes:
    """An error as vLLM sends it in mid-stream: the event, then `[DONE]`."""
    body = {"error": {"message": message, "type": TYPES.get(status, "server_error"), "param": None, "code": code or status}}
    return b"data: " + orjson.dumps(body) + b"\n\ndata: [DONE]\n\n"


def response(status: int, body: bytes, *, headers: bytes = b"", close: bool = False, head: bool = False) -> bytes:
    """A whole JSON answer; `head` leaves the body out and its length in."""
    end = b"connection: close\r\n\r\n" if close else b"\r\n"
    kind = b"content-type: application/json\r\n" if body else b""
    return b"".join((status_line(status), kind, b"content-length: %d\r\n" % len(body), headers, end, b"" if head else body))


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; `data` must not be empty (that would end it)."""
    return b"%x\r\n%b\r\n" % (len(data), data)
