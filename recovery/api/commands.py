"""
Sends an operator's command through its public Celery task and watches the rows for the outcome.

Waiting holds no thread: the answer of the task is looked for in short steps through a small limiter of its own, the
outcome is read off the board. Killing this process in the middle changes nothing about the command: it lies in the row.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread

from recovery.api.board import Board
from recovery.api.outcome import Asked, Outcome, outcome
from recovery.api.tasks import TaskQueue
from recovery.core.commanding import Verb
from recovery.core.instance import Instance
from recovery.errors import ConflictError, HostAwayError, StoreUnavailableError, UnknownModelError
from recovery.ports import Store
from recovery.queues import CONTROL_QUEUE, host_queue

ANSWER_S = 10.0
"""How long a control worker may take to answer; it takes milliseconds when one is there."""
QUICK_S = 1.5
"""The same for `?wait=false`, whose point is not to wait: a refusal that comes in this time is still told."""
STEPS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.25)
"""Between two looks for an answer, the last for ever."""
REMEMBER_S = 86_400.0
LOOKERS = 8
"""Threads that looks for answers may hold at once; a frozen Redis holds one of them for its time-out."""
RECHECK_S = 2.0


@dataclass(frozen=True)
class Sent:
    """A command on its way."""

    task_id: str
    model: str
    asked: Asked | None
    """None while no control worker has answered."""


class Commands:
    """The commands of one API process."""

    def __init__(self, board: Board, queue: TaskQueue, store: Store) -> None:
        self._board = board
        self._queue = queue
        self._store = store
        self._lookers = CapacityLimiter(LOOKERS)

    async def send(self, verb: Verb, model: str, options: Mapping[str, Any], *, answer_s: float = ANSWER_S, crash: bool = False) -> Sent:
        """
        Publish a command and wait for a control worker's answer to it.

        Raises `UnknownModelError`, `ConflictError` (refused, with the reason), `StoreUnavailableError` (not sent, or
        nobody took it). With an `answer_s` below `ANSWER_S` an answer that has not come yet is no error.
        """
        before = self._board.rows_of(model)
        kwargs = {"model": model, **options, "by": "api"}
        task_id = await self._thread(self._queue.send, f"recovery.{verb.value}", kwargs, CONTROL_QUEUE)
        kept = {"command": verb.value, "model": model, "at": self._board.now, "crash": crash, "runs": {row.id: row.run for row in before}}
        await self._thread(self._store.put, f"task:{task_id}", kept, REMEMBER_S)
        told = await self.answer(task_id, answer_s)
        if told is None:
            if answer_s >= ANSWER_S:
                raise StoreUnavailableError(
                    f"no control worker took the command within {ANSWER_S:g} s (task {task_id}); it is dropped if none does within a minute"
                )
            return Sent(task_id, model, None)
        accepted(told)
        return Sent(task_id, model, Asked.of(verb, told, before, crash=crash))

    async def answer(self, task_id: str, within_s: float) -> dict[str, Any] | None:
        """Return what a task answered, None when it has not in time; raise `StoreUnavailableError` when it failed."""
        waited_s, step = 0.0, 0
        while True:
            found = await to_thread.run_sync(self._queue.look, task_id, limiter=self._lookers)
            if found.status == "done":
                return found.result if isinstance(found.result, dict) else {}
            if found.status in ("failed", "dropped"):
                raise StoreUnavailableError(f"the task {task_id} {found.status}; see the worker's log")
            if waited_s >= within_s:
                return None
            pause_s = STEPS_S[min(step, len(STEPS_S) - 1)]
            await asyncio.sleep(pause_s)
            waited_s, step = waited_s + pause_s, step + 1

    async def ask_host(self, task: str, kwargs: Mapping[str, Any], host: str, within_s: float) -> dict[str, Any]:
        """Return what a host's task answers; raise `HostAwayError` when it does not in time."""
        task_id = await self._thread(self._queue.send, task, dict(kwargs), host_queue(host))
        told = await self.answer(task_id, within_s)
        if told is None:
            raise HostAwayError(f"host '{host}' did not answer within {within_s:g} s")
        await self._thread(self._queue.forget, task_id)
        return told

    async def outcome(self, sent: Sent, within_s: float) -> Outcome:
        """Wait for what becomes of an accepted command; `waiting` when it is still under way at the end."""
        assert sent.asked is not None
        end = asyncio.get_running_loop().time() + within_s
        with self._board.watch(sent.model) as watch:
            while True:
                left_s = end - asyncio.get_running_loop().time()
                try:
                    found = outcome(sent.asked, self._rows(sent.model))
                except StoreUnavailableError:
                    if left_s <= 0:
                        raise
                    found = Outcome("waiting")  # Redis restarts in seconds, and the command lies in the row
                if found.result != "waiting" or left_s <= 0:
                    return found
                await watch.wait(min(left_s, RECHECK_S))

    async def looked(self, model: str, before: Mapping[str, float | None], within_s: float) -> bool:
        """Wait until every instance named in `before` has been looked at since, or is not looked at any more."""
        end = asyncio.get_running_loop().time() + within_s
        with self._board.watch(model) as watch:
            while True:
                rows = self._rows(model)
                waits = any(row.id in before and row.run is not None and row.probe.last_at == before[row.id] for row in rows)
                left_s = end - asyncio.get_running_loop().time()
                if not waits or left_s <= 0:
                    return not waits
                await watch.wait(min(left_s, RECHECK_S))

    async def task(self, task_id: str) -> tuple[dict[str, Any], Any, Outcome | None]:
        """Return a command as it was sent, the task's state, and what became of it; raise `UnknownModelError` for an unknown task."""
        kept = await self._thread(self._store.get, f"task:{task_id}")
        if not isinstance(kept, dict):
            raise UnknownModelError("Task not found: commands are remembered for a day")
        found = await to_thread.run_sync(self._queue.look, task_id, limiter=self._lookers)
        if found.status != "done" or not isinstance(found.result, dict) or not found.result.get("accepted"):
            return kept, found, None
        tokens = {str(each["instance"]): int(each["token"]) for each in found.result.get("instances", ())}
        asked = Asked(Verb(kept["command"]), tokens, kept["runs"], bool(kept["crash"]))
        return kept, found, outcome(asked, self._rows(kept["model"]))

    def _rows(self, model: str) -> tuple[Instance, ...]:
        try:
            return self._board.rows_of(model)
        except UnknownModelError:
            return ()

    async def _thread(self, what: Any, *args: Any) -> Any:
        return await to_thread.run_sync(what, *args)


def accepted(told: Mapping[str, Any]) -> None:
    """Raise what a public task's answer means, unless it accepted the command."""
    reason = str(told.get("reason") or "the command was refused")
    match told.get("status"):
        case _ if told.get("accepted"):
            return
        case "unknown_model":
            raise UnknownModelError(reason)
        case "unavailable":
            raise StoreUnavailableError(reason)
        case "host_away":
            raise HostAwayError(reason)
        case _:
            raise ConflictError(reason)
