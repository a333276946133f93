"""Which streams can be continued, and what the request that continues one says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.core.continuation import (
    KNOWN,
    REASONS,
    RULES,
    StopScanner,
    expected_choices,
    next_request,
    next_text_request,
    stop_strings,
    tokens_left,
    why_not,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logit_bias": {"5": 1.0}, "stop_token_ids": [1], "ignore_eos": True},
        {"stop": ["a"], "max_tokens": 5, "max_completion_tokens": 5, "stream_options": {"include_usage": True}, "user": "u", "n": 1},
        {"tools": [{"type": "function"}], "tool_choice": "none", "parallel_tool_calls": True},
        {"seed": 5, "temperature": 0, "presence_penalty": 0, "repetition_penalty": 1.0, "logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text"}, "guided_json": None, "echo": False, "min_tokens": 3, "reasoning_effort": "none"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "chat_template_kwargs": {"enable_thinking": False}},
        {"tools": [], "functions": None, "bad_words": [], "some_new_flag": False, "another": None},
    ],
)
def test_these_can(more: dict[str, Any]) -> None:
    assert why_not({**CHAT, **more}) is None


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("tools", {"tools": [{"type": "function"}]}),
        ("tools", {"functions": [{"name": "f"}]}),
        ("reasoning", {"reasoning_effort": "low"}),
        ("reasoning", {"chat_template_kwargs": {"enable_thinking": True}}),
        ("reasoning", {"include_reasoning": False}),
        ("structured", {"response_format": {"type": "json_object"}}),
        ("structured", {"structured_outputs": {"choice": ["a"]}}),
        ("structured", {"guided_regex": "a+"}),
        ("penalties", {"presence_penalty": 0.1}),
        ("penalties", {"frequency_penalty": -1}),
        ("penalties", {"repetition_penalty": 1.1}),
        ("logprobs", {"logprobs": True}),
        ("logprobs", {"logprobs": 0}),
        ("logprobs", {"prompt_logprobs": 1}),
        ("choices", {"n": 2}),
        ("choices", {"best_of": 3}),
        ("choices", {"use_beam_search": True}),
        ("choices", {"prompt": ["a", "b"]}),
        ("choices", {"prompt": [[1], [2]]}),
        ("multimodal", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("multimodal", {"prompt_embeds": "x"}),
        ("seed", {"seed": 0}),
        ("seed", {"seed": 5, "temperature": 0.1}),
        ("echo", {"echo": True}),
        ("echo", {"suffix": "x"}),
        ("min_tokens", {"min_tokens": 2, "stop": "x"}),
        ("bad_words", {"bad_words": ["x"]}),
        ("transfer", {"kv_transfer_params": {"a": 1}}),
        ("unknown", {"some_new_parameter": 1}),
    ],
)
def test_these_cannot(reason: str, more: dict[str, Any]) -> None:
    assert why_not({**CHAT, **more}) == reason


def test_logprobs_zero_asks_for_the_sampled_tokens_so_it_counts() -> None:
    assert why_not({"prompt": "x", "logprobs": 0}) == "logprobs"


def test_every_rule_has_its_reason_in_the_table() -> None:
    assert {name for name, _ in RULES} <= set(REASONS)


@given(
    st.dictionaries(
        st.sampled_from(sorted(KNOWN)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
    )
)
def test_no_body_however_odd_raises(body: dict[str, Any]) -> None:
    assert why_not(body) in (None, *REASONS)
    stop_strings(body)
    expected_choices(body)


def test_the_request_that_goes_on() -> None:
    body = {
        **CHAT,
        "temperature": 0.5,
        "top_k": 3,
        "stop": ["x"],
        "max_tokens": 50,
        "min_tokens": 10,
        "stream_options": {"include_usage": True},
    }
    assert next_request(body, [1, 2], [3, 4, 5], 47) == {
        "model": "m",
        "prompt": [1, 2, 3, 4, 5],
        "max_tokens": 47,
        "min_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


@pytest.mark.parametrize(
    ("kind", "body", "context", "left"),
    [
        ("chat", {"max_tokens": 50}, None, 40),
        ("chat", {"max_tokens": 50}, 45, 15),
        ("chat", {"max_completion_tokens": 30, "max_tokens": 50}, 1000, 20),
        ("chat", {}, 1000, 970),
        ("chat", {}, None, None),
        ("completion", {}, 1000, 6),
        ("completion", {"max_tokens": None}, 1000, 6),
        ("completion", {"max_tokens": 10}, None, 0),
        ("completion", {"max_completion_tokens": 90}, None, 6),
    ],
)
def test_tokens_left_after_ten_of_a_prompt_of_twenty(kind: Any, body: dict[str, Any], context: int | None, left: int | None) -> None:
    assert tokens_left(kind, body, 20, 10, context) == left


def test_going_on_by_text() -> None:
    chat = next_text_request("chat", {**CHAT, "max_tokens": 9}, "so far", 4)
    assert chat is not None
    assert chat["messages"][-1] == {"role": "assistant", "content": "so far"}
    assert (chat["continue_final_message"], chat["add_generation_prompt"], chat["max_tokens"]) == (True, False, 4)
    text = next_text_request("completion", {"prompt": "Once"}, " upon", None)
    assert text == {"prompt": "Once upon"}
    assert next_text_request("completion", {"prompt": [1, 2]}, "x", 3) is None


def whole_answer(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """What vLLM makes of a text that arrives one character at a time."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops):
            if text[:end].endswith(stop):
                return text[: end if keep else end - len(stop)], stop
    return text, None


@given(st.text("ab", max_size=25), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans(), st.data())
def test_a_cut_changes_nothing_about_stop_strings(text: str, stops: list[str], keep: bool, data: st.DataObject) -> None:
    """
    The client has the text up to `cut`, minus what vLLM held back; the rest comes through the scanner in any pieces.
    """
    answer, met = whole_answer(text, stops, keep)
    seen_to = len(answer) if keep or met is None else len(answer) + len(met)
    cut = data.draw(st.integers(0, max(0, seen_to - 1)))
    hold = 0 if keep else max(map(len, stops)) - 1
    sent = text[: max(0, cut - hold)]
    scanner = StopScanner({"stop": stops, "include_stop_str_in_output": keep}, sent, text[len(sent) : cut])
    out, stop, at = sent, None, cut
    while stop is None and at < len(text):
        size = data.draw(st.integers(1, 3))
        piece, stop = scanner.feed(text[at : at + size], finished=at + size >= len(text))
        out, at = out + piece, at + size
    if at == cut == len(text):  # nothing more came but the end
        piece, stop = scanner.feed("", finished=True)
        out += piece
    if met is None:
        assert (out, stop) == (text, None)
    else:
        assert stop in stops
        assert out == answer or keep or len(stops) > 1
        if len(stops) == 1:
            assert (out, stop) == (answer, met)
