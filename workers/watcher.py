"""
What a host worker does beside its tasks: joins the fleet, watches keepers, and says that it lives.

A keeper's end is seen through its pidfd within milliseconds; what ended while no worker was there is found when one
comes up, and again every few seconds.
"""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.worker import WorkController

from recovery import wiring
from recovery.errors import ConfigError, DiskError, HostAwayError, RecoveryError, StoreUnavailableError
from recovery.host.logs import Seen, keep_tails
from recovery.host.service import HostService
from recovery.queues import host_queue
from workers.app import app
from workers.looks import Looks
from workers.sending import CelerySender

log = logging.getLogger(__name__)

BEAT_S = 3.0
BEAT_TTL_S = 10.0
RECONCILE_S = 5.0
TAILS_S = 30.0
"""
Heartbeat every 3 s, gone after 10 s (CELERY-FACTS.md, section 7); a host that is lost is shown within 15 s. Tails of logs are kept every
30 s and after an end: to read and redact them takes longer than all else an idle host does.
"""

_current: "HostWorker | None" = None


def current() -> "HostWorker":
    """The host worker of this process; raise `HostAwayError` when this is none (a control worker, say)."""
    if _current is None:
        raise HostAwayError("cannot act on processes here: this worker serves no GPU host; start one with -Q gpu.<host>")
    return _current


class HostWorker:
    """Everything one GPU host's worker owns. `start` joins before the first heartbeat: nothing is sent to a host without one."""

    def __init__(self) -> None:
        self._wiring = wiring.build()
        self.name = self._wiring.settings.host
        self._sender = CelerySender(app)
        self.service: HostService = wiring.host_service(self._wiring, self._sender, self.watch)
        self.looks = Looks(self.service)
        self._poll = select.epoll()
        self._watched: dict[str, int] = {}
        self._by_fd: dict[int, str] = {}
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = socket.socketpair()
        self._poll.register(self._wake_r, select.EPOLLIN)
        self._stop = threading.Event()
        self._served_at = 0.0
        self._tails: Seen = {}
        self._tailed_at = 0.0
        self._began = time.monotonic()
        self._problems: dict[str, str] = {}
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def start(self) -> None:
        """Join the fleet, then watch and beat in threads of their own; have the next keeper ready."""
        self.service.host.stay_ahead()
        for name, work in (("watcher", self._watch_forever), ("heartbeat", self._beat_forever)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def stop(self) -> None:
        """End the threads; the models live on."""
        self._stop.set()
        self._wake_w.send(b"x")

    def watch(self, instance: str) -> None:
        """Watch the keeper of an instance. A dead one fires at once; a second call changes nothing."""
        with self._lock:
            if instance in self._watched:
                return
            fd = self.service.host.keeper_pidfd(instance)
            if fd is None:
                return
            self._watched[instance] = fd
            self._by_fd[fd] = instance
            self._poll.register(fd, select.EPOLLIN)

    def served(self) -> None:
        """A task came through the queue: this worker is not deaf."""
        self._served_at = self._wiring.store.now()

    def _watch_forever(self) -> None:
        pending: dict[str, float] = {}
        while not self._stop.is_set():
            for fd, _events in self._poll.poll(0.05 if pending else 1.0):
                if fd == self._wake_r.fileno():
                    self._wake_r.recv(64)
                    continue
                pending[self._unwatch(fd)] = 0.0
            for instance in list(pending):
                if self._ended(instance):
                    del pending[instance]
                    self.watch(instance)  # a successor that was started before this end was seen is not watched yet

    def _unwatch(self, fd: int) -> str:
        with self._lock:
            instance = self._by_fd.pop(fd)
            self._watched.pop(instance, None)
            self._poll.unregister(fd)
        os.close(fd)
        return instance

    def _ended(self, instance: str) -> bool:
        self._tailed_at = 0.0
        try:
            return self.service.ended(instance)
        except StoreUnavailableError:
            return False  # exit.json waits for the next look
        except RecoveryError as error:
            log.warning("cannot report the end of %s: %s", instance, error)
            return True

    def _beat_forever(self) -> None:
        """Join, then beat; join again every few seconds: the file may have changed, and Redis may have forgotten."""
        joined_at = 0.0
        while not self._stop.is_set():
            try:
                if time.monotonic() - joined_at >= RECONCILE_S or joined_at == 0.0:
                    self.join()
                    joined_at = time.monotonic()
                heard_at = self.service.host.boot_clock()
                self._wiring.store.beat(self.name, self._facts(), BEAT_TTL_S)
                self._renew(heard_at)
                self._sender.send("recovery.served", {"host": self.name}, queue=host_queue(self.name), expires_s=BEAT_TTL_S)
                self._keep_tails()
            except StoreUnavailableError as error:
                log.warning("%s", error)
            except ConfigError as error:
                log.error("%s", error)
            except Exception:
                log.exception("cannot join the fleet; trying again")
            self._stop.wait(BEAT_S)

    def _renew(self, heard_at: float) -> None:
        try:
            self.service.renew(heard_at)
        except DiskError as error:
            log.error("%s; models that may move to another host end here when their lease is over", error)

    def join(self) -> dict[str, str]:
        """Read the fleet file again and bring the rows up to it; what is in the way of that, by instance."""
        self._note(self.service.join())
        return self._problems

    def _note(self, problems: Mapping[str, str]) -> None:
        """Say what keeps an instance, or a changed fleet file, from being taken up: once in the log, and in every heartbeat."""
        problem = getattr(self.service.fleet, "problem", None)
        found = {**problems, **({"fleet file": problem} if problem else {})}
        for name, text in found.items():
            if self._problems.get(name) != text:
                log.error("%s: %s", name, text)
        self._problems = found

    def _keep_tails(self) -> None:
        """The last lines of each log, for when this host is away; only logs that grew are read."""
        if time.monotonic() - self._tailed_at >= TAILS_S:
            self._tailed_at = time.monotonic()
            keep_tails(self.service, self._tails)

    def _facts(self) -> dict[str, Any]:
        return {
            "gpus": [reading.model_dump() for reading in self.service.repairs.cards()],
            "wall": time.time(),
            "boot_id": self._boot_id,
            "tokens": {instance: str(token) for instance, token in self.service.tokens().items()},
            "served_at": self._served_at,
            "up_s": time.monotonic() - self._began,
            "problems": self._problems,
        }


class HostStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs a `HostWorker` inside any Celery worker that consumes this host's queue."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: WorkController, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._worker: HostWorker | None = None

    def start(self, parent: WorkController) -> None:
        """Begin when `gpu.<this host>` is among the worker's queues."""
        global _current
        name = wiring.load_settings().host
        if host_queue(name) in {queue.name for queue in parent.app.amqp.queues.consume_from.values()}:
            self._worker = _current = HostWorker()
            self._worker.start()

    def stop(self, parent: WorkController) -> None:
        """End with the worker."""
        if self._worker is not None:
            self._worker.stop()


app.steps["worker"].add(HostStep)
