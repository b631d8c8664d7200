"""Requests and answers of the Open Inference Protocol as tests write and read them."""

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertmesh.oip.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse

DTYPES = {
    "BOOL": np.dtype("?"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
PROMPT = "abc"
# What a test gives for a tensor: its data type and its elements.
Given = tuple[str, Sequence[Any]]


def infer_request(
    text: str | None = PROMPT, *, parameters: dict[str, object] | None = None, request_id: str = "", **tensors: Given
) -> ModelInferRequest:
    """Return a request with raw contents; `text` is its text_input."""
    request = ModelInferRequest(model_name="fake", id=request_id)
    prompt = {} if text is None else {"text_input": ("BYTES", [text.encode()])}
    for name, (datatype, values) in {**prompt, **tensors}.items():
        request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        request.raw_input_contents.append(raw(datatype, values))
    for name, value in (parameters or {}).items():
        request.parameters[name].CopyFrom(parameter(value))
    return request


def sampling_parameters(**fields: object) -> Given:
    return ("BYTES", [json.dumps(fields).encode()])


def parameter(value: object) -> InferParameter:
    """Return a parameter as tritonclient writes one."""
    if isinstance(value, bool):
        return InferParameter(bool_param=value)
    if isinstance(value, int):
        return InferParameter(int64_param=value)
    if isinstance(value, float):
        return InferParameter(double_param=value)
    assert isinstance(value, str)
    return InferParameter(string_param=value)


def raw(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return np.array(values, dtype=DTYPES[datatype]).tobytes()


def outputs(response: ModelInferResponse) -> dict[str, Any]:
    """Return a response's tensors by name: a text for BYTES of one element, else a list."""
    read: dict[str, Any] = {}
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            assert list(output.shape) == [1]
            assert struct.unpack_from("<I", content)[0] == len(content) - 4
            read[output.name] = content[4:].decode()
        else:
            read[output.name] = np.frombuffer(content, dtype=DTYPES[output.datatype]).tolist()
            assert list(output.shape) == [len(read[output.name])]
    return read
