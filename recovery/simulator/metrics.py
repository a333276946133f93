"""vLLM's series under their exact names, as /metrics prints them."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_INTER = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
_HTTP = (0.1, 0.5, 1.0)

FINISHED = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Counts of values by upper bound, with their number and sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def render(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total:.1f}'
        yield f"{name}_count{{{labels}}} {total:.1f}"
        yield f"{name}_sum{{{labels}}} {self.sum!r}"


class Metrics:
    """The state behind /metrics. Gauges come from the engine's reports, so they stand still when it does."""

    def __init__(self, model_name: str, start_time: float) -> None:
        self._labels = f'engine="0",model_name="{model_name}"'
        self._start_time = start_time
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.asleep = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.rejections = 0
        self.success = dict.fromkeys(FINISHED, 0)
        self.http: dict[tuple[str, str, str], int] = {}
        self.iteration_tokens = Histogram(_TOKENS)
        self.ttft = Histogram(_TTFT)
        self.inter_token = Histogram(_INTER)
        self.per_output_token = Histogram(_INTER)
        self.e2e = Histogram(_REQUEST)
        self.queue_time = Histogram(_REQUEST)
        self.inference_time = Histogram(_REQUEST)
        self.prefill_time = Histogram(_REQUEST)
        self.decode_time = Histogram(_REQUEST)
        self.request_prompt = Histogram(_SIZES)
        self.request_generation = Histogram(_SIZES)
        self.http_duration = Histogram(_HTTP)

    def request_finished(self, reason: str, began: float, first: float, ended: float, prompt: int, made: int) -> None:
        """Count one request; instants of the monotonic clock, `first` 0 when no token came."""
        self.success[reason if reason in self.success else "error"] += 1
        self.e2e.observe(ended - began)
        if not first:
            return
        self.queue_time.observe(0.0)
        self.prefill_time.observe(first - began)
        self.decode_time.observe(ended - first)
        self.inference_time.observe(ended - began)
        self.request_prompt.observe(prompt)
        self.request_generation.observe(made)
        if made > 1:
            self.per_output_token.observe((ended - first) / (made - 1))

    def render(self) -> str:
        """The text of /metrics."""
        return "\n".join(self._series()) + "\n"

    def _series(self) -> Iterator[str]:
        labels = self._labels
        awake, offloaded, discarded = int(not self.asleep), int(self.asleep == 1), int(self.asleep >= 2)
        gauges: list[tuple[str, str, float]] = [
            ("vllm:num_requests_running", "", self.running),
            ("vllm:num_requests_waiting", "", self.waiting),
            ("vllm:num_requests_waiting_by_reason", ',reason="capacity"', self.waiting),
            ("vllm:num_requests_waiting_by_reason", ',reason="deferred"', 0),
            ("vllm:kv_cache_usage_perc", "", self.kv_usage),
            ("vllm:engine_sleep_state", ',sleep_state="awake"', awake),
            ("vllm:engine_sleep_state", ',sleep_state="weights_offloaded"', offloaded),
            ("vllm:engine_sleep_state", ',sleep_state="discard_all"', discarded),
            ("vllm:cache_config_info", ',block_size="16",num_gpu_blocks="8192"', 1),
        ]
        counters: list[tuple[str, str, float]] = [
            ("vllm:num_preemptions_total", "", 0),
            ("vllm:admission_rejections_total", ',reason="max_num_queued_reqs"', self.rejections),
            ("vllm:prompt_tokens_total", "", self.prompt_tokens),
            ("vllm:prompt_tokens_cached_total", "", 0),
            ("vllm:generation_tokens_total", "", self.generation_tokens),
            ("vllm:prefix_cache_queries_total", "", self.prompt_tokens),
            ("vllm:prefix_cache_hits_total", "", 0),
            *(("vllm:request_success_total", f',finished_reason="{reason}"', count) for reason, count in self.success.items()),
        ]
        for kind, rows in (("gauge", gauges), ("counter", counters)):
            named = ""
            for name, more, value in rows:
                if name != named:
                    named = name
                    yield f"# HELP {name} As vLLM's."
                    yield f"# TYPE {name} {kind}"
                yield f"{name}{{{labels}{more}}} {float(value)!r}"
        histograms = {
            "vllm:iteration_tokens_total": self.iteration_tokens,
            "vllm:time_to_first_token_seconds": self.ttft,
            "vllm:inter_token_latency_seconds": self.inter_token,
            "vllm:request_time_per_output_token_seconds": self.per_output_token,
            "vllm:e2e_request_latency_seconds": self.e2e,
            "vllm:request_queue_time_seconds": self.queue_time,
            "vllm:request_inference_time_seconds": self.inference_time,
            "vllm:request_prefill_time_seconds": self.prefill_time,
            "vllm:request_decode_time_seconds": self.decode_time,
            "vllm:request_prompt_tokens": self.request_prompt,
            "vllm:request_generation_tokens": self.request_generation,
        }
        for name, histogram in histograms.items():
            yield f"# HELP {name} As vLLM's."
            yield f"# TYPE {name} histogram"
            yield from histogram.render(name, labels)
        yield "# TYPE http_requests_total counter"
        for (handler, method, status), count in self.http.items():
            yield f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}} {float(count)!r}'
        yield "# TYPE http_request_duration_seconds histogram"
        yield from self.http_duration.render("http_request_duration_seconds", 'handler="all"')
        yield "# TYPE process_resident_memory_bytes gauge"
        yield f"process_resident_memory_bytes {float(_resident_bytes())!r}"
        yield "# TYPE process_start_time_seconds gauge"
        yield f"process_start_time_seconds {self._start_time!r}"


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123 -- pathlib is not worth it here
        return int(file.read().split()[1]) * 4096


def process_start_time() -> float:
    """Seconds since 1970 at which this process started, as prometheus_client computes it: boot time + start in clock ticks."""
    import os

    with open("/proc/stat") as file:  # noqa: PTH123
        boot = next(float(line.split()[1]) for line in file if line.startswith("btime"))
    with open("/proc/self/stat") as file:  # noqa: PTH123
        ticks = float(file.read().rpartition(")")[2].split()[19])
    return boot + ticks / os.sysconf("SC_CLK_TCK")
