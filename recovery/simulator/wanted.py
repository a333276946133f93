"""What a completion or chat request asks for, checked as vLLM checks it."""

from dataclasses import dataclass
from typing import Any

from recovery.simulator.tokens import VOCABULARY, encode, render_chat

Json = dict[str, Any]
TOOL_TOKENS = 8
"""Length of the argument of a tool call."""


class ApiError(Exception):
    """An answer that is an error, in vLLM's shape."""

    def __init__(self, code: int, message: str, kind: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        names = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
        self.body: Json = {"error": {"message": message, "type": kind or names.get(code, "Error"), "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A validated request."""

    chat: bool
    model: str
    prompts: list[list[int]]
    n: int
    max_tokens: int
    stream: bool
    include_usage: bool
    usage_each: bool
    token_ids: bool
    echo: bool
    stops: tuple[str, ...]
    keep_stop: bool
    tool: str
    tool_field: str
    engine: Json


def _fields(body: Json, name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if (kind is int and isinstance(value, bool)) or not isinstance(value, kind):
        raise ApiError(400, f"Input should be a valid {kind.__name__}", param=name)
    return value


def _prompts(body: Json) -> list[list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return [encode(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) and item for item in prompt):
            return [encode(item) for item in prompt]
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in prompt):
            return prompt
    raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")


def _messages(body: Json) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, "Field required: messages", param="messages")
    generate, go_on = body.get("add_generation_prompt", True), body.get("continue_final_message", False)
    if generate and go_on:
        raise ApiError(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    return encode(render_chat(messages, add_generation_prompt=generate, continue_final_message=go_on))


def _tool(body: Json) -> tuple[str, str]:
    """The function to call and the argument to fill, if this request gets a tool call: `auto` calls once per user message."""
    tools, choice = body.get("tools") or [], body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return "", ""
    functions: list[Json] = [tool.get("function", {}) for tool in tools if isinstance(tool, dict)]
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name")
        functions = [function for function in functions if function.get("name") == name]
        if not functions:
            raise ApiError(400, "Tool choice refers to a tool that is not in `tools`.", param="tool_choice")
    elif choice == "auto" and body["messages"][-1].get("role") == "tool":
        return "", ""
    properties = functions[0].get("parameters", {}).get("properties") or {"text": {}}
    return str(functions[0].get("name", "")), next(iter(properties))


def read_request(body: Json, chat: bool, max_model_len: int, default_max_tokens: int) -> Wanted:
    """What the request wants; `ApiError` 400 with vLLM's words where it makes no sense."""
    prompts = [_messages(body)] if chat else _prompts(body)
    for prompt in prompts:
        bad = next((token for token in prompt if not 0 <= token < VOCABULARY), None)
        if bad is not None:
            raise ApiError(400, f"Token id {bad} is out of vocabulary", param="prompt")
    longest = max(map(len, prompts))
    room = max_model_len - longest
    limit = f"This model's maximum context length is {max_model_len} tokens."
    if room < 1:
        raise ApiError(400, f"{limit} However, your request has {longest} input tokens. Please reduce the length of the input messages.")
    asked = _fields(body, "max_completion_tokens", int, None) if chat else None
    asked = asked if asked is not None else _fields(body, "max_tokens", int, None)
    if asked is not None and asked < 1:
        raise ApiError(400, f"max_tokens must be at least 1, got {asked}.", param="max_tokens")
    if asked is not None and asked > room:
        raise ApiError(400, f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. {limit}", param="max_tokens")
    stop = body.get("stop") or []
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    stream = _fields(body, "stream", bool, False)
    stream_options = body.get("stream_options") or {}
    if stream_options and not stream:
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    n = _fields(body, "n", int, 1)
    if n < 1:
        raise ApiError(400, f"n must be at least 1, got {n}.", param="n")
    tool, tool_field = _tool(body) if chat else ("", "")
    default = default_max_tokens if chat else 16
    max_tokens = min(room, asked if asked is not None else default, TOOL_TOKENS if tool else room)
    seeded = body.get("seed") is not None and body.get("temperature") != 0
    stop_ids = [token for token in body.get("stop_token_ids") or [] if type(token) is int]
    engine: Json = {"max_tokens": max_tokens, "ignore_eos": bool(body.get("ignore_eos")), "stop_ids": stop_ids}
    if seeded:
        engine["seed"] = _fields(body, "seed", int, 0)
    return Wanted(
        chat=chat,
        model=str(body.get("model") or ""),
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        stream=stream,
        include_usage=bool(stream_options.get("include_usage")),
        usage_each=bool(stream_options.get("continuous_usage_stats")),
        token_ids=bool(body.get("return_token_ids")),
        echo=bool(body.get("echo")) and not chat,
        stops=tuple(item for item in stops if isinstance(item, str) and item),
        keep_stop=bool(body.get("include_stop_str_in_output")),
        tool=tool,
        tool_field=tool_field,
        engine=engine,
    )
