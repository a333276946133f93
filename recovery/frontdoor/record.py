"""What a stream has sent so far, kept so that it can be continued on another replica."""

from array import array
from typing import Any

from recovery.core.continuation import Body, Kind, StopScanner, stop_strings, why_not

_FREE = {"role", "content", "refusal", "audio", "annotations"}
"""Parts of a chat's delta that are no parser's work."""


class Record:
    """
    The ids of one stream, as much of its text as is needed beside them, and whether it may be continued.

    `trouble` is None while it may, else a key of `REASONS`.
    `clean` is how many ids end at a whole character that the client has: ids after it belong to a character that is
    still pending, and are generated again.
    """

    __slots__ = (
        "_exact", "_limit", "_room", "base", "body", "clean", "count", "created", "events", "id", "ids", "kind", "merged", "model",
        "prompt", "scanner", "text", "trouble", "unsent", "wants_ids",
    )  # fmt: skip

    def __init__(self, kind: Kind, body: Body, limit: int, reasoning: bool) -> None:
        self.kind, self.body, self._limit, self._room = kind, body, limit, limit
        self.wants_ids = bool(body.get("return_token_ids"))
        self.trouble = "reasoning" if reasoning else why_not(body)
        self.prompt: array[int] | None = None
        self.ids: array[int] = array("I")
        self.text = bytearray()
        self.base = 0
        """How many ids lie before the first of `text`: what is known to be whole needs no text."""
        self._exact = not stop_strings(body)
        self.clean = self.count = self.events = 0
        self.merged = False
        """The last event with text had several ids: the last of them may begin a character the text does not show."""
        self.id: str | None = None
        self.created: int | None = None
        self.model: str | None = None
        self.unsent: list[int] = []
        """Ids kept across the cut that a client which asked for ids has not been given."""
        self.scanner: StopScanner | None = None

    @property
    def size(self) -> int:
        """Ids kept."""
        return len(self.ids) + len(self.prompt or ())

    @property
    def recording(self) -> bool:
        """True while there is a use in noting more: without ids, the text may still do."""
        return self.trouble is None or self.trouble == "no_ids"

    def usage(self, details: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer, whatever the last replica counted as prompt."""
        prompt = len(self.prompt or ())
        own = {"prompt_tokens": prompt, "completion_tokens": self.count, "total_tokens": prompt + self.count}
        return {**details, **own}

    def open(self, event: dict[str, Any], prompt: list[int] | None) -> None:
        """Note what the first event says of the answer."""
        self.id, self.created, self.model = event.get("id"), event.get("created"), event.get("model")
        if prompt is not None:
            self.prompt = array("I", prompt)
            self._room = self._limit - len(prompt)

    def note(self, ids: list[int] | None, text: str) -> None:
        """Note one event's ids and the text passed on with them."""
        if ids:
            self.ids.extend(ids)
            self.count += len(ids)
        elif text and ids is None and self.trouble is None:
            self.trouble = "no_ids"
        if text:
            self.events += 1
            self.clean = len(self.ids)
            self.merged = ids is not None and len(ids) > 1
            if self._exact and ids is not None and not self.merged:  # one id and its text: whole up to here
                self.base = self.clean
                self.text.clear()
            else:
                self.text += text.encode("utf-8", "surrogatepass")
        if len(self.ids) > self._room or len(self.text) > 16 * self._limit:
            self.forget("too_long")

    def watch_delta(self, delta: dict[str, Any]) -> bool:
        """True when a chat's delta carries anything; a parser's part in it ends the record."""
        carries = False
        for name, value in delta.items():
            if value and name != "role":
                carries = True
                if name not in _FREE and self.trouble is None:
                    self.forget("tools" if "call" in name else "reasoning")
        return carries

    def rewind(self) -> None:
        """Go back to the last whole character the client has: what came after is generated again."""
        self.count -= len(self.ids) - self.clean
        del self.ids[self.clean :]
        self.merged = False

    def forget(self, trouble: str) -> None:
        """Give up on continuing this stream, for a reason."""
        self.trouble = trouble
        self.ids, self.text, self.clean, self.base = array("I"), bytearray(), 0, 0
