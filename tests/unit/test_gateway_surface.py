"""What the gRPC surface has beside generation: tokens and text, the model, load reports, error details, limits."""

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.settings import GrpcSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1 import inference_pb2
from expertmesh.v1.admin_pb2 import LoadReport, WatchLoadRequest
from expertmesh.v1.inference_pb2 import DetokenizeRequest, GenerateRequest, GetModelRequest, TokenizeRequest
from tests.unit.gateway_fakes import MODEL, FakeWorker, letter_id, save_tokenizer
from tests.unit.gateway_server import Running, error_of, request, running


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """Return the sole google.rpc detail of an error, which must agree with its status."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (packed,) = status.details
    message = kind()
    assert packed.Unpack(message), packed.type_url
    return message


@pytest.mark.parametrize("text", ["", "a few words", "x" * 10_000])
async def test_text_becomes_tokens_and_text_again(tokenizer: Tokenizer, text: str) -> None:
    async with running(tokenizer=tokenizer) as up:
        tokens = await up.inference.Tokenize(TokenizeRequest(text=text))
        assert list(tokens.token_ids) == [letter_id(letter) for letter in text]
        back = await up.inference.Detokenize(DetokenizeRequest(token_ids=tokens.token_ids))
    assert back.text == text


async def test_without_a_tokenizer_there_are_no_texts() -> None:
    async with running() as up:
        for call, field in (
            (up.inference.Tokenize(TokenizeRequest(text="a")), "text"),
            (up.inference.Detokenize(DetokenizeRequest(token_ids=[1])), "token_ids"),
        ):
            error = await error_of(call)
            assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "fake has no tokenizer")
            assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == field


async def test_a_token_outside_the_vocabulary_has_no_text(tokenizer: Tokenizer) -> None:
    async with running(tokenizer=tokenizer) as up:
        error = await error_of(up.inference.Detokenize(DetokenizeRequest(token_ids=[1, 257])))
    assert error.details() == "token id 257 is outside the vocabulary of 257 tokens"
    assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == "token_ids"


async def test_the_model_is_told_field_by_field() -> None:
    async with running() as up:
        model = await up.inference.GetModel(GetModelRequest())
    assert model == inference_pb2.Model(
        name="fake",
        architecture="FakeMoeForCausalLM",
        dtype="float32",
        vocab_size=257,
        max_context=512,
        eos_token_ids=MODEL.eos_token_ids,
        has_tokenizer=True,
    )


BAD: dict[str, dict[str, Any]] = {
    "request_id": {"request_id": ""},
    "n": {"n": 65},
    "stop": {"stop": [""]},
    "token_ids": {"token_ids": inference_pb2.TokenIds(ids=[999])},
    "max_tokens": {"max_tokens": 5000},
    "temperature": {"temperature": -1.0},
    "top_k": {"top_k": -1},
    "top_p": {"top_p": 0.0},
    "min_p": {"min_p": 2.0},
    "repetition_penalty": {"repetition_penalty": 0.0},
    "seed": {"seed": 1 << 63},
    "stop_token_ids": {"stop_token_ids": [999]},
    "logprobs": {"logprobs": 21},
    "prompt": {"token_ids": None},
    "text": {"token_ids": None, "text": ""},
}


@pytest.mark.parametrize("field", BAD)
async def test_invalid_argument_names_the_field(tokenizer: Tokenizer, field: str) -> None:
    fields = {"token_ids": inference_pb2.TokenIds(ids=[1]), **BAD[field]}
    async with running(tokenizer=tokenizer) as up:
        error = await error_of(up.inference.GenerateOnce(GenerateRequest(**fields)))
    (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == (field, error.details())


async def test_no_room_says_when_to_try_again() -> None:
    async with running(FakeWorker("a", capacity=0)) as up:
        error = await error_of(up.inference.Generate(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000


def test_an_input_error_keeps_its_field_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("n is 0", field="n")))  # noqa: S301 - our own bytes
    assert (str(error), error.field) == ("n is 0", "n")


class Loads:
    """Counts that a test lays out look by look; the last one stays."""

    def __init__(self, *looks: tuple[list[int], int]) -> None:
        self._looks: Iterator[tuple[list[int], int]] = iter(looks)

    async def __call__(self) -> list[dict[str, object]]:
        look = next(self._looks, None)
        if look is None:
            raise UnavailableError("the controller is away")
        return [{"layer": 3, "tokens": look[0], "decode_tokens": look[1]}]


async def reports(loads: Loads, period_s: float | None = 0.1) -> tuple[list[LoadReport], grpc.aio.AioRpcError]:
    got: list[LoadReport] = []

    async def watch(up: Running) -> None:
        async for report in up.admin.WatchLoad(WatchLoadRequest(period_s=period_s)):
            got.append(report)  # noqa: PERF401 - those before the error are wanted

    async with running(loads=loads) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch(up)
    return got, caught.value


async def test_a_watcher_gets_differences_until_the_controller_is_away() -> None:
    got, error = await reports(Loads(([5, 0], 2), ([7, 1], 3), ([7, 1], 3), ([7, 2**40], 4)))
    layers = [[(layer.layer, list(layer.tokens), layer.decode_tokens) for layer in report.layers] for report in got]
    assert layers == [[(3, [2, 1], 1)], [(3, [0, 0], 0)], [(3, [0, 2**40 - 1], 1)]]
    assert all(report.interval_s >= 0.1 for report in got)
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_interval_in_which_a_count_fell_is_left_out() -> None:
    got, _ = await reports(Loads(([5, 0], 0), ([1, 0], 0), ([4, 0], 0), ([5, 0], -1), ([5, 2], 0)))
    assert [list(report.layers[0].tokens) for report in got] == [[3, 0], [0, 2]]


@pytest.mark.parametrize("period_s", [0.0, -1.0, 0.01, 3601.0, float("nan"), float("inf")])
async def test_a_period_out_of_range_is_refused(period_s: float) -> None:
    got, error = await reports(Loads(([1], 0)), period_s)
    assert (got, error.code()) == ([], grpc.StatusCode.INVALID_ARGUMENT)
    assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == "period_s"


async def test_a_watcher_that_goes_away_ends_its_looks() -> None:
    looks = 0

    async def loads() -> list[dict[str, object]]:
        nonlocal looks
        looks += 1
        return [{"layer": 0, "tokens": [looks], "decode_tokens": 0}]

    async with running(loads=loads) as up:
        call = up.admin.WatchLoad(WatchLoadRequest(period_s=0.1))
        await call.read()
        call.cancel()
        await asyncio.sleep(0.15)
        seen = looks
        await asyncio.sleep(0.3)
    assert looks == seen


async def test_a_message_beyond_the_limit_is_refused_and_one_within_is_not(tokenizer: Tokenizer) -> None:
    async with running(tokenizer=tokenizer, settings=GrpcSettings(max_message_bytes=1 << 16)) as up:
        assert len((await up.inference.Tokenize(TokenizeRequest(text="x" * 60_000))).token_ids) == 60_000
        error = await error_of(up.inference.Tokenize(TokenizeRequest(text="x" * 70_000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-status-details-bin" not in dict(error.trailing_metadata()), "it would fit no better later"


async def test_each_service_has_a_health_of_its_own() -> None:
    async with running() as up:
        stub = health_pb2_grpc.HealthStub(up.channel)
        for serving in (False, True):
            await up.server.set_serving(serving)
            for service, expected in (("expertmesh.v1.Inference", serving), ("expertmesh.v1.Admin", True)):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is expected, service
        error = await error_of(stub.Check(health_pb2.HealthCheckRequest(service="no.such")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_who_watches_health_sees_the_server_drain() -> None:
    async with running() as up:
        await up.server.set_serving(True)
        watch = health_pb2_grpc.HealthStub(up.channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.ensure_future(up.server.stop(grace_s=0.5))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stopping
