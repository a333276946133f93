"""
The tokenizer and the rule: the next token is a pure function of all token ids before it.

- Ids 0 to 255 are single bytes, 256 to 511 are words with a leading space, 512 ends a text (`EOS`).
- Text is encoded byte by byte, one id each, while the rule writes words: text that was generated
  encodes to other ids than those that made it. So a continuation by ids equals an uninterrupted run,
  and a continuation by text does not, as with a real model.
- One token in eight begins a character of two to four bytes, whose bytes are one token each: the text
  of a chunk is empty while a character is pending, and the rule always completes the character.

A test computes what a server must answer:

    prompt = encode("Hello")                          # or encode(render_chat(messages))
    decode(generate(prompt, 64)) == answer.choices[0].text
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

_ONSETS = tuple("bdfghjklmnprstvz")
_RHYMES = ("a", "e", "i", "o", "u", "an", "en", "in", "on", "un", "ar", "er", "ir", "or", "ur", "ai")
WORDS = tuple(f" {onset}{rhyme}" for onset in _ONSETS for rhyme in _RHYMES)
CHARACTERS = ("é", "ж", "→", "漢", "🚀")
"""The characters the rule splits over tokens: 2, 2, 3, 3 and 4 bytes, told apart by their first byte."""

EOS = 512
VOCABULARY = 513
PIECES = tuple(bytes([byte]) for byte in range(256)) + tuple(word.encode() for word in WORDS) + (b"",)

_MASK = (1 << 64) - 1
_ENCODED = tuple(character.encode() for character in CHARACTERS)
_NEXT_BYTE = {whole[:cut]: whole[cut] for whole in _ENCODED for cut in range(1, len(whole))}

State = tuple[int, bytes]
"""All the rule knows of the ids before: their hash, and the bytes of a character begun and not ended."""
START: State = (0x9E3779B97F4A7C15, b"")


def advance(state: State, token: int) -> State:
    """The state after one more id."""
    number, pending = state
    number = (number * 6364136223846793005 + token + 1442695040888963407) & _MASK
    if token > 255:
        return number, b""
    longer = pending + PIECES[token]
    if longer in _NEXT_BYTE:
        return number, longer
    return number, PIECES[token] if PIECES[token] in _NEXT_BYTE else b""


def fold(tokens: Iterable[int], state: State = START) -> State:
    """The state after all of `tokens`."""
    for token in tokens:
        state = advance(state, token)
    return state


def next_token(state: State, eos_every: int = 0, salt: int = 0) -> int:
    """
    The id that follows. About one in `eos_every` tokens ends the text (0: none does).

    `salt` is 0 but for a seeded request and for choices after the first, which differ from the first.
    """
    number, pending = state
    if pending:
        return _NEXT_BYTE[pending]
    number ^= salt
    number = ((number ^ (number >> 33)) * 0xFF51AFD7ED558CCD) & _MASK
    number ^= number >> 33
    if eos_every and (number >> 32) % eos_every == 0:
        return EOS
    if number % 8 == 0:
        return _ENCODED[(number >> 8) % len(_ENCODED)][0]
    return 256 + ((number >> 8) & 255)


def salt_for(seed: int | None, choice: int, position: int) -> int:
    """
    What a seeded request (`temperature` above 0) or a choice after the first mixes in at each position.

    It counts positions from the start of the request, so a seeded request cannot be continued exactly,
    as in vLLM, where the random state starts anew.
    """
    if seed is None and choice == 0:
        return 0
    return (((seed or 0) + 1) * 0xD1B54A32D192ED03 + choice * 0x8CB92BA72F3D8DD7 + position * 0x2545F4914F6CDD1D) & _MASK


def generate(prompt: Sequence[int], count: int, *, eos_every: int = 0, seed: int | None = None, choice: int = 0) -> list[int]:
    """The ids that follow `prompt`: `count` of them, or fewer if an `EOS` (included) comes before."""
    state = fold(prompt)
    made: list[int] = []
    while len(made) < count:
        token = next_token(state, eos_every, salt_for(seed, choice, len(made)))
        made.append(token)
        if token == EOS:
            break
        state = advance(state, token)
    return made


def encode(text: str) -> list[int]:
    """The ids of `text`: its UTF-8 bytes."""
    return list(text.encode("utf-8", "surrogatepass"))


def decode(tokens: Iterable[int]) -> str:
    """The text of `tokens`; bytes that are no character become U+FFFD, a character not ended is left out, as vLLM does."""
    return Decoder().feed(tokens)


class Decoder:
    """Text as the ids arrive; a character is held back until its last byte is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Iterable[int]) -> str:
        return self._decoder.decode(b"".join([PIECES[token] for token in tokens]))


def render_chat(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, continue_final_message: bool = False) -> str:
    """The prompt of a chat: `<|role|>text<|end|>` for each message, then `<|assistant|>`."""
    parts = list(_render_messages(messages))
    if continue_final_message and parts:
        parts[-1] = parts[-1].removesuffix("<|end|>")
    if add_generation_prompt:
        parts.append("<|assistant|>")
    return "".join(parts)


def _render_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        calls = message.get("tool_calls")
        tail = orjson.dumps(calls, option=orjson.OPT_SORT_KEYS).decode() if calls else ""
        yield f"<|{message.get('role', 'user')}|>{content}{tail}<|end|>"
