"""From the bodies of OpenAI's clients to the engine's requests."""

import random
from dataclasses import dataclass
from typing import Any

from expertmesh.actors.gateway.chat_template import ChatTemplate
from expertmesh.actors.gateway.openai_errors import HttpError
from expertmesh.actors.gateway.openai_schema import NEUTRAL_VALUES, ChatBody, CompletionBody, MessageBody, SamplingBody
from expertmesh.actors.gateway.validation import MAX_SAMPLES, MAX_SEED, ValidRequest, validate_request
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds

# OpenAI's own default of /v1/completions; a chat goes on to the end of the context.
COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class RequestReader:
    """Checks bodies against the model, renders chats, tokenises.

    tokenizer, template: of the checkpoint; None if it has none. rng: draws the seeds of requests that give none.
    """

    model: ModelInfo
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    rng: random.Random

    def completion(self, body: CompletionBody, request_id: str) -> list[ValidRequest]:
        """Return a request for each prompt.

        Raises:
            HttpError, InputError: it cannot be served as it is.
        """
        self._check(body)
        prompts = [self._prompt_ids(prompt) for prompt in _prompts(body)]
        num_choices = len(prompts) * (body.n or 1)
        if num_choices > MAX_SAMPLES:
            raise HttpError(400, f"{num_choices} choices asked for; at most {MAX_SAMPLES} are allowed", param="n")
        max_tokens = body.max_tokens or COMPLETION_MAX_TOKENS
        requests = []
        for index, prompt_ids in enumerate(prompts):
            left = self._room(prompt_ids, "prompt", body.max_tokens)
            fields = self._fields(body, logprobs=body.logprobs, max_tokens=min(max_tokens, left))
            requests.append(self._validate(prompt_ids, fields, f"{request_id}-{index}" if index else request_id))
        return requests

    def chat(self, body: ChatBody, request_id: str) -> list[ValidRequest]:
        """Return the one request of a chat.

        Raises:
            HttpError, InputError: it cannot be served as it is.
            CorruptCheckpointError: the chat template cannot be used.
        """
        self._check(body)
        if self.template is None or self.tokenizer is None:
            raise HttpError(
                400,
                f"{self.model.name} has no chat template; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise HttpError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        text = self.template.render([_message(message) for message in body.messages], body.chat_template_kwargs or {})
        # The template writes all special tokens itself.
        prompt_ids = self.tokenizer.encode(text, add_special_tokens=False)
        asked = body.max_completion_tokens or body.max_tokens
        left = self._room(prompt_ids, "messages", asked)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        fields = self._fields(body, logprobs=logprobs, max_tokens=asked or left)
        return [self._validate(prompt_ids, fields, request_id)]

    def _check(self, body: SamplingBody) -> None:
        if body.model != self.model.name:
            raise HttpError(404, f"The model '{body.model}' does not exist", param="model", code="model_not_found")
        for name, neutral in NEUTRAL_VALUES.items():
            value = getattr(body, name, None)
            if value is not None and value not in neutral:
                raise HttpError(400, f"'{name}' is not served", param=name, code="unsupported_parameter")
        if body.stream_options is not None and not body.stream:
            raise HttpError(400, "stream_options needs stream to be true", param="stream_options", code="invalid_value")

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise HttpError(400, f"{self.model.name} has no tokenizer; give token ids", param="prompt")
        return self.tokenizer.encode(prompt)

    def _room(self, prompt_ids: list[int], param: str, max_tokens: int | None) -> int:
        """Return how many tokens may follow the prompt; refuse more, and a prompt that leaves room for none."""
        left = self.model.max_context - len(prompt_ids)
        if left < (max_tokens or 1):
            raise HttpError(
                400,
                f"the context is {self.model.max_context} tokens; the prompt has {len(prompt_ids)}, and "
                f"{max_tokens or 'no'} more were asked for",
                param=param,
                code="context_length_exceeded",
            )
        return left

    def _fields(self, body: SamplingBody, **fields: Any) -> dict[str, Any]:
        """Return fields of GenerateRequest, left out those that are None."""
        fields |= {
            "n": body.n,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "seed": None if body.seed is None else body.seed & MAX_SEED,
            "ignore_eos": body.ignore_eos,
            "stop_token_ids": body.stop_token_ids,
            "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _validate(self, prompt_ids: list[int], fields: dict[str, Any], request_id: str) -> ValidRequest:
        request = GenerateRequest(token_ids=TokenIds(ids=prompt_ids), **fields)
        return validate_request(
            request,
            model=self.model,
            tokenizer=self.tokenizer,
            request_id=request_id,
            default_seed=self.rng.getrandbits(63),
        )


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    """Return the prompts of a body, which may be one or several, each a text or token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _message(message: MessageBody) -> dict[str, str]:
    """Return a message as templates know them: a text, and no role that is newer than they are."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    fields = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.name is not None:
        fields["name"] = message.name
    return fields
