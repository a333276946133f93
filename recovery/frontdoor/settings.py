"""The front door's own settings. Those of a model come with the view (`view.ModelSettings`)."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from recovery.core.breaker import BreakerPolicy

KIB, MIB = 1024, 1024 * 1024


class DoorSettings(BaseModel):
    """One front door. Durations are seconds, sizes bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port of `/v1`; 0 takes a free one")
    metrics_host: str = Field(default="127.0.0.1", description="address of the metrics")
    metrics_port: int | None = Field(default=None, ge=0, le=65535, description="port of `/metrics`; none without")
    runtime_dir: Path | None = Field(default=None, description="where a successor fetches the listening socket; none without")
    keys_file: Path | None = Field(default=None, description="API keys of clients; none lets everybody in")
    access_log: Path | None = Field(default=None, description="one JSON line per request, without prompts; none without")

    max_connections: int = Field(default=20_000, ge=1, description="clients at once; more are turned away with 503")
    max_url_bytes: int = Field(default=8 * KIB, ge=64, description="over it: 414")
    max_header_bytes: int = Field(default=32 * KIB, ge=256, description="all header fields of a request; over it: 431")
    max_headers: int = Field(default=100, ge=1, description="number of header fields; over it: 431")
    max_body_bytes: int = Field(default=64 * MIB, ge=1, description="over it: 413")
    max_upload_bytes: int = Field(default=1024 * MIB, ge=1, description="of a body that is not JSON; over it: 413")
    keep_upload_bytes: int = Field(default=4 * MIB, ge=0, description="such a body is kept up to here, so that it can be retried")
    max_answer_bytes: int = Field(default=32 * MIB, ge=0, description="an answer is kept back up to here, so that it can be retried")
    max_event_bytes: int = Field(default=16 * MIB, ge=1024, description="of one server-sent event (the first holds the prompt's ids)")
    max_ahead_bytes: int = Field(default=256 * KIB, ge=0, description="pipelined bytes read ahead of an answer")

    header_timeout_s: float = Field(default=10.0, gt=0, description="from a request's first byte to the end of its headers; over it: 408")
    body_timeout_s: float = Field(default=30.0, gt=0, description="for a body, one second more per 10 kB received; over it: 408")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="a connection without a request is closed")
    stalled_client_s: float = Field(default=60.0, gt=0, description="a client that reads nothing for so long is cut off")
    connect_timeout_s: float = Field(default=2.0, gt=0, description="to reach a replica")
    upstream_idle_s: float = Field(default=4.0, gt=0, description="an idle connection to a replica is closed; uvicorn's own limit is 5 s")

    probe_interval_s: float = Field(default=0.5, gt=0, description="between looks at a replica that is suspect or silent")
    probe_timeout_s: float = Field(default=1.0, gt=0, description="for one look")
    freeze_after_s: float = Field(
        default=3.0, gt=0, description="a replica that has sent nothing and not answered a look for so long is given up; its requests move"
    )
    slow_start_s: float = Field(default=10.0, ge=0, description="a replica that has just come back gets its share of load over so long")
    breaker: BreakerPolicy = BreakerPolicy()

    max_attempts: int = Field(default=8, ge=1, description="replicas tried for one request")
    retry_ratio: float = Field(default=0.2, ge=0, description="retries earned by each request")
    retry_floor_per_s: float = Field(default=50.0, gt=0, description="retries a second that are always allowed")
    retry_burst: int = Field(default=2000, ge=1, description="retries at once; beyond, they are sent late, not refused")
    replay_max_tokens: int = Field(default=200_000, ge=0, description="prompt and answer kept per stream, so that it can be continued")
    replay_total_tokens: int = Field(
        default=50_000_000, ge=0, description="the same over all streams (4 bytes each); beyond, the longest can't be continued"
    )
    poison_min_s: float = Field(
        default=0.05, ge=0, description="a request sent to a replica less than so long before it vanished did not crash it"
    )
    poison_ttl_s: float = Field(default=3600.0, gt=0, description="how long a refused request stays refused")
    hold_comments_s: float = Field(
        default=0.0,
        ge=0,
        description="between comments to a held stream; 0: none. They commit the 200: later failures are error events",
    )
    drain_timeout_s: float = Field(default=60.0, ge=0, description="what is in flight when the door stops may take so long")
    report_interval_s: float = Field(default=1.0, gt=0, description="between reports of work in flight")
