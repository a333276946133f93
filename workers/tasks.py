"""
The tasks: parse, call one service method, answer. No decision is made here.

Public tasks take a model id and nothing executable; whoever can write to Redis can call them.
"""

import functools
import logging
from collections.abc import Callable
from threading import Event
from typing import Any

from celery import Task

from recovery import wiring
from recovery.core.commanding import Command, Verb
from recovery.errors import RecoveryError, StoreUnavailableError, UnknownModelError, WebhookError
from recovery.host import logs
from recovery.service import Answer, Service
from workers import watcher
from workers.app import app
from workers.sending import CelerySender

log = logging.getLogger(__name__)

LOCK_TRIES, LOCK_PAUSE_S = 500, 0.002
"""A start waits a second for another step of its instance; after that the tick delivers it again."""
STALE_LOOK_S = 10.0
"""A probe message older than this by Redis' clock is dropped: its rows have been delivered again meanwhile."""


@functools.cache
def control() -> Service:
    """The control side of this process."""
    return wiring.service(wiring.build(), CelerySender(app))


# --- public: for scripts, Flower, the API and the command line ---------------------------------------------------------


def _command(model: Any, **options: Any) -> dict[str, Any]:
    """Run a command; bad arguments and an absent Redis are answers, never tracebacks."""
    name = str(model)[:80]
    try:
        if not isinstance(model, str):
            raise TypeError("the model id must be a text")
        answer = control().command(model, Command(**options))
    except (ValueError, TypeError) as error:
        answer = Answer(accepted=False, model=name, status="refused", reason=f"cannot read the arguments: {_short(error)}")
    except RecoveryError as error:
        answer = Answer(accepted=False, model=name, status="unavailable", reason=str(error))
    return answer.model_dump(mode="json")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


@app.task(name="recovery.start")
def start(model: str, by: str = "script") -> dict[str, Any]:
    """Start a model that is down; one that runs is left alone."""
    return _command(model, verb=Verb.START, by=by)


@app.task(name="recovery.stop")
def stop(model: str, force: bool = False, stay_down: bool = True, by: str = "script") -> dict[str, Any]:
    """Stop a model. `force`: SIGKILL at once; `stay_down=False` with it: handled as a crash."""
    return _command(model, verb=Verb.STOP, force=force, stay_down=stay_down, by=by)


@app.task(name="recovery.restart")
def restart(model: str, override: bool = True, by: str = "script") -> dict[str, Any]:
    """Restart a model. `override=False`: refused when the policy is `no` or the budget is spent."""
    return _command(model, verb=Verb.RESTART, override=override, by=by)


@app.task(name="recovery.check")
def check(model: str, by: str = "script") -> dict[str, Any]:
    """Look at a model now."""
    return _command(model, verb=Verb.CHECK, by=by)


@app.task(name="recovery.reset")
def reset(model: str, by: str = "script") -> dict[str, Any]:
    """Clear a model's budget, backoff and overrides; one that gave up starts again."""
    return _command(model, verb=Verb.RESET, by=by)


@app.task(name="recovery.roll")
def roll(model: str, by: str = "script") -> dict[str, Any]:
    """Restart a model's replicas one after another, none before the last one serves. Advanced by the tick."""
    try:
        begun = control().roller.begin(str(model))
    except RecoveryError as error:
        status = "unknown_model" if isinstance(error, UnknownModelError) else "refused"
        return Answer(accepted=False, model=str(model)[:80], status=status, reason=str(error)).model_dump(mode="json")
    instances = tuple({"instance": instance} for instance in begun.order)
    return Answer(accepted=True, model=begun.model, status="ok", instances=instances, reason=begun.reason).model_dump(mode="json")


# --- the clock ---------------------------------------------------------------------------------------------------------


@app.task(name="recovery.tick", ignore_result=True, send_events=False, store_errors_even_if_ignored=False)
def tick() -> None:
    """Deliver what is due."""
    try:
        control().tick()
    except StoreUnavailableError as error:
        log.warning("tick: %s", error)


