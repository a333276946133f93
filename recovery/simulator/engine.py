"""
The engine: a scheduler that makes tokens in steps, and the child process it runs in.

The child is called VLLM::EngineCore, lives in the server's session, and every token passes through its socket, so that
SIGSTOP or SIGKILL of it has the effects of the real thing: stopped, /health stays 200 while completions hang and the counters
stand still; killed, the server sees it and ends. Like vLLM's it outlives a server that was killed, and obeys SIGTERM.
It wakes only for a step or a message.
"""

import os
import select
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from recovery.simulator import lines
from recovery.simulator.faults import Faults
from recovery.simulator.journal import ENGINE, ORPHAN, Journal
from recovery.simulator.options import Options
from recovery.simulator.tokens import EOS, State, advance, fold, next_token, salt_for

Message = dict[str, Any]
BUSY_STEP_S = 0.05
KV_TOKENS = 131_072
"""Size of the simulated KV cache; `kv` in a step's report is the share of it that running requests hold."""


class EngineCrash(Exception):
    """The engine must end; the argument names an entry of `lines.SERVE_ERRORS`."""


class _Job:
    __slots__ = ("choice", "id", "ignore_eos", "left", "made", "prompt", "ready_at", "seed", "state", "stop_ids", "total")

    def __init__(self, message: Message) -> None:
        self.id: str = message["id"]
        self.prompt: list[int] = message["prompt"]
        self.total: int = len(self.prompt)
        self.left: int = message["max_tokens"]
        self.seed: int | None = message.get("seed")
        self.choice: int = message.get("choice", 0)
        self.ignore_eos: bool = message.get("ignore_eos", False)
        self.stop_ids = frozenset(message.get("stop_ids", ()))
        self.made = 0
        self.ready_at = 0.0
        self.state: State = fold(())

    def take(self, count: int, eos_every: int) -> tuple[list[int], str | None]:
        """Up to `count` more ids, and why the text ended if it did."""
        made: list[int] = []
        while len(made) < count:
            token = next_token(self.state, 0 if self.ignore_eos else eos_every, salt_for(self.seed, self.choice, self.made))
            made.append(token)
            self.made += 1
            self.left -= 1
            if token == EOS or token in self.stop_ids:
                return made, "stop"
            if self.left <= 0:
                return made, "length"
            self.state = advance(self.state, token)
        return made, None


