"""Traces of a gateway and of a worker's engine, sent to a real collector over OTLP."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from expertmesh.actors import tracing as tracing_module
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.request_trace import RequestTracer
from expertmesh.actors.tracing import (
    NO_TRACE,
    TraceHeaders,
    Tracing,
    open_tracing,
    require_exporter,
    tracing_to,
    with_endpoint,
)
from expertmesh.actors.worker.stay_trace import StayTracer
from expertmesh.actors.worker.step_log import StepLog
from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.requests import FinishReason, SamplingParams, SequenceRequest
from expertmesh.cluster.settings import ServeSettings
from tests.log_lines import Lines, logged
from tests.otlp import Collector, Received, collecting, named
from tests.unit import gateway_server, openai_server
from tests.unit.gateway_fakes import FakeWorker, save_tokenizer
from tests.unit.test_engine import Bench, request_of
from tests.unit.test_gateway_failover import PROMPT, collect, valid
from tests.unit.test_openai_http import chat, completion

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
REQUEST = "text_completion fake"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


@pytest.fixture
def tracing(collector: Collector) -> Iterator[Tracing]:
    opened = open_tracing(settings(collector.endpoint), "gateway-1", "node-1")
    assert opened is not None
    yield opened
    opened._provider.shutdown()


def settings(endpoint: str, **fields: Any) -> ServeSettings:
    return ServeSettings(model=Path("model"), otlp_endpoint=endpoint, **fields)


async def run(
    tracing: Tracing | None,
    worker: FakeWorker,
    later: FakeWorker | None = None,
    trace: TraceHeaders = NO_TRACE,
    **fields: Any,
) -> None:
    """Generate one request at a gateway of one worker, and, when that has died, of another."""
    engine = Engine(tokenizer=None, rng=random.Random(1), tracer=RequestTracer(tracing, "fake"))
    engine.pool.set_workers([worker])
    try:
        generating = asyncio.create_task(collect(engine, replace(valid(**fields), trace=trace)))
        if later is not None:
            await gateway_server.until(lambda: worker.dead)
            engine.pool.set_workers([later])
        await generating
    finally:
        await engine.pool.close()


def spans_of(collector: Collector, tracing: Tracing, count: int) -> list[Received]:
    tracing.close()
    return collector.wait(lambda spans: len(spans) >= count)


async def test_a_request_is_a_span_with_the_conventions_attributes(collector: Collector, tracing: Tracing) -> None:
    await run(tracing, FakeWorker("a"), n=2, temperature=0.5)
    spans = spans_of(collector, tracing, 2)
    (request,), (stay,) = named(spans, REQUEST), named(spans, "expertmesh.stay")
    assert (request.process, request.kind, request.parent_id, request.is_error) == ("gateway-1", 2, "", False)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "fake",
        "gen_ai.response.id": "r",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": 40,
        "gen_ai.response.finish_reasons": ["length", "length"],
    }
    assert {name: request.attributes[name] for name in expected} == expected
    assert request.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert (stay.parent_id, stay.trace_id, stay.links) == (request.span_id, request.trace_id, ())
    assert stay.attributes["expertmesh.worker"] == "a"
    assert request.start_ns <= stay.start_ns <= stay.end_ns <= request.end_ns


async def test_a_second_stay_is_linked_to_the_first_in_one_trace(collector: Collector, tracing: Tracing) -> None:
    first, second = FakeWorker("a", die_after=4), FakeWorker("b")
    await run(tracing, first, second, max_tokens=30)
    spans = spans_of(collector, tracing, 3)
    (request,), (lost, other) = named(spans, REQUEST), named(spans, "expertmesh.stay")
    assert (lost.attributes["expertmesh.worker"], other.attributes["expertmesh.worker"]) == ("a", "b")
    assert lost.is_error
    assert "a died" in lost.message
    assert (other.links, other.is_error) == ((lost.span_id,), False)
    assert {lost.parent_id, other.parent_id} == {request.span_id}
    assert not request.is_error
    told = [worker.submitted[0].traceparent.rpartition("-")[0] for worker in (first, second)]
    assert told == [f"00-{request.trace_id}-{span.span_id}" for span in (lost, other)]


async def test_a_refusal_is_an_error_with_its_code(collector: Collector, tracing: Tracing) -> None:
    with pytest.raises(CapacityError):
        await run(tracing, FakeWorker("a", submit_error=CapacityError("no room")))
    spans = spans_of(collector, tracing, 2)
    (request,), (stay,) = named(spans, REQUEST), named(spans, "expertmesh.stay")
    assert (request.is_error, request.attributes["error.type"]) == (True, "RESOURCE_EXHAUSTED")
    assert (stay.is_error, stay.message) == (True, "full")


async def test_a_clients_trace_is_taken_up(collector: Collector, tracing: Tracing) -> None:
    await run(tracing, FakeWorker("a"), trace=TraceHeaders(TRACEPARENT))
    (request,) = named(spans_of(collector, tracing, 2), REQUEST)
    assert (request.trace_id, request.parent_id) == (TRACE_ID, PARENT_ID)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE_ID}-{PARENT_ID}",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        "00-\n-\x00-01",
        "a" * 10_000,
    ],
)
async def test_a_malformed_one_is_ignored(collector: Collector, tracing: Tracing, header: str) -> None:
    await run(tracing, FakeWorker("a"), trace=TraceHeaders(header, "also=nonsense"))
    (request,) = named(spans_of(collector, tracing, 2), REQUEST)
    assert request.parent_id == ""
    assert request.trace_id != TRACE_ID


async def test_what_a_client_does_not_sample_is_not_traced(collector: Collector, tracing: Tracing) -> None:
    worker = FakeWorker("a")
    await run(tracing, worker, trace=TraceHeaders(f"00-{TRACE_ID}-{PARENT_ID}-00"))
    assert worker.submitted[0].traceparent == ""
    await run(tracing, worker)
    (request,) = named(spans_of(collector, tracing, 2), REQUEST)
    assert request.trace_id != TRACE_ID


async def test_the_ratio_decides_for_requests_without_a_trace(collector: Collector) -> None:
    opened = open_tracing(settings(collector.endpoint, trace_ratio=0.0), "gateway-1", "node-1")
    assert opened is not None
    await run(opened, FakeWorker("a"))
    await run(opened, FakeWorker("a"), trace=TraceHeaders(TRACEPARENT))
    assert {span.trace_id for span in spans_of(collector, opened, 2)} == {TRACE_ID}


async def test_traceparent_comes_over_both_fronts(collector: Collector, tracing: Tracing, tmp_path: Path) -> None:
    headers = {"traceparent": TRACEPARENT}
    tokenizer = save_tokenizer(tmp_path)
    async with gateway_server.running(FakeWorker("a")) as grpc_up:
        grpc_up.engine._tracer = RequestTracer(tracing, "fake")
        await grpc_up.inference.GenerateOnce(gateway_server.request(), metadata=tuple(headers.items()))
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer) as http_up:
        http_up.engine._tracer = RequestTracer(tracing, "fake")
        await http_up.client.completions.create(**completion(), extra_headers=headers)
        await http_up.client.chat.completions.create(**chat(), extra_headers=headers)
    spans = spans_of(collector, tracing, 6)
    assert {span.trace_id for span in spans} == {TRACE_ID}
    assert len(named(spans, REQUEST)) == 2
    (talk,) = named(spans, "chat fake")
    assert (talk.parent_id, talk.attributes["gen_ai.operation.name"]) == (PARENT_ID, "chat")


# The worker's part.


def sequence(sequence_id: str, traceparent: str = TRACEPARENT) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=sequence_id, prompt_ids=(1, 2, 3), sampling=SamplingParams(), traceparent=traceparent
    )


def test_a_stay_has_its_queue_prefill_and_decode(collector: Collector, tracing: Tracing) -> None:
    counted = iter([(1.0, 5), (3.5, 7)])
    stays = StayTracer(tracing, "worker-0", lambda: next(counted))
    stays.arrived(sequence("r-1#0~a"))
    stays.begins(7, ["r-1#0~a", "other"])
    stays.begins(8, ["r-1#0~a"])
    stays.drawn(["r-1#0~a"])
    stays.drawn(["r-1#0~a"])
    stays.gone("r-1#0~a", 20, num_output_tokens=12, outcome=FinishReason.LENGTH)
    stays.gone("r-1#0~a", 20, num_output_tokens=12, outcome=FinishReason.LENGTH)
    spans = spans_of(collector, tracing, 4)
    (stay,) = named(spans, "expertmesh.sequence")
    parts = [named(spans, f"expertmesh.{part}")[0] for part in ("queue", "prefill", "decode")]
    assert (stay.trace_id, stay.parent_id, stay.kind) == (TRACE_ID, PARENT_ID, 2)
    assert {part.parent_id for part in parts} == {stay.span_id}
    times = [stay.start_ns, *(part.end_ns for part in parts)]
    assert [part.start_ns for part in parts] == times[:3]
    assert times == sorted(times)
    assert parts[2].end_ns == stay.end_ns
    attributes = stay.attributes
    assert (attributes["expertmesh.expert_wait_s"], attributes["expertmesh.retried_layers"]) == (2.5, 2)
    assert (attributes["expertmesh.first_step"], attributes["expertmesh.last_step"]) == (7, 20)
    assert (attributes["gen_ai.response.id"], attributes["gen_ai.usage.output_tokens"]) == ("r-1", 12)
    assert len(spans) == 4


def test_one_that_is_dropped_while_it_waits_has_a_queue_alone(collector: Collector, tracing: Tracing) -> None:
    stays = StayTracer(tracing, "worker-0", lambda: (0.0, 0))
    stays.arrived(sequence("r-1#0~a"))
    stays.arrived(sequence("r-2#0~a", traceparent=""))
    stays.gone("r-1#0~a", 0, num_output_tokens=0, outcome=FinishReason.CANCELLED)
    stays.gone("r-2#0~a", 0, num_output_tokens=0, outcome=FinishReason.CANCELLED)
    spans = spans_of(collector, tracing, 2)
    assert {span.name for span in spans} == {"expertmesh.sequence", "expertmesh.queue"}
    assert not stays._stays
    assert not stays._new


def test_an_engine_has_its_sequences_noted(collector: Collector, tracing: Tracing) -> None:
    bench = Bench()
    bench.engine._log = StepLog(stays=StayTracer(tracing, "worker-0", lambda: (0.0, 0)))
    bench.run([replace(request_of(name), traceparent=TRACEPARENT) for name in ("r-1#0~a", "r-1#1~a")])
    spans = spans_of(collector, tracing, 8)
    sequences = named(spans, "expertmesh.sequence")
    assert {span.attributes["expertmesh.sequence.id"] for span in sequences} == {"r-1#0~a", "r-1#1~a"}
    assert {span.attributes["gen_ai.usage.output_tokens"] for span in sequences} == {12}
    assert min(span.attributes["expertmesh.first_step"] for span in sequences) == 1
    assert len(named(spans, "expertmesh.decode")) == 2


# Without an endpoint, and with one that is away.


async def test_without_an_endpoint_nothing_is_made() -> None:
    assert open_tracing(settings(""), "gateway-1", "node-1") is None
    worker = FakeWorker("a")
    await run(None, worker)
    assert worker.submitted[0].traceparent == ""


async def test_an_endpoint_that_is_away_is_told_once_and_costs_no_request(unused_tcp_port: int) -> None:
    # The exporter itself tries again for its timeout.
    exporter = OTLPSpanExporter(f"http://127.0.0.1:{unused_tcp_port}/v1/traces", timeout=0.2)
    with logged("info") as lines:
        opened = tracing_to(exporter, settings(""), "gateway-1", "node-1")
        for count in (1, 2, 3):
            await run(opened, FakeWorker("a"))
            opened.close(5.0)
            assert len(lines.of("request_ended")) == count
        assert len(_wait_for(lines, "traces_lost")) == 1
        assert not lines.of("log"), "OpenTelemetry's own lines"
        with collecting(unused_tcp_port) as collector:
            await run(opened, FakeWorker("a"))
            opened.close(5.0)
            collector.wait(lambda spans: len(spans) >= 2)
            (again,) = _wait_for(lines, "traces_sent_again")
    assert again["num_spans"] >= 2


def test_spans_that_cannot_be_sent_do_not_pile_up() -> None:
    class Away(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            assert let_go.wait(60)
            return SpanExportResult.FAILURE

    let_go = threading.Event()
    opened = tracing_to(Away(), settings(""), "gateway-1", "node-1")
    made = [weakref.ref(_span(opened)) for _ in range(3 * tracing_module._MAX_WAITING_SPANS)]
    gc.collect()
    kept = sum(span() is not None for span in made)
    let_go.set()
    opened._provider.shutdown()
    assert kept <= 2 * tracing_module._MAX_WAITING_SPANS, "those that wait, and a batch on its way"


def _span(opened: Tracing) -> Any:
    span = opened.tracer.start_span("x")
    span.end()
    return span


def test_the_endpoint_comes_from_settings_or_from_the_environment() -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert with_endpoint(settings(""), {}).otlp_endpoint == ""
    assert with_endpoint(settings(""), variables).otlp_endpoint == "http://collector:4318"
    assert with_endpoint(settings("http://mine:1"), variables).otlp_endpoint == "http://mine:1"
    for wrong in ("collector:4317", "http://user:word@collector"):
        with pytest.raises(InputError, match=r"otlp_endpoint is .*; it must be"):
            with_endpoint(settings(""), {"OTEL_EXPORTER_OTLP_ENDPOINT": wrong})


@pytest.mark.parametrize("module", ["opentelemetry.exporter.none", "no_such_package.exporter"])
def test_an_exporter_that_is_missing_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(tracing_module, "_EXPORTER", module)
    with pytest.raises(InputError, match=r"pip install 'expertmesh\[tracing\]'"):
        require_exporter("http://collector:4318")


def test_the_path_of_the_endpoint() -> None:
    for endpoint in ("http://c:4318", "http://c:4318/", "http://c:4318/v1/traces", "http://c:4318/v1/traces/"):
        assert tracing_module._traces_url(endpoint) == "http://c:4318/v1/traces"


def _wait_for(lines: Lines, event: str) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + 30
    while not lines.of(event):
        assert time.monotonic() < deadline_s, lines.text
        time.sleep(0.01)
    return lines.of(event)
