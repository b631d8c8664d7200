"""Traces of requests, sent by OpenTelemetry's SDK where an endpoint is set; without one nothing of it is imported.

W3C Trace Context, https://www.w3.org/TR/trace-context/: a client's `traceparent` and `tracestate` are taken up, and a
worker gets its request's.
"""

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import ServeSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_log = EventLog(__name__)
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_TRACES_PATH = "/v1/traces"
# A span is sent a moment after its end; what comes faster than it can be sent is dropped beyond so many.
_SEND_PERIOD_S = 1.0
_MAX_WAITING_SPANS = 2048


class TraceHeaders(NamedTuple):
    """What a request brought of a trace that it belongs to; empty: it begins its own."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str | bytes]]) -> "TraceHeaders":
        """Pick them out of headers, or of gRPC's metadata."""
        found = {name: value for name, value in pairs if name in cls._fields and isinstance(value, str)}
        return cls(**found)


NO_TRACE = TraceHeaders()


class Tracing:
    """Makes a process's spans. Any thread may use it."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Use a provider; see `open_tracing`."""
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("expertmesh")

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what waits, as far as that can be done in time."""
        self._provider.force_flush(round(timeout_s * 1000))


def open_tracing(settings: ServeSettings, process: str, node: str) -> Tracing | None:
    """Return what makes this process's spans; None: no endpoint is set.

    Args:
        settings: endpoint, and which part of the requests is traced.
        process: its role and number.
        node: on which it runs.

    Raises:
        InputError: an endpoint is set, and the exporter is not installed.
    """
    if not settings.otlp_endpoint:
        return None
    require_exporter(settings.otlp_endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return tracing_to(OTLPSpanExporter(_traces_url(settings.otlp_endpoint)), settings, process, node)


def tracing_to(exporter: "SpanExporter", settings: ServeSettings, process: str, node: str) -> Tracing:
    """Return what makes spans and hands them to an exporter, from a thread of its own."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource.create({"service.instance.id": process, "expertmesh.node": node})
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have named it already, if they are set.
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "expertmesh"}))
    provider = TracerProvider(
        resource=resource,
        sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)),
        # At the end of a process it would wait for an endpoint that is away.
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            _told(exporter), schedule_delay_millis=_SEND_PERIOD_S * 1000, max_queue_size=_MAX_WAITING_SPANS
        )
    )
    return Tracing(provider)


def with_endpoint(settings: ServeSettings, environment: Mapping[str, str]) -> ServeSettings:
    """Return settings with OpenTelemetry's own variable where they set no endpoint.

    Raises:
        InputError: an endpoint is set, and is no address or the exporter is not installed.
    """
    endpoint = settings.otlp_endpoint or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not endpoint:
        return settings
    if not endpoint.startswith(("http://", "https://")) or "@" in endpoint:
        raise InputError(f"otlp_endpoint is {endpoint!r}; it must be http://HOST:PORT or https://, without a password")
    require_exporter(endpoint)
    return settings.model_copy(update={"otlp_endpoint": endpoint})


def require_exporter(endpoint: str) -> None:
    """Refuse an endpoint that nothing can be sent to.

    Raises:
        InputError: the exporter is not installed.
    """
    try:
        found = importlib.util.find_spec(_EXPORTER)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(
            f"otlp_endpoint is {endpoint}, and OpenTelemetry's exporter is not installed: "
            "pip install 'expertmesh[tracing]'"
        )


def context_of(headers: TraceHeaders) -> "Context":
    """Return the context that a request's headers name; one that is malformed counts as none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers._asdict(), context=Context())


def traceparent_of(span: "Span") -> str:
    """Return the header by which another process goes on with a span's trace; "": the span is not sampled."""
    from opentelemetry.context import Context
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not span.get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span, Context()))
    return carrier["traceparent"]


def _traces_url(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH


class _LastWords(logging.Handler):
    """Keeps what OpenTelemetry's modules last complained of: they would repeat it with every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def _told(exporter: "SpanExporter") -> "SpanExporter":
    """Return an exporter whose failures are told once, until it succeeds again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    words, library = _LastWords(), logging.getLogger("opentelemetry")
    library.handlers[:] = [words]
    library.propagate = False

    class Told(SpanExporter):
        num_lost = 0

        def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
            result = exporter.export(spans)
            if result is not SpanExportResult.SUCCESS:
                if not self.num_lost:
                    _log.tell("traces_lost", reason=words.text)
                self.num_lost += len(spans)
            elif self.num_lost:
                _log.tell("traces_sent_again", num_spans=self.num_lost)
                self.num_lost = 0
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Told()