class Engine:
    """
    Continuous batching: each step gives every running request its next tokens, the rest waits.

    `due` says when the next step is, `step` makes it and reports it. Instants are of the monotonic clock.
    """

    def __init__(self, faults: Faults, max_num_seqs: int, fault_file: str = "") -> None:
        self.faults = faults
        self._max_running = max(1, max_num_seqs)
        self._fault_file = fault_file
        self._waiting: deque[_Job] = deque()
        self._running: dict[str, _Job] = {}
        self._last_step = 0.0
        self._crash = ""
        self._changed = False
        self.asleep = 0
        self.paused = False

    def handle(self, message: Message, now: float) -> Message | None:
        """Take one message of the server; the answer, if it asks for one."""
        match message["t"]:
            case "add":
                self._waiting.append(_Job(message))
                self._admit(now)
            case "abort":
                self._running.pop(message["id"], None)
                self._waiting = deque(job for job in self._waiting if job.id != message["id"])
                self._changed = True
                self._admit(now)
            case "faults":
                self.faults.change(message["values"])
                self._changed = self._changed or not self.faults.busy
                self._admit(now)
            case "crash":
                self._crash = message["kind"]
            case "ask":
                return {"u": message["id"], "v": self._ask(message["what"], message.get("value"), now)}
        return None

    def _ask(self, what: str, value: Any, now: float) -> Any:
        match what:
            case "sleep":
                self.asleep = int(value)
            case "wake_up":
                self.asleep = 0
            case "pause":
                self.paused = True
            case "resume":
                self.paused = False
        self._admit(now)
        return {"sleeping": bool(self.asleep), "paused": self.paused}

    def _admit(self, now: float) -> None:
        if self.faults.busy or self.asleep or self.paused:
            return
        while self._waiting and len(self._running) < self._max_running:
            job = self._waiting.popleft()
            job.state = fold(job.prompt)
            job.ready_at = now + self.faults.ttft_s
            self._running[job.id] = job

    def due(self, now: float) -> float | None:
        """When the next step is to be made; None: when a message comes."""
        if self._crash:
            return now
        if self.faults.engine_hang or self.asleep or self.paused:
            return None
        if self.faults.busy:
            return max(now, self._last_step + BUSY_STEP_S)
        if not self._running:
            return now if self._changed else None
        return max(self._last_step + self._period(), min(job.ready_at for job in self._running.values()))

    def _period(self) -> float:
        speed = self.faults.tokens_per_s
        return (max(1, self.faults.chunk_tokens) / speed if speed > 0 else 0.0) + self.faults.step_delay_s

    def step(self, now: float) -> Message:
        """
        Make one step and report it: `o` (id, tokens, reason), `r`unning, `w`aiting, `kv`, `p`rompt tokens, `n` new tokens.

        A report with `s` 0 is no step: the queue changed while nothing ran. `EngineCrash` when the engine is to end.
        """
        self._obey_fault_file()
        if self._crash:
            raise EngineCrash(self._crash)
        self._changed = False
        if self.faults.engine_hang:
            return self._report(0)
        if self.faults.busy:
            self._last_step = now
            return self._report(1, new=self._max_running)
        if not self._running:
            return self._report(0)
        period = self._period()
        planned = self._last_step + period
        self._last_step = planned if now - planned < period else now
        output: list[tuple[str, list[int], str | None]] = []
        prompt = new = 0
        for job in [job for job in self._running.values() if job.ready_at <= now]:
            if job.made == 0:
                prompt += len(job.prompt)
            tokens, reason = job.take(max(1, self.faults.chunk_tokens), self.faults.eos_every)
            new += len(tokens)
            output.append((job.id, tokens, reason))
            if reason:
                del self._running[job.id]
        self._admit(now)
        return self._report(1, output, prompt, new)

    def _report(self, step: int, output: list[tuple[str, list[int], str | None]] | None = None, prompt: int = 0, new: int = 0) -> Message:
        running = self._max_running if self.faults.busy else len(self._running)
        held = KV_TOKENS if self.faults.busy else sum(job.total + job.made for job in self._running.values())
        usage = min(1.0, held / KV_TOKENS)
        return {"s": step, "o": output or [], "r": running, "w": len(self._waiting), "kv": usage, "p": prompt, "n": new}

    def _obey_fault_file(self) -> None:
        if not self._fault_file:
            return
        try:
            word = Path(self._fault_file).read_text().strip()
        except OSError:
            return
        if word.startswith("slow:"):
            self.faults.step_delay_s = float(word[5:]) / 1000
        elif word == "hang":
            self.faults.engine_hang = True
        elif word:
            self._crash = word if word in lines.SERVE_ERRORS else "exit"


def load_error(options: Options) -> str:
    """Which entry of `lines.LOAD_ERRORS` or `CONFIG_ERRORS` this command line ends with; empty: it loads."""
    if options.load_error and not options.fail_first:
        return options.load_error
    if options.oom_above_len and options.max_model_len > options.oom_above_len:
        return "oom"
    if options.oom_above_utilization and options.gpu_memory_utilization > options.oom_above_utilization:
        return "oom"
    if options.oom_above_seqs and options.max_num_seqs > options.oom_above_seqs:
        return "oom-warmup"
    if options.oom_unless_eager and not options.enforce_eager:
        return "oom-warmup"
    if options.kv_fits_len and options.max_model_len > options.kv_fits_len:
        return "kv-too-small"
    return ""


def log_load(text: str, options: Options) -> None:
    """Print one line of `lines.LOADING`."""
    values = {"model": options.model, "max_model_len": options.max_model_len, "seconds": f"{options.load_s:.2f}"}
    lines.say(((lines.STDOUT, lines.ENGINE, text),), **values)


