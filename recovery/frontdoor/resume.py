"""How the rest of a cut stream is asked for: everything that has to be known before the request can be built."""

from typing import TYPE_CHECKING

import orjson

from recovery.core.continuation import StopScanner, next_request, next_text_request, stop_strings, tokens_left
from recovery.frontdoor.fleet import Endpoint
from recovery.frontdoor.looks import ask
from recovery.frontdoor.record import Record

if TYPE_CHECKING:
    from recovery.frontdoor.looks import Looks

CONTEXT_IDS = 16
"""Prompt ids put before the answer's when its text is asked for: the first token of a text may lose its space."""
MAX_PENDING = 8
"""Ids looked back over for the last whole character; one has at most 4 bytes, plus tokens without text."""


class CannotResumeError(Exception):
    """The stream cannot be continued; the argument is a key of `continuation.REASONS`."""


class NothingLeftError(Exception):
    """The stream was cut after its last token: only the end is missing."""


async def next_body(record: Record, endpoint: Endpoint, looks: "Looks") -> tuple[bytes, bytes]:
    """
    Return path and body of the request that goes on at `endpoint`.

    Raises `CannotResumeError`, `NothingLeftError`, or `OSError` when the replica could not be asked.
    """
    if record.trouble == "no_ids" or record.prompt is None:
        return _by_text(record, endpoint)
    if record.trouble is not None:
        raise CannotResumeError(record.trouble)
    record.scanner = None
    stops = stop_strings(record.body)
    held = ""
    if stops or record.merged:
        held = await _settle(record, endpoint)
    else:
        record.rewind()
    if stops:
        record.scanner = StopScanner(record.body, record.text.decode("utf-8", "surrogatepass"), held)
    left = _left(record, endpoint)
    if left is None:
        await looks.fetch_cards(endpoint)
        left = _left(record, endpoint)
    if left is None:
        raise CannotResumeError("no_length")
    if left <= 0:
        raise NothingLeftError
    request = next_request(record.body, record.prompt, record.ids, left)
    return b"/v1/completions", orjson.dumps(request)


def _left(record: Record, endpoint: Endpoint) -> int | None:
    return tokens_left(record.kind, record.body, len(record.prompt or ()), len(record.ids), endpoint.pool.max_model_len)


def _by_text(record: Record, endpoint: Endpoint) -> tuple[bytes, bytes]:
    if record.trouble not in (None, "no_ids"):
        raise CannotResumeError(record.trouble or "no_ids")
    if not endpoint.pool.settings.allow_text_continuation:
        raise CannotResumeError("no_ids")
    text = record.text.decode("utf-8", "surrogatepass")
    left = tokens_left(record.kind, record.body, 0, record.events, None)
    if left is not None and left <= 0:
        raise NothingLeftError
    request = next_text_request(record.kind, record.body, text, left)
    if request is None:
        raise CannotResumeError("no_ids")
    path = b"/v1/chat/completions" if record.kind == "chat" else b"/v1/completions"
    return path, orjson.dumps(request)


async def _settle(record: Record, endpoint: Endpoint) -> str:
    """
    Cut the ids at the last whole character and return the text of theirs that the client has not been sent.

    vLLM holds text back that may begin a stop string, and the last of several ids in one event may begin a
    character; only the tokenizer knows, so a replica is asked.
    """
    sent = record.text.decode("utf-8", "surrogatepass")
    context = [*(record.prompt or ()), *record.ids[: record.base]][-CONTEXT_IDS:]
    before = await _text(record, endpoint, context)
    best: tuple[int, str] | None = None
    for end in range(len(record.ids), max(record.base - 1, len(record.ids) - MAX_PENDING - 1), -1):
        whole = await _text(record, endpoint, [*context, *record.ids[record.base : end]])
        text = whole[len(before) :]
        if not whole.startswith(before) or (best is not None and text != best[1]):
            break  # one id fewer is one character fewer
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            best = (end, text)  # ids that add no text belong to a character that is pending, or to none
    if best is None or not best[1].startswith(sent) or (record.wants_ids and best[0] < record.clean):
        raise CannotResumeError("held_back")
    record.unsent, record.clean = list(record.ids[record.clean : best[0]]), best[0]
    record.rewind()
    return best[1][len(sent) :]


async def _text(record: Record, endpoint: Endpoint, ids: list[int]) -> str:
    if not ids:
        return ""
    request = orjson.dumps({"model": record.body.get("model"), "tokens": ids})
    status, answer = await ask(endpoint, "POST", "/detokenize", request)
    if status >= 500:
        raise ConnectionError(f"/detokenize: {status}")
    try:
        text = orjson.loads(answer)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise CannotResumeError("held_back") from error
    if status != 200 or not isinstance(text, str):
        raise CannotResumeError("held_back")
    return text
