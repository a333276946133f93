"""Loaded by schemathesis: keeps requests from waiting for what never comes, and aims half of them at a model that exists."""

from typing import Any

import schemathesis

WAITING = ("/restart", "/stop", "/start")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """No endless streams, no waiting for outcomes (nobody carries commands out here)."""
    query = case.query if isinstance(case.query, dict) else {}
    query.pop("follow", None)
    if case.operation.path.endswith(WAITING) and "timeout" not in query:
        query["timeout"] = 0.1
    if case.operation.path.endswith(WAITING) and isinstance(query.get("timeout"), int | float) and query["timeout"] > 0:
        query["timeout"] = 0.1
    case.query = query
    if isinstance(case.headers, dict | object) and case.headers is not None:
        case.headers.pop("accept", None)  # a stream of events may be asked for by this header too
    parameters = case.path_parameters
    if isinstance(parameters, dict) and "model_id" in parameters and len(str(parameters["model_id"])) % 2:
        parameters["model_id"] = "vllm"
