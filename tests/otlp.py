"""A collector of OpenTelemetry's traces: takes OTLP over HTTP on loopback and keeps the spans."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Received:
    """A span. process: of the resource that sent it. Times are nanoseconds since 1970."""

    process: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[str, ...]
    start_ns: int
    end_ns: int
    is_error: bool
    message: str
    attributes: dict[str, Any]


class Collector:
    """What has come so far."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._spans: list[Received] = []
        self._come = threading.Condition()

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self._come:
            self._spans += _spans_of(request)
            self._come.notify_all()

    @property
    def spans(self) -> list[Received]:
        """All of them."""
        with self._come:
            return list(self._spans)

    def wait(self, holds: Callable[[list[Received]], bool], timeout_s: float = 60.0) -> list[Received]:
        """Return the spans once they are as they should be."""
        with self._come:
            assert self._come.wait_for(lambda: holds(self._spans), timeout_s), self._spans
            return list(self._spans)


def named(spans: list[Received], name: str) -> list[Received]:
    """Return those of a name, in order of their beginning."""
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_ns)


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Yield a collector that listens; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_ours = self.path == "/v1/traces"
            if is_ours:
                collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if is_ours else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing of each request."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    collector = Collector(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _spans_of(request: ExportTraceServiceRequest) -> Iterator[Received]:
    for resource in request.resource_spans:
        process = _attributes(resource.resource.attributes)["service.instance.id"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    process=process,
                    name=span.name,
                    kind=span.kind,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    links=tuple(link.span_id.hex() for link in span.links),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    is_error=span.status.code == 2,
                    message=span.status.message,
                    attributes=_attributes(span.attributes),
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(element) for element in value.array_value.values]
    return getattr(value, kind)
