"""The Open Inference Protocol over a real gRPC server and fake workers: answers, streams, errors, cancelling."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from expertmesh.cluster.requests import SamplingParams
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.oip import open_inference_pb2
from expertmesh.oip.open_inference_pb2 import ModelInferRequest, ModelStreamInferResponse
from tests.unit.gateway_fakes import EOS_ID, FakeWorker, fake_output, fake_text, fake_token, letter_id, save_tokenizer
from tests.unit.gateway_server import Running, error_of, running, sampling, until
from tests.unit.oip_requests import infer_request, outputs

PROMPT_IDS = tuple(letter_id(letter) for letter in "abc")
STREAM: dict[str, Any] = {"stream": ("BOOL", [True])}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def seeded(seed: int, max_tokens: int = 12, **fields: Any) -> ModelInferRequest:
    return infer_request(parameters={"seed": seed, "max_tokens": max_tokens, **fields.pop("parameters", {})}, **fields)


async def answers(up: Running, *requests: ModelInferRequest) -> list[ModelStreamInferResponse]:
    """Return the responses of one stream of these requests."""
    return [response async for response in up.open_inference.ModelStreamInfer(iter(requests))]


def is_final(response: ModelStreamInferResponse) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


async def test_an_answer_has_text_tokens_finish_reason_usage_and_the_id(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        response = await up.open_inference.ModelInfer(seeded(6, request_id="mine"))
    assert outputs(response) == {
        "text_output": fake_text(PROMPT_IDS, sampling(6)),
        "output_ids": fake_output(PROMPT_IDS, sampling(6)),
        "finish_reason": "length",
    }
    assert (response.model_name, response.model_version, response.id) == ("fake", "1", "mine")
    assert {name: value.int64_param for name, value in response.parameters.items()} == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
    }


async def test_typed_contents_token_ids_chosen_outputs_and_the_prompt_before_the_text(tokenizer: Tokenizer) -> None:
    typed = ModelInferRequest(model_name="fake", model_version="1")
    typed.parameters["seed"].uint64_param = 6
    typed.inputs.add(name="input_ids", datatype="INT64", shape=[3]).contents.int64_contents.extend(PROMPT_IDS)
    typed.inputs.add(name="max_tokens", datatype="INT32", shape=[1, 1]).contents.int_contents.append(12)
    typed.outputs.add(name="text_output")
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        chosen = await up.open_inference.ModelInfer(typed)
        whole = await up.open_inference.ModelInfer(seeded(6, exclude_input_in_output=("BOOL", [False])))
    text = fake_text(PROMPT_IDS, sampling(6))
    assert outputs(chosen) == {"text_output": text}
    assert outputs(whole)["text_output"] == f"abc{text}"
    assert chosen.id == ""


async def test_a_stop_string_cuts_the_text(tokenizer: Tokenizer) -> None:
    text = fake_text(PROMPT_IDS, sampling(6))
    stop = text[4:6]
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        response = await up.open_inference.ModelInfer(seeded(6, parameters={"stop": stop}))
    assert outputs(response)["text_output"] == text[: text.index(stop)]
    assert outputs(response)["finish_reason"] == "stop"


async def test_a_stream_brings_a_response_for_each_piece(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        got = await answers(up, seeded(6, request_id="r", **STREAM))
    pieces = [outputs(one.infer_response) for one in got]
    assert len(got) > 1
    assert "".join(piece["text_output"] for piece in pieces) == fake_text(PROMPT_IDS, sampling(6))
    assert [token for piece in pieces for token in piece["output_ids"]] == fake_output(PROMPT_IDS, sampling(6))
    assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
    assert [is_final(one) for one in got] == [False] * (len(got) - 1) + [True]
    assert {one.infer_response.id for one in got} == {"r"}
    assert got[-1].infer_response.parameters["completion_tokens"].int64_param == 12


@pytest.mark.parametrize("stream", [True, False])
async def test_an_empty_final_response_ends_a_request_when_asked(tokenizer: Tokenizer, stream: bool) -> None:
    wanted = {"triton_enable_empty_final_response": True}
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        got = await answers(up, seeded(6, parameters=wanted, request_id="r", stream=("BOOL", [stream])))
    assert [is_final(one) for one in got] == [False] * (len(got) - 1) + [True]
    assert [bool(one.infer_response.outputs) for one in got] == [True] * (len(got) - 1) + [False]
    assert got[-1].infer_response.id == "r"
    assert (len(got) == 2) is not stream
    text = "".join(outputs(one.infer_response)["text_output"] for one in got[:-1])
    assert text == fake_text(PROMPT_IDS, sampling(6))


async def test_requests_of_one_stream_run_at_once_and_an_error_ends_only_its_own(tokenizer: Tokenizer) -> None:
    begun, short_ended = asyncio.Event(), asyncio.Event()
    got: dict[str, list[ModelStreamInferResponse]] = {}

    def token(prompt_ids: Sequence[int], settings: SamplingParams, position: int) -> int:
        """The long one ends once the short one has: only if both run at once do both end."""
        return EOS_ID if settings.seed == 1 and short_ended.is_set() else fake_token(prompt_ids, settings, position)

    async def requests() -> AsyncIterator[ModelInferRequest]:
        yield seeded(1, 500, request_id="long", **STREAM)
        await begun.wait()
        yield seeded(2, 0, request_id="wrong", **STREAM)
        yield infer_request(None, request_id="none")
        yield seeded(3, 5, request_id="short", **STREAM)
        other = seeded(4)
        other.model_name = "other"
        yield other

    async with running(FakeWorker("a", step_s=0.02, token=token), tokenizer=tokenizer) as up:
        async for one in up.open_inference.ModelStreamInfer(requests()):
            begun.set()
            got.setdefault(one.infer_response.id, []).append(one)
            if one.infer_response.id == "short" and is_final(one):
                short_ended.set()
    ends = {name: outputs(got[name][-1].infer_response)["finish_reason"] for name in ("long", "short")}
    texts = {name: "".join(outputs(one.infer_response)["text_output"] for one in got[name]) for name in ends}
    assert ends == {"long": "stop", "short": "length"}
    assert texts["short"] == fake_text(PROMPT_IDS, sampling(3, 5))
    assert fake_text(PROMPT_IDS, sampling(1, 500)).startswith(texts["long"])
    errors = {name: [one.error_message for one in got[name]] for name in ("wrong", "none", "")}
    assert errors == {
        "wrong": ["request wrong: max_tokens is 0; it must be at least 1"],
        "none": ["request none: no prompt: give the input text_input or input_ids"],
        "": ["model 'other' is not served; 'fake' is"],
    }
    assert all(is_final(got[name][0]) for name in errors)


async def test_without_the_input_stream_there_is_one_response(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        (one,) = await answers(up, seeded(6))
    assert outputs(one.infer_response)["text_output"] == fake_text(PROMPT_IDS, sampling(6))
    assert is_final(one)


async def test_a_stream_without_requests_ends() -> None:
    async with running(FakeWorker("a")) as up:
        assert await answers(up) == []


async def test_a_cancelled_stream_ends_all_its_requests() -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        forever = asyncio.Event()

        async def requests() -> AsyncIterator[ModelInferRequest]:
            for seed in range(3):
                yield infer_request(
                    None, input_ids=("INT32", [5]), parameters={"seed": seed, "max_tokens": 500}, **STREAM
                )
            await forever.wait()

        call = up.open_inference.ModelStreamInfer(requests())
        await call.read()
        await until(lambda: len(worker.live_ids) == 3)
        call.cancel()
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
        assert sorted(worker.cancelled) == sorted(one.sequence_id for one in worker.submitted)


async def test_a_closed_channel_ends_the_requests_of_its_stream() -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        async with grpc.aio.insecure_channel(up.server.address) as channel:
            stub = type(up)(up.server, up.engine, channel).open_inference
            call = stub.ModelStreamInfer(iter([seeded_ids(500)]))
            await call.read()
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)


def seeded_ids(max_tokens: int) -> ModelInferRequest:
    return infer_request(None, input_ids=("INT32", [5]), parameters={"seed": 1, "max_tokens": max_tokens}, **STREAM)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_passed_deadline_leaves_the_batch(is_stream: bool, tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a", step_s=0.02)
    async with running(worker, tokenizer=tokenizer) as up:
        if is_stream:
            call = up.open_inference.ModelStreamInfer(iter([seeded(1, 500, **STREAM)]), timeout=0.3)
        else:
            call = up.open_inference.ModelInfer(seeded(1, 500), timeout=0.3)
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)


async def test_a_request_goes_on_at_another_worker(tokenizer: Tokenizer) -> None:
    """Whichever of the two gets it dies; the pieces stay those of an undisturbed worker."""
    workers = [FakeWorker("a"), FakeWorker("b")]
    async with running(*workers, tokenizer=tokenizer) as up:
        call = up.open_inference.ModelStreamInfer(iter([seeded(6, 200, **STREAM)]))
        texts: list[str] = []
        async for one in call:
            texts.append(outputs(one.infer_response)["text_output"])
            if len(texts) == 1:
                next(worker for worker in workers if worker.live_ids).kill()
    assert "".join(texts) == fake_text(PROMPT_IDS, sampling(6, 200))
    assert all(worker.submitted for worker in workers)


async def test_errors_of_an_answer_are_statuses(tokenizer: Tokenizer) -> None:
    other, version = seeded(6), seeded(6)
    other.model_name, version.model_version = "other", "2"
    short = seeded(6)
    short.raw_input_contents[0] = b"\3\0\0"
    cases = {
        "stream: ModelInfer gives one response; use ModelStreamInfer": seeded(6, **STREAM),
        "text_input: its raw contents end after 3 bytes, element 0 needs 4 of them": short,
        "temperature is -1.0; it must be at least 0": seeded(6, parameters={"temperature": -1}),
    }
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        for message, request in cases.items():
            error = await error_of(up.open_inference.ModelInfer(request))
            assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
        for request, message in (
            (other, "model 'other' is not served; 'fake' is"),
            (version, "version '2' of 'fake' is not served; '1' is"),
        ):
            error = await error_of(up.open_inference.ModelInfer(request))
            assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, message)
        assert (up.engine.meter.ended["INVALID_ARGUMENT"], up.engine.meter.ended["INTERNAL"]) == (3, 0)


async def test_full_workers_and_faults(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async with running(FakeWorker("a", capacity=0), tokenizer=tokenizer) as up:
        error = await error_of(up.open_inference.ModelInfer(seeded(6)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (one,) = await answers(up, seeded(6))
        assert "a is full" in one.error_message
    async with running(FakeWorker("a", failed="secret cause"), tokenizer=tokenizer) as up:
        error = await error_of(up.open_inference.ModelInfer(seeded(6, request_id="find-me")))
        assert error.code() is grpc.StatusCode.INTERNAL
        (one,) = await answers(up, seeded(6, request_id="find-me-too"))
    told = "request find-me-too: internal error; look for find-me-too in the gateway's log"
    assert one.error_message == told
    assert "secret cause" in caplog.text


async def test_a_long_prompt_is_read_beside_the_loop(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        error = await error_of(up.open_inference.ModelInfer(infer_request("x" * 10_000)))
    assert "10000 tokens" in (error.details() or "")


async def test_liveness_readiness_and_the_server(tokenizer: Tokenizer) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        stub = up.open_inference

        async def readiness() -> list[bool]:
            asked = [("fake", ""), ("fake", "1"), ("fake", "2"), ("other", "")]
            ready = [
                (await stub.ModelReady(open_inference_pb2.ModelReadyRequest(name=name, version=version))).ready
                for name, version in asked
            ]
            return [(await stub.ServerReady(open_inference_pb2.ServerReadyRequest())).ready, *ready]

        assert (await stub.ServerLive(open_inference_pb2.ServerLiveRequest())).live
        assert await readiness() == [False] * 5
        await up.server.set_serving(True)
        assert await readiness() == [True, True, True, False, False]
        server = await stub.ServerMetadata(open_inference_pb2.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("expertmesh", ["model_configuration"])
    assert server.version[0].isdigit()


async def test_metadata_and_configuration_name_the_same_tensors() -> None:
    async with running(FakeWorker("a")) as up:
        metadata = await up.open_inference.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="fake"))
        asked = open_inference_pb2.ModelConfigRequest(name="fake", version="1")
        config = (await up.open_inference.ModelConfig(asked)).config
        error = await error_of(up.open_inference.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="other")))
        config_error = await error_of(
            up.open_inference.ModelConfig(open_inference_pb2.ModelConfigRequest(name="fake", version="9"))
        )
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("fake", ["1"], "expertmesh_safetensors")
    inputs = {one.name: (one.datatype, list(one.shape)) for one in metadata.inputs}
    assert inputs["text_input"] == ("BYTES", [1])
    assert inputs["input_ids"] == ("INT32", [-1])
    assert inputs["sampling_parameters"] == ("BYTES", [1])
    assert (inputs["stream"], inputs["temperature"], inputs["stop"]) == (("BOOL", [1]), ("FP32", [1]), ("BYTES", [-1]))
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.outputs] == [
        ("text_output", "BYTES", [1]),
        ("output_ids", "INT32", [-1]),
        ("finish_reason", "BYTES", [1]),
    ]
    assert {one.name: list(one.dims) for one in config.input} == {name: shape for name, (_, shape) in inputs.items()}
    assert all(one.optional for one in config.input)
    assert [one.data_type for one in config.output] == [13, 8, 13]
    assert (config.name, config.backend, config.max_batch_size) == ("fake", "expertmesh", 0)
    assert config.model_transaction_policy.decoupled
    assert (error.code(), config_error.code()) == (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
