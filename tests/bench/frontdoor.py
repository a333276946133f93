"""
The front door beside nginx, vllm-router and no proxy at all: `python -m tests.bench.frontdoor [--json FILE]`.

All in one run, interleaved, each proxy pinned to the last core, load and stand-in replicas to the others. Ours runs
with everything on: API keys, access log, metrics, token ids asked for and taken out again. CPU is what the kernel
counted for the proxy's processes, so it holds on a busy machine too; rates and delays don't.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from recovery.frontdoor.keys import digest
from tests.bench import peers
from tests.bench.load import Result, closed_loop, first_events, open_streams

ROOT = Path(__file__).parents[2]
REPLICAS = 2
ROUTER = ("vllm-router==0.1.17",)
Row = dict[str, float]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Bench:
    """The processes of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        cores = sorted(os.sched_getaffinity(0))
        self.proxy_core, self.load_cores = {cores[-1]}, set(cores[:-1]) or {cores[-1]}

    def start(self, name: str, command: list[str], cores: set[int]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        os.sched_setaffinity(process.pid, cores)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stubs(self) -> list[int]:
        ports = [free_port() for _ in range(REPLICAS)]
        for port in ports:
            self.start(f"stub-{port}", [sys.executable, "-m", "tests.bench.stub", "--port", str(port)], self.load_cores)
        for port in ports:
            serves(port)
        return ports


def serves(port: int, within_s: float = 60.0) -> None:
    """Wait until a completion comes through."""
    headers = {"authorization": "Bearer bench-key"}
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            body = {"model": "m", "prompt": "x", "max_tokens": 1}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers, timeout=5, trust_env=False)
            if answer.status_code == 200:
                return
        if time.monotonic() > until:
            raise SystemExit(f"nothing serves on port {port}")
        time.sleep(0.1)


def ours(bench: Bench, stubs: list[int]) -> tuple[int, subprocess.Popen[bytes]]:
    port = free_port()
    view, keys = bench.folder / "view.json", bench.folder / "keys.json"
    replicas = [{"instance": f"m-{i}", "model": "m", "host": "127.0.0.1", "port": p, "api_key": "up"} for i, p in enumerate(stubs)]
    view.write_text(json.dumps({"models": [{"name": "m", "replicas": replicas}]}))
    keys.write_text(
        json.dumps({"keys": [{"name": "bench", "sha256": digest("bench-key"), "rate_per_s": 1e9, "burst": 1000000, "concurrency": 100000}]})
    )
    flags = ["--view", str(view), "--port", str(port), "--metrics-port", str(free_port()), "--keys-file", str(keys)]
    flags += ["--access-log", str(bench.folder / "access.log")]
    return port, bench.start("ours", [sys.executable, "-m", "recovery.frontdoor", *flags], bench.proxy_core)


def nginx(bench: Bench, stubs: list[int]) -> tuple[int, subprocess.Popen[bytes]] | None:
    binary = shutil.which("nginx")
    if binary is None:
        return None
    port = free_port()
    servers = " ".join(f"server 127.0.0.1:{p};" for p in stubs)
    config = bench.folder / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {bench.folder}/nginx.pid; error_log {bench.folder}/nginx.err;\n"
        "worker_rlimit_nofile 65536; events { worker_connections 16384; }\n"
        f"http {{ access_log {bench.folder}/nginx.log; client_body_temp_path {bench.folder}/body; proxy_temp_path {bench.folder}/proxy;\n"
        f"fastcgi_temp_path {bench.folder}/f; uwsgi_temp_path {bench.folder}/u; scgi_temp_path {bench.folder}/s;\n"
        "keepalive_requests 1000000000;\n"
        f"upstream replicas {{ least_conn; {servers} keepalive 2048; keepalive_requests 1000000000; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://replicas; proxy_http_version 1.1;\n"
        'proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; } } }\n'
    )
    return port, bench.start("nginx", [binary, "-p", str(bench.folder), "-c", str(config)], bench.proxy_core)


def router(bench: Bench, stubs: list[int], binary: str) -> tuple[int, subprocess.Popen[bytes]]:
    port = free_port()
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
        "--log-level",
        "warning",
        "--prometheus-port",
        str(free_port()),
    ]
    urls = [f"http://127.0.0.1:{p}" for p in stubs]
    flags += ["--max-concurrent-requests", "100000", "--worker-urls", *urls]
    return port, bench.start("vllm-router", [binary, *flags], bench.proxy_core)


