"""What an operator decides: checked once at the edge, frozen, unknown keys refused."""

from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from expertmesh.cluster.autoscaler import ShardTierSettings, WorkerTierSettings


class AutoscaleSettings(BaseModel):
    """How the two tiers follow the load."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    period_s: float = Field(default=5.0, gt=0, description="seconds between two decisions, over which is measured")
    shards: ShardTierSettings
    workers: WorkerTierSettings


class GrpcSettings(BaseModel):
    """What the gateway's gRPC server allows its clients, whoever they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_message_bytes: int = Field(
        default=16 << 20, ge=1 << 16, le=1 << 30, description="largest message taken from a client"
    )
    max_streams_per_connection: int = Field(
        default=2048, ge=1, description="calls at once on one connection; a client holds further ones back"
    )
    handshake_timeout_s: float = Field(
        default=20.0, ge=1, description="longest time in which a new connection must begin TLS and HTTP/2 in order"
    )
    keepalive_s: float = Field(
        default=30.0, ge=1, description="silence of a connection after which the server asks whether the client lives"
    )
    keepalive_timeout_s: float = Field(
        default=10.0, ge=1, description="longest wait for that answer; then the connection is closed, its calls end"
    )
    min_ping_s: float = Field(
        default=10.0, ge=0.1, description="least time between pings of a client; who pings faster is cut off"
    )
    resume_s: float = Field(
        default=30.0, gt=0, description="how long a stream with an idempotency key is kept: unread, and after its end"
    )
    max_ended_streams: int = Field(
        default=256, ge=0, description="most such streams kept after their end; the oldest are forgotten first"
    )


class NodeSettings(BaseModel):
    """Which of a cluster's nodes take what: the labels that Ray must know a node by; empty: any node does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: dict[str, str] = Field(default={}, description="labels of the nodes that expert shards may run on")
    workers: dict[str, str] = Field(default={}, description="labels of the nodes that attention workers may run on")
    gateways: dict[str, str] = Field(
        default={}, description="labels of the nodes that gateways may run on; of applications of Ray Serve alone"
    )
    controller: dict[str, str] = Field(
        default={}, description="labels of the node of the controller; of applications of Ray Serve alone"
    )
    domain_label: str = Field(
        default="",
        description="label whose value names what fails together, such as a host; empty: each node is for itself",
    )


class TlsSettings(BaseModel):
    """By which certificate the gateway is known, and whose certificates its clients need. Files are PEM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert_file: Path = Field(description="certificate chain, the server's own first; on the gateway's node")
    key_file: Path = Field(description="private key of the certificate, not encrypted")
    client_ca_file: Path | None = Field(
        default=None,
        description="authorities one of which must have signed a client's certificate; None: none is asked",
    )


