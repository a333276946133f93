"""
The cards of this host, read through NVIDIA's management library where it and a driver are there; else there are none.

No method raises: a card that cannot be asked is a reading that says so. Cards are numbered as `nvidia-smi` does (by PCI
address); CUDA numbers them the same way under `CUDA_DEVICE_ORDER=PCI_BUS_ID`. The process ids that the driver tells are those
of the host: inside a container with its own pid namespace they name nobody.
"""

import contextlib
import importlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from recovery.adapters.kernel_log import KernelLog
from recovery.core.diagnosis import GpuProcess, GpuReading

EVENTS_KEPT: Final = 256
WAIT_MS: Final = 500
RETRY_S: Final = 60.0
"""A host whose driver is not there now is asked again after this long."""


def load_nvml() -> Any | None:
    """nvidia-ml-py's module, or None where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


class Nvml:
    """One host's cards. Safe to use from several threads; `close()` ends the thread that waits for Xid events."""

    def __init__(self, nvml: Any | None = None, kernel: KernelLog | None = None) -> None:
        self._nvml: Any = nvml if nvml is not None else load_nvml()
        self._kernel = kernel
        self._lock = threading.RLock()
        self._ready = False
        self._asked_at = float("-inf")
        self._addresses: dict[int, str] = {}
        self._xids: deque[tuple[float, int, int]] = deque(maxlen=EVENTS_KEPT)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def readings(self) -> tuple[GpuReading, ...]:
        """One reading per card; none on a host without cards, driver or library."""
        with self._lock:
            if not self._open():
                return ()
            try:
                count = self._nvml.nvmlDeviceGetCount()
            except self._nvml.NVMLError:
                self._ready = False
                return ()
            return tuple(self._reading(index) for index in range(count))

    def xids(self, gpus: Sequence[int], since: float) -> tuple[int, ...]:
        """Xid events of these cards (all when empty) since an instant (Unix seconds), oldest first, each number once."""
        with self._lock:
            self._open()
            seen = [xid for at, index, xid in self._xids if at >= since and (not gpus or index in gpus)]
            if self._kernel is not None:
                by_address = {_address(address): index for index, address in self._addresses.items()}
                for address, xid in self._kernel.xids(since):
                    if not gpus or not by_address or by_address.get(_address(address)) in gpus:
                        seen.append(xid)
        return tuple(dict.fromkeys(seen))

    @property
    def driver_version(self) -> str | None:
        """The driver's version, None where there is none."""
        with self._lock:
            return _text(self._ask(self._nvml.nvmlSystemGetDriverVersion)) if self._open() else None

    def close(self) -> None:
        """End the thread and leave the library."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=10 * WAIT_MS / 1000)
        with self._lock:
            if self._ready:
                self._ready = False
                self._ask(self._nvml.nvmlShutdown)

    def _open(self) -> bool:
        """Whether the library answers; starts it, and the wait for events, the first time it does."""
        if self._nvml is None or self._closing.is_set():
            return False
        if not self._ready and time.monotonic() - self._asked_at >= RETRY_S:
            self._asked_at = time.monotonic()
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlInit()
                self._ready = True
                self._watch()
        return self._ready

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """The library's answer, or None where it has none."""
        try:
            return question(*args)
        except self._nvml.NVMLError:
            return None

    def _reading(self, index: int) -> GpuReading:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            # The driver lists the card and cannot talk to it: fallen off the bus, or in need of a reset.
            lost = error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
            return GpuReading(index=index, lost=lost, problem=str(error))
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        running = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        return GpuReading(
            index=index,
            name=_text(self._ask(nvml.nvmlDeviceGetName, handle)) or "",
            used_bytes=memory.used,
            total_bytes=memory.total,
            utilization=None if rates is None else rates.gpu / 100,
            processes=tuple(GpuProcess(pid=each.pid, used_bytes=_bytes(each.usedGpuMemory)) for each in running),
            driver=_text(self._ask(nvml.nvmlSystemGetDriverVersion)) or "",
        )

    def _watch(self) -> None:
        """Ask the driver for Xid events of every card, and wait for them on a thread of our own."""
        nvml = self._nvml
        events = self._ask(nvml.nvmlEventSetCreate)
        if events is None:
            return
        watched = 0
        for index, handle in self._handles():
            if (info := self._ask(nvml.nvmlDeviceGetPciInfo, handle)) is not None:
                self._addresses[index] = _text(info.busId) or ""
            with contextlib.suppress(nvml.NVMLError):  # not supported by every card
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                watched += 1
        if watched and self._thread is None:
            self._thread = threading.Thread(target=self._wait, args=(events,), name="xid-events", daemon=True)
            self._thread.start()

    def _handles(self) -> Iterator[tuple[int, Any]]:
        for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0):
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                yield index, handle

    def _wait(self, events: Any) -> None:
        nvml = self._nvml
        while not self._closing.is_set():
            try:
                event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:
                    self._closing.wait(WAIT_MS / 1000)
                continue
            at = time.time()
            index = self._ask(nvml.nvmlDeviceGetIndex, event.device)
            with self._lock:
                self._xids.append((at, -1 if index is None else int(index), int(event.eventData)))


def _text(value: Any) -> str | None:
    """Names came as bytes from older versions of the library."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _bytes(value: Any) -> int | None:
    """Memory of a process; the driver does not know it everywhere (None, or all bits set, on Windows and in MIG)."""
    return int(value) if isinstance(value, int) and 0 <= value < 2**63 else None


def _address(text: str) -> str:
    """A PCI address in one form: NVML says 00000000:3B:00.0, the kernel 0000:3b:00."""
    bus = text.lower().split(".")[0].split(":")
    return ":".join([f"{int(bus[0], 16):x}", *bus[1:]]) if len(bus) == 3 else text.lower()
