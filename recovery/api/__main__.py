"""`python -m recovery.api`: the management API and the status page under uvicorn."""

import sys

import uvicorn

from recovery import logs, wiring
from recovery.adapters.rate_limits import RateLimits
from recovery.api.app import create_app
from recovery.api.limits import PER_MINUTE
from recovery.api.tasks import CeleryTasks
from recovery.errors import ConfigError
from workers.app import make_app
from workers.sending import CelerySender

GRACE_S = 3
"""How long open requests get at shutdown. Nothing depends on them: a command lies in its row."""


def main() -> int:
    """Serve until SIGTERM; 2 when the settings cannot be used."""
    logs.configure()
    try:
        wired = wiring.build()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    settings = wired.settings
    app = create_app(
        settings, wired.store, CeleryTasks(make_app(), CelerySender), RateLimits.on_redis(wired.url, settings.key_prefix, PER_MINUTE)
    )
    uvicorn.run(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=32 * 1024,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
