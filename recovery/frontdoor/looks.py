"""
The door's own quick looks at replicas: is one that broke a connection dead, is one that is silent frozen?

The supervisor decides about replicas; this only bridges the seconds until its word arrives, or the time it is away.
"""

import asyncio
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any

import orjson

from recovery.frontdoor.fleet import Endpoint, Fleet
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.view import LEAVING

MAX_ANSWER_BYTES = 32 * 1024 * 1024


class Look(Enum):
    """What one look found."""

    WELL = auto()
    DEAD = auto()
    """Refused, reset, or `/health` not 200: vLLM's 503 there means a dead engine (VLLM-FACTS, d)."""
    SILENT = auto()
    """No answer in time: busy or frozen."""


async def ask(endpoint: Endpoint, method: str, path: str, body: bytes = b"", timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Ask a replica one thing on a connection of its own; `OSError` when it can't be reached or breaks off."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(endpoint.spec.host, endpoint.spec.port, limit=MAX_ANSWER_BYTES)
        try:
            prefix = endpoint.prefix.decode()
            kind = "content-type: application/json\r\n" if body else ""
            start = f"{method} {prefix}{path} HTTP/1.1\r\n{kind}content-length: {len(body)}\r\nconnection: close\r\n"
            writer.write(start.encode() + endpoint.head + b"\r\n" + body)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            lower = head.lower()
            if b"transfer-encoding: chunked" in lower:
                answer = await _chunks(reader)
            elif b"content-length:" in lower:
                length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
                answer = await reader.readexactly(min(length, MAX_ANSWER_BYTES))
            else:
                answer = await reader.read(MAX_ANSWER_BYTES)
            return status, answer
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            raise ConnectionError(f"broke off: {error}") from error
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts, total = [], 0
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        total += size
        if total > MAX_ANSWER_BYTES:
            raise ValueError("answer too large")
        parts.append((await reader.readexactly(size + 2))[:-2])
    return b"".join(parts)


async def look(endpoint: Endpoint, timeout_s: float) -> Look:
    """Ask `/health` once."""
    try:
        status, _ = await ask(endpoint, "GET", "/health", timeout_s=timeout_s)
    except TimeoutError:
        return Look.SILENT
    except OSError:
        return Look.DEAD
    return Look.WELL if status == 200 else Look.DEAD


class Looks:
    """Looks after every replica that gave cause: one watch per replica, until it is well or the view takes it out."""

    def __init__(self, fleet: Fleet, settings: DoorSettings, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._fleet, self._settings, self._spawn = fleet, settings, spawn
        self.froze: Callable[[Endpoint], None] = lambda endpoint: None
        fleet.came_up = self.came_up

    def suspect(self, endpoint: Endpoint, why: str) -> None:
        """Take a replica that broke a connection out of the choice and look at it at once."""
        self._fleet.suspicious(endpoint, why)
        self.watch(endpoint)

    def watch(self, endpoint: Endpoint) -> None:
        """Look at a replica until it is well."""
        if not endpoint.watching:
            endpoint.watching = True
            self._spawn(self._watch(endpoint))

    def sweep(self, now: float) -> None:
        """Begin a watch over each replica that owes answers and has sent nothing for a while, or that only the door can judge."""
        fed = self._fleet.view is None or self._fleet.view.fed
        for endpoint in self._fleet.endpoints():
            if endpoint.watching:
                continue
            quiet = endpoint.busy and now - endpoint.last_byte > 2 * self._settings.probe_interval_s
            orphan = not fed and not endpoint.up and endpoint.spec.state not in LEAVING
            if quiet or orphan:
                self.watch(endpoint)

    async def _watch(self, endpoint: Endpoint) -> None:
        clock, settings = self._fleet.clock, self._settings
        began = clock()
        try:
            while not endpoint.removed:
                asked_at = clock()
                found = await look(endpoint, settings.probe_timeout_s)
                now = clock()
                if endpoint.removed:
                    return
                if found is Look.WELL or (found is Look.SILENT and not endpoint.dead and endpoint.last_byte > max(asked_at, began + 0.1)):
                    self._fleet.found_well(endpoint)
                    return
                if found is Look.DEAD:
                    self._fleet.found_dead(endpoint)
                    self._fleet.suspicious(endpoint, "look failed")
                elif not endpoint.silent:
                    endpoint.silent = True
                    self._fleet.refresh(endpoint)
                if found is Look.SILENT and now - max(endpoint.last_byte, began) >= settings.freeze_after_s:
                    self.froze(endpoint)
                if not endpoint.spec.routable and not endpoint.busy and self._fleet.view is not None and self._fleet.view.fed:
                    return  # the supervisor is on it and says when it is back
                await asyncio.sleep(max(0.0, settings.probe_interval_s - (clock() - asked_at)))
        finally:
            endpoint.watching = False

    def came_up(self, endpoint: Endpoint) -> None:
        """Learn what a replica that has just come up calls its models."""
        self._spawn(self.fetch_cards(endpoint))

    async def fetch_cards(self, endpoint: Endpoint) -> None:
        """Ask a replica for `/v1/models` and keep the cards; aliases that name one instance are left out."""
        try:
            status, answer = await ask(endpoint, "GET", "/v1/models")
            cards = {card["id"]: card for card in orjson.loads(answer)["data"]} if status == 200 else {}
        except (OSError, ValueError, KeyError, TypeError):
            return
        cards = {name: card for name, card in cards.items() if isinstance(name, str) and not name.startswith("inst-")}
        if cards and cards != endpoint.pool.cards:
            endpoint.pool.cards = cards
            self._fleet.index()
