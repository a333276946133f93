"""
Which streams can be continued on another replica, and how the request that continues one is built.

Exact continuation is by token ids: `/v1/completions` with the prompt's ids and those generated so far
(VLLM-FACTS, e). Where that would give another answer than an uninterrupted run, the client gets an error
event instead; `REASONS` says which and why, and the README prints it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Body = Mapping[str, Any]
Kind = Literal["chat", "completion"]

COMPLETION_MAX_TOKENS = 16
"""vLLM's default for `/v1/completions`; a null means the same there (0.32, completion/protocol.py)."""

REASONS: Mapping[str, str] = {
    "tools": "a tool call may be half sent, and its parser's state is lost with the replica",
    "reasoning": "the reasoning parser's state is lost with the replica",
    "structured": "the grammar (response_format, structured_outputs, guided_*) would start anew in mid-answer",
    "penalties": "penalties count what was generated, and the generated part would count as prompt",
    "logprobs": "chat and completion log probabilities differ in format, and offsets would start anew",
    "choices": "several answers in one stream (n, best_of, beam search, several prompts)",
    "multimodal": "images, audio and embeddings are not in the token ids",
    "seed": "a seeded sampler starts anew, so the rest would differ (temperature 0 is exempt)",
    "echo": "the prompt is part of the answer (echo, suffix, return_prompt_text)",
    "min_tokens": "min_tokens together with stop strings cannot be counted across the cut",
    "bad_words": "bad_words looks back over what was generated",
    "transfer": "KV transfer and per-request extensions (kv_transfer_params, vllm_xargs) belong to one engine",
    "unknown": "the request has a field this front door does not know",
    "no_ids": "the replica sent no token ids, and the model's allow_text_continuation is off",
    "too_long": "the stream is longer than the replay buffer",
    "held_back": "the replica that would go on cannot tell the text held back for a stop string or a split character",
    "no_length": "neither the request nor the replica says how many tokens may follow",
    "model": "the answer has begun, and only a fallback model is left",
    "attempts": "every replica failed",
    "refused": "the replica that would go on refused the request",
}
"""Why a stream that broke after its first event is ended with an error event instead of continued."""


def _set(value: object) -> bool:
    """True for everything but null and false; `logprobs: 0` asks for something."""
    return value is not None and value is not False


def _given(*names: str) -> Callable[[Body], bool]:
    return lambda body: any(body.get(name) for name in names)


def _many(body: Body) -> bool:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1 or bool(body.get("use_beam_search")) or several


def _multimodal(body: Body) -> bool:
    if body.get("prompt_embeds") or body.get("mm_processor_kwargs") or body.get("modalities") or body.get("audio"):
        return True
    messages = body.get("messages")
    contents = (m.get("content") for m in messages if isinstance(m, dict)) if isinstance(messages, list) else ()
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(not isinstance(part, dict) or part.get("type", "text") != "text" for part in parts)


def _reasoning(body: Body) -> bool:
    extra = body.get("chat_template_kwargs")
    thinks = isinstance(extra, dict) and bool(extra.get("enable_thinking") or extra.get("thinking"))
    effort = body.get("reasoning_effort") not in (None, "none")
    return thinks or effort or bool(body.get("thinking_token_budget")) or body.get("include_reasoning") is False


def _structured(body: Body) -> bool:
    wanted = body.get("response_format")
    plain = wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text")
    return not plain or bool(body.get("structured_outputs")) or any(k.startswith("guided_") and body[k] for k in body)


def _penalised(body: Body) -> bool:
    additive = body.get("presence_penalty") or body.get("frequency_penalty")
    return bool(additive) or (body.get("repetition_penalty") or 1) != 1 or bool(body.get("repetition_detection"))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAMPLING = _words(
    "temperature top_p top_k min_p logit_bias stop_token_ids ignore_eos skip_special_tokens spaces_between_special_tokens"
    " allowed_token_ids priority cache_salt user session_id watermarking length_penalty"
)
"""Fields that mean the same in the request that goes on, so they are copied."""
COUNTED = frozenset({"max_tokens", "max_completion_tokens", "min_tokens"})
"""Fields that are reduced by what was generated."""
SPENT = _words(
    "model messages prompt stream stream_options stop include_stop_str_in_output return_token_ids return_tokens_as_token_ids"
    " chat_template chat_template_kwargs add_generation_prompt continue_final_message add_special_tokens documents"
    " truncate_prompt_tokens truncation_side tools functions tool_choice function_call parallel_tool_calls metadata store"
    " service_tier request_id top_logprobs media_io_kwargs reasoning_effort include_reasoning safety_identifier prompt_cache_key"
    " seed n best_of use_beam_search presence_penalty frequency_penalty repetition_penalty response_format logprobs echo"
)
"""Fields that have done their work (they are in the prompt's ids), that the front door sees to, or that the rules below let pass."""
JUDGED = _words(
    "structured_outputs prompt_logprobs logprob_token_ids prompt_embeds mm_processor_kwargs modalities audio thinking_token_budget"
    " repetition_detection suffix return_prompt_text bad_words kv_transfer_params ec_transfer_params vllm_xargs logits_processors"
)
"""Fields that a rule below judges; a harmless value passes."""
KNOWN = SAMPLING | COUNTED | SPENT | JUDGED

