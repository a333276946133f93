"""How commands reach the fleet: views from Redis, deeds through the public Celery tasks, each within a deadline."""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from recovery import wiring
from recovery.cli.exits import TimedOutError
from recovery.core.instance import Instance
from recovery.errors import ConflictError, StoreUnavailableError
from recovery.queues import CONTROL_QUEUE
from recovery.service import not_found

ANSWER_S = 5.0
"""A Redis that is away or frozen is told within this time, whatever the clients below think of it."""
LIFE_S = 60.0
"""How long a command that nobody took waits for a worker. Celery compares it with host clocks, so it is generous."""

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

T = TypeVar("T")


@functools.cache
def wired() -> wiring.Wiring:
    """The wiring of this environment. What the store would log, these commands say themselves."""
    logging.getLogger("recovery").addHandler(logging.NullHandler())
    return wiring.build()


def within(work: Callable[[], T], seconds: float = ANSWER_S) -> T:
    """What `work` returns; `StoreUnavailableError` when it takes longer. It runs in a thread that then is left behind."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise StoreUnavailableError(
            f"cannot use Redis at {wired().url.safe}: it does not answer within {seconds:g} s (frozen, overloaded or cut off)"
        )
    return results[0]


def ask(task: str, *args: Any, queue: str = CONTROL_QUEUE, wait_s: float = ANSWER_S, **kwargs: Any) -> Any:
    """
    What a task answers; published once, never again.

    `StoreUnavailableError` when Redis is away or frozen, `TimedOutError` when no worker answered in time.
    """
    within(wired().store.now, 4.0)  # the plain way to a plain error
    answered, answer = within(lambda: _ask(task, args, kwargs, queue, wait_s), wait_s + 1.0)
    if not answered:
        who = (
            "control worker (`recovery up` or `recovery control`)" if queue == CONTROL_QUEUE else f"worker of {queue.removeprefix('gpu.')}"
        )
        raise TimedOutError(
            f"cannot get an answer to {task} within {wait_s:g} s: the {who} is not there or busy; "
            f"the command waits for it for {LIFE_S:g} s more"
        )
    return answer


def _ask(task: str, args: tuple[Any, ...], kwargs: dict[str, Any], queue: str, wait_s: float) -> tuple[bool, Any]:
    from celery.exceptions import TimeoutError as NoAnswer
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from workers.app import app

    where = wired().url.safe
    try:
        sent = app.send_task(task, args=args, kwargs=kwargs, queue=queue, retry=False, expires=LIFE_S)
        return True, sent.get(timeout=wait_s, interval=0.05, disable_sync_subtasks=False)
    except NoAnswer:
        return False, None
    except (OperationalError, RedisError, OSError) as error:
        raise StoreUnavailableError(f"cannot use Redis at {where}: {error}") from error
    except Exception as error:  # what the task itself raised, as Celery brings it back
        raise ConflictError(f"{task} failed: {type(error).__name__}: {error}") from error


def rows_of(name: str) -> tuple[Instance, ...]:
    """The rows of a model, or of one instance; `UnknownModelError` names those there are, `SchemaError` if only they cannot be read."""
    rows = within(wired().store.load_all)
    found = tuple(row for row in rows if row.model == name) or tuple(row for row in rows if row.id == name)
    if not found:
        raise within(lambda: not_found(wired().store, name, rows))
    return tuple(sorted(found, key=lambda row: row.replica))
