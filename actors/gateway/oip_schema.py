"""Which tensors and settings have requests and answers of the Open Inference Protocol?

Names are those of Triton's vLLM backend, as far as it has them.
"""

from dataclasses import dataclass
from enum import StrEnum

from expertmesh.cluster.model_info import ModelInfo

MAX_INT32 = (1 << 31) - 1
MAX_UINT32 = (1 << 32) - 1
MAX_INT64 = (1 << 63) - 1


class DataType(StrEnum):
    """Data types of tensors, by the protocol's names, that something here has."""

    BOOL = "BOOL"
    INT32 = "INT32"
    INT64 = "INT64"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


INTEGERS = (DataType.INT32, DataType.INT64, DataType.UINT32, DataType.UINT64)
FLOATS = (DataType.FP32, DataType.FP64)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor. datatypes: those taken, first the one that clients are told. length: of its dimension; -1: any."""

    name: str
    datatypes: tuple[DataType, ...]
    length: int = 1


class Kind(StrEnum):
    """What a setting's value is."""

    BOOL = "true or false"
    INT = "a whole number"
    FLOAT = "a number"
    STRINGS = "a string or a list of strings"
    INTS = "a whole number or a list of them"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting. low, high: bounds of its whole numbers on the wire; what makes sense within is checked later."""

    kind: Kind
    low: int = -MAX_INT32
    high: int = MAX_INT32

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor that a client may give it as."""
        datatypes = {
            Kind.BOOL: (DataType.BOOL,),
            Kind.INT: INTEGERS,
            Kind.INTS: INTEGERS,
            Kind.FLOAT: FLOATS,
            Kind.STRINGS: (DataType.BYTES,),
        }
        is_list = self.kind in (Kind.STRINGS, Kind.INTS)
        return TensorSpec(name=name, datatypes=datatypes[self.kind], length=-1 if is_list else 1)


SETTINGS = {
    "max_tokens": Setting(kind=Kind.INT),
    "temperature": Setting(kind=Kind.FLOAT),
    "top_k": Setting(kind=Kind.INT),
    "top_p": Setting(kind=Kind.FLOAT),
    "min_p": Setting(kind=Kind.FLOAT),
    "repetition_penalty": Setting(kind=Kind.FLOAT),
    "seed": Setting(kind=Kind.INT, low=0, high=MAX_INT64),
    "stop": Setting(kind=Kind.STRINGS),
    "stop_token_ids": Setting(kind=Kind.INTS, low=0, high=MAX_UINT32),
    "ignore_eos": Setting(kind=Kind.BOOL),
    "n": Setting(kind=Kind.INT),
    "stream": Setting(kind=Kind.BOOL),
    "exclude_input_in_output": Setting(kind=Kind.BOOL),
}
TEXT_INPUT = TensorSpec(name="text_input", datatypes=(DataType.BYTES,))
INPUT_IDS = TensorSpec(name="input_ids", datatypes=INTEGERS, length=-1)
SAMPLING_PARAMETERS = TensorSpec(name="sampling_parameters", datatypes=(DataType.BYTES,))

TEXT_OUTPUT = TensorSpec(name="text_output", datatypes=(DataType.BYTES,))
OUTPUT_IDS = TensorSpec(name="output_ids", datatypes=(DataType.INT32,), length=-1)
FINISH_REASON = TensorSpec(name="finish_reason", datatypes=(DataType.BYTES,))


def input_specs(model: ModelInfo) -> dict[str, TensorSpec]:
    """Return the inputs by name; without a tokenizer there is no text."""
    prompts = (TEXT_INPUT, INPUT_IDS) if model.has_tokenizer else (INPUT_IDS,)
    settings = [setting.spec(name) for name, setting in SETTINGS.items()]
    return {spec.name: spec for spec in (*prompts, SAMPLING_PARAMETERS, *settings)}


def output_specs(model: ModelInfo) -> dict[str, TensorSpec]:
    """Return the outputs by name, in the order in which they are sent; without a tokenizer there is no text."""
    texts = (TEXT_OUTPUT,) if model.has_tokenizer else ()
    return {spec.name: spec for spec in (*texts, OUTPUT_IDS, FINISH_REASON)}
