"""
A Redis stream in memory: entries under rising ids, trimmed at one end.
"""

import math
from dataclasses import dataclass, field
from typing import Any

START = "0-0"


@dataclass
class MemoryStream:
    """Entries, oldest first, under ids of milliseconds and a number."""

    entries: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    last: str = START
    ends: float = math.inf

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def end(self) -> str:
        """The id of the newest entry, the start where there is none."""
        return self.entries[-1][0] if self.entries else START

    def go_on_after(self, lost: "MemoryStream") -> None:
        """Give no id again that another life of this stream has given."""
        self.last = max(self.last, lost.last, key=_parts)

    def add(self, now: float, fields: dict[str, Any], kept: int) -> str:
        """Add one entry and return its id, which is above every earlier one even where the clock went back."""
        milliseconds, number = _parts(self.last)
        at = int(now * 1000)
        self.last = f"{at}-0" if at > milliseconds else f"{milliseconds}-{number + 1}"
        self.entries.append((self.last, fields))
        del self.entries[: max(0, len(self.entries) - kept)]
        return self.last

    def has(self, name: str) -> bool:
        """True when that entry is still there."""
        return any(known == name for known, _ in reversed(self.entries))

    def after(self, name: str, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the first `count` entries above an id."""
        floor = _parts(name)
        return [entry for entry in self.entries if _parts(entry[0]) > floor][: max(0, count)]

    def newest(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the last `count` entries, oldest first."""
        return self.entries[-count:] if count > 0 else []


def _parts(name: str) -> tuple[int, int]:
    milliseconds, _, number = name.partition("-")
    return int(milliseconds), int(number or 0)
