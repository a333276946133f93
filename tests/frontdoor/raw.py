"""Raw HTTP/1.1 over a socket: what no well-behaved client would send."""

import contextlib
import socket
import time
from dataclasses import dataclass


@dataclass
class Answer:
    """One answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One TCP connection."""

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.buffer = b""

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return False
        self.buffer += data
        return bool(data)

    def answer(self, head_only: bool = False) -> Answer | None:
        """The next answer, None when the connection ends first."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = b""
        if head_only or lines[0].split()[1] in ("204", "100"):
            return Answer(int(lines[0].split()[1]), headers, body)
        if headers.get("transfer-encoding") == "chunked":
            while not self.buffer.endswith(b"0\r\n\r\n") and self._more():
                pass
            body, self.buffer = self.buffer, b""
        elif "content-length" in headers:
            length = int(headers["content-length"])
            while len(self.buffer) < length and self._more():
                pass
            body, self.buffer = self.buffer[:length], self.buffer[length:]
        else:
            while self._more():
                pass
            body, self.buffer = self.buffer, b""
        return Answer(int(lines[0].split()[1]), headers, body)

    def rest(self, end: bytes) -> bytes:
        """Everything up to `end`, at once; made for large answers."""
        parts = [self.buffer]
        while not parts[-1].endswith(end) and (data := self.sock.recv(2**20)):
            parts.append(data)
        return b"".join(parts)

    def ended(self) -> bool:
        """True once the peer has closed; what still comes is dropped."""
        while self._more():
            self.buffer = b""
        return True


def talk(port: int, data: bytes, timeout_s: float = 30.0) -> list[Answer]:
    """Send bytes and return every answer until the connection ends or nothing comes for a while."""
    answers = []
    with Wire(port, timeout_s) as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(data)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                answer = wire.answer()
            except TimeoutError:
                break
            if answer is None:
                break
            answers.append(answer)
    return answers


def post(path: str, body: bytes, *headers: str, host: str = "x") -> bytes:
    """A request as bytes."""
    lines = "".join(f"{header}\r\n" for header in (f"host: {host}", "content-type: application/json", *headers))
    return f"POST {path} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body
