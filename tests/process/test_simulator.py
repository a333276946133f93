"""The simulator's surface: what a client sees of a healthy server."""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from recovery.simulator.api import embed
from recovery.simulator.tokens import CHARACTERS, EOS, decode, encode, generate, render_chat
from tests.process.simulated import Server, wait_until

Start = Callable[..., Server]
HELLO = encode("Hello")
CHAT = [{"role": "user", "content": "Tell me a story."}]
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def begin(*arguments: str, **more: Any) -> Server:
        servers.append(Server(tmp_path, *arguments, **more))
        return servers[-1].ready()

    yield begin
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("serve", "org/model", "--served-model-name", "main", "alias", "--max-model-len", "2048", "--tokens-per-s", "0")
    one = Server(tmp_path_factory.mktemp("sim"), *arguments, "--max_num_seqs", "64", "--dtype", "float32", "--enforce-eager")
    yield one.ready()
    one.close()


def stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, without the closing `[DONE]`, which must be there."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [orjson.loads(line) for line in lines[:-1]]


def joined(events: list[dict[str, Any]], index: int = 0) -> tuple[str, list[int]]:
    """Text and ids of one choice of a completion stream."""
    rows = [row for event in events for row in event["choices"] if row["index"] == index]
    return "".join(row["text"] for row in rows), [token for row in rows for token in row["token_ids"] or []]


# --- the rule ---


def test_generated_text_holds_characters_split_over_tokens():
    text = decode(generate(HELLO, 400))
    assert all(character in text for character in CHARACTERS)
    assert "�" not in text


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 40, 63])
def test_generation_goes_on_from_ids_as_if_never_cut(cut):
    whole = generate(HELLO, 64)
    assert generate(HELLO + whole[:cut], 64 - cut) == whole[cut:]


def test_generation_from_text_takes_another_way():
    whole = generate(HELLO, 64)
    assert generate(encode("Hello" + decode(whole[:32])), 32) != whole[32:]


def test_a_seed_changes_the_text_and_cannot_be_continued():
    assert generate(HELLO, 32, seed=7) == generate(HELLO, 32, seed=7) != generate(HELLO, 32)
    whole = generate(HELLO, 32, seed=7)
    assert generate(HELLO + whole[:10], 22, seed=7) != whole[10:]


# --- endpoints ---


def test_status_endpoints_answer_as_vllm(server):
    assert [server.status(path) for path in ("/health", "/ping", "/version", "/load", "/metrics")] == [200] * 5
    assert server.get("/version").json() == {"version": "0.32.0"}
    cards = server.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
        ("main", "org/model", 2048),
        ("alias", "org/model", 2048),
    ]
    assert server.status("/nothing") == 404
    assert server.status("/v1/completions") == 405
    assert server.status("/is_sleeping") == 404, "only in dev mode"


def test_admin_state_shows_the_flags(server):
    options = server.get("/admin/state").json()["options"]
    assert (options["max_model_len"], options["max_num_seqs"], options["enforce_eager"]) == (2048, 64, True)
    assert options["ignored"] == {"dtype": ["float32"]}


def test_without_admin_there_is_no_admin_endpoint(tmp_path):
    from recovery.simulator.options import parse

    assert not parse(["--port", "1"]).admin


def test_a_completion_is_the_text_of_the_rule(server):
    answer = server.complete("Hello", 64, return_token_ids=True)
    row = answer["choices"][0]
    assert row["text"] == decode(generate(HELLO, 64))
    assert (row["token_ids"], row["prompt_token_ids"], row["finish_reason"]) == (generate(HELLO, 64), HELLO, "length")
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 69, "completion_tokens": 64, "prompt_tokens_details": None}


