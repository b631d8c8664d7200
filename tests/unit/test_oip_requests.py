"""Settings of requests of the Open Inference Protocol, wherever they are given, and the prompts."""

from dataclasses import replace
from typing import Any

import pytest

from expertmesh.actors.gateway.oip_requests import InferRequest, InferRequestReader
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.requests import SamplingParams
from expertmesh.oip.open_inference_pb2 import ModelInferRequest
from tests.unit.gateway_fakes import EOS_ID, MODEL, letter_id, save_tokenizer
from tests.unit.oip_requests import infer_request, sampling_parameters

PROMPT_IDS = tuple(letter_id(letter) for letter in "abc")
SETTINGS: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "seed": 2**62,
}
SAMPLING = SamplingParams(**SETTINGS, stop_token_ids=(EOS_ID,))
TENSORS: dict[str, Any] = {
    "max_tokens": ("INT32", [7]),
    "temperature": ("FP32", [0.5]),
    "top_k": ("UINT32", [5]),
    "top_p": ("FP64", [0.25]),
    "min_p": ("FP32", [0.125]),
    "repetition_penalty": ("FP32", [1.5]),
    "seed": ("UINT64", [2**62]),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> InferRequestReader:
    return InferRequestReader(model=MODEL, tokenizer=save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def read(reader: InferRequestReader, request: ModelInferRequest) -> InferRequest:
    return reader.read(request, request_id=request.id or "drawn", default_seed=3)


def error_of(reader: InferRequestReader, request: ModelInferRequest) -> InputError:
    with pytest.raises(InputError) as caught:
        read(reader, request)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "request_",
    [
        infer_request(parameters=SETTINGS),
        infer_request(parameters={name: str(value) for name, value in SETTINGS.items()}),
        infer_request(sampling_parameters=sampling_parameters(**SETTINGS, stop=None)),
        # As the client of Triton's vLLM backend writes them.
        infer_request(sampling_parameters=sampling_parameters(**{n: str(v) for n, v in SETTINGS.items()})),
        infer_request(**TENSORS),
    ],
    ids=["parameters", "parameters as strings", "sampling_parameters", "sampling_parameters as strings", "tensors"],
)
def test_settings_are_taken_wherever_they_are_given(reader: InferRequestReader, request_: ModelInferRequest) -> None:
    asked = read(reader, request_)
    assert asked.valid.sampling == (SAMPLING,)
    assert asked.valid.prompt_ids == PROMPT_IDS


def test_what_is_not_given_is_as_over_the_gateways_own_protocol(reader: InferRequestReader) -> None:
    asked = read(reader, infer_request())
    assert asked.valid.sampling == (SamplingParams(max_tokens=128, seed=3, stop_token_ids=(EOS_ID,)),)
    assert (asked.valid.request_id, asked.client_id) == ("drawn", "")
    assert (asked.stream, asked.echo, asked.empty_final_response) == (False, "", False)
    assert [spec.name for spec in asked.outputs] == ["text_output", "output_ids", "finish_reason"]


def test_a_tensor_wins_over_sampling_parameters_and_these_over_parameters(reader: InferRequestReader) -> None:
    request = infer_request(
        parameters={"max_tokens": 1, "top_k": 1, "seed": 1},
        sampling_parameters=sampling_parameters(max_tokens=2, top_k=2),
        max_tokens=("INT64", [4]),
    )
    (sampling,) = read(reader, request).valid.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (4, 2, 1)


@pytest.mark.parametrize(
    ("request_", "stop"),
    [
        (infer_request(parameters={"stop": "x"}), ("x",)),
        (infer_request(stop=("BYTES", [b"x", "ü".encode()])), ("x", "ü")),
        (infer_request(sampling_parameters=sampling_parameters(stop=["x", "y"])), ("x", "y")),
    ],
)
def test_stop_strings(reader: InferRequestReader, request_: ModelInferRequest, stop: tuple[str, ...]) -> None:
    assert read(reader, request_).valid.stop == stop


def test_stop_tokens_the_end_of_sequence_the_id_and_the_outputs(reader: InferRequestReader) -> None:
    request = infer_request(
        parameters={"ignore_eos": True, "triton_enable_empty_final_response": True},
        sampling_parameters=sampling_parameters(stop_token_ids=[4, 5], n=1),
        stream=("BOOL", [True]),
        request_id="mine",
    )
    request.outputs.add(name="finish_reason")
    request.outputs.add(name="text_output")
    asked = read(reader, request)
    assert asked.valid.sampling[0].stop_token_ids == (4, 5)
    assert (asked.valid.request_id, asked.client_id) == ("mine", "mine")
    assert (asked.stream, asked.empty_final_response) == (True, True)
    assert [spec.name for spec in asked.outputs] == ["text_output", "finish_reason"]


@pytest.mark.parametrize("datatype", ["INT32", "INT64", "UINT32", "UINT64"])
def test_token_ids_are_a_prompt(reader: InferRequestReader, datatype: str) -> None:
    asked = read(reader, infer_request(None, input_ids=(datatype, PROMPT_IDS)))
    assert asked.valid.prompt_ids == PROMPT_IDS


def test_the_input_stands_before_the_output_when_asked(reader: InferRequestReader) -> None:
    assert read(reader, infer_request(exclude_input_in_output=("BOOL", [False]))).echo == "abc"
    assert read(reader, infer_request(exclude_input_in_output=("BOOL", [True]))).echo == ""


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (infer_request(None), "text_input", "no prompt: give the input text_input or input_ids"),
        (
            infer_request(input_ids=("INT32", [1])),
            "input_ids",
            "text_input and input_ids are both given; only one may be",
        ),
        (infer_request(""), "text_input", "text_input: the prompt is empty"),
        (infer_request(None, input_ids=("INT32", [])), "input_ids", "input_ids: the prompt is empty"),
        (
            infer_request(None, input_ids=("INT32", [1, -1])),
            "input_ids",
            "input_ids: token id -1 is outside the vocabulary of 257 tokens",
        ),
        (infer_request(None, text_input=("BYTES", [b"\xff"])), "text_input", "text_input is not UTF-8: "),
        (infer_request("x" * 600), "text_input", "text_input: the prompt of 600 tokens leaves no room in the context"),
        (infer_request(request_id="x" * 129), "id", "id: request_id has 129 characters"),
        (infer_request(parameters={"max_tokens": 0}), "max_tokens", "max_tokens is 0; it must be at least 1"),
        (infer_request(parameters={"temperature": -1.0}), "temperature", "temperature is -1.0; it must be at least 0"),
        (infer_request(parameters={"n": 2}), "n", "n is 2; it must be 1: a request has one sample"),
        (infer_request(parameters={"best_of": 2}), "best_of", "best_of is not served; settings are max_tokens, "),
        (infer_request(parameters={"priority": 2}), "priority", "priority is not served"),
        (infer_request(parameters={"triton_other": True}), "triton_other", "triton_other is not served"),
        (infer_request(parameters={"max_tokens": True}), "max_tokens", "max_tokens is True; it must be a whole number"),
        (infer_request(parameters={"max_tokens": 1.5}), "max_tokens", "max_tokens is 1.5; it must be a whole number"),
        (infer_request(parameters={"top_k": "many"}), "top_k", "top_k is 'many'; it must be a whole number"),
        (infer_request(parameters={"top_k": "9" * 5000}), "top_k", "it must be a whole number"),
        (infer_request(parameters={"max_tokens": 2**40}), "max_tokens", "it must be from -2147483647 to 2147483647"),
        (infer_request(parameters={"seed": -1}), "seed", "seed is -1; it must be from 0 to 9223372036854775807"),
        (infer_request(parameters={"temperature": "inf"}), "temperature", "temperature is 'inf'; it must be finite"),
        (
            infer_request(parameters={"temperature": "warm"}),
            "temperature",
            "temperature is 'warm'; it must be a number",
        ),
        (infer_request(temperature=("FP32", [float("nan")])), "temperature", "temperature is nan; it must be finite"),
        (infer_request(parameters={"ignore_eos": 1}), "ignore_eos", "ignore_eos is 1; it must be true or false"),
        (infer_request(stop=("BYTES", [b"\xff"])), "stop", "stop is not UTF-8"),
        (
            infer_request(sampling_parameters=sampling_parameters(stop=[3])),
            "stop",
            "stop is [3]; it must be a string or a list of strings",
        ),
        (
            infer_request(sampling_parameters=("BYTES", [rb'{"stop": "\ud800"}'])),
            "stop",
            "it must be valid Unicode",
        ),
        (
            infer_request(sampling_parameters=sampling_parameters(stop_token_ids=[257])),
            "stop_token_ids",
            "stop token id 257 is outside the vocabulary",
        ),
        (
            infer_request(sampling_parameters=("BYTES", [b"max_tokens=3"])),
            "sampling_parameters",
            "sampling_parameters is no JSON: ",
        ),
        (
            infer_request(sampling_parameters=("BYTES", [b"[" * 100_000])),
            "sampling_parameters",
            "sampling_parameters is no JSON: ",
        ),
        (
            infer_request(sampling_parameters=("BYTES", [b"[3]"])),
            "sampling_parameters",
            "sampling_parameters must be a JSON object, found list",
        ),
        (
            infer_request(sampling_parameters=("BYTES", [b'{"top_p": NaN}'])),
            "top_p",
            "top_p is nan; it must be finite",
        ),
        (
            infer_request(exclude_input_in_output=("BOOL", [False]), stream=("BOOL", [True])),
            "exclude_input_in_output",
            "exclude_input_in_output must be true with stream",
        ),
        (
            infer_request(None, input_ids=("INT32", [1]), exclude_input_in_output=("BOOL", [False])),
            "exclude_input_in_output",
            "exclude_input_in_output must be true with input_ids",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    reader: InferRequestReader, request_: ModelInferRequest, field: str, message: str
) -> None:
    error = error_of(reader, request_)
    assert error.field == field
    assert message in str(error)


def test_a_parameter_without_a_value_is_refused(reader: InferRequestReader) -> None:
    request = infer_request()
    request.parameters["top_k"].Clear()
    assert str(error_of(reader, request)) == "top_k: the parameter has no value"


def test_unknown_outputs_and_their_parameters_are_refused(reader: InferRequestReader) -> None:
    request = infer_request()
    request.outputs.add(name="logits")
    assert str(error_of(reader, request)).startswith("logits: there is no such output; there are text_output, ")
    request = infer_request()
    request.outputs.add(name="text_output").parameters["classification"].int64_param = 3
    assert str(error_of(reader, request)) == "text_output: parameter classification is not served"


def test_without_a_tokenizer_there_is_no_text() -> None:
    reader = InferRequestReader(model=replace(MODEL, has_tokenizer=False), tokenizer=None)
    assert str(error_of(reader, infer_request(None))) == "no prompt: give the input input_ids"
    assert str(error_of(reader, infer_request())).startswith("text_input: there is no such input; there are input_ids")
    asked = read(reader, infer_request(None, input_ids=("INT32", [1, 2])))
    assert [spec.name for spec in asked.outputs] == ["output_ids", "finish_reason"]
    request = infer_request(None, input_ids=("INT32", [1, 2]))
    request.outputs.add(name="text_output")
    assert "text_output: there is no such output" in str(error_of(reader, request))
