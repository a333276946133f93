"""
The parent of one run: starts the server, records how it ended, leaves nothing of it alive.

Run as `python -I -S keeper.py SPECFILE`, or ahead of time without one: then the order for its run comes as a line on
standard input (`be_ready`). Nothing but the standard library, and of that little: the server is started before json
(10 ms) and signal (5 ms) are imported. Everything else in this project may be restarted while a keeper lives, so an
old one must go on working beside newer parts: SPECFILE carries a version.

Files, in the directory of SPECFILE:
  run.lock    held (flock, close-on-exec) as long as this process lives. Taken already: exit code 75.
  run.json    pids, start times, session, boot id: enough to find the server again when this process was killed.
  exit.json   how the server ended.      gone.json   what had to be killed after it, and what would not die.
The server writes straight to its log. The keeper is never in between: killed or stopped, it takes nothing with it.
It ignores SIGTERM, SIGINT, SIGHUP and SIGQUIT, and forwards none: whoever wants the server stopped signals the server.

Its environment and working directory are the server's, which carries the marker RECOVERY_RUN from its first instant.
Whoever started it reads one JSON line from its standard output: {"ok": true}, or {"error": text, "kind": ...}.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # typing is not worth its import here
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

SPEC_VERSION = 1
EXIT_LOCKED, EXIT_DISK, EXIT_SPAWN, EXIT_SPEC = 75, 74, 71, 78  # as in sysexits.h
TICK_S = 1.0  # between looks at log size, deadline and orphans; the server's own end wakes us at once
CALM_S = 5.0  # at most, while the log hardly grows: a look costs 0.4 ms, and a host may have a hundred keepers
RESERVE = 4096  # bytes set aside for each record, so that a disk that fills up later does not cost us the exit code
LEFT_LISTED = 16
MARKER = b"RECOVERY_RUN="


# --- the process table -------------------------------------------------------------------------------------------


class Proc:
    """One process, as /proc/PID/stat shows it. `start` (ticks since boot) and pid together name it for good."""

    __slots__ = ("cpu_ticks", "name", "pid", "ppid", "rss_pages", "session", "start", "state", "threads")

    def __init__(self, pid: int, stat: bytes) -> None:
        head, _, rest = stat.rpartition(b")")
        field = rest.split(None, 22)
        self.pid, self.name, self.state = pid, head.partition(b"(")[2].decode("utf-8", "replace"), field[0].decode()
        self.ppid, self.session = int(field[1]), int(field[3])
        self.cpu_ticks = int(field[11]) + int(field[12])
        self.threads, self.start, self.rss_pages = int(field[17]), int(field[19]), int(field[21])

    @property
    def alive(self) -> bool:
        """False for a zombie, unless other threads of it still run: one stuck in a driver outlives its main thread."""
        return self.state not in "ZXx" or self.threads > 1


def read_proc(path: str) -> bytes:
    """A file of /proc. Not by `open`, which asks the kernel seven times where this asks four: a look reads one per process."""
    fd, pieces = os.open(path, os.O_RDONLY), []
    try:
        while piece := os.read(fd, 65536):
            pieces.append(piece)
            if len(piece) < 4096:  # /proc fills pages: less than one is the end
                break
    finally:
        os.close(fd)
    return b"".join(pieces)


def look_up(pid: int) -> Proc | None:
    """The process of that number, zombie or not, or None."""
    try:
        return Proc(pid, read_proc(f"/proc/{pid}/stat"))
    except (OSError, IndexError, ValueError):
        return None


def process_table() -> dict[int, Proc]:
    """Every process there is, by pid; about 10 us each."""
    procs = (look_up(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {proc.pid: proc for proc in procs if proc is not None}


def can_read(proc: Proc) -> bool:
    """Whether its environment can be read without the risk of waiting for ever on what a stuck process holds."""
    return proc.state not in "DZXx"


def marker_of(pid: int) -> str | None:
    """The run a process was started in: RECOVERY_RUN in its first environment, "" if it has none, None if unreadable."""
    try:
        environ = read_proc(f"/proc/{pid}/environ")
    except OSError:
        return None
    if not environ:  # a kernel thread, a zombie, or in the middle of its exec
        return None
    for entry in environ.split(b"\0"):
        if entry.startswith(MARKER):
            return os.fsdecode(entry[len(MARKER) :])
    return ""


def descendants(table: dict[int, Proc], roots: Iterable[int]) -> set[int]:
    """The pids of all children, grandchildren and so on of `roots`, without the roots."""
    children: dict[int, list[int]] = {}
    for proc in table.values():
        children.setdefault(proc.ppid, []).append(proc.pid)
    found: set[int] = set()
    queue = list(roots)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def in_session(table: dict[int, Proc], session: int, leader_start: int) -> set[int]:
    """
    The pids of that session, if it is still ours: its leader is the process that began it, or gone.

    A leader with another start time is a stranger who got the number after our session had ended.
    """
    leader = table.get(session)
    if session <= 0 or (leader is not None and leader.start != leader_start):
        return set()
    return {proc.pid for proc in table.values() if proc.session == session}


def send(pid: int, start: int, signum: int) -> bool:
    """Signal this very process; False if it is gone, even when its number belongs to another one by now."""
    import signal

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):  # a kernel before 5.3, or a sandbox that knows no pidfds
        fd = -1
    try:
        now = look_up(pid)  # after the open: from here on the descriptor cannot come to mean another process
        if now is None or now.start != start:
            return False
        if fd >= 0:
            signal.pidfd_send_signal(fd, signum)
        else:
            os.kill(pid, signum)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if fd >= 0:
            os.close(fd)


# --- files -------------------------------------------------------------------------------------------------------


class _Plain:
    """What the scanner of the json module wants to be told."""

    strict = True
    object_hook = object_pairs_hook = parse_constant = None
    parse_float, parse_int = float, int


def parse(text: str) -> Any:
    """As `json.loads`, but without importing json: that would take longer than all else before the server's exec."""
    try:
        from _json import make_scanner

        scanner: Any = make_scanner
        return scanner(_Plain)(text.strip(), 0)[0]
    except (ImportError, AttributeError, TypeError, StopIteration):
        import json

        return json.loads(text)