def test_a_stream_is_the_same_text_with_ids(server):
    events = stream(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 64, "return_token_ids": True})
    assert joined(events) == (decode(generate(HELLO, 64)), generate(HELLO, 64))
    rows = [event["choices"][0] for event in events]
    assert rows[0]["prompt_token_ids"] == HELLO
    assert all(row["prompt_token_ids"] is None for row in rows[1:])
    assert any(row["text"] == "" and row["token_ids"] for row in rows), "a chunk is empty while a character is pending"
    assert [row["finish_reason"] for row in rows] == [None] * (len(rows) - 1) + ["length"]


def test_ids_are_not_sent_unless_asked_for(server):
    events = stream(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 4})
    assert all(row["token_ids"] is None and row["prompt_token_ids"] is None for event in events for row in event["choices"])


@pytest.mark.parametrize("cut", [1, 20, 40, 63])
def test_another_server_continues_a_chat_by_ids(server, start, cut):
    other = start("--engine", "none", "--chunk-tokens", "3")
    body = {"messages": CHAT, "max_tokens": 64, "return_token_ids": True}
    events = stream(server, "/v1/chat/completions", body)
    prompt = events[0]["prompt_token_ids"]
    tokens = [token for event in events for row in event["choices"] for token in row["token_ids"] or []]
    assert prompt == encode(render_chat(CHAT))
    rest = stream(other, "/v1/completions", {"prompt": prompt + tokens[:cut], "max_tokens": 64 - cut, "return_token_ids": True})
    assert tokens[:cut] + joined(rest)[1] == tokens == generate(prompt, 64)


def test_chat_streams_its_role_first_and_its_usage_last(server):
    events = stream(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 9, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"] == []
    prompt = len(encode(render_chat(CHAT)))
    assert events[-1]["usage"]["completion_tokens"] == 9
    assert events[-1]["usage"]["total_tokens"] == prompt + 9
    text = "".join(event["choices"][0]["delta"]["content"] for event in events[:-1])
    assert text == decode(generate(encode(render_chat(CHAT)), 9))


def test_continue_final_message_renders_it_open(server):
    messages = [*CHAT, {"role": "assistant", "content": "Once"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "return_token_ids": True}
    assert server.post("/v1/chat/completions", body).status_code == 400
    answer = server.post("/v1/chat/completions", {**body, "add_generation_prompt": False}).json()
    assert decode(answer["prompt_token_ids"]).endswith("<|assistant|>Once")


def test_echo_puts_the_prompt_before_the_text(server):
    assert server.text("Hello", 8, echo=True) == "Hello" + decode(generate(HELLO, 8))
    events = stream(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 8, "echo": True, "return_token_ids": True})
    assert joined(events) == ("Hello" + decode(generate(HELLO, 8)), HELLO + generate(HELLO, 8))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_straddles_tokens_ends_the_text(server, streamed):
    whole = decode(generate(HELLO, 64))
    stop = whole[30:36]
    at = whole.index(stop)
    body = {"prompt": "Hello", "max_tokens": 64, "stop": ["never", stop], "return_token_ids": True}
    events = stream(server, "/v1/completions", body) if streamed else [server.post("/v1/completions", body).json()]
    assert joined(events)[0] == whole[:at]
    assert (events[-1]["choices"][0]["finish_reason"], events[-1]["choices"][0]["stop_reason"]) == ("stop", stop)
    assert server.text("Hello", 64, stop=stop, include_stop_str_in_output=True) == whole[: at + len(stop)]
    assert server.get("/admin/state").json()["in_flight"] == 0


def test_n_and_several_prompts_make_several_choices(server):
    rows = server.complete(["Hello", "World"], 8, n=2)["choices"]
    expected = [decode(generate(encode(word), 8, choice=choice)) for word in ("Hello", "World") for choice in (0, 1)]
    assert [row["text"] for row in rows] == expected
    assert len(set(expected)) == 4
    events = stream(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 8, "n": 2})
    assert [joined(events, index)[0] for index in (0, 1)] == expected[:2]