RULES: tuple[tuple[str, Callable[[Body], bool]], ...] = (
    ("tools", lambda body: bool(body.get("tools") or body.get("functions")) and body.get("tool_choice") != "none"),
    ("reasoning", _reasoning),
    ("structured", _structured),
    ("penalties", _penalised),
    ("logprobs", lambda body: any(map(_set, map(body.get, ("logprobs", "prompt_logprobs", "logprob_token_ids"))))),
    ("choices", _many),
    ("multimodal", _multimodal),
    ("seed", lambda body: body.get("seed") is not None and body.get("temperature") != 0),
    ("echo", _given("echo", "suffix", "return_prompt_text")),
    ("min_tokens", lambda body: bool(body.get("min_tokens")) and bool(stop_strings(body))),
    ("bad_words", _given("bad_words")),
    ("transfer", _given("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "logits_processors")),
    ("unknown", lambda body: any(_set(body[k]) for k in body if k not in KNOWN and not k.startswith("guided_"))),
)


def why_not(body: Body) -> str | None:
    """Return the key into `REASONS` for which a stream of this request can't be continued by ids, None when it can."""
    return next((reason for reason, applies in RULES if applies(body)), None)


def stop_strings(body: Body) -> tuple[str, ...]:
    """Return the request's stop strings, a single one as one."""
    stop = body.get("stop")
    if isinstance(stop, str):
        return (stop,) if stop else ()
    return tuple(s for s in stop if isinstance(s, str) and s) if isinstance(stop, list) else ()


def expected_choices(body: Body) -> int:
    """Return how many finish reasons a whole answer has: `n`, times the prompts."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    n = body.get("n")
    return prompts * (n if isinstance(n, int) and n > 0 else 1)


def tokens_left(kind: Kind, body: Body, prompt_tokens: int, generated: int, max_model_len: int | None) -> int | None:
    """
    Return how many tokens may still follow, None when nobody knows.

    A chat without a limit may fill the context, but `/v1/completions` would take a missing or null limit for
    16, so the context's length has to be known.
    """
    limit = body.get("max_completion_tokens") if kind == "chat" else None
    if limit is None:
        limit = body.get("max_tokens")
    if limit is None and kind == "completion":
        limit = COMPLETION_MAX_TOKENS
    room = None if max_model_len is None else max_model_len - prompt_tokens - generated
    left = None if limit is None else int(limit) - generated
    if left is None or room is None:
        return room if left is None else left
    return min(left, room)


def next_request(body: Body, prompt_ids: Sequence[int], generated: Sequence[int], left: int) -> dict[str, Any]:
    """
    Return the `/v1/completions` body that goes on exactly where `generated` ends, for `left` more tokens.

    Stop strings are left out: the front door looks for them itself (`StopScanner`), since one may straddle the cut.
    """
    request: dict[str, Any] = {name: body[name] for name in SAMPLING if name in body}
    request |= {"model": body.get("model"), "prompt": [*prompt_ids, *generated], "max_tokens": left}
    request |= {"stream": True, "return_token_ids": True}
    if body.get("min_tokens"):
        request["min_tokens"] = max(0, int(body["min_tokens"]) - len(generated))
    if body.get("stream_options"):
        request["stream_options"] = body["stream_options"]
    return {name: value for name, value in request.items() if value is not None}


def next_text_request(kind: Kind, body: Body, text: str, left: int | None) -> dict[str, Any] | None:
    """
    Return the request that goes on by text, None when its shape does not allow it.

    Inexact: text encodes to other ids than those that made it, and chat templates may strip white space. Only
    where ids are not to be had and the operator allows it.
    """
    request = dict(body)
    if kind == "chat":
        if not isinstance(body.get("messages"), list):
            return None
        request["messages"] = [*body["messages"], {"role": "assistant", "content": text}]
        request |= {"continue_final_message": True, "add_generation_prompt": False}
    elif isinstance(body.get("prompt"), str):
        request["prompt"] = body["prompt"] + text
    else:
        return None
    if left is not None:
        request["max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"] = left
    return request


class StopScanner:
    """
    vLLM's stop strings for the part of a stream that was continued: holds back what may be the start of one.

    One may straddle the cut: `sent` is what the client has, `held` what the replica had generated and held back.
    """

    __slots__ = ("_before", "_hold", "_include", "_stops", "_text")

    def __init__(self, body: Body, sent: str, held: str) -> None:
        self._stops = stop_strings(body)
        self._include = bool(body.get("include_stop_str_in_output"))
        longest = max((len(s) for s in self._stops), default=1) - 1
        self._hold = 0 if self._include else longest
        self._before = sent[len(sent) - longest :] if longest <= len(sent) else sent
        self._text = held

    def feed(self, text: str, finished: bool) -> tuple[str, str | None]:
        """Return the text that may be passed on now, and the stop string that was met."""
        self._text += text
        window, known = self._before + self._text, len(self._before)
        met = [(window.find(s, max(0, known - len(s) + 1)), s) for s in self._stops]
        found = min(((at + len(s), at, s) for at, s in met if at >= 0), default=None)
        if found is not None:
            end, at, stop = found
            return window[known : max(known, end if self._include else at)], stop
        keep = 0 if finished else min(self._hold, len(self._text))
        out, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        self._before = (self._before + out)[-max(1, len(self._before), len(max(self._stops, key=len, default=""))) :]
        return out, None
