"""What a continued stream looks like to its client: exactly like one that was never cut, or an error event that says why."""

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from recovery.core.continuation import REASONS
from recovery.simulator.tokens import Decoder, decode, encode, generate, render_chat
from tests.frontdoor.world import Door, Outcome, Sim, World, expected_text, stream, whole

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CUT = 12


def ask(door: Door, path: str, **body: Any) -> Outcome:
    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            return await stream(client, path, {"model": "m", "temperature": 0, **body})

    return asyncio.run(run())


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat_ids(text: str, tokens: int) -> list[int]:
    return generate(encode(render_chat(messages(text))), tokens)


NO_FAULT = {"cut_after_tokens": 0, "error_after_tokens": 0, "stall_after_tokens": 0, "fault_streams": 0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, list[Sim]]]:
    """Two replicas behind one door, for all tests that need nothing special."""
    world = World(tmp_path_factory.mktemp("continuation"))
    try:
        sims = world.sims(2, "--tokens-per-s", "500")
        yield world.door(sims), sims
    finally:
        world.close()


class Pair:
    """The shared two, both of which reset their next stream after so many tokens; and what the door counted since."""

    def __init__(self, door: Door, sims: list[Sim], cut_at: int = CUT) -> None:
        self.door, self.sims = door, sims
        self.cut_next(cut_at)
        self._before = self._counted()

    def cut_next(self, after: int) -> None:
        self.sims[0].fault(**NO_FAULT)
        self.sims[1].fault(**NO_FAULT)
        for sim in self.sims:
            sim.fault(cut_after_tokens=after, fault_streams=1)

    def _counted(self) -> float:
        return self.door.metric("recovery_frontdoor_continued_total", by="ids")

    @property
    def continued(self) -> float:
        return self._counted() - self._before

    def whole(self, path: str, **body: Any) -> Outcome:
        """The same request with no fault set."""
        for sim in self.sims:
            sim.fault(**NO_FAULT)
        return ask(self.door, path, **body)


@pytest.fixture
def pair(shared: tuple[Door, list[Sim]]) -> Pair:
    return Pair(*shared)


def test_a_chat_goes_on_under_its_own_name(pair: Pair) -> None:
    cut = ask(pair.door, CHAT, messages=messages("Hello"), max_tokens=60, stream_options={"include_usage": True})
    plain = pair.whole(CHAT, messages=messages("Hello"), max_tokens=60, stream_options={"include_usage": True})
    assert pair.continued == 2
    assert cut.text == plain.text == decode(chat_ids("Hello", 60))
    assert (cut.finish, cut.done, cut.usage) == (plain.finish, plain.done, plain.usage)
    for name in ("id", "created", "model", "object"):
        assert len({event[name] for event in cut.events}) == 1, name
    assert cut.events[0]["object"] == "chat.completion.chunk"
    roles = [c["delta"].get("role") for e in cut.events for c in e["choices"] if c["delta"].get("role")]
    assert roles == ["assistant"]
    keys = {key for e in cut.events for c in e["choices"] for key in (*e, *c)}
    assert not keys & {"token_ids", "prompt_token_ids", "text"}


def test_a_completion_goes_on_with_its_usage_in_every_event(pair: Pair) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    cut = ask(pair.door, TEXT, prompt="Once upon", max_tokens=60, stream_options=options)
    plain = pair.whole(TEXT, prompt="Once upon", max_tokens=60, stream_options=options)
    assert pair.continued == 2
    assert cut.text == plain.text == expected_text("Once upon", 60)
    assert cut.usage == plain.usage
    last = [event["usage"]["completion_tokens"] for event in cut.events]
    assert last == sorted(last) and {event["usage"]["prompt_tokens"] for event in cut.events} == {len("Once upon")}


def test_a_completion_without_max_tokens_ends_at_sixteen_though_it_was_cut(pair: Pair) -> None:
    assert ask(pair.door, TEXT, prompt="Short").text == expected_text("Short", 16)
    assert pair.continued == 1


def test_a_chat_without_max_tokens_fills_the_context_though_it_was_cut(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "2000", "--max-model-len", "200")
    sims[0].fault(cut_after_tokens=CUT, fault_streams=1)
    door = world.door(sims)
    prompt = encode(render_chat(messages("Hello")))
    cut = ask(door, CHAT, messages=messages("Hello"))
    assert door.metric("recovery_frontdoor_continued_total", by="ids") == 1
    assert (cut.text, cut.finish) == (decode(generate(prompt, 200 - len(prompt))), "length")


