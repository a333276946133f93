"""The `Sender` port on Celery: publishing never waits for a broker that is away."""

import logging
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

log = logging.getLogger(__name__)


class CelerySender:
    """Publishes tasks by name. A send that fails is only a lost hint: the row is due again soon after."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def send(
        self,
        task: str,
        kwargs: dict[str, Any],
        *,
        queue: str,
        countdown_s: float = 0.0,
        expires_s: float = 60.0,
        task_id: str | None = None,
    ) -> str | None:
        """Publish a task (under `task_id` when given) and return its id; None when the broker did not take it."""
        timing: dict[str, Any] = {"countdown": countdown_s} if countdown_s > 0 else {}
        try:
            sent = self._app.send_task(task, kwargs=kwargs, queue=queue, task_id=task_id, expires=expires_s, retry=False, **timing)
        except (OperationalError, OSError, TimeoutError) as error:
            log.warning("cannot send %s to %s: %s; the next tick delivers it", task, queue, error)
            return None
        return str(sent.id)
