"""Which metrics there are: one table, from which they are made; and how what a process counts gets to Ray's export.

What is counted is counted in plain numbers where it happens. A loop that runs anyway hands it over now and then, so
that a token costs nothing here. docs/metrics.md shows the same table; Prometheus sees each name behind `ray_`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from expertmesh.cluster.errors import UnknownNameError

# Ray puts it before the name of every metric that it exports.
EXPORT_PREFIX = "ray_"
# From a token of a fast GPU to a prompt that waited for long, in steps of 2 to 3.
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MOVE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Kind(StrEnum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the table. boundaries: upper bounds of a histogram's buckets, in its unit."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...] = ()
    meaning: str
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return EXPORT_PREFIX + self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        ends = ("_bucket", "_sum", "_count") if self.kind is Kind.HISTOGRAM else ("",)
        return tuple(self.exported + end for end in ends)


def _counter(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=f"expertmesh_{name}", kind=Kind.COUNTER, unit=unit, labels=labels, meaning=meaning)


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=f"expertmesh_{name}", kind=Kind.GAUGE, unit=unit, labels=labels, meaning=meaning)


def _histogram(name: str, boundaries: tuple[float, ...], meaning: str) -> Metric:
    return Metric(
        name=f"expertmesh_{name}", kind=Kind.HISTOGRAM, unit="seconds", meaning=meaning, boundaries=boundaries
    )


METRICS: tuple[Metric, ...] = (
    # Of a gateway.
    _counter("requests_total", "requests", "requests that ended, by the name of the gRPC status", "code"),
    _gauge("live_requests", "requests", "requests of a gateway that have not ended"),
    _histogram("time_to_first_token_seconds", _WAIT_S, "from a valid request to its first token at the gateway"),
    _histogram("inter_token_seconds", _GAP_S, "between two messages of a sample with new tokens, at the gateway"),
    _counter("request_failovers_total", "requests", "requests that went on at another worker"),
    _counter("refused_calls_total", "calls", "calls without an API key, or with one of the wrong role", "code"),
    # Of workers.
    _histogram("queue_seconds", _WAIT_S, "from a sequence's arrival at a worker to the first step that computes it"),
    _gauge("running_sequences", "sequences", "sequences in the batch", "worker"),
    _gauge("waiting_sequences", "sequences", "sequences in the queue", "worker"),
    _gauge("kv_pages", "pages", "KV pages of a worker, 0 where the model keeps its own cache", "worker"),
    _gauge("kv_free_pages", "pages", "KV pages that can be had", "worker"),
    _counter("generated_tokens_total", "tokens", "tokens drawn", "worker"),
    _counter(
        "computed_tokens_total",
        "tokens",
        "tokens put through the model; phase: prefill, decode",
        "worker",
        "phase",
    ),
    _counter("worker_busy_seconds_total", "seconds", "time in steps", "worker"),
    _counter("worker_expert_seconds_total", "seconds", "of it, time on experts: links and shards", "worker"),
    _counter("link_bytes_total", "bytes", "activations over links; kind: dispatch, combine, reduce", "worker", "kind"),
    _counter("retries_total", "layers", "layers of a step of which a part was asked for again", "worker"),
    _counter("lost_links_total", "links", "links to shards that broke", "worker"),
    _counter("dropped_pairs_total", "pairs", "pairs of token and expert left out by a capacity factor", "worker"),
    # Of shards.
    _gauge("shard_slots", "experts", "experts, or slices, that a shard holds", "shard"),
    _gauge("shard_weight_bytes", "bytes", "bytes of their weights", "shard"),
    _counter("shard_tokens_total", "tokens", "tokens of its experts, shared as the dispatch weights say", "shard"),
    _counter("shard_packets_total", "packets", "packets answered", "shard"),
    _counter("shard_busy_seconds_total", "seconds", "time spent computing", "shard"),
    _counter("shard_queue_seconds_total", "seconds", "time that packets waited, summed", "shard"),
    _counter("replica_moves_total", "experts", "replicas taken in; source: shard, checkpoint", "shard", "source"),
    # Of the fleet.
    _gauge("ready", "0 or 1", "1: every expert has a live replica and a worker is ready"),
    _gauge("members", "processes", "members of a tier (shard, worker) in a state", "tier", "state"),
    _gauge("epoch", "number", "number of the placement in force"),
    _gauge("balancedness_ratio", "ratio", "mean over largest shard load; window: slow, recent", "window"),
    _histogram("placement_change_seconds", _MOVE_S, "from the first replica taken in to the last slot freed"),
    _gauge("last_placement_change_timestamp_seconds", "seconds", "when the placement last changed, since 1970"),
    _gauge("hot_expert_load_ratio", "ratio", "load over the layer's mean, 5 minutes; rank 1: hottest", "layer", "rank"),
    _gauge("hot_expert_index", "number", "which expert that is", "layer", "rank"),
    _gauge("loop_stalled", "0 or 1", "1: a loop of the controller has not succeeded for long", "loop"),
    _gauge("loop_last_success_age_seconds", "seconds", "time since a loop succeeded, or began", "loop"),
)


class Instrument(Protocol):
    """One metric of an exporter."""

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""

    def add(self, growth: float, labels: Mapping[str, str]) -> None:
        """Let a counter grow by 0 or more."""

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        """Add one observation to a histogram."""


class Metrics:
    """The metrics of one process. Makes those that it is told of. One thread at a time."""

    def __init__(self, make: Callable[[Metric], Instrument] | None = None) -> None:
        """Make none yet; `make` makes an instrument, Ray's unless given."""
        self._make = make or RayInstrument
        self._table = {metric.name: metric for metric in METRICS}
        self._instruments: dict[str, Instrument] = {}
        self._told: dict[tuple[str, frozenset[tuple[str, str]]], tuple[object, float]] = {}

    def set(self, name: str, value: float, **labels: object) -> None:
        """Set a gauge.

        Raises:
            UnknownNameError: the table has no such gauge with these labels.
        """
        self._instrument(name, Kind.GAUGE, labels).set(float(value), _text(labels))

    def count(self, name: str, total: float, *, life: object = None, **labels: object) -> None:
        """Tell a counter what was counted since its process began; it grows by what is new.

        Args:
            name: of the counter.
            total: counted since the beginning.
            life: tells the processes apart that count for the same labels; one that was never seen begins at 0.
            labels: of the counter.

        Raises:
            UnknownNameError: the table has no such counter with these labels.
        """
        instrument, text = self._instrument(name, Kind.COUNTER, labels), _text(labels)
        key = name, frozenset(text.items())
        known_life, known = self._told.get(key, (life, None))
        last = known if known is not None and known_life == life else 0.0
        # An answer that a later one has overtaken counts nothing back.
        if known is None or known_life != life or total > last:
            self._told[key] = (life, total)
            instrument.add(float(total - last), text)

    def observe(self, name: str, values: Iterable[float], **labels: object) -> None:
        """Add observations to a histogram.

        Raises:
            UnknownNameError: the table has no such histogram with these labels.
        """
        instrument, text = self._instrument(name, Kind.HISTOGRAM, labels), _text(labels)
        for value in values:
            instrument.observe(value, text)

    def _instrument(self, name: str, kind: Kind, labels: Mapping[str, object]) -> Instrument:
        metric = self._table.get(name)
        if metric is None or metric.kind is not kind or set(metric.labels) != set(labels):
            raise UnknownNameError(f"there is no {kind} {name} with the labels {sorted(labels)}")
        if name not in self._instruments:
            self._instruments[name] = self._make(metric)
        return self._instruments[name]


class RayInstrument:
    """A metric of Ray's export. Each process of Ray reports to its node's agent, which Prometheus scrapes."""

    def __init__(self, metric: Metric) -> None:
        """Make it in this process."""
        from ray.util import metrics as ray_metrics  # for whoever reports: the table is read by those without Ray

        args = {"name": metric.name, "description": metric.meaning, "tag_keys": metric.labels}
        self._metric: Any
        if metric.kind is Kind.HISTOGRAM:
            self._metric = ray_metrics.Histogram(boundaries=list(metric.boundaries), **args)
        else:
            self._metric = (ray_metrics.Counter if metric.kind is Kind.COUNTER else ray_metrics.Gauge)(**args)

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        """See Instrument.set."""
        self._metric.set(value, dict(labels))

    def add(self, growth: float, labels: Mapping[str, str]) -> None:
        """See Instrument.add."""
        # Not `inc`, which refuses 0: a counter that is first seen when it is 1 shows Prometheus no increase.
        self._metric._record(growth, dict(labels))

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        """See Instrument.observe."""
        self._metric.observe(value, dict(labels))


def _text(labels: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in labels.items()}
