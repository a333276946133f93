"""What a look over HTTP makes of servers, well-mannered and otherwise. Real sockets; the servers say exactly what a test wants."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from recovery.adapters.http_line import BrokenError, Line, RefusedError
from recovery.adapters.http_probe import HttpProber, Target
from recovery.core.looking import Look
from recovery.core.states import State
from tests.core.making import memory, row

METRICS = b'# HELP x\nvllm:iteration_tokens_total_count{engine="0"} 7.0\nvllm:iteration_tokens_total_count{engine="1"} 3.0\n'
MODELS = b'{"object":"list","data":[{"id":"tiny","object":"model"}]}'

Serve = Callable[["Asked"], Awaitable[bytes | None]]


class Asked:
    """One request as it came in."""

    def __init__(self, raw: bytes, body: bytes, connection: int) -> None:
        head, *lines = raw.decode().split("\r\n")
        self.method, self.path, _ = head.split(" ")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.body, self.connection = body, connection


class Server:
    """Answers with what `serve` gives: whole bytes of a response, or None to say nothing at all and wait."""

    def __init__(self, serve: Serve) -> None:
        self.serve, self.asked, self.connections = serve, list[Asked](), 0
        self.root = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
                asked = Asked(head, await reader.readexactly(length), connection)
                self.asked.append(asked)
                answer = await self.serve(asked)
                if answer is None:
                    await asyncio.Event().wait()
                    return
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer.lower() or answer == b"":
                    return

    @property
    def paths(self) -> list[str]:
        return [each.path for each in self.asked]


@contextlib.asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[Server]:
    """A server that is gone afterwards."""
    server = Server(serve)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.root = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        await _close(listening)


async def _close(listening: asyncio.Server) -> None:
    """End a server and whatever still serves a connection of it."""
    listening.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.01)  # transports are closed by the loop's next turns


def reply(body: bytes = b"", status: int = 200, *more: str) -> bytes:
    """A whole response."""
    head = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


async def well(asked: Asked) -> bytes | None:
    """A server without fault."""
    return reply({"/metrics": METRICS, "/v1/models": MODELS}.get(asked.path, b"{}"))


def but(**faults: Any) -> Serve:
    """A well-mannered server with these answers instead; keys are paths with _ for /."""

    async def serve(asked: Asked) -> bytes | None:
        name = asked.path.strip("/").replace("/", "_")
        return faults[name] if name in faults else await well(asked)

    return serve


def looked(serve: Serve, *, key: str | None = None, under: str = "", **changes: Any) -> tuple[Look, Server]:
    """One look at such a server."""

    async def look() -> tuple[Look, Server]:
        async with served(serve) as server:
            seen = await HttpProber().look(row(**changes), Target(root=server.root + under, api_key=key))
            return seen, server

    return asyncio.run(look())


SHORT = {"health_check_timeout": 0.6, "completion_timeout_s": 0.6}


def test_a_server_without_fault_is_asked_everything_on_one_connection() -> None:
    """
    Its counter stood still, so one token is asked for, and the counter is read again: that is progress.
    """
    look, server = looked(well, probe=memory(steps=10.0))
    assert (look.ready, look.steps, look.completion, look.message) == (True, 10.0, "ok", "")
    assert server.paths == ["/health", "/v1/models", "/metrics", "/v1/completions", "/metrics"]
    assert server.connections == 1
    assert server.asked[3].body == b'{"model": "tiny", "prompt": [5], "max_tokens": 1, "temperature": 0}'


def test_a_counter_that_moved_needs_no_completion() -> None:
    look, server = looked(well, probe=memory(steps=9.0))
    assert (look.ready, look.completion) == (True, "skipped")
    assert server.paths == ["/health", "/v1/models", "/metrics"]


def test_b01_health_is_asked_at_the_root_and_models_under_v1() -> None:
    _, server = looked(well, under="/behind/a/proxy")
    assert server.paths[:3] == ["/behind/a/proxy/health", "/behind/a/proxy/v1/models", "/behind/a/proxy/metrics"]


def test_the_key_is_sent_and_a_locked_door_is_told() -> None:
    look, server = looked(well, key="secret")
    assert server.asked[0].headers["authorization"] == "Bearer secret" and look.ready
    look, _ = looked(but(v1_models=reply(status=401)))
    assert look.ready and look.completion == "off" and "set api_key_env" in look.message


def test_an_endpoint_that_hangs_does_not_hide_the_others() -> None:
    """
    /health of a busy server hangs while its metrics move: that is what tells busy from hung.
    """
    look, server = looked(but(health=None), rules=SHORT, probe=memory(steps=9.0))
    assert (look.health, look.models, look.steps, look.ready) == ("timeout", "ok", 10.0, False)
    assert look.message == "/health gave no answer in 0.6 s"
    assert server.connections == 2


def test_everything_hangs() -> None:
    look, _ = looked(but(health=None, v1_models=None, metrics=None), rules=SHORT, probe=memory(steps=9.0))
    assert (look.health, look.models, look.steps, look.completion) == ("timeout", "timeout", None, "skipped")


@pytest.mark.parametrize(
    ("answer", "completion", "ready"),
    [
        (None, "timeout", False),
        (reply(status=500), "failed", False),
        (reply(status=503), "overloaded", True),
        (reply(status=404), "off", True),
        (reply(status=400), "off", True),
        (b"", "failed", False),
    ],
)
def test_completions(answer: bytes | None, completion: str, ready: bool) -> None:
    look, _ = looked(but(v1_completions=answer), rules=SHORT, probe=memory(steps=10.0))
    assert (look.completion, look.ready) == (completion, ready)


def test_a_paused_server_is_not_hung() -> None:
    look, _ = looked(but(v1_completions=None, is_paused=reply(b'{"is_paused":true}')), rules=SHORT, probe=memory(steps=10.0))
    assert (look.completion, look.asleep, look.ready) == ("timeout", True, True)


def test_a_sleeping_server_is_not_asked_for_tokens() -> None:
    asleep = METRICS + b'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0\n'
    look, server = looked(but(metrics=reply(asleep)), probe=memory(steps=10.0))
    assert look.asleep and look.ready and "/v1/completions" not in server.paths


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (reply(status=503), "status", "/health: status 503"),
        (b"SSH-2.0-OpenSSH\r\n", "broken", "/health: no HTTP"),
        (b"", "broken", "/health: the connection was closed"),
    ],
)
def test_health_that_is_none(answer: bytes, kind: str, text: str) -> None:
    look, _ = looked(but(health=answer))
    assert look.health == kind and look.message.startswith(text) and not look.ready


def test_refused_is_no_time_out() -> None:
    """
    vLLM refuses connections while it loads.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        root = f"http://127.0.0.1:{bound.getsockname()[1]}"
        look = asyncio.run(HttpProber().look(row(State.STARTING), Target(root=root)))
    assert (look.health, look.models, look.message) == ("refused", "refused", "/health: connection refused")


