"""Bodies and chunks of answers as OpenAI's clients expect them, of completions and of chats."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from expertmesh.actors.gateway.openai_logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from expertmesh.cluster.requests import FinishReason, TokenEvent

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}

Fields = dict[str, object]


@dataclass(kw_only=True)
class Part:
    """The next part of one choice, or all of it."""

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def reason(self) -> str | None:
        """OpenAI's name of the finish reason."""
        return None if self.finish_reason is None else FINISH_REASONS[self.finish_reason]


class AnswerFormat(ABC):
    """Writes the answer of one request."""

    whole_kind: str
    chunk_kind: str

    def __init__(self, *, answer_id: str, created_s: int, model: str, names: TokenNames, with_logprobs: bool) -> None:
        """Name the answer.

        Args:
            answer_id: of the request.
            created_s: Unix time.
            model: the model's name.
            names: how tokens are shown.
            with_logprobs: whether they were asked for.
        """
        self._head: Fields = {"id": answer_id, "created": created_s, "model": model, "system_fingerprint": None}
        self._names = names
        self._with_logprobs = with_logprobs

    def whole(self, parts: Sequence[Part], usage: Fields) -> Fields:
        """Return the body of an answer that is not streamed."""
        choices = [self._choice(index, part) for index, part in enumerate(parts)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def opening(self, num_choices: int) -> list[Fields]:
        """Return the choices of the chunks that come before any text."""
        return []

    @abstractmethod
    def delta(self, index: int, part: Part) -> Fields:
        """Return the choice of a chunk."""

    @abstractmethod
    def _choice(self, index: int, part: Part) -> Fields: ...

    def chunk(self, choice: Fields, usage: Fields | None) -> Fields:
        """Return a chunk; usage is None where it was not asked for, and {} until it is known."""
        return self._chunk([choice], usage)

    def closing(self, usage: Fields) -> Fields:
        """Return the last chunk of a stream that counts tokens."""
        return self._chunk([], usage)

    def _chunk(self, choices: list[Fields], usage: Fields | None) -> Fields:
        counted: Fields = {} if usage is None else {"usage": usage or None}
        return {**self._head, "object": self.chunk_kind, "choices": choices, **counted}


class CompletionFormat(AnswerFormat):
    """Answers of /v1/completions."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(self, *, answer_id: str, created_s: int, model: str, names: TokenNames, with_logprobs: bool) -> None:
        super().__init__(
            answer_id=answer_id, created_s=created_s, model=model, names=names, with_logprobs=with_logprobs
        )
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def delta(self, index: int, part: Part) -> Fields:
        """See AnswerFormat."""
        return self._choice(index, part)

    def _choice(self, index: int, part: Part) -> Fields:
        logprobs = None
        if self._with_logprobs:
            logprobs = self._logprobs.setdefault(index, CompletionLogprobs(self._names)).push(part.tokens)
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.reason}


class ChatFormat(AnswerFormat):
    """Answers of /v1/chat/completions."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[Fields]:
        """See AnswerFormat."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(num_choices)
        ]

    def delta(self, index: int, part: Part) -> Fields:
        """See AnswerFormat."""
        delta: Fields = {"content": part.text} if part.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(part), "finish_reason": part.reason}

    def _choice(self, index: int, part: Part) -> Fields:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(part), "finish_reason": part.reason}

    def _logprobs(self, part: Part) -> Fields | None:
        return chat_logprobs(self._names, part.tokens) if self._with_logprobs else None


def usage_fields(num_prompt_tokens: int, num_output_tokens: int) -> Fields:
    """Return OpenAI's count of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }
