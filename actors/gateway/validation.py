"""Is this request one that can be served? From the wire's message to frozen settings, or InputError."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertmesh.actors.gateway.received import NOTHING, SampleSoFar, validate_received
from expertmesh.actors.tracing import NO_TRACE, TraceHeaders
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.requests import SamplingParams
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest

DEFAULT_MAX_TOKENS = 128
MAX_SAMPLES = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_NAME_CHARS = 128
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidRequest:
    """A request within all limits: one prompt, and the sampling of each of its samples (they differ in seed).

    operation: what OpenTelemetry calls its kind, chat or text_completion. trace: that it belongs to. received: what the
    client has of each sample; empty: nothing of any.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]
    stop: tuple[str, ...]
    operation: str = "text_completion"
    trace: TraceHeaders = NO_TRACE
    received: tuple[SampleSoFar, ...] = ()

    @property
    def so_far(self) -> tuple[SampleSoFar, ...]:
        """What the client has, one for each sample."""
        return self.received or (NOTHING,) * len(self.sampling)

    @property
    def tokens_left(self) -> tuple[int, ...]:
        """Most tokens to generate, one for each sample that has not ended."""
        pairs = zip(self.sampling, self.so_far, strict=True)
        return tuple(one.max_tokens - len(so_far.token_ids) for one, so_far in pairs if not so_far.has_ended)


def validate_request(
    request: GenerateRequest, *, model: ModelInfo, tokenizer: Tokenizer | None, request_id: str, default_seed: int
) -> ValidRequest:
    """Check a request against the model and its own limits, and tokenise its prompt.

    Args:
        request: as it came over the wire.
        model: gives vocabulary, context and end-of-sequence tokens.
        tokenizer: of the checkpoint; None if it has none.
        request_id: the request's name; the client's own where it gave one.
        default_seed: used when the request gives none.

    Raises:
        InputError: the message names the field, its value and the limit.
    """
    _require_name(request_id, "request_id")
    if request.HasField("idempotency_key"):
        _require_name(request.idempotency_key, "idempotency_key")
    num_samples = request.n if request.HasField("n") else 1
    _require(1 <= num_samples <= MAX_SAMPLES, "n", f"n is {num_samples}; it must be from 1 to {MAX_SAMPLES}")
    stop = _stop_strings(request, tokenizer)
    prompt_ids = _prompt_ids(request, model, tokenizer)
    sampling = _sampling(request, model, num_prompt_tokens=len(prompt_ids), default_seed=default_seed)
    received = validate_received(request.received, sampling, num_samples=num_samples, vocab_size=model.vocab_size)
    return ValidRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=tuple(replace(sampling, seed=sample_seed(sampling.seed, index)) for index in range(num_samples)),
        stop=stop,
        received=received if request.received else (),
    )


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample `index`: the request's own for sample 0, else output `index` of splitmix64 from it.

    Both are below 2^63. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    if index == 0:
        return seed
    mask = (1 << 64) - 1
    mixed = (seed + index * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InputError(message, field=field)


def _require_name(name: str, field: str) -> None:
    _require(
        0 < len(name) <= MAX_NAME_CHARS and name.isprintable(),
        field,
        f"{field} has {len(name)} characters; it must have 1 to {MAX_NAME_CHARS}, all printable",
    )


def _stop_strings(request: GenerateRequest, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    stop = tuple(request.stop)
    _require(
        len(stop) <= MAX_STOP_STRINGS,
        "stop",
        f"{len(stop)} stop strings given; at most {MAX_STOP_STRINGS} are allowed",
    )
    _require("" not in stop, "stop", "a stop string is empty")
    _require(not stop or tokenizer is not None, "stop", "stop strings need a tokenizer; the checkpoint has none")
    return stop


def _prompt_ids(request: GenerateRequest, model: ModelInfo, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InputError("no prompt: give text or token_ids", field="prompt")
    if kind == "text":
        _require(request.text != "", "text", "the prompt is empty")
        if tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer; give the prompt as token_ids", field="text")
        prompt_ids = tuple(tokenizer.encode(request.text))
    else:
        prompt_ids = tuple(request.token_ids.ids)
        require_in_vocabulary(prompt_ids, "token id", model, field="token_ids")
    _require(len(prompt_ids) > 0, kind, "the prompt is empty")
    return prompt_ids


def require_in_vocabulary(token_ids: Sequence[int], what: str, model: ModelInfo, *, field: str) -> None:
    """Raise InputError if a token id is not below the vocabulary size; `what` and `field` name it."""
    for token_id in token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise InputError(f"{what} {token_id} is outside the vocabulary of {model.vocab_size} tokens", field=field)


def _sampling(
    request: GenerateRequest, model: ModelInfo, *, num_prompt_tokens: int, default_seed: int
) -> SamplingParams:
    seed = request.seed if request.HasField("seed") else default_seed
    _require(0 <= seed <= MAX_SEED, "seed", f"seed is {seed}; it must be from 0 to 2^63 - 1")
    _require(
        math.isfinite(request.temperature), "temperature", f"temperature is {request.temperature}; it must be finite"
    )
    _require(request.temperature >= 0, "temperature", f"temperature is {request.temperature}; it must be at least 0")
    _require(request.top_k >= 0, "top_k", f"top_k is {request.top_k}; it must be at least 0")
    top_p = request.top_p if request.HasField("top_p") else 1.0
    _require(0 < top_p <= 1, "top_p", f"top_p is {top_p}; it must be above 0 and at most 1")
    _require(0 <= request.min_p <= 1, "min_p", f"min_p is {request.min_p}; it must be from 0 to 1")
    penalty = request.repetition_penalty if request.HasField("repetition_penalty") else 1.0
    _require(
        0 < penalty < math.inf, "repetition_penalty", f"repetition_penalty is {penalty}; it must be finite and above 0"
    )
    logprobs = request.logprobs if request.HasField("logprobs") else None
    _require(
        logprobs is None or 0 <= logprobs <= MAX_LOGPROBS,
        "logprobs",
        f"logprobs is {logprobs}; it must be 0 to {MAX_LOGPROBS}",
    )
    stop_token_ids = tuple(request.stop_token_ids)
    require_in_vocabulary(stop_token_ids, "stop token id", model, field="stop_token_ids")
    if not request.ignore_eos:
        stop_token_ids += model.eos_token_ids
    return SamplingParams(
        max_tokens=_max_tokens(request, model, num_prompt_tokens),
        temperature=request.temperature,
        # Keeping the whole vocabulary keeps no fewer; a kernel need not handle more.
        top_k=min(request.top_k, model.vocab_size),
        top_p=top_p,
        min_p=request.min_p,
        repetition_penalty=penalty,
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        logprobs=logprobs,
    )


def _max_tokens(request: GenerateRequest, model: ModelInfo, num_prompt_tokens: int) -> int:
    left = model.max_context - num_prompt_tokens
    if left < 1:
        raise InputError(
            f"the prompt of {num_prompt_tokens} tokens leaves no room in the context of {model.max_context}",
            field=request.WhichOneof("prompt") or "prompt",
        )
    if not request.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, left)
    max_tokens = request.max_tokens
    _require(max_tokens > 0, "max_tokens", f"max_tokens is {max_tokens}; it must be at least 1")
    if max_tokens > left:
        raise InputError(
            f"prompt of {num_prompt_tokens} tokens and max_tokens {max_tokens} make {num_prompt_tokens + max_tokens}; "
            f"the context is {model.max_context}",
            field="max_tokens",
        )
    return max_tokens
