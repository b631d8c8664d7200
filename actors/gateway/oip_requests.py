"""From a ModelInferRequest to the engine's request, and how its answer is wanted."""

from dataclasses import dataclass

from expertmesh.actors.gateway.oip_schema import INPUT_IDS, TEXT_INPUT, TensorSpec, input_specs, output_specs
from expertmesh.actors.gateway.oip_settings import Value, read_settings, to_text, wants_empty_final_response
from expertmesh.actors.gateway.oip_tensors import Tensor, read_tensors
from expertmesh.actors.gateway.validation import ValidRequest, require_in_vocabulary, validate_request
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.oip.open_inference_pb2 import ModelInferRequest
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds

# What validation.py names by GenerateRequest's fields goes by other names here.
_NAMES = {"text": TEXT_INPUT.name, "token_ids": INPUT_IDS.name, "request_id": "id"}


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """A request that can be served.

    client_id: its id in responses, empty where the client gave none. outputs: the tensors wanted. echo: what stands
    before the answer's text. stream: whether each piece is a response. empty_final_response: whether one without
    tensors ends them.
    """

    valid: ValidRequest
    client_id: str
    outputs: tuple[TensorSpec, ...]
    echo: str
    stream: bool
    empty_final_response: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequestReader:
    """Reads the requests for one model. tokenizer: of the checkpoint; None if it has none."""

    model: ModelInfo
    tokenizer: Tokenizer | None

    def read(self, request: ModelInferRequest, *, request_id: str, default_seed: int) -> InferRequest:
        """Return what a request asks for.

        Args:
            request: for this model.
            request_id: its name in logs; the client's own where it gave one.
            default_seed: used when the request gives none.

        Raises:
            InputError: it cannot be served as it is; the message names the tensor or parameter.
        """
        tensors = read_tensors(request, input_specs(self.model))
        settings = read_settings(request.parameters, tensors)
        stream = bool(settings.pop("stream", False))
        is_echo_wanted = not settings.pop("exclude_input_in_output", True)
        if settings.get("n", 1) != 1:
            raise InputError(f"n is {settings['n']}; it must be 1: a request has one sample", field="n")
        wanted = self._prompt(tensors, settings)
        try:
            valid = validate_request(
                wanted, model=self.model, tokenizer=self.tokenizer, request_id=request_id, default_seed=default_seed
            )
        except InputError as error:
            if error.field not in _NAMES:
                raise
            name = _NAMES[error.field]
            raise InputError(f"{name}: {error}", field=name) from error
        return InferRequest(
            valid=valid,
            client_id=request.id,
            outputs=self._outputs(request),
            echo=_echo(wanted, stream) if is_echo_wanted else "",
            stream=stream,
            empty_final_response=wants_empty_final_response(request.parameters),
        )

    def _prompt(self, tensors: dict[str, Tensor], settings: dict[str, Value]) -> GenerateRequest:
        """Return the request as the gateway's other clients send it."""
        text, ids = tensors.get(TEXT_INPUT.name), tensors.get(INPUT_IDS.name)
        names = [TEXT_INPUT.name, INPUT_IDS.name] if self.model.has_tokenizer else [INPUT_IDS.name]
        if text is not None and ids is not None:
            raise InputError(f"{names[0]} and {names[1]} are both given; only one may be", field=names[1])
        # The fields of the settings have their names, and their kinds were checked.
        wanted = GenerateRequest(**settings)  # type: ignore[arg-type]
        if text is not None:
            (content,) = text.values
            assert isinstance(content, bytes)
            wanted.text = to_text(text.name, content)
        elif ids is not None:
            prompt_ids = [int(token_id) for token_id in ids.values]
            require_in_vocabulary(prompt_ids, f"{ids.name}: token id", self.model, field=ids.name)
            wanted.token_ids.CopyFrom(TokenIds(ids=prompt_ids))
        else:
            raise InputError(f"no prompt: give the input {' or '.join(names)}", field=names[0])
        return wanted

    def _outputs(self, request: ModelInferRequest) -> tuple[TensorSpec, ...]:
        specs = output_specs(self.model)
        for output in request.outputs:
            if output.name not in specs:
                raise InputError(
                    f"{output.name}: there is no such output; there are {', '.join(specs)}", field=output.name
                )
            if output.parameters:
                raise InputError(
                    f"{output.name}: parameter {sorted(output.parameters)[0]} is not served", field=output.name
                )
        wanted = {output.name for output in request.outputs} or specs.keys()
        return tuple(spec for name, spec in specs.items() if name in wanted)


def _echo(wanted: GenerateRequest, stream: bool) -> str:
    """Return the prompt's text, which goes before the answer's."""
    name = "exclude_input_in_output"
    if stream:
        raise InputError(f"{name} must be true with stream: pieces hold no input", field=name)
    if not wanted.text:
        raise InputError(f"{name} must be true with {INPUT_IDS.name}: it has no text", field=name)
    return wanted.text
