"""One trace of a request through real processes: the gateway's spans, and those of the workers that it was at."""

from collections.abc import Iterator

import psutil
import pytest

from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server, serving
from tests.otlp import Collector, Received, collecting, named

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
REQUEST = "text_completion pocket-moe"
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--shards", "2", "--replicas", "2", "--workers", "1"]
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    with serving(POCKET, tmp_path_factory.mktemp("tracing"), *options, env=env) as started:
        yield started


def generate(server: Server, trace_id: str, *, kill: bool = False) -> int:
    """Generate within a trace, and kill the worker once a part has come; return how many tokens came."""
    request = GenerateRequest(token_ids=TokenIds(ids=[40, 41, 42]), max_tokens=NUM_TOKENS, ignore_eos=True)
    metadata = (("traceparent", f"00-{trace_id}-{PARENT_ID}-01"),)
    (worker,) = server.status().workers
    count = 0
    with server.channel() as channel:
        for response in InferenceStub(channel).Generate(request, timeout=100, metadata=metadata):
            before, count = count, count + len(response.token_ids)
            if kill and before < NUM_TOKENS // 10 <= count:
                psutil.Process(worker.pid).kill()
    return count


def trace_of(collector: Collector, trace_id: str) -> list[Received]:
    """Return the spans of a trace once its request and a worker have sent theirs."""

    def own(spans: list[Received]) -> list[Received]:
        return [span for span in spans if span.trace_id == trace_id]

    wanted = {REQUEST, "expertmesh.sequence", "expertmesh.decode"}
    return own(collector.wait(lambda spans: wanted <= {span.name for span in own(spans)}))


def test_gateway_and_worker_make_one_trace(server: Server, collector: Collector) -> None:
    assert generate(server, TRACE_ID) == NUM_TOKENS
    spans = trace_of(collector, TRACE_ID)
    (request,), (stay,) = named(spans, REQUEST), named(spans, "expertmesh.stay")
    (sequence,) = named(spans, "expertmesh.sequence")
    assert request.process.startswith("gateway-")
    assert sequence.process == stay.attributes["expertmesh.worker"]
    assert [request.parent_id, stay.parent_id, sequence.parent_id] == [PARENT_ID, request.span_id, stay.span_id]
    assert sequence.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    seconds = (sequence.end_ns - sequence.start_ns) / 1e9
    assert 0 < sequence.attributes["expertmesh.expert_wait_s"] < seconds
    parts = [named(spans, f"expertmesh.{name}")[0] for name in ("queue", "prefill", "decode")]
    assert {part.parent_id for part in parts} == {sequence.span_id}
    assert len(spans) == 6, "and none for a step, a layer or a token"


def test_a_request_whose_worker_is_killed_has_two_stays(server: Server, collector: Collector) -> None:
    trace_id = TRACE_ID[::-1]
    assert generate(server, trace_id, kill=True) == NUM_TOKENS, "it waits for the worker to be started again"
    spans = trace_of(collector, trace_id)
    (request,), stays = named(spans, REQUEST), named(spans, "expertmesh.stay")
    assert (request.parent_id, request.is_error) == (PARENT_ID, False)
    assert len(stays) >= 2
    assert {stay.parent_id for stay in stays} == {request.span_id}
    assert [stay.links for stay in stays] == [(), *((stay.span_id,) for stay in stays[:-1])]
    assert [stay.is_error for stay in stays] == [True] * (len(stays) - 1) + [False]
    (sequence,) = named(spans, "expertmesh.sequence")  # of the killed one the gateway alone can tell
    assert sequence.parent_id == stays[-1].span_id
    assert sequence.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert stays[-1].attributes["expertmesh.former_output_tokens"] >= NUM_TOKENS // 10