def test_without_an_address_only_the_process_is_checked() -> None:
    look = asyncio.run(HttpProber().look(row(), Target(root=None)))
    assert (look.http, look.ready) == (False, True)


def test_connections_that_are_closed_after_each_answer() -> None:
    async def serve(asked: Asked) -> bytes | None:
        body = {"/metrics": METRICS, "/v1/models": MODELS}.get(asked.path, b"{}")
        return reply(body, 200, "connection: close")

    look, server = looked(serve, probe=memory(steps=10.0))
    assert look.ready and server.connections == 5


def test_nothing_stays_open_after_a_look() -> None:
    async def look() -> int:
        async with served(but(health=None)) as server:
            await HttpProber().look(row(rules=SHORT), Target(root=server.root))
            loop = asyncio.get_running_loop()
            for _ in range(100):
                await asyncio.sleep(0)
            return len([each for each in asyncio.all_tasks(loop) if "Line" in repr(each) or "_ask" in repr(each)])

    assert asyncio.run(look()) == 0


# --- the line itself --------------------------------------------------------------------------------------------------


def ask(*pieces: bytes, path: str = "/x") -> bytes:
    """The body of a response that comes in these pieces, after which the connection is closed."""

    async def run() -> bytes:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        line = Line(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        try:
            return (await line.ask("GET", path)).body
        finally:
            line.close()
            await _close(listening)

    return asyncio.run(run())


def test_bodies_of_every_kind() -> None:
    assert ask(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"ab", b"cd") == b"abcd"
    assert ask(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n", b"1\r\nc\r\n0\r\n\r\n") == b"abc"
    assert ask(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def") == b"abcdef"
    assert ask(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na") in (b"", b"a")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab",),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n", *[b"x" * 1_000_000] * 6),
        (b"HTTP/1.1 200 OK\r\n",),
        (b"garbage",),
        (),
    ],
)
def test_what_is_cut_or_too_long_is_broken(pieces: tuple[bytes, ...]) -> None:
    with pytest.raises(BrokenError):
        ask(*pieces)


def test_tls_that_cannot_be_trusted_is_told() -> None:
    """
    Something that speaks no TLS on a port that ought to.
    """

    async def run() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        try:
            await Line(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}").ask("GET", "/health")
        finally:
            await _close(listening)

    with pytest.raises((BrokenError, RefusedError)):
        asyncio.run(run())


def test_a_user_in_the_address_is_sent() -> None:
    async def run() -> str:
        async with served(well) as server:
            line = Line(server.root.replace("//", "//me:p%40ss@"))
            await line.ask("GET", "/health")
            line.close()
            return server.asked[0].headers["authorization"]

    assert asyncio.run(run()) == "Basic bWU6cEBzcw=="