class Run:
    """One run: what the spec says, what has been seen of it."""

    def __init__(self, spec_path: str, spec: dict[str, Any]) -> None:
        self.dir = os.path.dirname(os.path.abspath(spec_path))
        self.token: int = spec["token"]
        self.marker: str = spec["marker"]
        self.argv: list[str] = spec.get("argv", [])
        self.log: str = spec["log"]
        self.log_bytes: int = spec["log_bytes"]
        self.log_files: int = spec["log_files"]
        self.kill_deadline_s: float = spec["kill_deadline_s"]
        self.deadline_file: str | None = spec.get("deadline_file")
        self.tmpdir: str | None = spec.get("tmpdir")
        self.adopted = spec.get("mode") == "adopt"
        self.pid: int = spec.get("server_pid", 0)  # the server: its number and start time, which name it for good
        self.start: int = spec.get("server_start", 0)
        self.log_fd = -1
        self.log_size, self.log_looked_at = 0, 0.0
        self.deadline = float("inf")
        self.reason = "exited"
        self.shared_memory: set[str] = set()

    def path(self, name: str) -> str:
        return os.path.join(self.dir, name)

    def reserve(self) -> None:
        """Set space aside for the records, so that only here a full disk can stop us: before there is a server."""
        for name in ("run.json", "exit.json", "gone.json"):
            fd = os.open(self.path(f".{name}.tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.write(fd, b" " * RESERVE)
            finally:
                os.close(fd)

    def write(self, name: str, record: dict[str, Any], *, sync: bool = False) -> None:
        """
        Put a record in its place in one step; readers see the old one or the new one.

        Only run.json is forced to disk: when the machine itself goes down, its boot id tells how the run ended.
        """
        import json

        data = json.dumps({"schema": 1, "token": self.token, **record}).encode()
        fd = os.open(self.path(f".{name}.tmp"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(self.path(f".{name}.tmp"), self.path(name))
        if sync:
            fd = os.open(self.dir, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def write_exit(self, status: int | None, **more: Any) -> None:
        """exit.json from a wait status; None when the server was not our child and nobody can know."""
        rc = None if status is None else os.waitstatus_to_exitcode(status)
        record = {
            "code": rc if rc is not None and rc >= 0 else None,
            "signal": -rc if rc is not None and rc < 0 else None,
            "unknown": rc is None,
            "at": time.time(),
            "boottime": time.clock_gettime(time.CLOCK_BOOTTIME),
            "reason": self.reason,
        }
        self.write("exit.json", {**record, **more})

    # --- the log ---

    def bound_log(self) -> bool:
        """
        Keep the log to `log_files` files of `log_bytes` each: the live one, the first part (LOG.1) and the latest others.

        True while it hardly grows: at the pace since the last look, `CALM_S` add less than half of `log_bytes`.

        The server has the file open for appending, so it is copied and cut. Lines written between the last look at
        the size and the cut are lost; that is microseconds, and only in a run that fills its log.
        """
        size = os.fstat(self.log_fd).st_size
        now = time.monotonic()
        pace = (size - self.log_size) / max(now - self.log_looked_at, 0.01)
        self.log_size, self.log_looked_at = size, now
        if size <= self.log_bytes:
            return pace * CALM_S < self.log_bytes / 2
        parts = log_parts(self.log)
        try:
            with open(self.log, "rb") as log:
                begin = 0
                if not parts:
                    begin = copy_piece(log.fileno(), 0, self.log_bytes, f"{self.log}.1")
                    parts = [1]
                parts.append(parts[-1] + 1)
                copy_piece(log.fileno(), max(begin, size - self.log_bytes), 2 * self.log_bytes, f"{self.log}.{parts[-1]}")
            os.ftruncate(self.log_fd, 0)
            for part in parts[1 : -max(self.log_files - 2, 0) or None]:
                os.unlink(f"{self.log}.{part}")
        except OSError as error:
            print(f"cannot rotate {self.log}: {error}", file=sys.stderr)
            if size > 2 * self.log_bytes:  # no room for the copy: a bounded log matters more than a whole one
                os.ftruncate(self.log_fd, 0)
        self.log_size = 0
        return False

    # --- what else belongs to the run ---

    def members(self) -> list[Proc]:
        """Every living process of the run except this one: our descendants, the session, the carriers of the marker."""
        table = process_table()
        pids = descendants(table, {os.getpid()})
        pids |= in_session(table, self.pid, self.start)
        server = table.get(self.pid)
        if server is not None and server.start == self.start:
            pids |= descendants(table, {server.pid}) | {server.pid}
        pids |= {pid for pid, proc in table.items() if proc.start >= self.start and can_read(proc) and marker_of(pid) == self.marker}
        return [table[pid] for pid in pids if pid != os.getpid() and table[pid].alive]

    def note_shared_memory(self, members: list[Proc]) -> None:
        """Remember the rings (/dev/shm/psm_*) the run has open: a killed vLLM leaves them behind for ever."""
        for proc in members:
            try:
                for fd in os.listdir(f"/proc/{proc.pid}/fd"):
                    target = os.readlink(f"/proc/{proc.pid}/fd/{fd}")
                    if target.startswith("/dev/shm/psm_") and not target.endswith(" (deleted)"):
                        self.shared_memory.add(target)
            except OSError:
                continue

    def sweep(self) -> None:
        """Remove the files of a run of which nothing lives: its temporary directory and its shared memory."""
        for path in self.shared_memory:
            remove(path)
        if self.tmpdir:
            remove_tree(self.tmpdir)


def log_parts(log: str) -> list[int]:
    """The numbers of the parts already cut off a log, oldest first."""
    stem = os.path.basename(log) + "."
    names = (name[len(stem) :] for name in os.listdir(os.path.dirname(log)) if name.startswith(stem))
    return sorted(int(name) for name in names if name.isdigit())


def copy_piece(source: int, offset: int, length: int, target: str) -> int:
    """Copy `length` bytes, or up to the end as it moves, into a new file; where it got to. A failure leaves no file."""
    fd, end = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), offset + length
    try:
        while offset < end and (done := os.sendfile(fd, source, offset, end - offset)) > 0:
            offset += done
        return offset
    except OSError:
        os.unlink(target)
        raise
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove a file, a link or an empty directory; what cannot be removed stays."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass


def remove_tree(path: str) -> None:
    """Remove a directory with all that is in it, without following links; shutil does it too, but costs 10 ms to import."""
    for top, dirs, files in os.walk(path, topdown=False):
        for name in files + dirs:
            remove(os.path.join(top, name))
    remove(path)


# --- a run, from its start to its end ----------------------------------------------------------------------------


def answer(record: dict[str, Any]) -> None:
    """Tell whoever started us, once; it may be gone."""
    import json

    try:
        os.write(1, json.dumps(record).encode() + b"\n")
        nul = os.open("/dev/null", os.O_WRONLY)
        os.dup2(nul, 1)
        os.close(nul)
    except OSError:
        pass


def take_lock(path: str) -> bool:
    """Take run.lock for as long as this process lives; it does not pass to the server."""
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(10):  # somebody who only looks whether it is taken holds it for a moment
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
    return False


def become_subreaper() -> None:
    """
    Make orphans of the run our children. Before the server's exec: a daemon is orphaned within its first millisecond.

    Through the core of ctypes where it has the entry points, because importing ctypes itself takes 4 ms. Without either,
    session and marker still find all but those that shed both.
    """
    call = (36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        import _ctypes

        core: Any = _ctypes
        core.call_function(core.dlsym(core.dlopen(None, 0), "prctl"), call)
    except (ImportError, AttributeError, TypeError, OSError):
        try:
            import ctypes

            ctypes.CDLL(None).prctl(*call)
        except (ImportError, OSError):
            pass


def start_server(run: Run) -> None:
    """
    Execute the server: a session of its own, no input, both streams appended to the log, signals as after login.

    Python ignores SIGPIPE and SIGXFSZ, and nohup SIGHUP; a child would inherit that. Numbers above 31 cannot have
    been touched by any of these. Raises OSError when the command cannot be executed.
    """
    nul = os.open("/dev/null", os.O_RDONLY)
    streams = [(os.POSIX_SPAWN_DUP2, nul, 0), (os.POSIX_SPAWN_DUP2, run.log_fd, 1), (os.POSIX_SPAWN_DUP2, run.log_fd, 2)]
    defaults = [number for number in range(1, 32) if number not in (9, 19)]
    run.pid = os.posix_spawnp(run.argv[0], run.argv, os.environ, file_actions=streams, setsid=True, setsigmask=[], setsigdef=defaults)
    os.close(nul)
    server = look_up(run.pid)  # it is there, dead or alive, until we reap it
    run.start = 0 if server is None else server.start


def settle(run: Run) -> None:
    """All that can wait until the server is on its way: signals, the record."""
    import signal

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    me = look_up(os.getpid())
    if me is None or run.start == 0:
        raise OSError("/proc cannot be read")
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    hertz, boottime = os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME)
    record = {
        "keeper_pid": me.pid,
        "keeper_start": me.start,
        "server_pid": run.pid,
        "server_start": run.start,
        "session": run.pid,
        "boot_id": boot_id,
        "marker": run.marker,
        "at": time.time() - (boottime - run.start / hertz),
        "boottime": run.start / hertz,
        "tmpdir": run.tmpdir,
        "adopted": run.adopted,
    }
    run.write("run.json", record, sync=True)


def reap(run: Run) -> int | None:
    """Collect dead children, ours and the orphans we inherited; the server's wait status if it was among them."""
    status = None
    while True:
        try:
            pid, this = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == run.pid:
            status = this


def lease_left_s(run: Run) -> float:
    """
    Seconds until the server must be ended; infinite without a deadline file.

    The file holds one number, seconds on CLOCK_BOOTTIME, which no administrator and no suspend can turn back. A file
    that is missing or unreadable changes nothing: the last deadline read from it stands.
    """
    if run.deadline_file:
        try:
            with open(run.deadline_file) as file:
                run.deadline = float(file.read())
        except (OSError, ValueError):
            pass
    return run.deadline - time.clock_gettime(time.CLOCK_BOOTTIME)


def watch(run: Run) -> int | None:
    """Look after the run until the server has ended; its wait status, or None if it was not our child."""
    import select
    import signal

    poller, tick_s = select.poll(), TICK_S
    try:
        pidfd = os.pidfd_open(run.pid)
        poller.register(pidfd, select.POLLIN)
    except (AttributeError, OSError):
        pidfd, tick_s = -1, 0.05
    wait_s = tick_s
    begun, note_at = time.monotonic(), 2.0
    try:
        while True:
            status = reap(run)
            if status is not None:
                return status
            now = look_up(run.pid)
            if now is None or now.start != run.start or (run.adopted and not now.alive):
                return None
            left_s = lease_left_s(run)
            if left_s <= 0:  # somebody else may start it elsewhere from now on: no time for a grace
                run.reason = "lease expired"
                send(run.pid, run.start, signal.SIGKILL)
            calm = run.bound_log() and pidfd >= 0
            wait_s = min(2 * wait_s, CALM_S) if calm else tick_s
            if time.monotonic() - begun > note_at:
                note_at = min(2 * note_at, note_at + 600)
                run.note_shared_memory(run.members())
            poller.poll(1000 * (min(wait_s, left_s) if left_s > 0 else tick_s))
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def kill_members(run: Run) -> tuple[int, list[Proc]]:
    """SIGKILL all that is left of a run until nothing is, or `kill_deadline_s` is over: how many, and who would not die."""
    import signal

    until, pause_s = time.monotonic() + run.kill_deadline_s, 0.001
    killed: set[int] = set()
    while True:
        reap(run)
        left = run.members()
        if not left or time.monotonic() > until:
            return len(killed), left
        run.note_shared_memory([proc for proc in left if proc.pid not in killed])
        killed |= {proc.pid for proc in left if send(proc.pid, proc.start, signal.SIGKILL)}
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def finish(run: Run, status: int | None) -> int:
    """Record the end, end the rest, record that, sweep. A disk that refuses the records does not save the strays."""
    try:
        run.write_exit(status)
    except OSError as error:
        print(f"cannot write exit.json: {error}", file=sys.stderr)
    killed, left = kill_members(run)
    if not left:
        run.sweep()
    stubborn = [{"pid": proc.pid, "start": proc.start, "name": proc.name, "state": proc.state} for proc in left]
    try:
        run.write("gone.json", {"at": time.time(), "killed": killed, "left": stubborn[:LEFT_LISTED]})
    except OSError as error:
        print(f"cannot write gone.json: {error}", file=sys.stderr)
        return EXIT_DISK
    return 0


def keep(run: Run) -> int:
    """See one run through; the exit code of this process."""
    try:
        if not take_lock(run.path("run.lock")):
            answer({"error": f"cannot take {run.path('run.lock')}: another keeper holds it", "kind": "locked"})
            return EXIT_LOCKED
        run.log_fd = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        run.reserve()
    except OSError as error:
        answer({"error": f"cannot write to {error.filename or run.dir}: {error.strerror}", "kind": "disk"})
        return EXIT_DISK
    if run.adopted:
        server = look_up(run.pid)
        if server is None or server.start != run.start:
            answer({"error": f"cannot adopt {run.pid}: it has ended", "kind": "gone"})
            run.reason = "ended before it was adopted"
            return finish(run, None)
    else:
        try:
            start_server(run)
        except OSError as error:
            run.reason = "spawn failed"
            text = f"cannot execute {run.argv[0]}: {error.strerror}"
            run.write_exit(None, spawn_error=text, unknown=False)
            answer({"error": text, "kind": "spawn"})
            run.sweep()
            return EXIT_SPAWN
    try:
        settle(run)
    except BaseException as error:
        # A server without a record is one that nobody would find: end it, and say so.
        if not run.adopted:
            kill_members(run)
        answer({"error": f"cannot record the run in {run.path('run.json')}: {error}", "kind": "disk"})
        return EXIT_DISK
    answer({"ok": True})
    return finish(run, watch(run))


def be_ready() -> str | None:
    """
    Wait for an order and become what it says: the path of the spec, or None when whoever started us has gone.

    The order is one line of JSON: `spec`, the path; `env`, the whole environment; `cwd`, or null for the one we have; `errors`,
    the file for what we complain of. It comes through a pipe because an environment holds secrets, which belong on no disk.
    Raises OSError and ValueError when that cannot be had. A Python that has started already saves 12 ms of a restart.
    """
    for name in ("fcntl", "json", "select", "signal"):  # wanted a moment from now, when every millisecond counts
        __import__(name)
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            return None
        line += piece
    order = parse(line.decode())
    files = ((os.open("/dev/null", os.O_RDONLY), 0), (os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2))
    for fd, number in files:
        os.dup2(fd, number)
        os.close(fd)
    if order["cwd"] is not None:
        os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    return str(order["spec"])


def main(argv: list[str]) -> int:
    """Read the spec, become a session of our own, keep the run."""
    os.closerange(3, 65536)  # the worker's sockets and device files are none of the server's business
    become_subreaper()
    if os.getpgrp() != os.getpid():  # a group leader cannot: somebody runs it by hand from a shell
        os.setsid()
    path: str | None = argv[1] if len(argv) > 1 else None
    try:
        path = path or be_ready()
        if path is None:
            return 0
        with open(path) as file:
            spec = parse(file.read())
        if spec["version"] != SPEC_VERSION:
            raise ValueError(f"version {spec['version']}, this keeper reads {SPEC_VERSION}")
        run = Run(path, spec)
    except (OSError, ValueError, KeyError, TypeError) as error:
        answer({"error": f"cannot use {f'the spec {path}' if path else 'the order'}: {type(error).__name__}: {error}", "kind": "spec"})
        return EXIT_SPEC
    return keep(run)


if __name__ == "__main__":
    code = main(sys.argv)
    os._exit(code)  # nothing is left to flush, and whoever watches us waits 2 ms less