def log_load_error(kind: str, options: Options) -> None:
    """Print the lines of a failed start."""
    fits = options.kv_fits_len or options.oom_above_len or 1792
    table = lines.LOAD_ERRORS.get(kind) or lines.CONFIG_ERRORS.get(kind, ())
    lines.say(table, max_model_len=options.max_model_len, fits=fits, utilization=options.gpu_memory_utilization, model=options.model)


def spawn(options: Options, journal: Journal, error: str) -> tuple[int, socket.socket]:
    """Start the child; its pid and the server's end of the socket. It says `{"ready": true}` when it has loaded."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        journal.release(ENGINE)
        return pid, ours
    try:
        journal.keep_only(ENGINE)
        _close_all_but({theirs.fileno(), *journal.descriptors()})
        _rename("VLLM::EngineCore", wipe_environ=not os.environ.get("SPT_NOENV"))
        _run(theirs, options, error)
    finally:
        os._exit(1)


def spawn_orphan(options: Options, journal: Journal) -> int:
    """Start a child in a session of its own, that keeps the environment and lives on when the server is gone; its pid."""
    pid = os.fork()
    if pid:
        journal.release(ORPHAN)
        return pid
    try:
        os.setsid()
        journal.keep_only(ORPHAN)
        _close_all_but(journal.descriptors())
        _rename("VLLM::Worker", wipe_environ=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(options.orphan_limit_s)
    finally:
        os._exit(0)


def _run(sock: socket.socket, options: Options, error: str) -> None:
    """The child's life: load, then serve messages and steps until told to end. Never returns normally."""
    faults = options.faults
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if faults.ignore_sigterm else _leave(sock))
    begun = time.monotonic()
    for share, text in lines.LOADING:
        time.sleep(max(0.0, begun + share * options.load_s - time.monotonic()))
        if error and share >= 0.5:
            log_load_error(error, options)
            os._exit(1)
        log_load(text, options)
    engine = Engine(faults, options.max_num_seqs, options.fault_file)
    _send(sock, {"ready": True})
    received = b""
    while True:
        now = time.monotonic()
        due = engine.due(now)
        if select.select([sock], [], [], None if due is None else max(0.0, due - now))[0]:
            data = sock.recv(1 << 20)
            if not data:
                _linger(options)
            *messages, received = (received + data).split(b"\n")
            for message in messages:
                if answer := engine.handle(orjson.loads(message), time.monotonic()):
                    _send(sock, answer)
        now = time.monotonic()
        due = engine.due(now)
        if due is not None and due <= now:
            try:
                _send(sock, engine.step(now))
            except EngineCrash as crash:
                lines.say(lines.SERVE_ERRORS[str(crash)])
                os._exit(1)


def _send(sock: socket.socket, message: Message) -> None:
    with suppress(OSError):  # the server is gone; the next read says so
        sock.sendall(orjson.dumps(message) + b"\n")


def _leave(sock: socket.socket) -> None:
    """SIGTERM: say so, and end."""
    _send(sock, {"bye": True})
    os._exit(0)


def _linger(options: Options) -> None:
    """The server was killed: live on and hold what is held, as vLLM's engine does, but not for ever."""
    deadline = time.monotonic() + options.orphan_limit_s
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)
    os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    """vLLM spawns its engine, so no descriptor of the server reaches it."""
    for entry in Path("/proc/self/fd").iterdir():
        descriptor = int(entry.name)
        if descriptor > 2 and descriptor not in kept:
            with suppress(OSError):
                os.close(descriptor)


def _rename(title: str, wipe_environ: bool) -> None:
    """
    Change comm and command line as setproctitle does, which also wipes /proc/PID/environ unless `SPT_NOENV` is set.

    The strings lie at the addresses that /proc/self/stat names (fields 48 to 51); Python has copied them long ago.
    """
    try:
        Path("/proc/self/comm").write_text(title)
        numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        first, last, env_first, env_last = (int(numbers[field - 3]) for field in (48, 49, 50, 51))
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(first)
            memory.write(title.encode()[: last - first - 1].ljust(last - first, b"\0"))
            if wipe_environ:
                memory.seek(env_first)
                memory.write(b"\0" * (env_last - env_first))
    except (OSError, ValueError, IndexError):
        pass  # a kernel that forbids it: the child keeps its old name
