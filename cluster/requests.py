"""What is asked of an attention worker and what it answers: frozen records that cross processes as plain values."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token or stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the client went away
    DEADLINE = "deadline"  # the client's deadline passed
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults are greedy decoding.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; repetition_penalty 1 is off.
    logprobs is how many of the most likely tokens to report beside the chosen one; None: nothing, 0: only the chosen.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """One sequence to generate.

    output_ids are tokens generated before, elsewhere (a resumed sequence); the worker goes on after them, and
    max_tokens counts them. traceparent: of the trace that the stay belongs to, in W3C's form; "": it is not traced.
    """

    sequence_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    traceparent: str = ""


def request_id_of(sequence_id: str) -> str:
    """Return the id of a sequence's request: a gateway calls sequences `<request_id>#<sample>~<stay>`."""
    return sequence_id.rpartition("#")[0] or sequence_id


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability before temperature and truncation."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One new token of one sequence, or its end without one.

    index counts generated tokens from 0 (a resumed sequence goes on counting). token_id is None only when a sequence
    ends without a new token; finish_reason is None while it goes on. error is set with FinishReason.ERROR; unavailable
    says that a part was away and that trying again may help.
    """

    sequence_id: str
    index: int
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    unavailable: bool = False
