"""Bodies that are no JSON, and answers that are no events: passed on in both directions within bounds."""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import pytest

from tests.frontdoor.world import Door, World
from tests.helpers import wait_until

MIB = 1024 * 1024


class Echo(http.server.BaseHTTPRequestHandler):
    """A replica that says what it was sent, and can die in the middle."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, int]]] = []
    broken = 0

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", -1))
        if length >= 0:
            body = self.rfile.read(length)
        else:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        Echo.seen.append((self.path, len(body)))
        if Echo.broken:
            Echo.broken -= 1
            self.close_connection = True
            return
        if self.path.startswith("/v1/audio/speech"):
            self.send_response(200)
            self.send_header("content-type", "audio/wav")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for _ in range(64):
                self.wfile.write(b"%x\r\n%b\r\n" % (65536, b"s" * 65536))
            self.wfile.write(b"0\r\n\r\n")
            return
        form = re.search(rb'; name="model"\r\n\r\n(.*?)\r\n', body)
        model = form[1].decode() if form is not None else None
        answer = json.dumps({"path": self.path, "length": len(body), "sum": sum(body) % 9973, "model": model}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        listed = b'{"data": [{"id": "echo/base"}, {"id": "an-adapter"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(listed)))
        self.end_headers()
        self.wfile.write(listed)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def echo(world: World) -> Iterator[Door]:
    """A door with two models, each on the same echo server."""
    Echo.seen, Echo.broken = [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    door = Door(world.folder)
    world.parts.append(door)
    port = server.server_address[1]
    rows = [{"instance": f"{m}-0", "model": m, "host": "127.0.0.1", "port": port} for m in ("ears", "mouth", "hearing")]
    named = {"hearing": {"served_names": ["openai/whisper-large-v3", "whisper"]}}
    door.tell([{"name": row["model"], "settings": named.get(row["model"], {}), "replicas": [row]} for row in rows])
    door.start(keep_upload_bytes=200_000, max_upload_bytes=32 * MIB)
    yield door
    server.shutdown()
    server.server_close()


def send(door: Door, size: int, *, model: str | None = "ears", query: str = "") -> httpx.Response:
    fields = {} if model is None else {"model": model}
    url = f"{door.url}/v1/audio/transcriptions{query}"
    return httpx.post(url, data=fields, files={"file": ("a.wav", b"abc" * (size // 3))}, timeout=60, trust_env=False)


@pytest.mark.parametrize("size", [30, 30_000, 100_000, 1_000_000, 20_000_000])
def test_a_form_of_any_size_arrives_whole(echo: Door, size: int) -> None:
    answer = send(echo, size)
    assert answer.status_code == 200
    assert answer.json()["length"] > size - 3 and answer.json()["path"] == "/v1/audio/transcriptions"


def test_the_model_comes_from_the_form_or_the_query(echo: Door) -> None:
    assert send(echo, 200_000, model=None).status_code == 400
    assert send(echo, 300, model=None).status_code == 400
    assert send(echo, 200_000, model="nobody").status_code == 404
    assert send(echo, 200_000, model=None, query="?model=mouth").status_code == 200
    assert echo.metric("recovery_frontdoor_requests_total", model="mouth", code="200") == 1


@pytest.mark.parametrize("size", [30, 300_000, 3_000_000])
def test_a_form_names_the_model_as_its_servers_do(echo: Door, size: int) -> None:
    """
    The fleet's own id, which the servers do not know, becomes their first name; a name of theirs stays, and so do all other bytes.
    """
    whole = send(echo, size, model="whisper").json()
    renamed = send(echo, size, model="hearing").json()
    assert (whole["model"], renamed["model"]) == ("whisper", "openai/whisper-large-v3")
    assert renamed["length"] - whole["length"] == len("openai/whisper-large-v3") - len("whisper")
    assert echo.metric("recovery_frontdoor_requests_total", model="hearing", code="200") == 2


def test_a_model_whose_command_tells_no_name_is_called_as_its_servers_list_it(echo: Door) -> None:
    wait_until(lambda: send(echo, 30, model="ears").json()["model"], "echo/base", within_s=60)
    assert send(echo, 30, model="an-adapter").json()["model"] == "an-adapter"


def test_a_renamed_form_is_the_same_on_its_second_way(echo: Door) -> None:
    Echo.broken = 1
    assert send(echo, 100_000, model="hearing").json()["model"] == "openai/whisper-large-v3"
    first, second = Echo.seen
    assert first == second


def test_a_file_called_model_names_no_model(echo: Door) -> None:
    files = {"file": ("model", b"ears\r\n" * 100)}
    answer = httpx.post(f"{echo.url}/v1/audio/transcriptions", files=files, timeout=60, trust_env=False)
    assert answer.status_code == 400 and "model is needed" in answer.json()["error"]["message"]


def test_a_chunked_body_goes_through(echo: Door) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b"z" * 10_000

    headers = {"content-type": "application/octet-stream"}
    answer = httpx.post(f"{echo.url}/v1/files?model=ears", content=parts(), headers=headers, timeout=60, trust_env=False)
    assert answer.json()["length"] == 500_000


def test_a_small_body_is_sent_again_and_a_large_one_cannot_be(echo: Door) -> None:
    Echo.broken = 1
    assert send(echo, 100_000).status_code == 200
    assert len(Echo.seen) == 2
    Echo.broken = 1
    answer = send(echo, 1_000_000)
    assert answer.status_code == 502 and "too large to keep" in answer.json()["error"]["message"]


def test_an_upload_above_the_limit_is_refused(echo: Door) -> None:
    with contextlib.suppress(httpx.HTTPError):  # it may be refused while it is still being sent
        assert send(echo, 40_000_000).status_code == 413
    assert send(echo, 30).status_code == 200


def test_sound_flows_as_it_comes(echo: Door) -> None:
    with httpx.stream("POST", f"{echo.url}/v1/audio/speech", json={"model": "mouth", "input": "x"}, timeout=60) as response:
        assert response.headers["content-type"] == "audio/wav"
        assert sum(len(part) for part in response.iter_bytes()) == 64 * 65536
