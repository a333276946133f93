"""
How often each kind of request may come, per model.

The numbers for restart and logs are the specification's; the others keep one careless script from filling the queue.
A limit that cannot be counted (Redis away) refuses with 503: the command could not have been sent either.
"""

import math
from collections.abc import Callable, Coroutine
from typing import Any, Final

from anyio import to_thread
from fastapi import Depends, HTTPException, Request

from recovery.adapters.rate_limits import RateLimits

PER_MINUTE: Final = {"restart": 10, "logs": 30, "start": 10, "stop": 10, "reset": 10, "check": 60, "events": 120, "session": 10}
"""Requests a minute: per model; `session` per address of the client."""


def limited(kind: str) -> Any:
    """A dependency: this kind of request, for the model in the path, within its limit; else 429 with Retry-After."""

    async def check(request: Request) -> None:
        limits: RateLimits = request.app.state.limits
        who = request.path_params.get("model_id") or (request.client.host if request.client else "-")
        wait_s = await to_thread.run_sync(limits.take, kind, str(who)[:80])
        if wait_s is not None:
            said = f"Too many {kind} requests: at most {limits.per_minute[kind]} a minute"
            raise HTTPException(429, said, {"retry-after": str(math.ceil(wait_s))})

    checked: Callable[[Request], Coroutine[Any, Any, None]] = check
    return Depends(checked)
