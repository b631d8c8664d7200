"""What sampling means, one row at a time and in plain Python: the slow twin of `sampling`."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from expertmesh.kernels.sampling import WEIGHT_BITS, SamplingSettings


def sample_row(
    logits: Sequence[float], settings: SamplingSettings, position: int, context_ids: Sequence[int] = ()
) -> tuple[int, float, list[tuple[int, float]]]:
    """Return the row's token, its logprob, and the logprobs of all tokens, best first and equal ones by id."""
    scores = [float(x) for x in logits]
    for token_id in set(context_ids):
        score = scores[token_id]
        penalty = settings.repetition_penalty
        scores[token_id] = score * penalty if score < 0 else score / penalty
    token_id = _best_first(scores)[0] if settings.temperature == 0 else _draw(scores, settings, position)
    log_total = math.log(math.fsum(math.exp(x - max(logits)) for x in logits)) + max(logits)
    ranked = [(i, logits[i] - log_total) for i in _best_first(logits)]
    return token_id, logits[token_id] - log_total, ranked


def random_bits(seed: int) -> Iterator[int]:
    """Yield the 64-bit outputs of SplitMix64 from state `seed`, as in Vigna's public splitmix64.c."""
    mask = 2**64 - 1
    state = seed & mask
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def _draw(scores: list[float], settings: SamplingSettings, position: int) -> int:
    generator = random_bits(next(random_bits(settings.seed)))
    for _ in range(position):
        next(generator)
    uniform = ((next(generator) >> 12) + 0.5) / 2**52
    weights = _filtered_weights(scores, settings)
    target = uniform * sum(weights)
    passed = 0
    for token_id, weight in enumerate(weights):
        passed += weight
        if passed > target:
            return token_id
    raise AssertionError(f"uniform {uniform} did not fall into a total weight of {sum(weights)}")


def _filtered_weights(scores: list[float], settings: SamplingSettings) -> list[int]:
    best = max(scores)
    # float32, as the fast path: at the edges of min-p the two must round alike.
    shifted = [np.float32(score - best) / np.float32(settings.temperature) for score in scores]
    weights = [int(float(np.exp(x)) * 2**WEIGHT_BITS) for x in shifted]
    ranked = _best_first(scores)
    if settings.top_k:
        kth = scores[ranked[min(settings.top_k, len(ranked)) - 1]]
        weights = [w if score >= kth else 0 for w, score in zip(weights, scores, strict=True)]
    if settings.top_p < 1:
        total, before = sum(weights), 0
        kept = {ranked[0]}
        for token_id in ranked:
            if before < settings.top_p * total:
                kept.add(token_id)
            before += weights[token_id]
        weights = [w if token_id in kept else 0 for token_id, w in enumerate(weights)]
    return [w if w >= settings.min_p * 2**WEIGHT_BITS else 0 for w in weights]


def _best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda token_id: (-scores[token_id], token_id))
