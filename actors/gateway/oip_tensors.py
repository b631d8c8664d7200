"""What values do these tensors hold? From the wire, typed or raw, and back to raw.

Raw contents are little-endian; an element of BYTES stands behind its length of 4 bytes. Source: the Open Inference
Protocol's gRPC specification, and tritonclient's serialize_byte_tensor for BYTES.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.actors.gateway.oip_schema import DataType, TensorSpec
from expertmesh.cluster.errors import InputError
from expertmesh.oip.open_inference_pb2 import InferTensorContents, ModelInferRequest

Values = list[bool] | list[int] | list[float] | list[bytes]

_LENGTH = struct.Struct("<I")
_NUMPY = {
    DataType.BOOL: np.dtype("?"),
    DataType.INT32: np.dtype("<i4"),
    DataType.INT64: np.dtype("<i8"),
    DataType.UINT32: np.dtype("<u4"),
    DataType.UINT64: np.dtype("<u8"),
    DataType.FP32: np.dtype("<f4"),
    DataType.FP64: np.dtype("<f8"),
}
_CONTENTS = {
    DataType.BOOL: "bool_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """The elements of a tensor of one dimension."""

    name: str
    datatype: DataType
    values: Values


def read_tensors(request: ModelInferRequest, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the inputs of a request by name.

    Args:
        request: as it came over the wire.
        specs: the inputs that there are.

    Raises:
        InputError: one is unknown, given twice, or not as its spec or its own shape says; the message names it.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; give one for each, or none",
            field="raw_input_contents",
        )
    tensors: dict[str, Tensor] = {}
    for index, given in enumerate(request.inputs):
        name = given.name
        if name not in specs:
            raise _error(name, f"there is no such input; there are {', '.join(specs)}")
        if name in tensors:
            raise _error(name, "given twice")
        if given.parameters:
            raise _error(name, f"parameter {sorted(given.parameters)[0]} is not served")
        if raw and given.HasField("contents"):
            raise _error(name, "given in contents and in raw_input_contents; only one may be")
        datatype = _datatype(given.datatype, specs[name])
        length = _length(given.shape, specs[name])
        if raw:
            values = _from_raw(name, datatype, length, raw[index])
        else:
            values = _from_contents(name, datatype, length, given.contents)
        tensors[name] = Tensor(name=name, datatype=datatype, values=values)
    return tensors


def to_raw(datatype: DataType, values: Sequence[int] | Sequence[bytes]) -> bytes:
    """Return the raw contents of a tensor: of BYTES where the values are bytes, else of numbers that fit in it."""
    if datatype is DataType.BYTES:
        return b"".join(_LENGTH.pack(len(value)) + value for value in values if isinstance(value, bytes))
    return np.asarray(values, dtype=_NUMPY[datatype]).tobytes()


def _datatype(given: str, spec: TensorSpec) -> DataType:
    if given not in spec.datatypes:
        raise _error(spec.name, f"datatype is {given or 'missing'}; it must be {' or '.join(spec.datatypes)}")
    return DataType(given)


def _length(shape: Sequence[int], spec: TensorSpec) -> int:
    """Return how many elements a shape has; a leading 1 for a batch may be there."""
    sizes = list(shape)
    rest = sizes[1:] if len(sizes) == 2 and sizes[0] == 1 else sizes
    if len(rest) != 1 or rest[0] < 0 or spec.length not in (-1, rest[0]):
        wanted = "[n] or [1, n]" if spec.length == -1 else f"[{spec.length}] or [1, {spec.length}]"
        raise _error(spec.name, f"shape is {sizes}; it must be {wanted}")
    return rest[0]


def _from_raw(name: str, datatype: DataType, length: int, content: bytes) -> Values:
    if datatype is DataType.BYTES:
        return _elements(name, length, content)
    num_bytes = length * _NUMPY[datatype].itemsize
    if len(content) != num_bytes:
        raise _error(name, f"{length} elements of {datatype} are {num_bytes} bytes, its raw contents {len(content)}")
    values: Values = np.frombuffer(content, dtype=_NUMPY[datatype]).tolist()
    return values


def _elements(name: str, length: int, content: bytes) -> list[bytes]:
    """Take apart the raw contents of BYTES."""
    elements: list[bytes] = []
    at = 0
    while at < len(content) and len(elements) <= length:
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(content, at)[0] if start <= len(content) else start
        if end > len(content):
            raise _error(
                name, f"its raw contents end after {len(content)} bytes, element {len(elements)} needs {end} of them"
            )
        elements.append(content[start:end])
        at = end
    if len(elements) != length:
        found = "more" if len(elements) > length else len(elements)
        raise _error(name, f"its shape says {length} elements, its raw contents hold {found}")
    return elements


def _from_contents(name: str, datatype: DataType, length: int, contents: InferTensorContents) -> Values:
    wanted = _CONTENTS[datatype]
    for field, _ in contents.ListFields():
        if field.name != wanted:
            raise _error(name, f"elements of {datatype} belong in {wanted}, some are in {field.name}")
    values: Values = list(getattr(contents, wanted))
    if len(values) != length:
        raise _error(name, f"its shape says {length} elements, {wanted} holds {len(values)}")
    return values


def _error(name: str, message: str) -> InputError:
    return InputError(f"{name}: {message}", field=name)
