"""Test shim, on the PYTHONPATH of a host worker: loses the messages of restarts and steps that it sends, while the file LOSE is there."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOSE = Path(os.environ.get("LOSE", "/nonexistent"))

if "celery" in sys.orig_argv and "worker" in sys.orig_argv:
    from celery.app.base import Celery

    send = Celery.send_task

    def lossy(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Say that it was sent; write down that it was not."""
        if name in ("recovery.restart_instance", "recovery.step_instance") and LOSE.exists():
            with LOSE.open("a") as file:
                file.write(f"{name}\n")
            return SimpleNamespace(id="lost")
        return send(self, name, *args, **kwargs)

    Celery.send_task = lossy
