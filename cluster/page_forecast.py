"""Will there be pages for all sequences until they end, as the first of them leave theirs to the others?

n: sequences in the order in which they end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.cluster.live_sequence import LiveSequence
from expertmesh.cluster.output_lengths import OutputLengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Stay:
    """What one running sequence has and needs.

    num_tokens: known ones, for which it has num_pages, or will have before the next step. pages: those that it has now.
    num_left: tokens that it is expected to generate, at least 1. num_prefill_steps: steps before the one that yields
    the next token.
    """

    num_tokens: int
    num_pages: int
    pages: tuple[int, ...]
    num_left: int
    num_prefill_steps: int

    def num_needed(self, page_size: int) -> int:
        """Return the pages that it still takes until its end."""
        # The last token that is generated is never computed.
        return max(0, -(-(self.num_tokens + self.num_left - 1) // page_size) - self.num_pages)


def stays_of(
    sequences: Sequence[LiveSequence], lengths: OutputLengths, *, page_size: int, max_batch_tokens: int
) -> list[Stay]:
    """Forecast the stays of running sequences, oldest first; one that is about to begin comes last."""
    # What is left of a step's tokens for prompts when every other sequence decodes.
    prompt_tokens_a_step = max(1, max_batch_tokens - len(sequences) + 1)
    num_ahead = 0
    stays: list[Stay] = []
    for sequence in sequences:
        is_decoding = sequence.num_left <= 1
        num_ahead += 0 if is_decoding else sequence.num_left
        num_tokens = len(sequence.tokens)
        stays.append(
            Stay(
                num_tokens=num_tokens,
                num_pages=max(len(sequence.pages), -(-num_tokens // page_size)),
                pages=sequence.pages,
                num_left=lengths.expected(sequence.num_generated, sequence.max_tokens) - sequence.num_generated,
                num_prefill_steps=0 if is_decoding else -(-num_ahead // prompt_tokens_a_step) - 1,
            )
        )
    return stays


def pages_suffice(
    stays: Sequence[Stay], num_shared: Callable[[Sequence[int]], int], *, num_free: int, page_size: int
) -> bool:
    """Return whether each sequence will find its pages, if it generates what is expected of it, a token a step.

    Need grows until a sequence ends and falls then, so it is largest just before some end; those moments are looked at,
    as in Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", 2025. A sequence that is still at
    its prompt is taken to grow at once and to end late, so that neither makes the need larger than was forecast.

    Args:
        stays: of all running sequences.
        num_shared: says how many of some pages stay when one owner lets go of them.
        num_free: pages that can be had now.
        page_size: tokens a page.
    """
    if sum(stay.num_needed(page_size) for stay in stays) <= num_free:
        return True
    numbers = sorted(
        (s.num_left + s.num_prefill_steps, s.num_left, s.num_tokens, s.num_pages, s.num_pages - num_shared(s.pages))
        for s in stays
    )
    ends_n, left_n, tokens_n, pages_n, freed_n = np.array(numbers).T
    # Row i is the moment before sequence i ends; column j what sequence j has taken by then, if it is still there.
    taken_nn = np.maximum(0, -(-(tokens_n + np.minimum(ends_n[:, None], left_n) - 1) // page_size) - pages_n)
    is_there_nn = ends_n >= ends_n[:, None]
    peaks_n = (taken_nn * is_there_nn).sum(axis=1) - (freed_n * ~is_there_nn).sum(axis=1)
    return bool((peaks_n <= num_free).all())
