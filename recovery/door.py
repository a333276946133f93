"""`python -m recovery.door`: the front door as a part of the fleet, fed from Redis and the fleet file."""

import os
import sys

from recovery import logs, wiring
from recovery.adapters.last_known import LastKnownStore
from recovery.errors import RecoveryError
from recovery.frontdoor.figures import Figures
from recovery.frontdoor.server import Server, announce
from recovery.frontdoor.settings import DoorSettings
from recovery.frontdoor.store_feed import StoreFeeder, StoreReports
from workers.app import app
from workers.sending import CelerySender


def main() -> int:
    """Serve until SIGTERM or until a successor has taken the socket; 2 for a setting that cannot be used."""
    logs.configure()
    try:
        wired = wiring.build()
        settings = wired.settings
        fleet = wiring.FleetFile(settings)
        fleet()
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        door = DoorSettings(
            host=settings.front_host,
            port=settings.front_port,
            metrics_port=settings.front_metrics_port,
            runtime_dir=settings.run_dir,
            keys_file=settings.home / "keys.json" if (settings.home / "keys.json").exists() else None,
            access_log=settings.home / "logs" / "access.log",
        )
        store = LastKnownStore(wired.url, settings.key_prefix)
        name = f"{settings.host}-{os.getpid()}"
        reports = StoreReports(store, CelerySender(app), name)
        return Server(door, StoreFeeder(store, fleet, dict(os.environ)), reports, Figures(store, name)).run(announce)
    except RecoveryError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
