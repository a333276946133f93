"""
Cards and kernel: what is read, what cannot be read, and a real process that the kernel's OOM killer takes.

There is no card here, so a stand-in plays nvidia-ml-py: the same names, answers and errors (13.615). The real library is
asked too, on a machine without a driver.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from recovery.adapters.gpu import Nvml, load_nvml
from recovery.adapters.kernel_log import KernelLog
from recovery.core.diagnosis import GpuProcess
from tests.helpers import wait_until

GIB = 2**30
BIG = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE


class FakeNvml:
    """Two cards of 80 GiB, of which `lost` no longer answer."""

    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED, NVML_ERROR_TIMEOUT, NVML_ERROR_NOT_SUPPORTED = 15, 16, 10, 3
    nvmlEventTypeXidCriticalError = 8

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"error {value}")
            self.value = value

    def __init__(self, *, driver: bool = True, events: bool = True) -> None:
        self.driver, self.events, self.open = driver, events, False
        self.lost: dict[int, int] = {}
        self.happened: list[tuple[int, int]] = []
        self.arrived = threading.Event()

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError(9)  # NVML_ERROR_DRIVER_NOT_LOADED
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.10"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{0x3B + handle:02X}:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if handle in self.lost:
            raise self.NVMLError(self.lost[handle])
        return SimpleNamespace(used=70 * GIB, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle == 1:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=93)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=4242, usedGpuMemory=69 * GIB), SimpleNamespace(pid=7, usedGpuMemory=BIG)]

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, handle: int, kind: int, events: object) -> None:
        if not self.events:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> SimpleNamespace:
        if not self.arrived.wait(timeout_ms / 1000) or not self.happened:
            self.arrived.clear()
            raise self.NVMLError(self.NVML_ERROR_TIMEOUT)
        device, xid = self.happened.pop(0)
        return SimpleNamespace(device=device, eventData=xid)

    def happen(self, device: int, xid: int) -> None:
        self.happened.append((device, xid))
        self.arrived.set()


@pytest.fixture
def nvml():
    return FakeNvml()


@pytest.fixture
def gpu(nvml):
    gpu = Nvml(nvml)
    yield gpu
    gpu.close()


def test_each_card_is_read_with_its_memory_and_who_holds_it(gpu):
    first, second = gpu.readings()

    assert (first.index, first.name, first.used_bytes, first.total_bytes, first.utilization) == (0, "NVIDIA H100", 70 * GIB, 80 * GIB, 0.93)
    assert first.processes == (GpuProcess(pid=4242, used_bytes=69 * GIB), GpuProcess(pid=7, used_bytes=None))
    assert (second.utilization, second.lost) == (None, False)
    assert gpu.driver_version == "570.86.10"


@pytest.mark.parametrize(("error", "lost"), [(15, True), (16, True), (4, False)])
def test_a_card_that_does_not_answer_is_a_reading_that_says_so(nvml, gpu, error, lost):
    nvml.lost = {1: error}

    first, second = gpu.readings()

    assert not first.lost
    assert (second.lost, second.total_bytes, second.problem) == (lost, 0, f"error {error}")


def test_no_driver_means_no_cards_and_no_error():
    gpu = Nvml(FakeNvml(driver=False))

    assert (gpu.readings(), gpu.xids((), 0), gpu.driver_version) == ((), (), None)
    gpu.close()


def test_the_real_library_without_a_driver_is_no_error():
    assert load_nvml() is not None, "nvidia-ml-py is among the packages of the tests"
    gpu = Nvml()

    assert all(reading.index >= 0 for reading in gpu.readings())
    assert isinstance(gpu.xids((0,), time.time()), tuple)
    gpu.close()


def test_xid_events_are_kept_by_card_and_time(nvml, gpu):
    gpu.readings()
    before = time.time()
    nvml.happen(1, 79)

    wait_until(lambda: gpu.xids((1,), before), (79,), within_s=60)
    nvml.happen(0, 31)
    wait_until(lambda: gpu.xids((), before), (79, 31), within_s=60)

    assert gpu.xids((0,), before) == (31,)
    assert gpu.xids((), time.time() + 1) == ()


def test_xid_events_of_the_kernel_do_where_cards_have_none(tmp_path):
    kmsg = write_kmsg(
        tmp_path, "NVRM: Xid (PCI:0000:3c:00): 79, pid=99, GPU has fallen off the bus.", "NVRM: Xid (PCI:0000:3b:00): 31, pid=7"
    )
    gpu = Nvml(FakeNvml(events=False), KernelLog(kmsg))
    gpu.readings()

    assert gpu.xids((1,), 0) == (79,)
    assert gpu.xids((), 0) == (79, 31)
    assert gpu.xids((1,), time.time() + 60) == ()
    gpu.close()


def test_close_ends_the_thread_and_leaves_the_library(nvml, gpu):
    gpu.readings()
    gpu.close()

    assert not nvml.open
    assert [thread for thread in threading.enumerate() if thread.name == "xid-events"] == []
    assert gpu.readings() == ()


# --- the kernel


def write_kmsg(folder: Path, *texts: str, ago_s: float = 0) -> Path:
    """A kernel log in the form of /dev/kmsg."""
    at = int((time.clock_gettime(time.CLOCK_MONOTONIC) - ago_s) * 1e6)
    path = folder / "kmsg"
    path.write_text("".join(f"6,{n},{at},-;{text}\n SUBSYSTEM=x\n" for n, text in enumerate(texts)))
    return path


def write_cgroup(folder: Path, kills: int) -> tuple[Path, Path]:
    (folder / "own").write_text("0::/slice/unit\n")
    (folder / "slice" / "unit").mkdir(parents=True, exist_ok=True)
    (folder / "slice" / "unit" / "memory.events").write_text(f"low 0\nhigh 0\nmax 3\noom 1\noom_kill {kills}\n")
    return folder, folder / "own"


KILL = "Memory cgroup out of memory: Killed process 4242 (VLLM::Worker) total-vm:1kB, anon-rss:1kB"


def test_a_kill_in_the_kernels_log_is_told_by_pid_and_time(tmp_path):
    log = KernelLog(write_kmsg(tmp_path, "usb 1-1: new device", KILL), tmp_path, tmp_path / "none")
    now = time.time()

    assert log.oom_killed(4242, now - 5)
    assert log.oom_killed(1, now - 5, others=(4242,))
    assert not log.oom_killed(1, now - 5)
    assert not log.oom_killed(4242, now + 60)


def test_a_kill_before_the_run_is_another_ones(tmp_path):
    log = KernelLog(write_kmsg(tmp_path, KILL, ago_s=100), tmp_path, tmp_path / "none")

    assert not log.oom_killed(4242, time.time() - 50)


def test_without_the_log_a_rise_of_the_cgroups_count_has_to_do(tmp_path):
    cgroups, own = write_cgroup(tmp_path, 2)
    log = KernelLog(tmp_path / "closed", cgroups, own)
    before = time.time()

    assert not log.oom_killed(4242, before)
    write_cgroup(tmp_path, 3)
    assert log.oom_killed(4242, before)
    assert not log.oom_killed(4242, time.time())


def test_a_machine_that_tells_nothing_is_no_error(tmp_path):
    log = KernelLog(tmp_path / "no", tmp_path / "no", tmp_path / "no")

    assert (log.oom_killed(1, 0), log.xids(0), log.records(0)) == (False, (), None)


def test_this_machines_own_kernel_log_is_read_or_closed():
    records = KernelLog().records(0)

    assert records is None or all(record.text and record.at <= time.time() + 60 for record in records)


@pytest.fixture
def small_cgroup():
    """A memory cgroup of 64 MiB of our own."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            parents.insert(0, Path("/sys/fs/cgroup/memory") / path.lstrip("/"))
    for parent in parents:
        group = parent / f"recovery-test-{os.getpid()}"
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]
        try:
            group.mkdir()
        except OSError:
            continue
        limit = next((path for path in limits if path.exists()), None)
        if limit is not None:
            limit.write_text(str(64 * 2**20))
            yield group
            wait_until(lambda group=group: (group / "cgroup.procs").read_text(), "", within_s=60)
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("this machine lets us make no memory cgroup")


def test_a_process_that_the_kernel_really_killed_is_found(small_cgroup):
    if KernelLog().records(0) is None:
        pytest.skip("this machine's kernel log is closed to us")
    log, began = KernelLog(), time.time()
    hog = "import sys; sys.stdin.readline(); hold = [bytearray(2**20) for _ in range(4096)]"
    with subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE, text=True) as child:
        (small_cgroup / "cgroup.procs").write_text(str(child.pid))
        child.communicate("go\n", timeout=120)

    assert child.returncode == -9
    wait_until(lambda: log.oom_killed(child.pid, began), True, within_s=60)
    assert not log.oom_killed(os.getpid(), began)