class ServeSettings(BaseModel):
    """How a model is served. Read from the command line and `--config FILE` (TOML)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Path = Field(description="checkpoint directory, readable on every node")
    shards: int = Field(default=2, ge=1, le=1024, description="expert shards")
    workers: int = Field(default=1, ge=1, le=1024, description="attention workers")
    replicas: int = Field(default=1, ge=1, description="shards that hold each expert, at most the number of shards")
    expert_tp: int = Field(
        default=1, ge=1, le=64, description="slices that each expert is cut in, each placed as an expert is"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where Ray has GPUs")
    deterministic: bool = Field(
        default=False,
        description="tokens and logprobs equal to the bit whatever the batch, the shards, the replicas, the faults",
    )
    grpc_host: str = "127.0.0.1"
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="0 takes a free one")
    grpc: GrpcSettings = GrpcSettings()
    tls: TlsSettings | None = Field(default=None, description="None: gRPC and HTTP are in plaintext")
    keys: Path | None = Field(
        default=None, description="file of API keys (`expertmesh keys`); None: whoever reaches the server may generate"
    )
    http: bool = Field(default=True, description="whether OpenAI's HTTP is served beside gRPC")
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")
    max_body_bytes: int = Field(
        default=16 << 20, ge=1 << 16, le=1 << 30, description="largest body taken from an HTTP client"
    )
    max_requests: int = Field(
        default=4096, ge=1, le=9999, description="requests that are alive at a gateway; more are refused"
    )
    state: str = Field(default="", description="redis://... ; empty: an embedded server of the controller's")
    deployment: str = Field(
        default="", description="name of the records in Redis, apart from those of others that use it; empty: the model"
    )

    page_size: int = Field(default=16, ge=1, le=1024, description="tokens a KV page")
    kv_tokens: int = Field(default=0, ge=0, description="tokens of KV cache a worker; 0: a tenth of free memory")
    max_batch_tokens: int = Field(
        default=1024, ge=1, description="tokens of a step, prompt chunks and decodes together"
    )
    max_sequences: int = Field(default=64, ge=1, description="sequences in a worker's batch")
    max_queue: int = Field(
        default=1024, ge=1, description="live sequences at a worker, and waiting ones at a gateway; more are refused"
    )
    max_unread_tokens: int = Field(
        default=1_000_000, ge=1000, description="tokens that wait at the gateway for readers or are kept for them"
    )
    max_context: int = Field(default=0, ge=0, description="tokens of a sequence; 0: what the model allows")

    dispatch: Literal["auto", "rendezvous", "quota", "concentrate"] = Field(
        default="auto", description="how tokens are given to an expert's replicas; auto: by the size of the batch"
    )
    capacity_factor: float | None = Field(
        default=None, gt=0, description="most tokens of a step for an expert, in even shares; None: no token is dropped"
    )
    spare_slots: float = Field(
        default=0.125, ge=0, le=8, description="room for more replicas of hot experts, as a part of a shard's slots"
    )
    rebalance_period_s: float = Field(
        default=30.0, ge=0, description="seconds between two looks at which experts are hot; 0: only when asked"
    )
    weights_period_s: float = Field(
        default=3.0, ge=0, description="seconds between two looks at how replicas share their tokens; 0: never"
    )

    absence_s: float = Field(
        default=60.0, ge=0, description="how long a member may be away before the others are balanced without it"
    )

    log_format: Literal["json", "text"] = Field(default="json", description="how a process's log lays out its lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged; debug has a line for each step"
    )
    slow_log_s: float = Field(default=5.0, ge=0, description="a step or packet that takes longer is logged; 0: none")

    otlp_endpoint: str = Field(
        default="",
        pattern=r"^(https?://[^\s@]+)?$",
        description="http://host:port that traces are sent to; empty: OTEL_EXPORTER_OTLP_ENDPOINT, and without it none",
    )
    trace_ratio: float = Field(
        default=1.0, ge=0, le=1, description="part of the requests that are traced, of those that bring no trace"
    )

    hot_experts: int = Field(default=3, ge=0, le=64, description="hottest experts of each layer that metrics show")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="of a Ray that is started; 0 takes a free one")

    autoscale: AutoscaleSettings | None = Field(default=None, description="None: the numbers change only when asked")
    member_cpus: float = Field(
        default=0, ge=0, description="cores that a CPU member reserves in Ray; 0: a quarter of an equal share"
    )
    room_timeout_s: float = Field(
        default=60.0, gt=0, description="how long a member waits for room in Ray, in which its autoscaler brings a node"
    )

    nodes: NodeSettings = NodeSettings()
    link_host: str = Field(default="", description="interface that links listen on; empty: the node's address in Ray")
    links: Literal["auto", "gloo"] = Field(
        default="auto",
        description="auto: NCCL between GPUs, memory within a GPU or a node, Gloo between nodes; gloo: Gloo everywhere",
    )
    pin_cores: bool = Field(
        default=True, description="CPU shards keep to cores of their own where there are enough, and no quota on them"
    )
    shard_threads: int = Field(
        default=0, ge=0, description="CPU threads a shard computes with; 0: member_cpus, or chosen by cores"
    )
    worker_threads: int = Field(
        default=0, ge=0, description="CPU threads a worker computes with; 0: member_cpus, or chosen by cores"
    )
    link_timeout_s: float = Field(default=20.0, gt=0, description="longest wait for one packet's answer")
    worker_timeout_s: float = Field(
        default=3.0, gt=0, description="longest silence of a worker before its streams go on elsewhere"
    )
    recovery_s: float = Field(default=10.0, ge=0, description="how long a step waits for a lost expert's new replica")
    start_timeout_s: float = Field(default=600.0, gt=0, description="longest time until everything is ready")

    @model_validator(mode="after")
    def _deterministic_on_cpu(self) -> "ServeSettings":
        if self.deterministic and self.device == "cuda":
            raise ValueError("deterministic=true computes on CPUs, and device is cuda")
        return self

    @model_validator(mode="after")
    def _deterministic_drops_nothing(self) -> "ServeSettings":
        if self.deterministic and self.capacity_factor is not None:
            raise ValueError(
                f"deterministic=true is refused with capacity_factor={self.capacity_factor}: what is dropped of a "
                "request depends on what else is in its steps"
            )
        return self

    @model_validator(mode="after")
    def _client_certificates_are_asked_on_every_way(self) -> "ServeSettings":
        asks_clients = self.tls is not None and self.tls.client_ca_file is not None
        if asks_clients and self.http and not is_loopback(self.http_host):
            raise ValueError(
                f"tls.client_ca_file is refused with http_host={self.http_host}: Ray Serve's HTTP asks no client for a "
                "certificate; keep HTTP on loopback behind a proxy that does, or serve none"
            )
        return self

    @model_validator(mode="after")
    def _replicas_fit(self) -> "ServeSettings":
        if self.replicas > self.shards:
            raise ValueError(f"replicas={self.replicas} needs at least as many shards, there are shards={self.shards}")
        return self

    @model_validator(mode="after")
    def _slices_fit(self) -> "ServeSettings":
        if self.expert_tp > self.shards:
            raise ValueError(
                f"expert_tp={self.expert_tp} is above shards={self.shards}: slices of an expert would share a shard"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_autoscaler(self) -> "ServeSettings":
        if self.autoscale is None:
            return self
        for name, count, tier in (
            ("shards", self.shards, self.autoscale.shards),
            ("workers", self.workers, self.autoscale.workers),
        ):
            if count > tier.max_count:
                raise ValueError(f"{name}={count} is above the most that the autoscaler may have, {tier.max_count}")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. Of names it is known of localhost alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
