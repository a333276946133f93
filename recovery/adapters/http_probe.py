"""
Looks at one server over HTTP: `/health` and `/metrics` at its root, `/v1/models` and one token under `/v1`.

A server that answers promptly is asked everything on one connection. What it does not answer within `PROMPT_S` is waited for
beside the rest, on a connection of its own, so that one endpoint that hangs does not hide the others; one that failed the last look
is asked everything side by side from the start.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass

from recovery.adapters.http_line import BrokenError, Line, RefusedError
from recovery.core.instance import Instance
from recovery.core.looking import Answer, Completion, Look, wants_completion

PROMPT_S = 0.25
STEPS, TOKENS, SLEEP = b"vllm:iteration_tokens_total_count", b"vllm:generation_tokens_total", b"vllm:engine_sleep_state"
SAMPLE = re.compile(rb"(\{[^}\n]*\})?[ \t]+(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(?=\s|$)")
"""What follows a metric's name: its labels, its value."""


@dataclass(frozen=True)
class Target:
    """Where an instance answers and with which key. `root` is None when only its process can be checked."""

    root: str | None
    api_key: str | None = None


class HttpProber:
    """Looks at servers. Lives on one event loop."""

    def __init__(self) -> None:
        self.metrics: dict[str, str] = {}
        """What each instance's server last said at /metrics."""

    async def look(self, row: Instance, target: Target) -> Look:
        """Return what the server of `row.run` says of itself, within `health_check_timeout` (+ the completion's own)."""
        assert row.run is not None
        if target.root is None:
            return Look(run=row.run, http=False)
        started = time.monotonic()
        caller = _Caller(target)
        try:
            return await self._look(row, caller, started)
        finally:
            caller.close()

    async def _look(self, row: Instance, caller: "_Caller", started: float) -> Look:
        limit = row.policy.health_check_timeout
        # A server that answers answers /metrics in milliseconds; waiting longer for it would delay the completion.
        prompt_s = PROMPT_S if row.probe.failures == 0 else 0.0
        asked = (("/health", limit), ("/v1/models", limit), ("/metrics", min(limit, 2.0)))
        health, models, metrics = await caller.all(*asked, prompt_s=prompt_s)
        steps, asleep = _read_metrics(metrics)
        if metrics.kind == "ok":
            self.metrics[row.id] = metrics.body.decode(errors="replace")
        completion: Completion = "skipped"
        why = ""
        answers = health.kind == "ok" and models.kind == "ok"
        if (answers or steps is not None) and not asleep and wants_completion(row, steps):
            completion, why = await self._complete(row, caller, models)
            if completion == "ok":
                steps = _read_metrics(await caller.get("/metrics", min(limit, 2.0)))[0] or steps
            elif completion in ("timeout", "failed"):
                asleep = await self._paused(caller)
        return self._seen(row, (health, models), steps, completion, why, started, asleep=asleep)

    def _seen(
        self,
        row: Instance,
        replies: "tuple[_Reply, _Reply]",
        steps: float | None,
        completion: Completion,
        why: str,
        started: float,
        *,
        asleep: bool,
    ) -> Look:
        assert row.run is not None
        health, models = replies
        locked_out = models.status in (401, 403)
        return Look(
            run=row.run,
            health=health.kind,
            models="ok" if locked_out else models.kind,
            status=health.status if health.kind == "status" else models.status,
            message=_say("/health", health) or _say("/v1/models", models) or why,
            steps=steps,
            asleep=asleep,
            completion="off" if locked_out else completion,
            duration_s=time.monotonic() - started,
        )

    async def _complete(self, row: Instance, caller: "_Caller", models: "_Reply") -> tuple[Completion, str]:
        name = _first_model(models.body)
        if name is None:
            return "off", ""
        limit = row.policy.completion_timeout_s
        reply = await caller.post("/v1/completions", {"model": name, "prompt": [5], "max_tokens": 1, "temperature": 0}, limit)
        if reply.kind == "ok":
            return "ok", ""
        if reply.kind == "status" and reply.status == 503:
            return "overloaded", ""
        if reply.kind == "status" and reply.status is not None and reply.status < 500:
            return "off", ""  # an embedding model has no completions; a client's fault is no sign of ill health
        if reply.kind == "timeout":
            return "timeout", f"a one-token completion got no answer in {limit:g} s"
        return "failed", f"a one-token completion failed: {reply.said}"

    async def _paused(self, caller: "_Caller") -> bool:
        """True when a server in development mode says it is paused; /metrics does not show that (VLLM-FACTS.md, section d)."""
        reply = await caller.get("/is_paused", 1.0)
        return reply.kind == "ok" and b"true" in reply.body.lower()


