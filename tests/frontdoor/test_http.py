"""HTTP/1.1 taken strictly: hostile and malformed input costs a 4xx and a connection, never the door, never a second request."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.frontdoor.client import Client
from recovery.frontdoor.door import Door as InProcess
from recovery.frontdoor.request import Request
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.view import View
from tests.frontdoor.raw import Wire, post, talk
from tests.frontdoor.world import Door, Sim, World, expected_text
from tests.helpers import wait_until

BODY = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 4}).encode()
GOOD = post("/v1/completions", BODY)
HOST = b"Host: x\r\n"
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Sim]]:
    """One replica behind one door with short time-outs, for the whole module."""
    world = World(tmp_path_factory.mktemp("http"))
    try:
        (sim,) = world.sims(1, "--tokens-per-s", "2000")
        limits = {"max_body_bytes": 100_000, "max_header_bytes": 8192, "max_url_bytes": 2048, "max_ahead_bytes": 16384}
        yield world.door([sim], header_timeout_s=1.0, body_timeout_s=1.0, idle_timeout_s=2.0, **limits), sim
    finally:
        world.close()


def alive(door: Door) -> None:
    """The door still serves, and answers right."""
    answer = httpx.post(f"{door.url}/v1/completions", content=BODY, headers={"content-type": "application/json"}, timeout=30)
    assert answer.json()["choices"][0]["text"] == expected_text("Hello", 4)


LINE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n"
REFUSED = {
    "length in a trailer": (400, CHUNKED + b"\r\n2\r\n{}\r\n0\r\nContent-Length: 3\r\n\r\n"),
    "both lengths": (400, LINE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "both lengths, other order": (
        400,
        CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    "two lengths": (400, LINE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
    "two equal lengths": (400, LINE + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    "a list of lengths": (400, LINE + b"Content-Length: 5, 5\r\n\r\nhello"),
    "negative length": (400, LINE + b"Content-Length: -5\r\n\r\n"),
    "signed length": (400, LINE + b"Content-Length: +5\r\n\r\nhello"),
    "hex length": (400, LINE + b"Content-Length: 0x5\r\n\r\nhello"),
    "huge length": (400, LINE + b"Content-Length: 99999999999999999999999\r\n\r\n"),
    "length above the limit": (413, LINE + b"Content-Length: 100001\r\n\r\n"),
    "chunked twice": (
        400,
        CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "chunked, identity": (400, LINE + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    "gzip, chunked": (400, LINE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "xchunked": (400, LINE + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "vertical tab before chunked": (400, LINE + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "space before colon": (400, LINE + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    "chunked in HTTP/1.0": (400, b"POST /v1/completions HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "folded header": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n folded\r\n\r\n"),
    "folded first header": (400, b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n"),
    "bare line feeds": (400, b"GET /v1/models HTTP/1.1\nHost: x\n\n"),
    "bare carriage return in a value": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: 1\rX-B: 2\r\n\r\n"),
    "zero byte in a value": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n"),
    "zero byte in a name": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX\x00A: a\r\n\r\n"),
    "no colon": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n"),
    "empty name": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n: v\r\n\r\n"),
    "no host": (400, b"GET /v1/models HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
    "HTTP/2 preface": (None, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": (400, b"GET /v1/models\r\n\r\n"),
    "HTTP/1.2": (None, b"GET /v1/models HTTP/1.2\r\nHost: x\r\n\r\n"),
    "lower-case protocol": (400, b"GET /v1/models http/1.1\r\nHost: x\r\n\r\n"),
    "unknown method": (None, b"FROB /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    "lower-case method": (400, b"get /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    "connect": (None, b"CONNECT evil:443 HTTP/1.1\r\nHost: evil:443\r\n\r\n"),
    "trace": (405, b"TRACE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    "space in target": (400, b"GET /v1/mo dels HTTP/1.1\r\nHost: x\r\n\r\n"),
    "relative target": (400, b"GET v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    "chunk size in words": (400, CHUNKED + b"\r\nxyz\r\n"),
    "negative chunk": (400, CHUNKED + b"\r\n-1\r\n"),
    "huge chunk": (None, CHUNKED + b"\r\nfffffffffffffffff\r\n"),
    "chunk without its end": (400, CHUNKED + b"\r\n2\r\nabcd\r\n0\r\n\r\n"),
    "TLS hello": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
    "nothing but zeros": (400, bytes(4096)),
    "long URL": (414, b"GET /v1/" + b"a" * 4096 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "many headers": (431, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(200)) + b"\r\n"),
    "large key": (431, LINE + b"Authorization: Bearer " + b"y" * 20_000 + b"\r\n\r\n"),
    "large header that is not passed on": (431, LINE + b"Connection: x-hop\r\nX-Hop: " + b"y" * 20_000 + b"\r\n\r\n"),
    "headers without end": (431, LINE + b"x-a: y\r\n" * 100_000),
    "large header": (431, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-a: " + b"y" * 20_000 + b"\r\n\r\n"),
    "upgrade": (400, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
    "unknown expectation": (417, LINE + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once_and_nothing_after_it_is_read(served: tuple[Door, Sim], name: str) -> None:
    """
    The request behind a malformed one must never be answered: that is how requests are smuggled.
    """
    door, _ = served
    status, data = REFUSED[name]
    answers = talk(door.port, data + SMUGGLED, 20.0)
    assert len(answers) == 1, [a.status for a in answers]
    assert answers[0].status == status if status is not None else 400 <= answers[0].status < 500
    assert answers[0].headers["connection"] == "close"
    assert json.loads(answers[0].body)["error"]["message"]
    alive(door)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"", 400),
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b'"m"', 400),
        ("/v1/completions", b'{"model": 5}', 400),
        ("/v1/completions", b'{"model": "nobody"}', 404),
        ("/v1/chat/completions", b'{"model": "m"}', 400),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "max_tokens": -3}', 400),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "stream": true, "max_tokens": -3}', 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b'{"model": "m", "prompt": "' + b"[" * 50_000 + b'"}', 400),
        ("/v1/completions", b"[" * 50_000, 400),
        ("/admin/state", b"{}", 404),
        ("/metrics", b"{}", 404),
        ("/v1/nonsense", b'{"model": "m"}', 404),
        ("/v1/models", b"{}", 405),
    ],
)
def test_a_clients_fault_is_a_4xx_and_the_connection_lives_on(served: tuple[Door, Sim], path: str, body: bytes, status: int) -> None:
    door, _ = served
    with Wire(door.port) as wire:
        wire.send(post(path, body))
        answer = wire.answer()
        assert answer is not None and answer.status == status, answer
        assert "error" in json.loads(answer.body) or path == "/v1/nonsense"
        wire.send(GOOD)
        answer = wire.answer()
        assert answer is not None and answer.status == 200


def test_client_faults_do_not_open_the_breaker(served: tuple[Door, Sim]) -> None:
    door, _ = served
    for _ in range(20):
        assert talk_once(door, post("/v1/completions", b'{"model": "m", "prompt": ""}')) == 400
    alive(door)


def talk_once(door: Door, data: bytes) -> int:
    with Wire(door.port) as wire:
        wire.send(data)
        answer = wire.answer()
        assert answer is not None
        return answer.status


def test_pipelined_requests_are_answered_in_order(served: tuple[Door, Sim]) -> None:
    door, _ = served
    bodies = [json.dumps({"model": "m", "prompt": f"p{i}", "max_tokens": 3}).encode() for i in range(20)]
    with Wire(door.port) as wire:
        wire.send(b"".join(post("/v1/completions", body) for body in bodies))
        for i in range(20):
            answer = wire.answer()
            assert answer is not None
            assert json.loads(answer.body)["choices"][0]["text"] == expected_text(f"p{i}", 3)


class _Sent(asyncio.Transport):
    """A client's connection without a client: what the door sends is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return False


