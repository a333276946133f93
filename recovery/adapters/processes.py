"""
The processes of this host's instances: started through keepers, looked at, signalled, never waited for.

Nothing is signalled that is not proved to belong to a run: by its keeper's descent, its recorded session, or the marker in its
environment; and always through a descriptor checked against the start time, so that a number used again hurts nobody.
Callers hold `step_lock` around whatever changes something.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from recovery import keeper
from recovery.adapters import proc_table, run_logs
from recovery.adapters.host_disk import HostDisk
from recovery.adapters.keepers import Answer, Keepers
from recovery.adapters.proc_table import ProcTable
from recovery.core.host import ExitRecord, GoneRecord, HostRecord, HostView, PortHolder, RunRecord, Stray
from recovery.errors import DiskError, LeaseHeldError, SpawnError
from recovery.keeper import Proc


class Processes:
    """One GPU host's instances under one home. Every method may be called from any thread."""

    def __init__(self, home: Path, python: str = sys.executable) -> None:
        self.disk = HostDisk(home)
        self._table = ProcTable()
        self._keepers = Keepers(self.disk, python)
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    # --- what is written down ---

    def instances(self) -> tuple[str, ...]:
        """The ids of all instances this host has ever had, sorted."""
        return self.disk.instances()

    def read_record(self, instance: str) -> HostRecord:
        """host.json; the defaults for an instance never seen. `DiskError` when it is damaged: start nothing on it."""
        return self.disk.read_record(instance)

    def write_record(self, instance: str, record: HostRecord) -> None:
        """Put host.json on the disk for good, before Redis is told ("disk before row"). `DiskError` when it cannot be."""
        self.disk.write_record(instance, record)

    def step_lock(self, instance: str) -> AbstractContextManager[None]:
        """The right to act on an instance on this host, for a `with` block; `LeaseHeldError` at once when it is taken."""
        return self.disk.step_lock(instance)

    def look(self, instance: str) -> HostView:
        """All that this host knows about an instance, now: about 1 ms for a table of 100 processes."""
        self._keepers.reap()
        record = self.read_record(instance)
        run = self._run(instance)
        # In this order: a run that ends while we look shows as alive, or as ended with its record; never as lost.
        table = self._table.scan()
        keeper_alive = run is not None and self._lives(table, run, run.keeper_pid, run.keeper_start)
        server_alive = run is not None and self._lives(table, run, run.server_pid, run.server_start)
        live = run.token if run is not None and (keeper_alive or server_alive) else None
        return HostView(
            record=record,
            run=run,
            exit=self.disk.read(instance, "exit.json", ExitRecord),
            gone=self.disk.read(instance, "gone.json", GoneRecord),
            keeper_alive=keeper_alive,
            server_alive=server_alive,
            locked=self.disk.run_locked(instance),
            strays=tuple(_stray(proc) for proc in self._strays(instance, table, run)),
            boot_id=self._boot_id,
            members=() if live is None else tuple(_stray(proc) for proc in self._members(instance, table, run, only=live)),
        )

    # --- starting ---

    def stay_ahead(self) -> None:
        """From now on have a keeper ready before it is needed, which makes a start 12 ms shorter. For a process that starts many."""
        self._keepers.stay_ahead()

    def spawn(
        self,
        instance: str,
        token: int,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        kill_deadline_s: float,
        log_bytes: int,
        log_files: int,
        deadline_file: Path | None = None,
        cwd: Path | None = None,
        keep_logs: int = 10,
        lease_s: float | None = None,
    ) -> RunRecord:
        """
        Start a run and return its record; the server is past its exec by then, and that is all it is.

        `env` is the server's whole environment; the marker, SPT_NOENV and a TMPDIR of its own are added. `cwd` is the
        caller's by default. `SpawnError`: the command cannot be executed, a failed start. `DiskError`: this host cannot
        record a run, nothing was started. `LeaseHeldError`: the last run's keeper has not finished.
        """
        self._refuse_if_locked(instance)
        run_logs.prune(self.disk.prepare(instance), max(keep_logs - 1, 1))
        if lease_s is not None:
            deadline_file = self._deadline(instance)
            self._write_deadline(instance, self.boot_clock() + lease_s)
        else:
            self._deadline(instance).unlink(missing_ok=True)
        bounds = {"kill_deadline_s": kill_deadline_s, "log_bytes": log_bytes, "log_files": log_files}
        spec = {**bounds, "argv": list(argv), "deadline_file": None if deadline_file is None else str(deadline_file)}
        answer = self._keepers.start(instance, token, spec, env, cwd)
        if answer.silent:  # it has been ended; what it may have started must be, too
            self.kill(instance, token)
        return self._started(instance, token, answer)

    def adopt(self, instance: str) -> RunRecord:
        """
        Give a living server whose keeper was killed a new one, and return the record it wrote.

        Its exit code will be unknown. `SpawnError`: there is nothing to adopt, or it ended this moment.
        """
        run = self._run(instance)
        if run is None or not self._lives(self._table.scan(), run, run.server_pid, run.server_start):
            raise SpawnError(f"cannot adopt {instance}: no server of a recorded run lives; its end is for the next look")
        self._refuse_if_locked(instance)
        return self._started(instance, run.token, self._keepers.adopt(instance, run))

    def boot_clock(self) -> float:
        """Seconds since the boot, by the clock that keepers read deadlines on."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def renew(self, instance: str, until: float) -> bool:
        """
        Put off the end of a leased run; `DiskError` when that cannot be written.

        False when the lease is over: somebody else may have started it elsewhere, so that end stands.
        """
        try:
            present = float(self._deadline(instance).read_text())
        except (OSError, ValueError):
            return False
        if self.boot_clock() >= present:
            return False
        self._write_deadline(instance, until)
        return True

    def leased(self, instance: str) -> bool:
        """Whether the newest run was started with a lease."""
        return self._deadline(instance).exists()

    def keeper_pidfd(self, instance: str) -> int | None:
        """A descriptor that becomes readable when the run's keeper ends, to be closed by the caller; None if it has."""
        run = self._run(instance)
        return None if run is None or run.boot_id != self._boot_id else _open_pidfd(run.keeper_pid, run.keeper_start)

    def members(self, instance: str, token: int) -> tuple[Stray, ...]:
        """The living processes of that run, without its keeper."""
        return tuple(_stray(proc) for proc in self._members(instance, self._table.scan(), self._run(instance), only=token))

    # --- ending ---

    def terminate(self, instance: str, token: int) -> bool:
        """SIGTERM to the main process of that run; False if it does not live. vLLM may lose it while it loads: send again."""
        run = self._run(instance)
        if run is None or run.token != token or run.boot_id != self._boot_id:
            return False
        server = keeper.look_up(run.server_pid)
        return server is not None and server.alive and keeper.send(run.server_pid, run.server_start, signal.SIGTERM)

    def kill(self, instance: str, token: int) -> tuple[Stray, ...]:
        """SIGKILL to all that belongs to that run except its keeper; what was signalled. Look again to see it gone."""
        return self._kill(self._members(instance, self._table.scan(), self._run(instance), only=token))

    def end_strays(self, instance: str) -> tuple[Stray, ...]:
        """SIGKILL to what is left of runs that are over (`HostView.strays`); what was signalled. A live run is not touched."""
        return self._kill(self._strays(instance, self._table.scan(), self._run(instance)))

    def end_keeper(self, instance: str, token: int) -> bool:
        """SIGKILL to a keeper that does not act (stopped, say) though its server is dead; False if it does not live."""
        run = self._run(instance)
        if run is None or run.token != token or run.boot_id != self._boot_id:
            return False
        return keeper.send(run.keeper_pid, run.keeper_start, signal.SIGKILL)

    # --- ports, work, room ---

    def port_holder(self, port: int) -> PortHolder | None:
        """Who listens on a TCP port of this host; None if nobody does. Only bound, as vLLM is while it loads, does not show."""
        inodes = proc_table.listen_inodes(port)
        if not inodes:
            return None
        table = self._table.scan()
        markers = self._table.markers(table)
        pid = proc_table.holder([*markers, *(pid for pid in table if pid not in markers)], inodes)
        if pid is None:
            return PortHolder(pid=None, name="", ours=False)
        owner = self.disk.parse_marker(markers.get(pid, ""))
        instance = owner[0] if owner else self._owner_by_descent(pid, table)
        return PortHolder(pid=pid, name=table[pid].name, ours=instance is not None, instance=instance)

    def listens(self, instance: str, port: int) -> bool:
        """Whether the socket that listens on the port belongs to the instance's recorded run."""
        run = self._run(instance)
        if run is None:
            return False
        members = self._members(instance, self._table.scan(), run, only=run.token)
        inodes = proc_table.listen_inodes(port)
        return bool(inodes) and proc_table.holder((proc.pid for proc in members), inodes) is not None

    def cpu_seconds(self, instance: str) -> float:
        """Seconds of CPU that the living processes of the recorded run have used so far."""
        run = self._run(instance)
        members = self._members(instance, self._table.scan(), run, only=run.token) if run is not None else []
        return sum(proc.cpu_ticks for proc in members) / os.sysconf("SC_CLK_TCK")

    def disk_free(self, path: Path | None = None) -> int:
        """Bytes free to us where `path` (default: the home) lies."""
        return self.disk.disk_free(path)

    # --- logs ---

    def log_path(self, instance: str, token: int) -> Path:
        """Where that run's two streams go."""
        return run_logs.log_path(self.disk.folder(instance), token)

    def runs(self, instance: str) -> tuple[int, ...]:
        """The tokens of the runs that have a log, oldest first."""
        return run_logs.runs(self.disk.folder(instance))

    def tail(self, instance: str, token: int, lines: int) -> list[str]:
        """The last lines of that run's log, without line ends."""
        return run_logs.tail(self.disk.folder(instance), token, lines)

    def read_log(self, instance: str, token: int, max_bytes: int) -> str:
        """That run's log; head and tail of it when it is longer than `max_bytes`."""
        return run_logs.read(self.disk.folder(instance), token, max_bytes)

    def protect(self, instance: str, token: int) -> None:
        """Keep that run's log beyond its turn: the first failure of a crash loop. Replaces the one protected before."""
        run_logs.protect(self.disk.prepare(instance), token)

    # --- within ---

    def _refuse_if_locked(self, instance: str) -> None:
        if self.disk.run_locked(instance):
            raise LeaseHeldError(f"cannot start a keeper for {instance}: another holds run.lock, its run has not ended")

    def _started(self, instance: str, token: int, answer: Answer) -> RunRecord:
        """The record of a run whose keeper said yes; else the error that fits what it said."""
        if answer.ok:
            run = self._run(instance)
            if run is not None and run.token == token:
                return run
            raise DiskError(f"cannot read the run.json of {instance} though its keeper wrote it; look at that disk")
        text = f"cannot start a run of {instance}: {answer.error}"
        if answer.kind == "locked":
            raise LeaseHeldError(text)
        if answer.kind == "disk":
            raise DiskError(f"{text}; free space or mend the permissions of {self.disk.folder(instance)}")
        if answer.kind == "spawn":
            raise SpawnError(f"{text}; correct the command in the fleet file, or install it on this host")
        raise SpawnError(f"{text}; see {self.disk.folder(instance) / 'keeper.log'}")

    def _deadline(self, instance: str) -> Path:
        return self.disk.folder(instance) / "deadline"

    def _write_deadline(self, instance: str, until: float) -> None:
        """In one step, so that a keeper never reads half a number. Not synced: a boot ends the run anyway."""
        path = self._deadline(instance)
        try:
            written = path.with_suffix(".tmp")
            written.write_text(repr(until))
            written.replace(path)
        except OSError as error:
            raise DiskError(f"cannot write {path}: {error.strerror}; free space or mend the permissions of {path.parent}") from error

    def _run(self, instance: str) -> RunRecord | None:
        return self.disk.read(instance, "run.json", RunRecord)

    def _lives(self, table: Mapping[int, Proc], run: RunRecord, pid: int, start: int) -> bool:
        proc = table.get(pid)
        return run.boot_id == self._boot_id and proc is not None and proc.start == start and proc.alive

    def _members(
        self, instance: str, table: dict[int, Proc], run: RunRecord | None, *, only: int | None = None, but: int | None = None
    ) -> list[Proc]:
        """The living processes of an instance, without keepers: of the run `only`, or of all runs `but` that one."""
        tokens: dict[int, int] = {}
        for pid, marker in self._table.markers(table).items():
            owner = self.disk.parse_marker(marker)
            if owner is not None and owner[0] == instance:
                tokens[pid] = owner[1]
        if run is not None and run.boot_id == self._boot_id:
            for pid in self._descent(table, run):
                tokens.setdefault(pid, run.token)
        spec_path = os.fsencode(self.disk.folder(instance) / "spec.json")
        chosen = [pid for pid, token in tokens.items() if token != but and only in (None, token)]
        return [table[pid] for pid in chosen if table[pid].alive and not _is_keeper(pid, spec_path)]

    def _strays(self, instance: str, table: dict[int, Proc], run: RunRecord | None) -> list[Proc]:
        """All that lives of an instance outside its live run, which is one with a keeper or a server."""
        live = None
        if run is not None and (
            self._lives(table, run, run.keeper_pid, run.keeper_start) or self._lives(table, run, run.server_pid, run.server_start)
        ):
            live = run.token
        return self._members(instance, table, run, but=live)

    def _descent(self, table: dict[int, Proc], run: RunRecord) -> set[int]:
        """What belongs to a run by its keeper's descent or its session, marker or not."""
        records = ((run.keeper_pid, run.keeper_start), (run.server_pid, run.server_start))
        roots = {pid for pid, start in records if self._lives(table, run, pid, start)}
        found = keeper.descendants(table, roots) | keeper.in_session(table, run.session, run.server_start)
        return (found | roots) - {run.keeper_pid}

    def _owner_by_descent(self, pid: int, table: dict[int, Proc]) -> str | None:
        for instance in self.instances():
            run = self._run(instance)
            if run is not None and run.boot_id == self._boot_id and pid in self._descent(table, run):
                return instance
        return None

    def _kill(self, procs: Sequence[Proc]) -> tuple[Stray, ...]:
        return tuple(_stray(proc) for proc in procs if keeper.send(proc.pid, proc.start, signal.SIGKILL))


def _is_keeper(pid: int, spec_path: bytes) -> bool:
    """Whether this is a keeper of the instance with that spec: even one that has not written its record yet."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return len(command) >= 5 and command[1:3] == [b"-I", b"-S"] and command[4] == spec_path


def _open_pidfd(pid: int, start: int) -> int | None:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    proc = keeper.look_up(pid)
    if proc is not None and proc.start == start:
        return fd
    os.close(fd)
    return None


def _stray(proc: Proc) -> Stray:
    page = os.sysconf("SC_PAGE_SIZE")
    return Stray(pid=proc.pid, start=proc.start, name=proc.name, state=proc.state, rss=proc.rss_pages * page)