def test_seed_counts_unless_the_temperature_is_zero(server):
    assert server.text("Hello", 32, seed=7, temperature=1) == decode(generate(HELLO, 32, seed=7))
    assert server.text("Hello", 32, seed=7, temperature=0) == decode(generate(HELLO, 32))


def test_the_end_of_text_ends_it_unless_ignored(start):
    server = start("--engine", "none", "--eos-every", "20")
    made = generate(HELLO, 500, eos_every=20)
    assert made[-1] == EOS
    row = server.complete("Hello", 500)["choices"][0]
    assert (row["text"], row["finish_reason"]) == (decode(made), "stop")
    assert server.text("Hello", 500, ignore_eos=True) == decode(generate(HELLO, 500))


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "NotFoundError"),
        ("/v1/completions", {}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": [9999]}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "many"}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x" * 2048}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2048}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x", "stop": 5}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "BadRequestError"),
        ("/v1/completions", [1], 400, "BadRequestError"),
        ("/v1/chat/completions", {"messages": []}, 400, "BadRequestError"),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [1]}, 400, "BadRequestError"),
        ("/v1/embeddings", {"input": ""}, 400, "BadRequestError"),
    ],
)
def test_a_clients_fault_has_vllms_shape(server, path, body, status, kind):
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, status)
    assert error.keys() == {"message", "type", "param", "code"}