def test_what_arrives_between_an_answer_and_the_reading_of_what_waited_keeps_its_place() -> None:
    """In process: it takes two sockets that are ready in one turn of the loop, which no client can bring about at will."""

    async def run() -> bytes:
        client, transport = Client(InProcess(DoorSettings(), View())), _Sent()
        client.connection_made(transport)
        answering = Mock()
        client.answering(answering)
        client.active_request = request = Request()
        request.whole = True
        client.data_received(b"GET /health HTT")
        client.exchange_over(answering)
        client.data_received(b"P/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0)
        return transport.sent

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 ")


def test_what_is_pipelined_behind_a_good_request_is_refused_after_it(served: tuple[Door, Sim]) -> None:
    door, _ = served
    answers = talk(door.port, GOOD + b"NONSENSE\r\n\r\n" + SMUGGLED)
    assert [a.status for a in answers] == [200, 400]


def test_bytes_one_by_one(served: tuple[Door, Sim]) -> None:
    door, _ = served
    with Wire(door.port) as wire:
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(GOOD)):
            wire.send(GOOD[i : i + 1])
        answer = wire.answer()
        assert answer is not None and answer.status == 200


def test_chunked_bodies_with_extensions_and_trailers(served: tuple[Door, Sim]) -> None:
    door, _ = served
    head = LINE + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY)))
    with Wire(door.port) as wire:
        wire.send(head + chunks + b"0\r\nX-Trailer: 1\r\n\r\n" + GOOD)
        first, second = wire.answer(), wire.answer()
        assert first is not None and first.status == 200
        assert second is not None and second.status == 200


