"""
Lines of a server's log: asked of its host, or the tail in Redis when the host is away.

The host redacts before it answers; nothing here adds or takes away.
"""

from collections.abc import Sequence
from typing import Any

from anyio import to_thread
from fastapi import HTTPException

from recovery.api.schemas import LogView
from recovery.api.state import Shared
from recovery.core.instance import Instance
from recovery.errors import HostAwayError

HOST_S = 10.0
"""How long a host may take to read 10,000 lines and to get them through its queue."""

ABSENT = {
    "never_started": "process never started (logs are created on first start)",
    "permission": "log file permissions issue",
    "no_directory": "log directory not created",
}
"""The specification's causes of "Logs Not Available"."""


def chosen(here: Shared, rows: Sequence[Instance], replica: int | None) -> Instance:
    """Return the replica asked for; without a number the first in trouble, else the first."""
    if replica is None:
        return next((row for row in rows if not row.routable), rows[0])
    found = next((row for row in rows if row.replica == replica), None)
    if found is None:
        numbers = ", ".join(str(row.replica) for row in rows)
        raise HTTPException(404, f"LLM model '{rows[0].model}' has no replica {replica}; there are: {numbers}")
    return found


async def read(here: Shared, row: Instance, lines: int, run: int | None = None, after: str | None = None) -> dict[str, Any]:
    """
    Return what the host tells, with `source` "host"; the tail kept in Redis, with `source` "redis", when it is away.

    Raises `HostAwayError` when there is neither; 404 in the specification's words when there is no log.
    """
    host = row.placement.host
    try:
        if host not in here.board.alive:
            raise HostAwayError(f"host '{host}' has not been heard from, and no lines of this log are kept elsewhere")
        asked = {"instance": row.id, "opts": {"lines": lines, "run": run, "after": after}}
        told = await here.commands.ask_host("recovery.read_logs", asked, host, HOST_S)
    except HostAwayError:
        tail = await to_thread.run_sync(here.store.get, f"logtail:{row.id}", limiter=here.readers)
        if not isinstance(tail, dict) or (run is not None and tail.get("run") != run):
            raise
        return {**tail, "lines": tail["lines"][-lines:], "source": "redis"}
    if "error" in told:
        raise HTTPException(404, _absent(row, str(told["error"]), str(told.get("detail") or "")))
    return {**told, "source": "host", "at": None}


def _absent(row: Instance, kind: str, detail: str) -> str:
    cause = ABSENT.get(kind, "they cannot be read")
    return f"Logs of LLM model '{row.model}' not available: {cause}" + (f" ({detail})" if detail else "")


def log_view(row: Instance, told: dict[str, Any]) -> LogView:
    """Return the specification's answer."""
    return LogView(
        model_id=row.model,
        lines=tuple(told["lines"]),
        total_lines=int(told["total_lines"]),
        returned_lines=len(told["lines"]),
        instance=row.id,
        run=told.get("run"),
        runs=tuple(told.get("runs") or ()),
        source=told["source"],
        at=told.get("at"),
    )
