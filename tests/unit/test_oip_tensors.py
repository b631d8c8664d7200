"""Tensors of the Open Inference Protocol: typed and raw, and what is wrong with them."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.actors.gateway.oip_schema import DataType, TensorSpec, input_specs
from expertmesh.actors.gateway.oip_tensors import read_tensors, to_raw
from expertmesh.cluster.errors import InputError
from expertmesh.oip.open_inference_pb2 import ModelInferRequest
from tests.unit.gateway_fakes import MODEL
from tests.unit.oip_requests import infer_request, raw

SPECS = input_specs(MODEL)
CONTENTS = {
    "BOOL": ("bool_contents", st.booleans()),
    "INT32": ("int_contents", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", st.integers(-(2**63), 2**63 - 1)),
    "UINT32": ("uint_contents", st.integers(0, 2**32 - 1)),
    "UINT64": ("uint64_contents", st.integers(0, 2**64 - 1)),
    "FP32": ("fp32_contents", st.floats(width=32, allow_nan=False)),
    "FP64": ("fp64_contents", st.floats(allow_nan=False)),
    "BYTES": ("bytes_contents", st.binary(max_size=20)),
}


@pytest.mark.parametrize("datatype", CONTENTS)
@given(data=st.data(), is_raw=st.booleans(), has_batch=st.booleans())
def test_values_arrive_typed_and_raw(datatype: str, data: st.DataObject, is_raw: bool, has_batch: bool) -> None:
    field, elements = CONTENTS[datatype]
    values = data.draw(st.lists(elements, max_size=5))
    request = ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1] * has_batch + [len(values)])
    if is_raw:
        request.raw_input_contents.append(raw(datatype, values))
    else:
        getattr(tensor.contents, field).extend(values)
    spec = TensorSpec(name="x", datatypes=(DataType(datatype),), length=-1)
    read = read_tensors(request, {"x": spec})["x"]
    assert (read.name, read.datatype, read.values) == ("x", datatype, values)


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5))
def test_raw_outputs_are_as_clients_read_them(texts: list[bytes], numbers: list[int]) -> None:
    assert to_raw(DataType.BYTES, texts) == raw("BYTES", texts)
    assert to_raw(DataType.INT32, numbers) == raw("INT32", numbers)


@given(st.binary(max_size=40), st.integers(-2, 2**40))
def test_any_bytes_are_read_or_refused_by_name(content: bytes, length: int) -> None:
    for name, datatype in (("stop", "BYTES"), ("input_ids", "INT64")):
        request = ModelInferRequest(raw_input_contents=[content])
        request.inputs.add(name=name, datatype=datatype, shape=[length])
        try:
            tensor = read_tensors(request, SPECS)[name]
        except InputError as error:
            read = error.field
        else:
            read = name if raw(datatype, tensor.values) == content and len(tensor.values) == length else "misread"
        assert read == name


def _shaped(*shape: int) -> Callable[[ModelInferRequest], None]:
    return lambda request: request.inputs[0].shape.__setitem__(slice(None), shape)


def _of_datatype(datatype: str) -> Callable[[ModelInferRequest], None]:
    return lambda request: setattr(request.inputs[0], "datatype", datatype)


def _named(name: str) -> Callable[[ModelInferRequest], None]:
    return lambda request: setattr(request.inputs[0], "name", name)


def _typed(request: ModelInferRequest) -> None:
    request.raw_input_contents.clear()
    request.inputs[0].contents.int_contents.append(3)


def _twice(request: ModelInferRequest) -> None:
    request.inputs[0].contents.bytes_contents.append(b"abc")


def _empty(request: ModelInferRequest) -> None:
    request.raw_input_contents.clear()


def _shared(request: ModelInferRequest) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shaped(2), r"text_input: shape is \[2\]; it must be \[1\] or \[1, 1\]"),
        (_shaped(), r"text_input: shape is \[\]; it must be \[1\] or \[1, 1\]"),
        (_shaped(1, 1, 1), r"text_input: shape is \[1, 1, 1\]; it must be \[1\] or \[1, 1\]"),
        (_shaped(-1), r"text_input: shape is \[-1\]; it must be \[1\] or \[1, 1\]"),
        (_of_datatype("FP32"), "text_input: datatype is FP32; it must be BYTES"),
        (_of_datatype(""), "text_input: datatype is missing; it must be BYTES"),
        (_named("prompt"), "prompt: there is no such input; there are text_"),
        (lambda request: request.inputs.append(request.inputs[0]), "raw_input_contents has 1 entries for 2 inputs"),
        (_typed, "text_input: elements of BYTES belong in bytes_contents, some are in int_contents"),
        (_twice, "text_input: given in contents and in raw_input_contents; only one may be"),
        (_empty, "text_input: its shape says 1 elements, bytes_contents holds 0"),
        (_shared, "text_input: parameter shared_memory_region is not served"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(change: Callable[[ModelInferRequest], None], message: str) -> None:
    request = infer_request()
    change(request)
    with pytest.raises(InputError, match=message):
        read_tensors(request, SPECS)


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "content", "message"),
    [
        ("text_input", "BYTES", [1], b"", "its shape says 1 elements, its raw contents hold 0"),
        ("text_input", "BYTES", [1], b"\3\0", "its raw contents end after 2 bytes, element 0 needs 4 of them"),
        ("text_input", "BYTES", [1], b"\3\0\0\0ab", "its raw contents end after 6 bytes, element 0 needs 7 of them"),
        ("text_input", "BYTES", [1], raw("BYTES", [b"a", b"b"]), "says 1 elements, its raw contents hold more"),
        ("stop", "BYTES", [2], raw("BYTES", [b"a"]) + b"\xff\xff\xff\xff", "element 1 needs 4294967304 of them"),
        ("input_ids", "INT32", [3], bytes(8), "3 elements of INT32 are 12 bytes, its raw contents 8"),
        ("input_ids", "INT64", [1, 1], bytes(9), "1 elements of INT64 are 8 bytes, its raw contents 9"),
        ("input_ids", "INT64", [2**60], bytes(8), "1152921504606846976 elements of INT64 are "),
        ("input_ids", "INT32", [2, 3], bytes(24), r"shape is \[2, 3\]; it must be \[n\] or \[1, n\]"),
        ("input_ids", "FP32", [2], bytes(8), "datatype is FP32; it must be INT32 or INT64 or UINT32 or UINT64"),
    ],
)
def test_raw_contents_that_do_not_fit_are_refused(
    name: str, datatype: str, shape: list[int], content: bytes, message: str
) -> None:
    request = ModelInferRequest(raw_input_contents=[content])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    with pytest.raises(InputError, match=rf"^{name}: .*{message}"):
        read_tensors(request, SPECS)


def test_a_tensor_given_twice_is_refused() -> None:
    request = infer_request()
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    with pytest.raises(InputError, match="text_input: given twice"):
        read_tensors(request, SPECS)
