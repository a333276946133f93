"""A store for the front door: what it can no longer read it knows as it last was, so that an upgrade takes no model away."""

from collections.abc import Sequence
from typing import Any

from recovery.adapters.redis_store import RedisStore
from recovery.core.change import Change
from recovery.core.instance import Instance
from recovery.core.states import State


class LastKnownStore(RedisStore):
    """
    Adds to the rows that can be read those that could be until a newer part wrote them.

    State, run and address of these follow the stream of changes, whose entries every version can read.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._known: dict[str, Instance] = {}

    def load_many(self, ids: Sequence[str]) -> tuple[Instance, ...]:
        """Return those rows that exist: read, or else as they were last known."""
        found, refused = self._read(ids)
        rows = {row.id: row for row in found}
        self._known |= rows
        kept = {name: self._known[name] for name in refused if name in self._known}
        return tuple((rows | kept)[name] for name in ids if name in rows or name in kept)

    def follow(self, position: str, block_s: float) -> tuple[Change, ...] | None:
        """Return the changes after `position`, and learn from them."""
        changes = super().follow(position, block_s)
        for change in changes or ():
            row = self._known.get(change.instance)
            if change.state == "deleted":
                self._known.pop(change.instance, None)
            elif row is not None and change.state in set(State):
                told = {"state": State(change.state), "run": change.run, "base_url": change.base_url}
                self._known[change.instance] = row.model_copy(update=told)
        return changes