def test_ids_the_client_asked_for_come_once_each(pair: Pair) -> None:
    cut = ask(pair.door, CHAT, messages=messages("Hello"), max_tokens=60, return_token_ids=True)
    assert pair.continued == 2
    ids = [i for e in cut.events for c in e["choices"] for i in c.get("token_ids") or ()]
    assert ids == chat_ids("Hello", 60)
    prompts = [e["prompt_token_ids"] for e in cut.events if e.get("prompt_token_ids")]
    assert prompts == [encode(render_chat(messages("Hello")))]


@pytest.mark.parametrize("cut_at", range(1, 13))
def test_characters_split_over_tokens_survive_a_cut_anywhere(pair: Pair, cut_at: int) -> None:
    """
    One token in eight begins a character of several tokens, so some of these cuts fall inside one.
    """
    for prompt in ("Zebra", "Apple"):
        pair.cut_next(cut_at)
        cut = ask(pair.door, TEXT, prompt=prompt, max_tokens=30)
        assert (cut.text, cut.error) == (expected_text(prompt, 30), "")
    assert pair.continued >= 2


def test_several_tokens_per_event_that_end_inside_a_character(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "2000", "--chunk-tokens", "3")
    door = world.door(sims)
    for number in range(12):
        for sim in sims:
            sim.fault(cut_after_tokens=9, fault_streams=1)
        prompt = f"prompt {number}"
        cut = ask(door, TEXT, prompt=prompt, max_tokens=40)
        assert (cut.text, cut.error) == (expected_text(prompt, 40), "")
    assert door.metric("recovery_frontdoor_continued_total", by="ids") >= 12


def test_stop_strings_are_found_before_across_and_after_the_cut(pair: Pair) -> None:
    """
    vLLM holds back what may begin a stop string, so at the cut the client lacks text the ids already hold.
    """
    text = expected_text("Stop me", 60)
    for start in range(8, len(text) - 8, 8):
        stop = text[start : start + 7]
        at = text.find(stop)
        for keep in (False, True):
            pair.cut_next(CUT)
            cut = ask(
                pair.door,
                TEXT,
                prompt="Stop me",
                max_tokens=60,
                stop=["never said", stop],
                include_stop_str_in_output=keep,
                stream_options={"include_usage": True},
            )
            assert (cut.text, cut.finish, cut.error) == (text[: at + (7 if keep else 0)], "stop", ""), (start, keep)
            assert [c["stop_reason"] for e in cut.events for c in e["choices"] if c["finish_reason"]] == [stop]
            assert cut.usage["total_tokens"] == cut.usage["completion_tokens"] + len("Stop me")
    assert pair.continued > 8


@pytest.mark.parametrize("fault", ["error_after_tokens", "stall_after_tokens"])
def test_an_error_event_or_silence_is_a_cut_too(world: World, fault: str) -> None:
    sims = world.sims(2, "--tokens-per-s", "300")
    sims[0].fault(**{fault: CUT, "fault_streams": 1})
    door = world.door(sims, model={"inter_token_timeout_s": 1.0})
    cut = ask(door, CHAT, messages=messages("Hello"), max_tokens=60)
    assert (cut.text, cut.finish, cut.error) == (decode(chat_ids("Hello", 60)), "length", "")
    assert door.metric("recovery_frontdoor_continued_total", by="ids") == 1
    if fault == "stall_after_tokens":
        assert [event["instance"] for event in door.events("stall")] == ["m-0"]


def test_a_shutdown_of_the_server_in_mid_stream_is_a_cut_too(world: World) -> None:
    """
    SIGTERM without a drain ends a stream with `finish_reason: abort` or an error event, and `[DONE]`.
    """
    sims = world.sims(2, "--tokens-per-s", "50")
    door = world.door(sims)
    ended = False

    def seen(outcome: Outcome) -> None:
        nonlocal ended
        if len(outcome.events) >= 5 and not ended:
            ended = True
            sims[0].process.terminate()  # type: ignore[union-attr]

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            return await stream(client, CHAT, {"model": "m", "messages": messages("Bye"), "max_tokens": 60}, seen)

    cut = asyncio.run(run())
    assert (cut.text, cut.finish, cut.error) == (decode(chat_ids("Bye", 60)), "length", "")


