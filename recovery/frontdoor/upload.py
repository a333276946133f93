"""Bodies that are no JSON (audio, files): passed on as they come, and kept for a retry as long as they are small."""

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from recovery.frontdoor.exchange import Exchange
from recovery.frontdoor.fleet import Endpoint, Pool
from recovery.frontdoor.upstream import Upstream
from recovery.frontdoor.wire import LAST_CHUNK, chunk

if TYPE_CHECKING:
    from recovery.frontdoor.client import Client
    from recovery.frontdoor.door import Door
    from recovery.frontdoor.request import Request

PREFIX_BYTES = 64 * 1024
"""How far into a form its `model` field is looked for. The official clients send fields before files."""
_MODEL = re.compile(rb'\bname="?model"?(?:\r\n[^\r\n]+)*\r\n\r\n([^\r\n]{1,500})\r\n', re.IGNORECASE)


def model_of(request: "Request", prefix: bytes) -> str | None:
    """Return the model that a request without JSON names: `?model=`, or the form's field, if it has come."""
    asked = parse_qs(request.query.decode("latin-1")).get("model")
    return asked[0] if asked else _text(_field(request, prefix))


def as_served(request: "Request", pool: Pool, prefix: bytes) -> bytes:
    """The start of a form with its model named as the servers of `pool` name it."""
    field = _field(request, prefix)
    name = pool.upstream_name(_text(field)) if field is not None else None
    if field is None or name is None:
        return prefix
    return prefix[: field.start(1)] + name.encode() + prefix[field.end(1) :]


def _field(request: "Request", prefix: bytes) -> re.Match[bytes] | None:
    return _MODEL.search(prefix[:PREFIX_BYTES]) if request.media.startswith(b"multipart/") else None


def _text(field: re.Match[bytes] | None) -> str | None:
    return field.group(1).decode("utf-8", "replace").strip() if field is not None else None


class Upload(Exchange):
    """A request whose body is still coming when it is sent on."""

    __slots__ = ("_longer", "_lost", "_received", "_waiting")

    def __init__(self, door: "Door", client: "Client", request: "Request", pool: Pool) -> None:
        super().__init__(door, client, request, pool, None, None, b"")
        prefix = b"".join(request.parts)
        request.parts = []
        self._received = len(prefix)
        self._waiting = [as_served(request, pool, prefix)]
        self._longer = len(self._waiting[0]) - len(prefix)
        """By how many bytes the form grows when its model is called by the servers' name."""
        self._lost = False
        """True once a part that was sent is no longer kept: from then on nothing can be repeated."""
        self.size = self._received

    def body_data(self, data: bytes) -> None:
        """Take the next part from the client."""
        self._received += len(data)
        settings = self.door.settings
        if self._received > settings.max_upload_bytes:
            self.client.abort()
            return
        if self.connection is not None:
            self.connection.write(self._framed(data))
        if not self._lost:
            self._waiting.append(data)
            self._bound()

    def _bound(self) -> None:
        if self._received > self.door.settings.keep_upload_bytes:
            if self.connection is not None:
                self._waiting.clear()
                self._lost = True
            else:
                self.client.hold_reading(True)

    def body_ends(self) -> None:
        """The client has sent everything."""
        if self.connection is not None and self.request.chunked:
            self.connection.write(LAST_CHUNK)

    def _framed(self, data: bytes) -> bytes:
        return chunk(data) if self.request.chunked else data

    def write_request(self, connection: Upstream, endpoint: Endpoint) -> None:
        request = self.request
        framing = (
            b"transfer-encoding: chunked\r\n\r\n" if request.chunked else b"content-length: %d\r\n\r\n" % (request.length + self._longer)
        )
        start = (request.method, b" ", endpoint.prefix, self.path, b" HTTP/1.1\r\n", request.lines)
        parts = [self._framed(part) for part in self._waiting]
        connection.write(b"".join((*start, b"x-request-id: ", request.request_id, b"\r\n", endpoint.head, framing, *parts)))
        if request.whole and request.chunked:
            connection.write(LAST_CHUNK)
        self._bound()
        self.client.hold_reading(connection.writing_paused)

    def upstream_full(self, full: bool) -> None:
        if not self.request.whole:
            self.client.hold_reading(full)

    def can_repeat(self) -> bool:
        return not self._lost
