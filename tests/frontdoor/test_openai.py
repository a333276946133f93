"""The official client, unchanged, against the door: every path it takes."""

import io
from collections.abc import Iterator

import openai
import pytest

from recovery.simulator.tokens import decode, encode, generate, render_chat
from tests.frontdoor.world import Door, Sim, World, expected_chat, expected_text

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, list[Sim], openai.OpenAI]]:
    world = World(tmp_path_factory.mktemp("openai"))
    try:
        sims = world.sims(2, "--tokens-per-s", "500")
        door = world.door(sims)
        with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
            yield door, sims, client
    finally:
        world.close()


def test_models(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    client = served[2]
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    client = served[2]
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=20)
    assert answer.choices[0].message.content == expected_chat("Hi", 20)
    assert answer.usage is not None and answer.usage.completion_tokens == 20


def test_streamed_chat_with_usage_cut_in_the_middle(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    door, sims, client = served
    for sim in sims:
        sim.fault(cut_after_tokens=7, fault_streams=1)
    pieces, usage, finish = [], None, None
    messages = [{"role": "user", "content": "Hi"}]
    chunks = client.chat.completions.create(
        model="m",
        messages=messages,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[call-overload]
    )
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == expected_chat("Hi", 30) and finish == "length"
    prompt = len(encode(render_chat(messages)))
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 30, prompt + 30)
    assert door.metric("recovery_frontdoor_continued_total", by="ids") == 2


def test_completions(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    client = served[2]
    assert client.completions.create(model="m", prompt="Hello", max_tokens=9).choices[0].text == expected_text("Hello", 9)
    stream = client.completions.create(model="m", prompt="Hello", max_tokens=9, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {i: decode(generate(encode("Hello"), 9, choice=i)) for i in (0, 1)}


def test_embeddings(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    answer = served[2].embeddings.create(model="m", input=["one", "two"], encoding_format="float")
    assert len(answer.data) == 2 and answer.data[0].embedding != answer.data[1].embedding


@pytest.mark.parametrize("streaming", [False, True])
def test_tool_calls(served: tuple[Door, list[Sim], openai.OpenAI], streaming: bool) -> None:
    client = served[2]
    messages = [{"role": "user", "content": "Weather?"}]
    if not streaming:
        answer = client.chat.completions.create(model="m", messages=messages, tools=[TOOL])  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.tool_calls[0].function.name == "weather"
        return
    names, arguments, finish = [], "", None
    for chunk in client.chat.completions.create(model="m", messages=messages, tools=[TOOL], stream=True):  # type: ignore[call-overload]
        for call in chunk.choices[0].delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert names == ["weather"] and finish == "tool_calls" and arguments.startswith('{"city": "') and arguments.endswith('"}')


def test_errors(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    client = served[2]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt="Hello", max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt="x" * 9000, max_tokens=5)


def test_a_stream_that_cannot_be_continued_raises(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    _, sims, client = served
    for sim in sims:
        sim.fault(cut_after_tokens=3, fault_streams=1)
    try:
        chunks = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=30, stream=True, presence_penalty=1
        )
        with pytest.raises(openai.APIError, match="cannot be continued"):
            list(chunks)
    finally:
        for sim in sims:
            sim.fault(cut_after_tokens=0)


def test_time_outs(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    _, sims, client = served
    for sim in sims:
        sim.fault(ttft_s=5.0)
    try:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(model="m", prompt="Hello", max_tokens=3)
    finally:
        for sim in sims:
            sim.fault(ttft_s=0.005)
    assert client.completions.create(model="m", prompt="Hello", max_tokens=3).choices[0].text == expected_text("Hello", 3)


def test_an_endpoint_the_server_does_not_have(served: tuple[Door, list[Sim], openai.OpenAI]) -> None:
    """
    A form with a file goes through by its model field; the simulator answers that it knows no such path.
    """
    with pytest.raises(openai.NotFoundError):
        served[2].audio.transcriptions.create(model="m", file=("a.wav", io.BytesIO(b"RIFF" * 1000)))
