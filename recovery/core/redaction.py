"""
Takes secrets and prompts out of log lines before they leave the host.

Five layers: secrets this host knows by value (`literals`), private keys, tokens that tell themselves by their form
(`hf_…`, `sk-…`, cloud keys, JWTs), values beside a telling name (`--api-key X`, `HF_TOKEN=X`, `'password': 'X'`,
`Authorization: …`, `scheme://user:pass@host`), prompts and outputs on vLLM's request lines, and the operator's own
patterns. What is caught and what is not stands as a corpus in `tests/core/test_redaction.py`: a secret without a form
and without a name beside it is *not* caught, unless it is a literal or the operator describes it.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from recovery.core.redaction_rules import BEGIN_KEY, BESIDE_A_NAME, END_KEY, FORM, KEY_BODY, PROMPT_TRIGGERS, PROMPTS, SECRET_NAME, TRIGGERS
from recovery.errors import ConfigError

MARK: Final = "[redacted]"
_KEEP_NAME: Final = rf"\1{MARK}"
MIN_LITERAL: Final = 8
"""Shorter values would also hide ordinary words and numbers."""
MAX_KEY_LINE: Final = 200
"""A longer line is no part of a private key: whatever began one was cut off."""


class RedactionConfig(BaseModel):
    """What to hide beside what is always hidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patterns: tuple[str, ...] = Field((), description="the operator's own regular expressions")
    prompts: bool = Field(True, description="hide prompts and outputs in vLLM's request log lines")
    literals: tuple[str, ...] = Field((), repr=False, description="secrets known by value (the server's environment)")


class _Rules:
    """A configuration, compiled."""

    def __init__(self, config: RedactionConfig) -> None:
        self.own = tuple(_compiled(pattern) for pattern in config.patterns)
        literals = sorted({each for each in config.literals if len(each) >= MIN_LITERAL}, key=len, reverse=True)
        self.literals = re.compile("|".join(map(re.escape, literals))) if literals else None
        self.prompts = config.prompts


class Redactor:
    """Redacts line after line; remembers only whether it is inside a private key."""

    def __init__(self, config: RedactionConfig) -> None:
        """Raise `ConfigError` when one of the operator's patterns is not a regular expression."""
        self._rules = _rules(config)
        self._in_key = False

    def line(self, text: str) -> str:
        """Return one line without its secrets; a line end stays as it is."""
        rules = self._rules
        if self._in_key or "-----" in text or 59 < len(text) < MAX_KEY_LINE:
            text = self._without_key(text)
        if rules.literals:
            text = rules.literals.sub(MARK, text)
        low = text.lower()
        if any(word in low for word in TRIGGERS):
            text = FORM.sub(MARK, text)
            for pattern in BESIDE_A_NAME:
                text = pattern.sub(_KEEP_NAME, text)
        if rules.prompts and any(word in low for word in PROMPT_TRIGGERS):
            for pattern in PROMPTS:
                text = pattern.sub(_KEEP_NAME, text)
        for own in rules.own:
            text = own.sub(MARK, text)
        return text

    def _without_key(self, text: str) -> str:
        """Private keys: on one line, over several, or from the middle of one, where a tail may begin."""
        end = text[len(text.rstrip("\r\n")) :]
        if self._in_key:
            if found := END_KEY.search(text):
                self._in_key = False
                return MARK + text[found.end() :]
            if len(text) < MAX_KEY_LINE:
                return MARK + end
            self._in_key = False
        if begun := BEGIN_KEY.search(text):
            if closed := END_KEY.search(text, begun.end()):
                return text[: begun.start()] + MARK + text[closed.end() :]
            self._in_key = True
            return text[: begun.start()] + MARK + end
        return MARK + end if KEY_BODY.match(text) else text


def redact_lines(lines: Iterable[str], config: RedactionConfig) -> list[str]:
    """Return the lines without secrets, in their order, each with the line end it had."""
    redactor = Redactor(config)
    return [redactor.line(line) for line in lines]


def redact_text(text: str, config: RedactionConfig | None = None) -> str:
    """Return a text of one or more lines without secrets."""
    return "".join(redact_lines(text.splitlines(keepends=True), config or RedactionConfig()))


def secret_values(environment: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return the values of the variables whose names say that they are secret: `literals` of a `RedactionConfig`."""
    return tuple(sorted({value for name, value in environment if len(value) >= MIN_LITERAL and SECRET_NAME.search(name)}))


@lru_cache(maxsize=64)
def _rules(config: RedactionConfig) -> _Rules:
    return _Rules(config)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"cannot use redact pattern {pattern!r}: {error}") from None
