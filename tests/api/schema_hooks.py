"""Loaded by schemathesis: keeps requests from waiting for what never comes, and aims half of them at a model that exists."""

from typing import Any

import schemathesis

WAITING = ("/restart", "/stop", "/start")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """No endless streams, no waiting for outcomes (nobody carries commands out here)."""
    query = case.query if isinstance(case.query, dict) else {}
    query.pop("follow", None)
    if case.operation.path.endswith(WAITING) and _may_wait(query.get("timeout", 600)):
        query["timeout"] = 0.1
    case.query = query
    if case.headers is not None:
        case.headers.pop("accept", None)  # a stream of events may be asked for by this header too
    parameters = case.path_parameters
    if isinstance(parameters, dict) and "model_id" in parameters and len(str(parameters["model_id"])) % 2:
        parameters["model_id"] = "vllm"


def _may_wait(value: Any) -> bool:
    """Whether this is a number of seconds above nothing; the coverage phase gives numbers as texts."""
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False
