"""
The task queue as the API uses it: publish a public task by name, look whether its answer has come.

Nothing here waits: a publish that the broker does not take is told at once, an answer is looked for, not blocked on.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from celery import Celery
from celery.backends.redis import RedisBackend

from recovery.errors import StoreUnavailableError
from recovery.ports import Sender

log = logging.getLogger(__name__)

EXPIRES_S = 60.0
"""A command that no worker took by then is dropped: carried out an hour later it would surprise."""


@dataclass(frozen=True)
class TaskAnswer:
    """How far a task is: `queued`, `running`, `done`, `failed` or `dropped`; `result` once it is done."""

    status: str
    result: Any = None


class TaskQueue(Protocol):
    """What the API needs of Celery."""

    def send(self, task: str, kwargs: dict[str, Any], queue: str) -> str:
        """Publish a task and return its id; raise `StoreUnavailableError` when the broker does not take it."""

    def look(self, task_id: str) -> TaskAnswer:
        """Return how far a task is; raise `StoreUnavailableError`."""

    def forget(self, task_id: str) -> None:
        """Drop the answer of a task (a log's lines need not lie in Redis for a day)."""


class QuietRedisBackend(RedisBackend):  # type: ignore[misc]
    """
    Celery's Redis backend without its subscription per published task.

    The original subscribes to each answer's channel at publish, on one connection shared by all threads, and leaves
    again only when somebody waits on the result object; a server that only looks answers up would pile them up.
    """

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        """Subscribe to nothing."""
        return {}


BACKENDS = dict.fromkeys(("redis", "rediss"), f"{__name__}:QuietRedisBackend")
_STATUS = {"SUCCESS": "done", "FAILURE": "failed", "REVOKED": "dropped", "STARTED": "running", "RETRY": "running"}


class CeleryTasks:
    """`TaskQueue` on a Celery app of this process' own."""

    def __init__(self, app: Celery, sender: Callable[[Celery], Sender]) -> None:
        app.loader.override_backends = {**getattr(app.loader, "override_backends", {}), **BACKENDS}
        self._app = app
        self._sender = sender(app)

    def send(self, task: str, kwargs: dict[str, Any], queue: str) -> str:
        """Publish a task and return its id; raise `StoreUnavailableError` when the broker does not take it."""
        task_id = self._sender.send(task, kwargs, queue=queue, expires_s=EXPIRES_S)
        if task_id is None:
            raise StoreUnavailableError("cannot send the command: the task queue (Redis) does not answer; nothing was changed")
        return task_id

    def look(self, task_id: str) -> TaskAnswer:
        """Return how far a task is; raise `StoreUnavailableError`."""
        meta = self._ask(lambda: self._app.backend.get_task_meta(task_id, cache=False))
        status = _STATUS.get(str(meta.get("status")), "queued")
        return TaskAnswer(status, meta.get("result") if status == "done" else None)

    def forget(self, task_id: str) -> None:
        """Drop the answer of a task; one that cannot be dropped ends by itself after a day."""
        try:
            self._ask(lambda: self._app.backend.delete(self._app.backend.get_key_for_task(task_id)))
        except StoreUnavailableError as error:
            log.debug("%s", error)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # redis-py's, kombu's and Celery's own, by version; all mean that nothing is known
            raise StoreUnavailableError(f"cannot read a task's answer: {type(error).__name__}") from error
