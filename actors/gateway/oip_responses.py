"""From pieces of an answer to ModelInferResponse and ModelStreamInferResponse."""

from collections.abc import AsyncIterator, Sequence

from expertmesh.actors.gateway.engine import Piece
from expertmesh.actors.gateway.oip_metadata import VERSION
from expertmesh.actors.gateway.oip_requests import InferRequest
from expertmesh.actors.gateway.oip_schema import FINISH_REASON, OUTPUT_IDS, TEXT_OUTPUT
from expertmesh.actors.gateway.oip_tensors import to_raw
from expertmesh.oip.open_inference_pb2 import ModelInferResponse, ModelStreamInferResponse

# As Triton names it: whether no response follows for the request.
FINAL_RESPONSE = "triton_final_response"


async def gathered(pieces: AsyncIterator[Piece]) -> Piece:
    """Return all pieces of one sample as one."""
    parts = [piece async for piece in pieces]
    return Piece(
        index=0,
        text="".join(part.text for part in parts),
        tokens=tuple(event for part in parts for event in part.tokens),
        finish_reason=parts[-1].finish_reason,
        num_output_tokens=parts[-1].num_output_tokens,
    )


def to_response(model_name: str, request: InferRequest, piece: Piece) -> ModelInferResponse:
    """Return a piece's tensors, as many as were asked for; usage is set where it is the last."""
    values: dict[str, Sequence[bytes] | Sequence[int]] = {
        TEXT_OUTPUT.name: [(request.echo + piece.text).encode()],
        OUTPUT_IDS.name: [event.token_id for event in piece.tokens if event.token_id is not None],
        FINISH_REASON.name: [(piece.finish_reason or "").encode()],
    }
    response = _empty(model_name, request)
    for spec in request.outputs:
        (datatype,) = spec.datatypes
        response.outputs.add(name=spec.name, datatype=datatype, shape=[len(values[spec.name])])
        response.raw_output_contents.append(to_raw(datatype, values[spec.name]))
    if piece.finish_reason is not None:
        response.parameters["prompt_tokens"].int64_param = len(request.valid.prompt_ids)
        response.parameters["completion_tokens"].int64_param = piece.num_output_tokens
    return response


def to_stream_response(response: ModelInferResponse, *, is_final: bool) -> ModelStreamInferResponse:
    """Return a response of a stream. is_final: none follows for its request."""
    response.parameters[FINAL_RESPONSE].bool_param = is_final
    return ModelStreamInferResponse(infer_response=response)


def empty_final_response(model_name: str, request: InferRequest) -> ModelStreamInferResponse:
    """Return the response without tensors that ends a request of a stream."""
    return to_stream_response(_empty(model_name, request), is_final=True)


def error_response(client_id: str, message: str) -> ModelStreamInferResponse:
    """Return what tells a client what is wrong with one request of a stream.

    tritonclient hands on the message alone: it names the request, so that the client knows which of its it was.
    """
    name = f"request {client_id}: " if client_id else ""
    infer_response = ModelInferResponse(id=client_id)
    infer_response.parameters[FINAL_RESPONSE].bool_param = True
    return ModelStreamInferResponse(error_message=f"{name}{message}", infer_response=infer_response)


def _empty(model_name: str, request: InferRequest) -> ModelInferResponse:
    return ModelInferResponse(model_name=model_name, model_version=VERSION, id=request.client_id)
