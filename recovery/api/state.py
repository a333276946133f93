"""What the endpoints of one API process share, and the way they reach it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, HTTPException, Path, Request

from recovery.api.board import Board
from recovery.api.commands import Commands
from recovery.api.schemas import MODEL_PATTERN
from recovery.core.instance import Instance
from recovery.ports import Store

MAX_STREAMS = 200
"""Open event streams of one process. Each costs a few kilobytes and a look every few seconds."""
READERS = 16
"""Threads that reads of history and logs may hold, so that a slow Redis leaves the others free."""


@dataclass
class Shared:
    """One per process."""

    store: Store
    board: Board
    commands: Commands
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(READERS))
    streams: int = 0

    async def read_rows(self, model: str) -> tuple[Instance, ...]:
        """Return a model's rows as they are in Redis now, for an answer that must not be a moment behind."""
        ids = [row.id for row in self.board.rows_of(model)]
        return await to_thread.run_sync(self.store.load_many, ids, limiter=self.readers)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count an open stream; 503 when there are too many."""
        if self.streams >= MAX_STREAMS:
            raise HTTPException(503, f"Too many open streams: at most {MAX_STREAMS}", {"retry-after": "10"})
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1


def shared(request: Request) -> Shared:
    """The shared state of this process."""
    found: Shared = request.app.state.shared
    return found


Here = Annotated[Shared, Depends(shared)]
ModelId = Annotated[str, Path(description="id of a model", pattern=MODEL_PATTERN, max_length=64, examples=["vllm"])]
