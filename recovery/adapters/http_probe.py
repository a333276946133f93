"""
Looks at one server over HTTP: `/health` and `/metrics` at its root, `/v1/models` and one token under `/v1`.

One httpx client per instance: a pool shared by fifty looks in flight scans itself (3.7 ms CPU a probe), one of
its own costs 0.55 ms (issue of measurements in CELERY-FACTS.md's sister run).
"""

import asyncio
import re
import ssl
import time
from dataclasses import dataclass

import httpx

from recovery.core.instance import Instance
from recovery.core.looking import Answer, Completion, Look, wants_completion

STEPS = re.compile(rb"^vllm:iteration_tokens_total_count(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.M)
TOKENS = re.compile(rb"^vllm:generation_tokens_total(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.M)
AWAKE = re.compile(rb'^vllm:engine_sleep_state\{[^}]*sleep_state="awake"[^}]*\}\s+0(?:\.0)?\s*$', re.M)
_NO_TLS_CHECK = ssl.create_default_context()


@dataclass(frozen=True)
class Target:
    """Where an instance answers and with which key. `root` is None when only its process can be checked."""

    root: str | None
    api_key: str | None = None


class HttpProber:
    """Looks at servers, each through a client of its own. Lives on one event loop."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str], httpx.AsyncClient] = {}
        self.metrics: dict[str, str] = {}
        """What each instance's server last said at /metrics."""

    async def look(self, row: Instance, target: Target) -> Look:
        """Return what the server of `row.run` says of itself, within `health_check_timeout` (+ the completion's own)."""
        assert row.run is not None
        if target.root is None:
            return Look(run=row.run, http=False)
        started = time.monotonic()
        client = self._client(row.id, target)
        limit = row.policy.health_check_timeout
        # A server that answers answers /metrics in milliseconds; waiting longer for it would delay the completion.
        health, models, metrics = await asyncio.gather(
            self._get(client, "/health", limit), self._get(client, "/v1/models", limit), self._get(client, "/metrics", min(limit, 2.0))
        )
        steps, asleep = _read_metrics(metrics)
        if metrics.kind == "ok":
            self.metrics[row.id] = metrics.body.decode(errors="replace")
        completion: Completion = "skipped"
        why = ""
        answers = health.kind == "ok" and models.kind == "ok"
        if (answers or steps is not None) and not asleep and wants_completion(row, steps):
            completion, why = await self._complete(row, client, models)
            if completion == "ok":
                steps = _read_metrics(await self._get(client, "/metrics", min(limit, 2.0)))[0] or steps
            elif completion in ("timeout", "failed"):
                asleep = await self._paused(client)
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

    async def forget(self, instance_id: str) -> None:
        """Close the clients of an instance that is gone."""
        for key in [key for key in self._clients if key[0] == instance_id]:
            await self._clients.pop(key).aclose()
        self.metrics.pop(instance_id, None)

    def _client(self, instance_id: str, target: Target) -> httpx.AsyncClient:
        assert target.root is not None
        key = (instance_id, target.root)
        if key not in self._clients:
            headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
            self._clients[key] = httpx.AsyncClient(
                base_url=target.root,
                headers=headers,
                verify=_NO_TLS_CHECK,
                limits=httpx.Limits(max_keepalive_connections=0),
                trust_env=False,
            )
        return self._clients[key]

    async def _get(self, client: httpx.AsyncClient, path: str, limit_s: float) -> "_Reply":
        return await self._ask(client, "GET", path, limit_s)

    async def _ask(self, client: httpx.AsyncClient, method: str, path: str, limit_s: float, body: object = None) -> "_Reply":
        try:
            async with asyncio.timeout(limit_s):
                response = await client.request(method, path, json=body, timeout=limit_s)
        except (TimeoutError, httpx.TimeoutException):
            return _Reply("timeout", None, b"", limit_s)
        except httpx.ConnectError:
            return _Reply("refused", None, b"")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return _Reply("broken", None, str(error).encode()[:200])
        kind: Answer = "ok" if response.status_code == 200 else "status"
        return _Reply(kind, response.status_code, response.content[:4_000_000])

    async def _complete(self, row: Instance, client: httpx.AsyncClient, models: "_Reply") -> tuple[Completion, str]:
        name = _first_model(models.body)
        if name is None:
            return "off", ""
        limit = row.policy.completion_timeout_s
        reply = await self._ask(client, "POST", "/v1/completions", limit, {"model": name, "prompt": [5], "max_tokens": 1, "temperature": 0})
        if reply.kind == "ok":
            return "ok", ""
        if reply.kind == "status" and reply.status == 503:
            return "overloaded", ""
        if reply.kind == "status" and reply.status is not None and reply.status < 500:
            return "off", ""  # an embedding model has no completions; a client's fault is no sign of ill health
        if reply.kind == "timeout":
            return "timeout", f"a one-token completion got no answer in {limit:g} s"
        return "failed", f"a one-token completion failed: {reply.said}"

    async def _paused(self, client: httpx.AsyncClient) -> bool:
        """True when a server in development mode says it is paused; /metrics does not show that (VLLM-FACTS.md, section d)."""
        reply = await self._get(client, "/is_paused", 1.0)
        return reply.kind == "ok" and b"true" in reply.body.lower()


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
    found = STEPS.findall(reply.body) or TOKENS.findall(reply.body)
    return (sum(float(value) for value in found) if found else None), bool(AWAKE.search(reply.body))


def _first_model(body: bytes) -> str | None:
    match = re.search(rb'"id"\s*:\s*"((?:[^"\\]|\\.)*)"', body)
    return match[1].decode(errors="replace") if match else None
