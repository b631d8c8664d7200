"""A real gRPC server over fake workers: status codes, streams, health, reflection, ports."""

import asyncio
import random
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expertmesh.actors.gateway.admin_service import AdminService
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.inference_service import InferenceService
from expertmesh.actors.gateway.oip_service import OpenInferenceService
from expertmesh.actors.gateway.server import start_server
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1 import admin_pb2, inference_pb2
from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse
from tests.unit.gateway_fakes import MODEL, FakeOperations, FakeWorker, fake_output, fake_text, save_tokenizer
from tests.unit.gateway_server import error_of, get_loads, get_status, request, running, sampling, until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


async def test_a_stream_brings_tokens_text_usage_and_the_request_id(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        responses = [one async for one in up.inference.Generate(request(seed=6, request_id="mine"))]
    assert [token for one in responses for token in one.token_ids] == fake_output((10, 20, 30), sampling(6))
    assert "".join(one.text for one in responses) == fake_text((10, 20, 30), sampling(6))
    assert {one.request_id for one in responses} == {"mine"}
    assert [one.HasField("usage") for one in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (responses[-1].usage.prompt_tokens, responses[-1].usage.completion_tokens) == (3, 12)


async def test_generate_once_gathers_all_samples_with_their_logprobs(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        response = await up.inference.GenerateOnce(request(seed=6, n=3, logprobs=2))
    assert [output.index for output in response.outputs] == [0, 1, 2]
    assert list(response.outputs[0].token_ids) == fake_output((10, 20, 30), sampling(6))
    assert response.outputs[0].text == fake_text((10, 20, 30), sampling(6))
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 36)
    assert len(response.request_id) == 32
    third = response.outputs[0].logprobs[2]
    assert (third.token_id, third.logprob) == (response.outputs[0].token_ids[2], -0.5)
    assert [(top.token_id, top.logprob) for top in third.top] == [(0, 0.0), (1, -1.0)]


async def test_a_request_without_a_seed_is_drawn_anew_each_time() -> None:
    async with running(FakeWorker("a")) as up:
        answers = [await up.inference.GenerateOnce(request()) for _ in range(2)]
    assert answers[0].outputs[0].token_ids != answers[1].outputs[0].token_ids
    assert answers[0].request_id != answers[1].request_id


async def test_wrong_input_is_invalid_argument_and_leaves_others_alone() -> None:
    async with running(FakeWorker("a")) as up:
        good = asyncio.ensure_future(up.inference.GenerateOnce(request(max_tokens=100)))
        for call in (up.inference.Generate, up.inference.GenerateOnce):
            error = await error_of(call(request(999)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == "token id 999 is outside the vocabulary of 257 tokens"
        assert len((await good).outputs[0].token_ids) == 100


async def test_a_long_text_prompt_is_tokenised_beside_the_loop(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        error = await error_of(up.inference.GenerateOnce(GenerateRequest(text="x" * 10_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "10000 tokens" in (error.details() or "")


async def test_full_workers_are_resource_exhausted_with_a_retry_delay() -> None:
    async with running(FakeWorker("a", capacity=0)) as up:
        error = await error_of(up.inference.Generate(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


async def test_a_fault_is_internal_with_the_request_id_and_the_cause_in_the_log_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(FakeWorker("a", failed="secret cause")) as up:
        error = await error_of(up.inference.Generate(request(request_id="find-me")))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "find-me" in (error.details() or "")
    assert "secret" not in (error.details() or "")
    assert "secret cause" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
async def test_a_cancelled_call_leaves_the_batch(method: str) -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        call = getattr(up.inference, method)(request(max_tokens=500))
        reading = asyncio.ensure_future(error_of(call)) if method == "GenerateOnce" else None
        if reading is None:
            assert isinstance(await call.read(), GenerateResponse)
        await until(lambda: bool(worker.live_ids))
        call.cancel()
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
        assert worker.cancelled == [worker.submitted[0].sequence_id]
        if reading is not None:
            with pytest.raises(asyncio.CancelledError):
                await reading


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
async def test_a_passed_deadline_leaves_the_batch(method: str) -> None:
    worker = FakeWorker("a", step_s=0.02)
    async with running(worker) as up:
        error = await error_of(getattr(up.inference, method)(request(max_tokens=500), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
        await until(lambda: worker.cancelled == [worker.submitted[0].sequence_id])


async def test_without_a_worker_a_call_waits_until_its_deadline() -> None:
    async with running() as up:
        error = await error_of(up.inference.Generate(request(), timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: up.engine.num_live_requests == 0)


async def test_status_arrives_field_by_field() -> None:
    async with running() as up:
        status = await up.admin.GetStatus(admin_pb2.GetStatusRequest())
    assert (status.plan, status.epoch, status.balancedness, status.controller.pid) == (
        "2 shards, 1 worker",
        3,
        0.875,
        11,
    )
    assert [(shard.id, shard.weight_bytes) for shard in status.shards] == [("s0", 2**33), ("s1", 2**33)]
    assert (status.workers[0].free_pages, status.workers[0].tokens_generated) == (60, 2**35)
    assert (status.model.name, list(status.model.moe_layers), status.model.has_tokenizer) == ("fake", [0, 1], True)
    assert (status.layer_traffic[0].dispatch_bytes, status.ready, status.not_ready_reason) == (100, True, "")


async def test_loads_arrive_in_order_of_layer() -> None:
    async with running() as up:
        loads = await up.admin.GetLoads(admin_pb2.GetLoadsRequest())
    assert [(layer.layer, list(layer.tokens), layer.decode_tokens) for layer in loads.layers] == [
        (0, [1, 2, 3, 4], 5),
        (1, [0, 0, 0, 2**40], 2**39),
    ]


async def test_a_controller_that_is_away_is_unavailable() -> None:
    async def away() -> dict[str, object]:
        raise UnavailableError("the controller is away")

    async with running(status=away) as up:
        error = await error_of(up.admin.GetStatus(admin_pb2.GetStatusRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the controller is away")


async def test_a_status_with_an_unknown_field_is_internal(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong() -> dict[str, object]:
        return {"no_such_field": 1}

    async with running(status=wrong) as up:
        error = await error_of(up.admin.GetStatus(admin_pb2.GetStatusRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "no_such_field" in caplog.text


async def test_health_follows_set_serving() -> None:
    async with running() as up:
        stub = health_pb2_grpc.HealthStub(up.channel)
        for serving in (True, False, True):
            await up.server.set_serving(serving)
            for name in ("", "expertmesh.v1.Inference", "inference.GRPCInferenceService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is serving


async def test_a_server_is_not_serving_until_told() -> None:
    async with running() as up:
        stub = health_pb2_grpc.HealthStub(up.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services() -> None:
    async with running() as up:
        stub = reflection_pb2_grpc.ServerReflectionStub(up.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
    names = {service.name for service in answers[0].list_services_response.service}
    ours = {"expertmesh.v1.Inference", "expertmesh.v1.Admin", "inference.GRPCInferenceService"}
    assert ours | {"grpc.health.v1.Health"} <= names


async def test_a_port_in_use_is_an_input_error() -> None:
    async with running() as up:
        with pytest.raises(InputError, match=rf"cannot listen on 127.0.0.1:{up.server.port}: .*in use"):
            await _start_on("127.0.0.1", up.server.port)


async def test_a_port_held_by_another_program_is_an_input_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="in use"):
        await _start_on("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no such host", 0), ("127.0.0.1", 70_000)])
async def test_an_address_that_is_not_of_this_machine_is_an_input_error(host: str, port: int) -> None:
    with pytest.raises(InputError, match="cannot listen on"):
        await _start_on(host, port)


async def _start_on(host: str, port: int) -> None:
    rng = random.Random(0)
    engine = Engine(tokenizer=None, rng=rng)
    await start_server(
        host=host,
        port=port,
        inference=InferenceService(engine, MODEL, None, rng),
        open_inference=OpenInferenceService(engine, MODEL, None, rng),
        admin=AdminService(get_status, get_loads, FakeOperations()),
    )
