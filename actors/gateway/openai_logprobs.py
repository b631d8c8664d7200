"""Logprobs in OpenAI's two shapes. A token is shown by its text, or its vocabulary's name where it has none alone."""

from collections.abc import Sequence

from expertmesh.cluster.requests import TokenEvent
from expertmesh.models.tokenizer import IncrementalDecoder, Tokenizer


class TokenNames:
    """How tokens are shown."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, token_id: int) -> str:
        """Return a token's text; without a tokenizer its number."""
        return str(token_id) if self.tokenizer is None else self.tokenizer.token_text(token_id)


class CompletionLogprobs:
    """The logprobs of one choice of a completion: parallel lists. Offsets go on over the pieces of a stream."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = None if names.tokenizer is None else IncrementalDecoder(names.tokenizer)
        self._num_chars = 0

    def push(self, events: Sequence[TokenEvent]) -> dict[str, list[object]]:
        """Return the logprobs of the next tokens; offsets count characters of the choice's text."""
        shown: dict[str, list[object]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for event in events:
            assert event.token_id is not None
            assert event.logprob is not None, f"{event.sequence_id}: the worker sent no logprob of token {event.index}"
            name = self._names(event.token_id)
            shown["text_offset"].append(self._num_chars)
            shown["token_logprobs"].append(event.logprob)
            shown["tokens"].append(name)
            shown["top_logprobs"].append(
                {name: event.logprob, **{self._names(top.token_id): top.logprob for top in event.top_logprobs}}
            )
            if self._decoder is not None:
                self._num_chars += len(self._decoder.push(event.token_id))
        return shown


def chat_logprobs(names: TokenNames, events: Sequence[TokenEvent]) -> dict[str, object]:
    """Return the logprobs of a chat's next tokens: an entry for each."""
    content = []
    for event in events:
        assert event.token_id is not None
        assert event.logprob is not None, f"{event.sequence_id}: the worker sent no logprob of token {event.index}"
        top = [_entry(names, other.token_id, other.logprob) for other in event.top_logprobs]
        content.append({**_entry(names, event.token_id, event.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, object]:
    text = names(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
