"""The clock: what Celery beat sends, and how often. Data only."""

from datetime import timedelta

BEAT_SCHEDULE = {
    # Beats may be doubled or late: a tick collapses by itself (`Service.tick`) and only delivers what the rows say is due.
    "tick": {
        "task": "recovery.tick",
        "schedule": timedelta(seconds=1),
        "options": {"queue": "control", "expires": 30, "ignore_result": True},
    },
}
