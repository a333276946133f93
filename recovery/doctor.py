"""Gathers what `core/doctoring` judges: Redis, our parts, this machine, the fleet file."""

from collections.abc import Mapping
from pathlib import Path

from recovery.adapters.gpu import Nvml
from recovery.adapters.processes import Processes
from recovery.core.braking import BRAKE_KEY
from recovery.core.doctoring import Facts, Finding, findings
from recovery.core.states import State
from recovery.errors import ConfigError, RecoveryError, StoreUnavailableError
from recovery.settings import load_fleet, port_clashes, unknown_names
from recovery.watchdog import traces
from recovery.wiring import Wiring


def examine(wiring: Wiring, environ: Mapping[str, str]) -> tuple[Finding, ...]:
    """Look at everything there is to look at; what cannot be asked is a finding, not an error."""
    settings, facts = wiring.settings, {}
    gpu = Nvml()
    try:
        info = wiring.store.info()
        rows = wiring.store.load_all()
        brake = wiring.store.get(BRAKE_KEY)
        facts = {
            "redis": info,
            "traces": traces(wiring.store),
            "unreadable": tuple(wiring.store.unreadable().values()),
            "failed": tuple(f"{row.id} has failed: {row.reason}" for row in rows if row.state is State.FAILED),
            "brake": f"on since many instances failed with {brake['cause']}" if brake and not brake.get("released_at") else None,
        }
    except StoreUnavailableError as error:
        facts = {"redis_error": str(error)}
    except RecoveryError as error:
        facts = {"redis_error": str(error)}
    problems, clashes = _fleet_problems(wiring)
    found = Facts(
        **facts,
        host=settings.host,
        home=str(settings.home),
        disk_free=_disk_free(settings.home),
        fleet_problems=problems,
        port_problems=clashes,
        driver=gpu.driver_version,
        cards=len(gpu.readings()),
        nvidia_device=Path("/dev/nvidiactl").exists(),
        flower_open=_flower(environ),
        unknown_settings=unknown_names(environ),
    )
    gpu.close()
    return findings(found)


def _fleet_problems(wiring: Wiring) -> tuple[tuple[str, ...], tuple[str, ...]]:
    path = wiring.settings.fleet
    if path is None:
        return (), ()
    try:
        return (), port_clashes(load_fleet(path, wiring.settings.host), wiring.settings)
    except ConfigError as error:
        return error.problems or (str(error),), ()


def _disk_free(home: Path) -> int | None:
    return Processes(home).disk_free() if home.exists() else None


def _flower(environ: Mapping[str, str]) -> str | None:
    """Flower 2.2 answers its pages to everybody when no password is configured (CELERY-FACTS.md, section 1)."""
    if environ.get("FLOWER_UNAUTHENTICATED_API", "").lower() in ("1", "true", "yes"):
        return "FLOWER_UNAUTHENTICATED_API lets everybody who reaches Flower run tasks"
    return None