def test_keys_guard_v1_only(start):
    server = start("--api-key", "one", "two", VLLM_API_KEY="three", VLLM_SERVER_DEV_MODE="0")
    assert [server.status(path) for path in ("/health", "/metrics", "/version", "/load", "/ping")] == [200] * 5
    assert server.status("/v1/models") == 401
    for key, status in (("one", 200), ("two", 200), ("three", 200), ("four", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert server.client.get("/v1/models", headers=headers).status_code == status, key
    assert "three" not in server.get("/admin/state").text


def test_tokenize_and_back(server):
    answer = server.post("/tokenize", {"prompt": "Hé"}).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (encode("Hé"), 3, 2048)
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Hé"}


# --- the official client ---


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_client_chats_and_streams(client):
    expected = decode(generate(encode(render_chat(CHAT)), 12))
    answer = client.chat.completions.create(model="main", messages=CHAT, max_tokens=12)
    assert answer.choices[0].message.content == expected
    chunks = list(client.chat.completions.create(model="alias", messages=CHAT, max_completion_tokens=12, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert client.completions.create(model="main", prompt="Hello", max_tokens=12).choices[0].text == decode(generate(HELLO, 12))
    assert [model.id for model in client.models.list()] == ["main", "alias"]


def test_openai_client_gets_tool_calls(client):
    create: Any = client.chat.completions.create
    message = create(model="main", messages=CHAT, tools=[WEATHER], tool_choice="required")
    call = message.choices[0].message.tool_calls[0]
    assert (message.choices[0].finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert orjson.loads(call.function.arguments)["city"]
    pieces = [chunk.choices[0].delta.tool_calls for chunk in create(model="main", messages=CHAT, tools=[WEATHER], stream=True)]
    arguments = "".join(piece[0].function.arguments for piece in pieces if piece)
    assert arguments == call.function.arguments
    answered = [*CHAT, message.choices[0].message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert create(model="main", messages=answered, tools=[WEATHER]).choices[0].message.content
    assert create(model="main", messages=CHAT, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_openai_client_embeds(client):
    answer = client.embeddings.create(model="main", input=["Hello", "World"])
    assert [row.embedding for row in answer.data] == [embed("Hello"), embed("World")]
    assert client.embeddings.create(model="main", input="Hello", encoding_format="float").data[0].embedding == embed("Hello")


def test_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=CHAT)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="main", prompt="x", max_tokens=0)


# --- metrics and the queue ---


def test_metrics_count_steps_tokens_and_outcomes(start):
    server = start("--served-model-name", "main", "alias")
    server.complete("Hello", 10)
    server.complete("Hello", 30, model="alias", stop=decode(generate(HELLO, 5))[-4:])
    label = {"model_name": "main", "engine": "0"}
    assert server.metric("vllm:iteration_tokens_total_count", **label) >= 10
    assert server.metric("vllm:generation_tokens_total", **label) >= 13
    assert server.metric("vllm:prompt_tokens_total", **label) == 10
    assert server.metric("vllm:request_success_total", finished_reason="length") == 1
    assert server.metric("vllm:request_success_total", finished_reason="stop") == 1
    assert server.metric("vllm:time_to_first_token_seconds_count") == 2
    assert server.metric("vllm:e2e_request_latency_seconds_bucket", le="+Inf") == 2
    assert server.metric("vllm:engine_sleep_state", sleep_state="awake") == 1
    assert server.metric("http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 2
    boot = next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    ticks = float(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[19])
    assert abs(server.metric("process_start_time_seconds") - boot - ticks / os.sysconf("SC_CLK_TCK")) < 1


def in_background(server: Server, body: dict[str, Any]) -> threading.Thread:
    def ask() -> None:
        with suppress(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=120, trust_env=False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_requests_beyond_max_num_seqs_wait_and_beyond_the_queue_are_refused(start):
    server = start("--max-num-seqs", "1", "--max-num-queued-reqs", "2", "--tokens-per-s", "10", "--enable-server-load-tracking")
    for _ in range(3):
        in_background(server, {"prompt": "Hello", "max_tokens": 5000})
    wait_until(lambda: (server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")), (1.0, 2.0))
    assert server.get("/load").json() == {"server_load": 3}
    assert 0 < server.metric("vllm:kv_cache_usage_perc") < 1
    refused = server.post("/v1/completions", {"prompt": "Hello"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert "currently busy" in refused.json()["error"]["message"]
    server.fault(tokens_per_s=0, chunk_tokens=1000)
    wait_until(lambda: (server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")), (0.0, 0.0))


def test_a_client_that_leaves_ends_its_request(start):
    server = start("--tokens-per-s", "20")
    with pytest.raises(httpx.ReadTimeout):
        server.complete("Hello", 5000, timeout=0.5)
    wait_until(
        lambda: (server.metric("vllm:num_requests_running"), server.metric("vllm:request_success_total", finished_reason="abort")),
        (0.0, 1.0),
    )


@pytest.mark.parametrize(("put", "back", "asked"), [("/sleep?level=1", "/wake_up", "is_sleeping"), ("/pause", "/resume", "is_paused")])
def test_asleep_or_paused_it_is_healthy_and_serves_nothing(start, put, back, asked):
    server = start(VLLM_SERVER_DEV_MODE="1")
    assert server.get(f"/{asked}").json() == {asked: False}
    server.post(put)
    assert server.get(f"/{asked}").json() == {asked: True}
    assert server.status("/health") == 200
    with pytest.raises(httpx.ReadTimeout):
        server.complete(timeout=0.5)
    awake = 0.0 if put.startswith("/sleep") else 1.0
    assert server.metric("vllm:engine_sleep_state", sleep_state="awake") == awake
    assert server.metric("vllm:engine_sleep_state", sleep_state="weights_offloaded") == 1 - awake
    server.post(back)
    assert server.text() == decode(generate(HELLO, 16))


# --- HTTP ---


def raw(server: Server, data: bytes) -> bytes:
    """All the server sends until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return answer


def test_pipelined_requests_are_answered_in_order(server):
    answer = raw(server, b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" * 2 + b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200", b"404"]


def test_http_1_0_gets_an_unchunked_stream(server):
    body = orjson.dumps({"prompt": "Hello", "max_tokens": 2, "stream": True})
    answer = raw(server, b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    assert b"chunked" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_rubbish_is_refused_and_hurts_nobody(server):
    assert raw(server, b"rubbish\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.status() == 200