class _Caller:
    """One look's requests to one server."""

    def __init__(self, target: Target) -> None:
        assert target.root is not None
        self._root = target.root
        self._headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._line = self._new()

    async def all(self, *asked: tuple[str, float], prompt_s: float) -> "list[_Reply]":
        """The answers to GETs of these (path, limit in seconds): in turn while each comes within `prompt_s`, else side by side."""
        tasks: list[asyncio.Task[_Reply]] = []
        for path, limit_s in asked:
            task = asyncio.ensure_future(self.get(path, limit_s))
            tasks.append(task)
            await asyncio.wait((task,), timeout=prompt_s)
            if not task.done():
                self._line = self._new()  # the old one is busy until the answer comes or its time is up
        return list(await asyncio.gather(*tasks))

    async def get(self, path: str, limit_s: float) -> "_Reply":
        return await self._ask("GET", path, limit_s)

    async def post(self, path: str, body: object, limit_s: float) -> "_Reply":
        return await self._ask("POST", path, limit_s, json.dumps(body).encode())

    def close(self) -> None:
        self._line.close()

    def _new(self) -> Line:
        return Line(self._root, self._headers)

    async def _ask(self, method: str, path: str, limit_s: float, body: bytes | None = None) -> "_Reply":
        if not self._line.usable:
            self._line = self._new()
        line = self._line
        try:
            async with asyncio.timeout(limit_s):
                response = await line.ask(method, path, body)
        except TimeoutError:
            return _Reply("timeout", None, b"", limit_s)
        except RefusedError:
            return _Reply("refused", None, b"")
        except BrokenError as error:
            return _Reply("broken", None, str(error).encode()[:200])
        finally:
            if line is not self._line:
                line.close()
        return _Reply("ok" if response.status == 200 else "status", response.status, response.body)


@dataclass(frozen=True)
class _Reply:
    kind: Answer
    status: int | None
    body: bytes
    limit_s: float = 0.0

    @property
    def said(self) -> str:
        return f"status {self.status}" if self.kind == "status" else self.kind


def _say(path: str, reply: _Reply) -> str:
    match reply.kind:
        case "ok":
            return ""
        case "timeout":
            return f"{path} gave no answer in {reply.limit_s:g} s"
        case "refused":
            return f"{path}: connection refused"
        case "status" if reply.status in (401, 403):
            return f"{path}: status {reply.status}; set api_key_env for this model"
        case "status":
            return f"{path}: status {reply.status}"
        case "broken":
            return f"{path}: {reply.body.decode(errors='replace') or 'connection broken'}"


def _read_metrics(reply: _Reply) -> tuple[float | None, bool]:
    if reply.kind != "ok":
        return None, False
    counts = _samples(reply.body, STEPS) or _samples(reply.body, TOKENS)
    asleep = any(b'sleep_state="awake"' in labels and value == 0.0 for labels, value in _samples(reply.body, SLEEP))
    return (sum(value for _, value in counts) if counts else None), asleep


def _samples(body: bytes, name: bytes) -> list[tuple[bytes, float]]:
    """Labels and value of each sample of a metric. A pattern tried at every line costs half a millisecond, a search a fiftieth of that."""
    found = []
    at = body.find(name)
    while at >= 0:
        after = at + len(name)
        if (at == 0 or body[at - 1 : at] == b"\n") and (sample := SAMPLE.match(body, after)):
            found.append((sample[1] or b"", float(sample[2])))
        at = body.find(name, after)
    return found


def _first_model(body: bytes) -> str | None:
    match = re.search(rb'"id"\s*:\s*"((?:[^"\\]|\\.)*)"', body)
    return match[1].decode(errors="replace") if match else None
