"""What does a client have of a request, from a gateway that is gone, and how does each sample go on from there?"""

from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.actors.gateway.text import TextStream
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.requests import FinishReason, SamplingParams
from expertmesh.v1.inference_pb2 import ReceivedSample

FIELD = "received"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSoFar:
    """What a client has of one sample. has_ended: its last message has come too."""

    token_ids: tuple[int, ...] = ()
    has_ended: bool = False


NOTHING = SampleSoFar()


def validate_received(
    received: Sequence[ReceivedSample], sampling: SamplingParams, *, num_samples: int, vocab_size: int
) -> tuple[SampleSoFar, ...]:
    """Return what was received of each sample.

    Raises:
        InputError: there is more than the request can have given, or a token that is none.
    """
    if len(received) > num_samples:
        raise InputError(f"{FIELD} has {len(received)} samples; n is {num_samples}", field=FIELD)
    found = tuple(SampleSoFar(token_ids=tuple(one.token_ids), has_ended=one.has_ended) for one in received)
    for index, so_far in enumerate(found):
        _require_possible(so_far.token_ids, f"{FIELD} of sample {index}", sampling, vocab_size)
    return found + (NOTHING,) * (num_samples - len(found))


def _require_possible(token_ids: Sequence[int], name: str, sampling: SamplingParams, vocab_size: int) -> None:
    if len(token_ids) > sampling.max_tokens:
        raise InputError(f"{name} has {len(token_ids)} tokens; max_tokens is {sampling.max_tokens}", field=FIELD)
    ends = frozenset(sampling.stop_token_ids)
    for position, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            message = f"{name}: token id {token_id} is outside the vocabulary of {vocab_size} tokens"
            raise InputError(message, field=FIELD)
        if token_id in ends and position + 1 < len(token_ids):
            raise InputError(_goes_on(name, position), field=FIELD)


def take_up(
    text: TextStream, sampling: SamplingParams, token_ids: Sequence[int], *, index: int
) -> tuple[str, FinishReason | None]:
    """Bring a sample's text to where its tokens left it, and find out whether these were all.

    Args:
        text: of the sample, with nothing in it.
        sampling: of the sample.
        token_ids: that were received, at least one; the text that is certain with them was received too.
        index: of the sample, for the error.

    Returns:
        Text that was held back, and why the sample has ended; no text and None where it goes on.

    Raises:
        InputError: a stop string is complete before the last of the tokens.
    """
    last = len(token_ids) - 1
    for position, token_id in enumerate(token_ids):
        _, matched = text.push(token_id)
        if matched and position < last:
            raise InputError(_goes_on(f"{FIELD} of sample {index}", position), field=FIELD)
        if matched:
            return "", FinishReason.STOP
    if token_ids[last] in sampling.stop_token_ids:
        reason = FinishReason.STOP
    elif len(token_ids) == sampling.max_tokens:
        reason = FinishReason.LENGTH
    else:
        return "", None
    part, matched = text.flush()
    return part, FinishReason.STOP if matched else reason


def _goes_on(name: str, position: int) -> str:
    return f"{name} goes on after its token {position}, which ends the sample"