class Aborting(http.server.BaseHTTPRequestHandler):
    """A replica that ends its streams as vLLM does at SIGTERM: three tokens, `finish_reason: abort`, `[DONE]`."""

    def rows(self, prompt: str) -> list[dict[str, Any]]:
        decoder, ids = Decoder(), generate(encode(prompt), 3)
        rows: list[dict[str, Any]] = [{"text": decoder.feed([i]), "finish_reason": None, "token_ids": [i]} for i in ids]
        rows[0]["prompt_token_ids"] = encode(prompt)
        return rows

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        rows = self.rows(body["prompt"])
        rows.append({"text": "", "finish_reason": "abort", "token_ids": []})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for row in rows:
            event = {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [{"index": 0, **row}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            threading.Event().wait(0.1)  # as a slow model
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class Wordless(Aborting):
    """One that gives no token ids."""

    @staticmethod
    def pieces(text: str) -> list[str]:
        return [text[i : i + 3] for i in range(0, len(text), 3)]

    def rows(self, prompt: str) -> list[dict[str, Any]]:
        return [{"text": piece, "finish_reason": None} for piece in self.pieces(decode(generate(encode(prompt), 3)))]


def test_an_aborted_answer_is_not_the_end(world: World) -> None:
    (sim,) = world.sims(1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Aborting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        door = Door(world.folder)
        world.parts.append(door)
        aborting = {**sim.row(), "instance": "m-9", "port": server.server_address[1]}
        door.tell([{"name": "m", "replicas": [aborting, sim.row()]}])
        door.start()
        cut = ask(door, TEXT, prompt="Plain words", max_tokens=20)
        assert (cut.text, cut.finish, cut.error) == (expected_text("Plain words", 20), "length", "")
        assert "abort" not in json.dumps(cut.events)
        assert door.metric("recovery_frontdoor_continued_total", by="ids") == 1
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("allowed", [True, False])
def test_without_ids_text_goes_on_only_where_the_operator_allows_it(world: World, allowed: bool) -> None:
    (sim,) = world.sims(1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wordless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        door = Door(world.folder)
        world.parts.append(door)
        wordless = {**sim.row(), "instance": "m-9", "port": server.server_address[1]}
        door.tell([{"name": "m", "settings": {"allow_text_continuation": allowed}, "replicas": [wordless, sim.row()]}])
        door.start()
        cut = ask(door, TEXT, prompt="Plain words", max_tokens=20)
        begun = decode(generate(encode("Plain words"), 3))
        if allowed:
            assert cut.text == begun + expected_text("Plain words" + begun, 20 - len(Wordless.pieces(begun)))
            assert (cut.finish, cut.error) == ("length", "")
            assert {event["id"] for event in cut.events} == {"x"}
        else:
            assert cut.text == begun and REASONS["no_ids"] in cut.error
    finally:
        server.shutdown()
        server.server_close()


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}]


@pytest.mark.parametrize(
    ("reason", "extra"),
    [
        ("tools", {"tools": TOOLS, "tool_choice": "auto"}),
        ("structured", {"response_format": {"type": "json_object"}}),
        ("penalties", {"presence_penalty": 0.5}),
        ("seed", {"seed": 7, "temperature": 1.0}),
        ("multimodal", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]}),
        ("reasoning", {"reasoning_effort": "high"}),
        ("unknown", {"some_new_parameter": 3}),
    ],
)
def test_what_cannot_be_continued_ends_with_an_error_that_says_why(pair: Pair, reason: str, extra: dict[str, Any]) -> None:
    door = pair.door
    pair.cut_next(4)
    before = door.metric("recovery_frontdoor_cut_total", reason=reason)
    cut = ask(door, CHAT, **{"messages": messages("Hello"), "max_tokens": 60, **extra})
    assert REASONS[reason] in cut.error and cut.done and cut.finish is None
    assert door.metric("recovery_frontdoor_cut_total", reason=reason) == before + 1
    assert pair.continued == 0


def test_what_cannot_be_continued_is_still_retried_before_its_first_event(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "300", "--ttft-s", "0.5")
    door = world.door(sims)

    async def run(start: Callable[[], None]) -> Outcome:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            body = {"model": "m", "messages": messages("Hello"), "max_tokens": 60, "presence_penalty": 0.5}
            task = asyncio.create_task(stream(client, CHAT, body))
            await asyncio.sleep(0.2)
            start()
            return await task

    outcome = asyncio.run(run(sims[0].kill))
    assert (outcome.text, outcome.error) == (decode(chat_ids("Hello", 60)), "")


def test_a_replay_buffer_that_is_too_small_is_a_reason_too(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "300")
    sims[0].fault(cut_after_tokens=CUT, fault_streams=1)
    door = world.door(sims, replay_max_tokens=20)
    assert REASONS["too_long"] in ask(door, CHAT, messages=messages("Hello"), max_tokens=60).error


def test_answers_that_do_not_stream_are_asked_for_again(world: World) -> None:
    sims = world.sims(2, "--tokens-per-s", "300")
    sims[0].fault(completion_status=500)
    door = world.door(sims)

    async def run() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60, trust_env=False) as client:
            return [await whole(client, TEXT, {"model": "m", "prompt": f"p{i}", "max_tokens": 5}) for i in range(12)]

    assert [o.text for o in asyncio.run(run())] == [expected_text(f"p{i}", 5) for i in range(12)]