class Cost:
    """CPU seconds and memory of a proxy, all its processes together."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._all = []
        if process is not None:
            root = psutil.Process(process.pid)
            self._all = [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self._all)

    def rss_mib(self) -> float:
        return sum(p.memory_info().rss for p in self._all) / 2**20


def measured(cost: Cost, load: Callable[[], Result]) -> tuple[Result, float]:
    """Run a load; return it with the CPU seconds the proxy used."""
    before = cost.cpu_s()
    result = load()
    return result, cost.cpu_s() - before


def one_round(port: int, cost: Cost, seconds: float) -> Row:
    """All closed-loop figures of one proxy; times in microseconds."""
    row: Row = {}
    for clients in (1, 16):
        result, _ = measured(cost, lambda clients=clients: closed_loop(port, clients, seconds))  # type: ignore[misc]
        row[f"p50_us_{clients}"] = result.quantile(result.latencies, 0.5) * 1e6
        row[f"p99_us_{clients}"] = result.quantile(result.latencies, 0.99) * 1e6
        row["errors"] = row.get("errors", 0) + result.errors
    result, cpu_s = measured(cost, lambda: closed_loop(port, 64, seconds))
    row["requests_per_s"] = result.requests / result.seconds
    row["cpu_us_per_request"] = cpu_s / max(1, result.requests) * 1e6
    row["errors"] += result.errors
    result, cpu_s = measured(cost, lambda: first_events(port, 16, seconds))
    row["ttft_p50_us_16"] = result.quantile(result.latencies, 0.5) * 1e6
    row["cpu_us_per_short_stream"] = cpu_s / max(1, result.requests) * 1e6
    row["errors"] += result.errors
    return row


def streams_round(port: int, cost: Cost, count: int, seconds: float) -> Row:
    """1,000 streams of 20 tokens a second; delays in microseconds."""
    result, cpu_s = measured(cost, lambda: open_streams(port, count, int(20 * seconds)))
    steady = result.delays[len(result.delays) // 5 :]
    return {
        "stream_errors": result.errors,
        "tokens": result.tokens,
        "delay_p50_us": result.quantile(steady, 0.5) * 1e6,
        "delay_p99_us": result.quantile(steady, 0.99) * 1e6,
        "cpu_us_per_token": cpu_s / max(1, result.tokens) * 1e6,
        "rss_mib": cost.rss_mib(),
    }


def run(rounds: int, seconds: float, streams: int, stream_seconds: float, router_binary: str) -> dict[str, Any]:
    """Measure everything; the result is what is printed and written."""
    with _bench() as bench:
        stubs = bench.stubs()
        targets: dict[str, tuple[int, subprocess.Popen[bytes] | None]] = {"direct": (stubs[0], None)}
        made = {"nginx": nginx(bench, stubs), "vllm-router": router(bench, stubs, router_binary), "ours": ours(bench, stubs)}
        missing = [name for name, target in made.items() if target is None]
        targets |= {name: target for name, target in made.items() if target is not None}
        for port, _ in targets.values():
            serves(port)
        os.sched_setaffinity(0, bench.load_cores)
        costs = {name: Cost(process) for name, (_, process) in targets.items()}
        rows: dict[str, list[Row]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, (port, _process) in targets.items():
                rows[name].append(one_round(port, costs[name], seconds))
        for name, (port, _process) in targets.items():
            rows[name][-1] |= streams_round(port, costs[name], streams, stream_seconds)
        table = {name: _best(each) for name, each in rows.items()}
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
        "seconds": seconds,
        "streams": streams,
        "stream_seconds": stream_seconds,
        "missing": missing,
        "median_of_rounds": table,
    }


def _best(rows: list[Row]) -> Row:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(statistics.median(row[name] for row in rows if name in row), 1) for name in names}


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.close()
        shutil.rmtree(folder, ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def show(result: dict[str, Any]) -> str:
    """The result as a table; columns are proxies."""
    table: dict[str, Row] = result["median_of_rounds"]
    names = dict.fromkeys(name for row in table.values() for name in row)
    lines = [f"{'':28}" + "".join(f"{proxy:>14}" for proxy in table)]
    for name in names:
        lines.append(f"{name:28}" + "".join(f"{row.get(name, float('nan')):14,.1f}" for row in table.values()))
    lines.append("")
    lines.append(
        f"load average {result['load_average']:.1f} on {result['cores']} cores; not measured: {', '.join(result['missing']) or 'none'}"
    )
    if "ours" in table and "vllm-router" in table:
        ratio = table["vllm-router"]["cpu_us_per_request"] / table["ours"]["cpu_us_per_request"]
        lines.append(f"requests per core: ours / vllm-router = {ratio:.2f} (by CPU time)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each closed loop")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--stream-seconds", type=float, default=15.0)
    parser.add_argument("--router", help="the vllm-router program; without it one is installed into the user's cache")
    given = parser.parse_args()
    router_binary = given.router or str(peers.environment("bench-router", ROUTER) / "vllm-router")
    result = run(given.rounds, given.seconds, given.streams, given.stream_seconds, router_binary)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(show(result) + "\n")


if __name__ == "__main__":
    main()
