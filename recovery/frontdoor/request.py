"""One request's head, as it is read: what is passed on, what the door has to look at, and what it refuses."""

from time import perf_counter
from typing import Protocol

from recovery.frontdoor.wire import HOP_BY_HOP, error_body

DROPPED = HOP_BY_HOP | {b"host", b"content-length", b"content-type", b"authorization", b"accept-encoding", b"x-request-id", b"expect"}
"""Fields of a request that are not passed on as they came. Compressed answers could not be read here."""

PLAIN = b""
SPECIAL: dict[bytes, bytes] = {}
"""Field names as clients write them: in lower case when the door has to look at them, `PLAIN` when they are passed on."""


def specially(name: bytes) -> bytes:
    """Sort a field name in; remembered, for clients write the same few names again and again."""
    lower = name.lower()
    special = lower if lower in DROPPED else PLAIN
    if len(SPECIAL) < 1000:
        SPECIAL[name] = special
    return special


class Body(Protocol):
    """Whatever takes a body as it comes."""

    def body_data(self, data: bytes) -> None: ...

    def body_ends(self) -> None: ...


class Refusal(Exception):
    """A request that is answered with an error. Raised while it is being read, it also ends the connection."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, lines: tuple[bytes, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.lines = status, message, lines
        self.body = error_body(status, message, code, param)


class Request:
    """One request as far as it has been read."""

    __slots__ = (
        "authorization", "began", "body", "chunked", "close", "expects", "fields", "headed", "host", "http10", "length", "lines", "media",
        "method", "named", "parts", "path", "query", "received", "request_id", "sink", "target", "upload", "whole",
    )  # fmt: skip

    def __init__(self) -> None:
        self.began = perf_counter()
        self.method = self.target = self.path = self.query = self.media = self.request_id = self.body = b""
        self.authorization: bytes | None = None
        self.fields: list[tuple[bytes, bytes]] = []
        """As they came, until the head is whole."""
        self.lines = b""
        """Those that are passed on."""
        self.named: list[bytes] = []
        """Fields that the Connection header names: hop-by-hop too."""
        self.parts: list[bytes] = []
        self.length = -1
        self.received = self.host = 0
        self.chunked = self.close = self.expects = self.headed = self.http10 = self.upload = self.whole = False
        self.sink: Body | None = None

    def take_fields(self, max_fields: int, max_bytes: int) -> Refusal | None:
        """Sort the header fields into those that are passed on and those that the door looks at."""
        fields, self.fields = self.fields, []
        lines: list[bytes] = []
        size = 0
        for name, value in fields:
            special = SPECIAL.get(name)
            if special is None:
                special = specially(name)
            if special is PLAIN:
                lines += (name, b": ", value, b"\r\n")
                continue
            size += len(name) + len(value)
            if special == b"content-length":
                if not value.isdigit() or len(value) > 18 or self.length >= 0:
                    return Refusal(400, "malformed Content-Length")
                self.length = int(value)
            elif special == b"host":
                self.host += 1
            elif special == b"authorization":
                self.authorization = value
            else:
                refusal = self._take(special, value)
                if refusal is not None:
                    return refusal
        if self.media:
            lines += (b"content-type: ", self.media, b"\r\n")
        self.lines = b"".join(lines)
        if size + len(self.lines) > max_bytes or len(fields) > max_fields:
            return Refusal(431, "request headers too large")
        if self.named and not {b"keep-alive", b"close"}.issuperset(self.named):
            self.lines = b"".join(b"%b: %b\r\n" % field for field in fields if self._passed_on(field[0].lower()))
        return None

    def _passed_on(self, name: bytes) -> bool:
        return name not in self.named and (name not in DROPPED or name == b"content-type")

    def _take(self, name: bytes, value: bytes) -> Refusal | None:
        if name == b"content-type":
            self.media = value
        elif name == b"x-request-id":
            self.request_id = value[:128]
        elif name == b"connection":
            self.named += [token.strip() for token in value.lower().split(b",")]
        elif name == b"transfer-encoding":
            if value.strip().lower() != b"chunked" or self.chunked:
                return Refusal(400, "only chunked transfer encoding is known")
            self.chunked = True
        elif name == b"expect":
            if value.lower() != b"100-continue":
                return Refusal(417, "unknown expectation")
            self.expects = True
        return None

    def complete_head(self, version: str, upgrade: bool, keep_alive: bool) -> Refusal | None:
        """Judge the head as a whole, now that all of it is there."""
        self.headed = True
        if version not in ("1.1", "1.0"):
            return Refusal(400, "only HTTP/1.1 and 1.0 are known")
        if upgrade:
            return Refusal(400, "cannot upgrade a connection")
        self.http10 = version == "1.0"
        if self.chunked and (self.length >= 0 or self.http10):
            return Refusal(400, "Content-Length and Transfer-Encoding contradict each other")
        if self.host != 1 and not (self.http10 and self.host == 0):
            return Refusal(400, "exactly one Host is needed")
        self.close = not keep_alive
        return self._split_target()

    def _split_target(self) -> Refusal | None:
        target = self.target
        if target[:1] != b"/" and target != b"*":
            scheme, _, rest = target.partition(b"://")
            if scheme.lower() not in (b"http", b"https") or not rest:
                return Refusal(400, "malformed request target")
            target = b"/" + rest.partition(b"/")[2]
        self.target = target = target.partition(b"#")[0]
        self.path, _, self.query = target.partition(b"?")
        return None
