"""Real simulators behind a real front door, in processes of their own, and clients that check every token."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from recovery.simulator.tokens import decode, encode, generate, render_chat
from tests.helpers import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Part:
    """A process in a session of its own, ended with everything it started."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, *arguments: str) -> None:
        with self.out.open("ab") as out:
            command = [sys.executable, "-m", *arguments]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal to the process and all it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(PATIENCE_S)

    def ended(self) -> int:
        """The exit code, once it has ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)


class Sim(Part):
    """One simulated vLLM on a port that it keeps over restarts."""

    def __init__(self, folder: Path, name: str, *arguments: str, model: str = "m") -> None:
        super().__init__(folder / f"{name}.out")
        self.name, self.model, self.port, self.arguments = name, model, free_port(), arguments

    def start(self, *more: str) -> None:
        """Start without waiting."""
        base = ("--port", str(self.port), "--served-model-name", self.model, "--admin", "--engine", "none", "--disable-uvicorn-access-log")
        self.spawn("recovery.simulator", *base, "--default-max-tokens", "100000", *self.arguments, *more)

    def ready(self) -> "Sim":
        wait_until(lambda: self.get("/health"), 200, within_s=PATIENCE_S)
        return self

    def get(self, path: str) -> int:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5, trust_env=False).status_code

    def fault(self, **values: Any) -> None:
        """Set lasting faults while it runs."""
        httpx.post(f"http://127.0.0.1:{self.port}/admin/fault", json=values, timeout=30, trust_env=False).raise_for_status()

    def served(self) -> int:
        """Requests it has been given to generate for."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30, trust_env=False).text
        return int(sum(s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == "vllm:request_success_total"))

    def row(self, **more: Any) -> dict[str, Any]:
        """What the view says of it."""
        return {"instance": self.name, "model": self.model, "host": "127.0.0.1", "port": self.port, **more}


class Door(Part):
    """A front door with its view in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "door.out")
        self.folder = folder
        self.view, self.reports = folder / "view.json", folder / "reports.jsonl"
        self.port = self.metrics_port = 0

    def tell(self, models: list[dict[str, Any]]) -> None:
        """Change what the door is told of the fleet, in one rename."""
        new = self.view.with_suffix(".new")
        new.write_text(json.dumps({"models": models}))
        new.replace(self.view)

    def start(self, **settings: Any) -> "Door":
        before = self.text.count("front door on") if self.out.exists() else 0
        given = {"port": 0, "metrics_port": 0, **settings}
        flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.spawn("recovery.frontdoor", "--view", str(self.view), "--reports", str(self.reports), *flags)
        wait_until(lambda: self.text.count("front door on") > before, within_s=PATIENCE_S)
        line = [line for line in self.text.splitlines() if line.startswith("front door on")][-1]
        words = line.replace(",", "").split()
        self.port, self.metrics_port = int(words[3]), int(words[-1])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Reports of one kind so far."""
        rows = [json.loads(line) for line in self.reports.read_text().splitlines()] if self.reports.exists() else []
        return [row["event"] for row in rows if "event" in row and row["event"]["kind"] == kind]

    def activity(self) -> list[dict[str, Any]]:
        """All activity rows reported so far, oldest first."""
        rows = [json.loads(line) for line in self.reports.read_text().splitlines()] if self.reports.exists() else []
        return [one for row in rows for one in row.get("activity", [])]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30, trust_env=False).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


class World:
    """One test's processes; all gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Part] = []

    def sims(self, count: int, *arguments: str, model: str = "m") -> list[Sim]:
        """Simulators, ready."""
        new = [Sim(self.folder, f"{model}-{i}", *arguments, model=model) for i in range(count)]
        self.parts += new
        for sim in new:
            sim.start()
        return [sim.ready() for sim in new]

    def door(self, sims: Iterable[Sim], *, model: dict[str, Any] | None = None, **settings: Any) -> Door:
        """A door in front of one model's simulators."""
        door = Door(self.folder)
        self.parts.append(door)
        sims = list(sims)
        door.tell([{"name": sims[0].model, "settings": model or {}, "replicas": [sim.row() for sim in sims]}])
        return door.start(**settings)

    def close(self) -> None:
        for part in self.parts:
            part.kill()


def expected_text(prompt: str, tokens: int) -> str:
    """What a whole completion of `prompt` must say."""
    return decode(generate(encode(prompt), tokens))


def expected_chat(message: str, tokens: int) -> str:
    """What a whole answer to one user message must say."""
    return decode(generate(encode(render_chat([{"role": "user", "content": message}])), tokens))


@dataclass
class Outcome:
    """One request as its client saw it."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    error: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error and self.finish in ("length", "stop")


async def sse(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], seen: Callable[[Outcome], None] | None = None) -> Outcome:
    """Send a streaming request and gather what comes, however it ends."""
    outcome = Outcome()
    try:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            outcome.status, outcome.headers = response.status_code, dict(response.headers)
            if response.status_code != 200:
                outcome.error = (await response.aread()).decode()
                return outcome
            async for data in sse(response):
                if data == "[DONE]":
                    outcome.done = True
                    continue
                event = json.loads(data)
                outcome.events.append(event)
                if "error" in event:
                    outcome.error = json.dumps(event["error"])
                if event.get("usage"):
                    outcome.usage = event["usage"]
                for choice in event.get("choices", ()):
                    outcome.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    outcome.finish = choice.get("finish_reason") or outcome.finish
                if seen is not None:
                    seen(outcome)
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def whole(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Outcome:
    """Send a request that does not stream."""
    outcome = Outcome()
    try:
        response = await client.post(path, json=body)
        outcome.status, outcome.headers = response.status_code, dict(response.headers)
        if response.status_code == 200:
            answer = response.json()
            choice = answer["choices"][0]
            outcome.text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
            outcome.finish, outcome.usage = choice["finish_reason"], answer["usage"]
        else:
            outcome.error = response.text
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


class Load:
    """Sixteen clients that ask one thing after another, each with prompts of its own, until told to stop."""

    def __init__(self, door: Door, *, streaming: bool, chat: bool, tokens: int, timeout_s: float = PATIENCE_S, clients: int = 16) -> None:
        self.door, self.streaming, self.chat, self.tokens = door, streaming, chat, tokens
        self.timeout_s, self.clients = timeout_s, clients
        self.outcomes: list[tuple[str, Outcome]] = []
        self.begun = 0
        self.stopping = False

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.door.url, timeout=self.timeout_s, trust_env=False) as client:
            turn = 0
            while not self.stopping or turn == 0:
                prompt = f"client {number} turn {turn}"
                turn += 1
                path, body = self.ask(prompt)
                self.begun += 1
                self.outcomes.append((prompt, await (stream if self.streaming else whole)(client, path, body)))

    def ask(self, prompt: str) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": "m", "max_tokens": self.tokens, "temperature": 0}
        if self.chat:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
        return "/v1/completions", {**body, "prompt": prompt}

    def failures(self) -> list[tuple[str, Outcome]]:
        """Every request that failed or whose text is not exactly what an uninterrupted run gives."""
        expected = expected_chat if self.chat else expected_text
        return [(p, o) for p, o in self.outcomes if not o.whole or o.text != expected(p, self.tokens)]

    async def finished(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        target = len(self.outcomes) + count
        while len(self.outcomes) < target:  # the test's own time-out is the deadline
            await asyncio.sleep(0.02)