def test_a_chunked_body_above_the_limit_is_cut_off(served: tuple[Door, Sim]) -> None:
    door, _ = served
    head = LINE + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers = talk(door.port, head + b"10000\r\n" + b"x" * 65536 + b"\r\n10000\r\n" + b"x" * 65536 + b"\r\n0\r\n\r\n")
    assert [a.status for a in answers] == [413]


def test_expect_100_continue(served: tuple[Door, Sim]) -> None:
    door, _ = served
    head, _, body = GOOD.partition(b"\r\n\r\n")
    with Wire(door.port) as wire:
        wire.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
        interim = wire.answer()
        assert interim is not None and interim.status == 100
        wire.send(body)
        answer = wire.answer()
        assert answer is not None and answer.status == 200


def test_a_refused_expectation_gets_no_100(served: tuple[Door, Sim]) -> None:
    door, _ = served
    data = LINE + b"Expect: 100-continue\r\nContent-Length: 200000\r\n\r\n"
    assert [a.status for a in talk(door.port, data)] == [413]


def test_head_and_options(served: tuple[Door, Sim]) -> None:
    door, _ = served
    with Wire(door.port) as wire:
        wire.send(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = wire.answer(head_only=True)
        assert answer is not None and answer.status == 200 and int(answer.headers["content-length"]) > 10
        wire.send(b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = wire.answer()
        assert answer is not None and answer.status == 204 and "POST" in answer.headers["allow"]
        wire.send(b"HEAD /v1/completions HTTP/1.1\r\nHost: x\r\n\r\nGET http://x/v1/models/m HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = wire.answer(head_only=True)
        assert answer is not None and answer.status == 405
        answer = wire.answer()
        assert answer is not None and json.loads(answer.body)["id"] == "m"


def test_http_10_gets_an_unchunked_answer_and_its_connection_closed(served: tuple[Door, Sim]) -> None:
    door, _ = served
    body = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 4, "stream": True}).encode()
    with Wire(door.port) as wire:
        wire.send(b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answer = wire.answer()
        assert answer is not None and answer.status == 200 and "transfer-encoding" not in answer.headers
        assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("data", [b"G", b"GET /v1/models HTTP/1.1\r\nHo", LINE + b"Content-Length: 50\r\n\r\n{", b"\r\n"])
def test_slow_clients_get_408(served: tuple[Door, Sim], data: bytes) -> None:
    door, _ = served
    assert [a.status for a in talk(door.port, data)] == [408]


def test_an_idle_connection_is_closed_in_silence(served: tuple[Door, Sim]) -> None:
    door, _ = served
    with Wire(door.port) as wire:
        assert wire.ended()


def test_headers_are_passed_on_and_hop_by_hop_ones_are_not(tmp_path: Path) -> None:
    """
    A listener of our own stands for the replica and shows what reaches it.
    """
    world = World(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        try:
            door = Door(tmp_path)
            world.parts.append(door)
            port = listener.getsockname()[1]
            row = {
                "instance": "m-0",
                "model": "m",
                "host": "127.0.0.1",
                "port": port,
                "api_key": "secret",
                "base_url": f"http://127.0.0.1:{port}/v1",
            }
            door.tell([{"name": "m", "replicas": [row]}])
            door.start()
            extra = (
                "Authorization: Bearer client",
                "X-Own: 1",
                "Connection: keep-alive, X-Hop",
                "X-Hop: 2",
                "TE: trailers",
                "x-request-id: abc",
            )
            with Wire(door.port) as wire:
                wire.send(post("/v1/completions", BODY, *extra))
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.settimeout(30)
                        seen = b""
                        while b"\r\n\r\n" not in seen:
                            seen += peer.recv(65536)
                        if not seen.startswith(b"POST"):
                            continue  # the door's question for the models
                        while not seen.endswith(BODY):
                            seen += peer.recv(65536)
                        peer.sendall(b"HTTP/1.1 200 OK\r\nX-Theirs: 3\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\n{}")
                        answer = wire.answer()
                        break
            lower = seen.lower()
            assert b"\r\nx-own: 1\r\n" in lower and b"\r\nauthorization: bearer secret\r\n" in lower
            assert lower.count(b"authorization") == 1 and b"\r\nx-request-id: abc\r\n" in lower
            assert b"x-hop" not in lower and b"\r\nte:" not in lower and b"\r\nhost: 127.0.0.1:" in lower
            assert answer is not None and answer.headers["x-theirs"] == "3" and answer.headers["x-request-id"] == "abc"
            assert "keep-alive" not in answer.headers
        finally:
            world.close()


def test_a_replica_whose_headers_do_not_end_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_headers_for_ever, args=(listener,), daemon=True)
        answering.start()
        try:
            door = Door(tmp_path)
            world.parts.append(door)
            row = {"instance": "m-0", "model": "m", "host": "127.0.0.1", "port": listener.getsockname()[1]}
            door.tell([{"name": "m", "replicas": [row], "settings": {"hold_timeout_s": 1.0}}])
            door.start()
            assert talk_once(door, GOOD) in (502, 503)
        finally:
            world.close()
            listener.shutdown(socket.SHUT_RDWR)
            answering.join(30)


def _headers_for_ever(listener: socket.socket) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer, contextlib.suppress(OSError):
            peer.settimeout(30)
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                peer.sendall(b"X-More: of the same\r\n" * 100)


def test_a_client_that_leaves_ends_the_request_at_the_replica(served: tuple[Door, Sim]) -> None:
    door, sim = served

    def running() -> float:
        text = httpx.get(f"http://127.0.0.1:{sim.port}/metrics", timeout=30).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))

    sim.fault(tokens_per_s=20.0)
    try:
        for streaming in (True, False):
            body = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 2000, "stream": streaming}).encode()
            with Wire(door.port) as wire:
                wire.send(post("/v1/completions", body))
                wait_until(running, 1.0, within_s=30)
            wait_until(running, 0.0, within_s=30)
    finally:
        sim.fault(tokens_per_s=2000.0)


PIECES = [b"GET ", b"POST ", b"/v1/models", b"/v1/completions", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", HOST]
PIECES += [b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: ", b"chunked", b"0\r\n\r\n", b"5\r\nhello\r\n"]
PIECES += [b":", b" ", b"\t", b"\x00", b"\xff", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"10", b"-1", b"{", b"}"]
PIECES += [b"Content-Type: application/json\r\n", BODY, GOOD, SMUGGLED]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)), min_size=1, max_size=12).map(b"".join))
def test_fuzz(served: tuple[Door, Sim], data: bytes) -> None:
    """
    Whatever is sent, the door answers with no 5xx, and serves the next client.
    """
    door, _ = served
    with Wire(door.port) as wire:
        try:
            wire.send(data)
            wire.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        while (answer := wire.answer()) is not None:
            assert answer.status < 500, (answer, data)
    assert door.process is not None and door.process.poll() is None


def test_the_door_still_serves_after_the_fuzz(served: tuple[Door, Sim]) -> None:
    alive(served[0])
