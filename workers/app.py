"""
The Celery app: JSON only, early acknowledgement, prefetch 1, everything durable in rows rather than in messages.

Every setting that is not Celery's default was measured; CELERY-FACTS.md's sections are named beside it.
"""

from typing import Any

from celery import Celery, signals
from kombu.transport.redis import Channel, Transport

from beat_schedule import BEAT_SCHEDULE
from recovery.core.fleet import VISIBILITY_TIMEOUT_S
from recovery.settings import load_settings
from recovery.wiring import redis_url

# A Celery 5.7 worker that holds an ETA message dies when Redis restarts, unless unacked messages are left alone (section 0).
# The price is paid by the rows: what is not handed back is delivered again by the tick.
Channel.do_restore = False
# A Redis that refuses writes (MISCONF on a full disk, maxmemory) ends a worker at its next BRPOP, for that is no connection error to
# kombu. For us it is one: something to be waited out, with the host's watcher at work meanwhile.
Transport.connection_errors = (*Transport.connection_errors, *Transport.channel_errors)


def make_app() -> Celery:
    """The app for the Redis of this environment; opens no connection yet."""
    url = redis_url(load_settings())
    made = Celery("recovery", broker=url.celery, backend=url.result_backend, include=["workers.tasks"])
    made.conf.update(_settings(url.transport_options))
    if url.use_ssl is not None:
        made.conf.update(broker_use_ssl=url.use_ssl, redis_backend_use_ssl=url.use_ssl)
    return made


def _settings(transport: dict[str, Any]) -> dict[str, Any]:
    times = {"socket_timeout": 5, "socket_connect_timeout": 2, "socket_keepalive": True, "health_check_interval": 5}
    return {
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_default_queue": "control",
        "task_create_missing_queues": True,
        "beat_schedule": BEAT_SCHEDULE,
        "beat_max_loop_interval": 1,
        # Early ack, prefetch 1: a worker that dies loses a hint, never a repair (section 3).
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_eta_task_limit": 2000,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "worker_send_task_events": True,
        # Flower sees a delayed restart when its host's worker takes it, with its ETA; "sent" events would also tell every tick and look.
        "task_send_sent_event": False,
        # Results and readable arguments for Flower and for scripts (section 8).
        "task_track_started": True,
        "result_extended": True,
        "result_expires": 86_400,
        # Half-open connections and frozen brokers: without these a worker stays deaf for good (section 5).
        "broker_transport_options": {
            **times,
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "unacked_restore_throttle": 1,
            "unacked_restore_interval": 10,
            "retry_policy": {"max_retries": 1},
            **transport,
        },
        "result_backend_transport_options": {**times, "retry_policy": {"max_retries": 1, "interval_start": 0.1}, **transport},
        "redis_socket_timeout": 5,
        "redis_socket_connect_timeout": 2,
        "redis_backend_health_check_interval": 5,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 2,
        "worker_redirect_stdouts": False,
        "worker_pool": "threads",
    }


app = make_app()
"""For `celery -A workers.app …` and for scripts."""


@signals.setup_logging.connect
def _plain_logging(**_kwargs: Any) -> None:
    """Log lines to stderr as every part of this project writes them."""
    from recovery.logs import configure

    configure()
