"""How every part of this project logs: one line an event, to stderr, with secrets taken out."""

import logging
import os

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
QUIET = ("httpx", "httpcore", "celery.beat", "celery.worker.strategy", "celery.app.trace", "kombu", "urllib3", "asyncio")
"""Loggers that would write a line per tick or per probe."""


def configure() -> None:
    """Set the root logger up, once per process. RECOVERY_LOG_LEVEL raises or lowers it (default INFO)."""
    logging.basicConfig(format=FORMAT, level=os.environ.get("RECOVERY_LOG_LEVEL", "INFO").upper(), force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
