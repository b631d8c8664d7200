"""How is the model described to clients of the Open Inference Protocol?"""

from collections.abc import Iterable

from expertmesh.actors.gateway.oip_schema import DataType, TensorSpec, input_specs, output_specs
from expertmesh.cluster.errors import NotFoundError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.oip import open_inference_pb2
from expertmesh.oip.open_inference_pb2 import ModelConfig, ModelMetadataResponse

VERSION = "1"
# <project>_<format>, as the protocol asks for.
PLATFORM = "expertmesh_safetensors"
BACKEND = "expertmesh"
_TensorMetadata = ModelMetadataResponse.TensorMetadata


def is_served(model: ModelInfo, name: str, version: str) -> bool:
    """Say whether this is the model that is served; an empty version is any."""
    return name == model.name and version in ("", VERSION)


def require_served(model: ModelInfo, name: str, version: str) -> None:
    """Raise NotFoundError for another model or version."""
    if name != model.name:
        raise NotFoundError(f"model {name!r} is not served; {model.name!r} is")
    if not is_served(model, name, version):
        raise NotFoundError(f"version {version!r} of {name!r} is not served; {VERSION!r} is")


def model_metadata(model: ModelInfo) -> ModelMetadataResponse:
    """Return the tensors of the model."""
    return ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=_metadata(input_specs(model).values()),
        outputs=_metadata(output_specs(model).values()),
    )


def model_config(model: ModelInfo) -> ModelConfig:
    """Return the model as Triton's clients expect it. Decoupled: a request of a stream may have several responses."""
    config = ModelConfig(name=model.name, platform=PLATFORM, backend=BACKEND)
    config.model_transaction_policy.decoupled = True
    for spec in input_specs(model).values():
        # With a tokenizer there are two kinds of prompt, and neither is needed.
        is_optional = model.has_tokenizer or spec.name != "input_ids"
        config.input.add(name=spec.name, data_type=_number(spec), dims=[spec.length], optional=is_optional)
    for spec in output_specs(model).values():
        config.output.add(name=spec.name, data_type=_number(spec), dims=[spec.length])
    return config


def _metadata(specs: Iterable[TensorSpec]) -> list[_TensorMetadata]:
    return [_TensorMetadata(name=spec.name, datatype=spec.datatypes[0], shape=[spec.length]) for spec in specs]


def _number(spec: TensorSpec) -> open_inference_pb2.DataType.ValueType:
    """Return Triton's number of a data type; it has a name of its own for BYTES."""
    name = "STRING" if spec.datatypes[0] is DataType.BYTES else spec.datatypes[0]
    return open_inference_pb2.DataType.Value(f"TYPE_{name}")