@app.task(name="recovery.tell", bind=True, ignore_result=True, max_retries=8)
def tell(self: Task, incident: str, what: str) -> None:
    """Tell the webhook about an incident; one that does not answer is asked again, for about ten minutes."""
    try:
        control().tell(incident, what)
    except WebhookError as error:
        raise self.retry(exc=error, countdown=min(300, 2**self.request.retries), expires=None) from None


# --- on a GPU host -----------------------------------------------------------------------------------------------------


def _on_host(work: Callable[[watcher.HostWorker], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` on this host's worker; our errors become an answer that Flower shows."""
    try:
        return work(watcher.current())
    except RecoveryError as error:
        log.warning("%s", error)
        return {"outcome": "error", "reason": str(error)}


def _start(worker: watcher.HostWorker, instance: str, token: int) -> dict[str, Any]:
    """Start a run; whoever holds the instance's `step.lock` (the hand that sent this message, say) lets go in milliseconds."""
    patience = Event()
    for _ in range(LOCK_TRIES):
        started = worker.service.start(instance, token)
        if started.outcome != "locked":
            break
        patience.wait(LOCK_PAUSE_S)
    return started.model_dump(mode="json")


@app.task(name="recovery.restart_instance", bind=True, max_retries=None)
def restart_instance(self: Task, instance: str, token: int, attempt: int, delay: float, reason: str) -> dict[str, Any]:
    """The delayed restart of one instance; a start that fails is tried again by this very job."""
    answer = _on_host(lambda worker: _start(worker, instance, token))
    if answer["outcome"] == "retry":
        kwargs = {"instance": instance, "token": answer["token"], "attempt": answer["attempt"], "delay": answer["delay_s"]}
        raise self.retry(
            args=(), kwargs={**kwargs, "reason": answer["reason"][:300]}, countdown=answer["delay_s"], expires=None, max_retries=None
        )
    return answer


@app.task(name="recovery.step_instance")
def step_instance(instance: str, token: int) -> dict[str, Any]:
    """The next step of a stop, a drain or a recycling."""
    return _on_host(lambda worker: {"outcome": worker.service.step(instance), "token": token})


@app.task(name="recovery.probe_host", ignore_result=True, send_events=False)
def probe_host(instances: list[str], sent_at: float) -> None:
    """Hand the instances whose look is due to this host's prober, and return."""
    try:
        worker = watcher.current()
        if worker.service.store.now() - sent_at <= STALE_LOOK_S:
            worker.looks.submit(instances)
    except RecoveryError as error:
        log.warning("probe_host: %s", error)


@app.task(name="recovery.read_logs", send_events=False)
def read_logs(instance: str, opts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Lines of a run's log, redacted: `opts` may hold lines (1 to 10000), run (a token) and after (a position told before)."""
    try:
        asked = opts or {}
        run, after = asked.get("run"), asked.get("after")
        return logs.read_logs(
            watcher.current().service,
            str(instance),
            lines=int(asked.get("lines", 100)),
            run=None if run is None else int(run),
            after=None if after is None else str(after),
        )
    except (RecoveryError, ValueError, TypeError) as error:
        return {"error": "refused", "detail": _short(error)}


@app.task(name="recovery.join_host")
def join_host() -> dict[str, Any]:
    """Read the fleet file again now and bring the rows of this host up to it."""

    def join(worker: watcher.HostWorker) -> dict[str, Any]:
        return {"outcome": "joined", "host": worker.name, "problems": worker.join()}

    return _on_host(join)


@app.task(name="recovery.plan_instance")
def plan_instance(instance: str, cause: str | None = None) -> dict[str, Any]:
    """What would be done about the next failure of an instance, step by step; nothing is done."""
    return _on_host(lambda worker: {"outcome": "planned", **worker.service.plan_of(instance, cause)})


@app.task(name="recovery.served", ignore_result=True, send_events=False)
def served(host: str) -> None:
    """The round trip through a host's own queue: a worker that is up but deaf shows only here."""
    watcher.current().served()
