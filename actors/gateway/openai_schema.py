"""What OpenAI's clients send: bodies of /v1/completions and /v1/chat/completions. Unknown fields are refused.

Source: OpenAI's API reference. Fields of ours beyond it, as other open servers name them: top_k, min_p,
repetition_penalty, ignore_eos, stop_token_ids, and chat_template_kwargs.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expertmesh.actors.gateway.validation import MAX_LOGPROBS, MAX_SAMPLES

_MAX_INT32 = (1 << 31) - 1
MAX_PROMPTS = 64

TokenId = Annotated[int, Field(ge=0, le=_MAX_INT32)]

# Known fields that change the answer in ways that are not served, and the values with which they change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """Whether a stream ends with a chunk that counts tokens. Obfuscation is taken and not done."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingBody(_Body):
    """What both kinds of request have."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1, le=_MAX_INT32)
    n: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)

    top_k: int | None = Field(default=None, ge=0, le=_MAX_INT32)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None

    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None


class CompletionBody(SamplingBody):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TextPart(_Body):
    """A part of a message's content; parts of other kinds are not served."""

    type: Literal["text"]
    text: str


class MessageBody(_Body):
    """A message of a chat. What an answer's message carries besides may come back when it holds nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ChatBody(SamplingBody):
    """Body of /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="variables for the chat template")

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    # These concern OpenAI's own service and change no token.
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
