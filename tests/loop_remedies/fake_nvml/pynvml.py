"""
Plays nvidia-ml-py for a worker under test: cards, lost ones and Xid events come from the JSON file that FAKE_NVML names.

`{"cards": 3, "lost": [1], "xids": [[0, 79]]}`; events are told once each, in order, as they are added. How many the worker has
taken in stands in a file of the same name with `.told` behind it.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED, NVML_ERROR_TIMEOUT = 15, 16, 10
nvmlEventTypeXidCriticalError = 8

_told = 0


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


def _state():
    try:
        return json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    except (OSError, ValueError):
        return {"cards": 0}


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlSystemGetDriverVersion():
    return "570.86.10"


def nvmlDeviceGetCount():
    return _state()["cards"]


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetIndex(handle):
    return handle


def nvmlDeviceGetName(handle):
    return "NVIDIA H100"


def nvmlDeviceGetPciInfo(handle):
    return SimpleNamespace(busId=f"00000000:{0x3B + handle:02X}:00.0")


def nvmlDeviceGetMemoryInfo(handle):
    if handle in _state().get("lost", ()):
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    return SimpleNamespace(used=0, total=80 * 2**30)


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=0)


def nvmlDeviceGetComputeRunningProcesses(handle):
    return []


def nvmlEventSetCreate():
    return object()


def nvmlDeviceRegisterEvents(handle, kind, events):
    pass


def nvmlEventSetWait_v2(events, timeout_ms):
    global _told
    Path(os.environ["FAKE_NVML"] + ".told").write_text(str(_told))  # who asks for the next one has taken in the last
    until = time.monotonic() + timeout_ms / 1000
    while time.monotonic() < until:
        happened = _state().get("xids", [])
        if len(happened) > _told:
            device, xid = happened[_told]
            _told += 1
            return SimpleNamespace(device=device, eventData=xid)
        time.sleep(0.02)
    raise NVMLError(NVML_ERROR_TIMEOUT)
