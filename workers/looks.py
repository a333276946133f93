"""The host's prober: one event-loop thread for all its servers, so that one hung server delays nobody."""

import asyncio
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import uvloop

from recovery.adapters.http_probe import HttpProber, Target
from recovery.adapters.vllm_metrics import TrafficKeeper
from recovery.core.instance import Instance
from recovery.core.looking import Look
from recovery.core.states import PROBED
from recovery.errors import RecoveryError
from recovery.host.service import HostService

log = logging.getLogger(__name__)

COMMIT_THREADS = 4


class Looks:
    """Looks at servers and hands each result to the service as it arrives. One per process."""

    def __init__(self, service: HostService) -> None:
        self._service = service
        self._prober = HttpProber()
        self._traffic = TrafficKeeper(service.store)
        self._busy: set[str] = set()
        self._commits = ThreadPoolExecutor(COMMIT_THREADS, thread_name_prefix="commit")
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="looks", daemon=True).start()

    def submit(self, instances: Iterable[str]) -> None:
        """Start a look at each of these that has none under way. Returns at once."""
        rows = self._service.store.load_many(tuple(instances))
        for row in rows:
            if row.state in PROBED and row.run is not None:
                asyncio.run_coroutine_threadsafe(self._look(row), self._loop)

    async def _look(self, row: Instance) -> None:
        if row.id in self._busy:
            return
        self._busy.add(row.id)
        try:
            made = self._service.launch_of(row)
            key = made.api_key.get_secret_value() if made is not None and made.api_key is not None else None
            look = await self._prober.look(row, Target(root=_root(row), api_key=key))
            await self._loop.run_in_executor(self._commits, self._commit, row.id, look)
        except Exception:
            log.exception("cannot look at %s", row.id)
        finally:
            self._busy.discard(row.id)

    def _commit(self, instance_id: str, look: Look) -> None:
        text = self._prober.metrics.pop(instance_id, None)
        try:
            if text is not None:
                self._traffic.take(instance_id, look.run, text)
            self._service.looked(instance_id, look)
        except RecoveryError as error:
            log.warning("cannot note the look at %s: %s", instance_id, error)


def _root(row: Instance) -> str | None:
    """`/health` is asked at the server's root, `/v1/models` under `/v1` (FAILURE-MODES.md, B1)."""
    return row.base_url.rstrip("/").removesuffix("/v1").rstrip("/") if row.base_url else None
