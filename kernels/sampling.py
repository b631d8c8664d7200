"""Batched sampling of next tokens, repeatable row by row.

A row's token is a function of its own logits, settings and position alone. Two things make it so: the random number
of a draw is computed from (seed, position), never taken from a generator with state; and the draw itself is in
integers, whose sums have no rounding, so that batch, threads and order of summation cannot change it.

Filters run in the order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p. A filter sets the
weight of what it drops to 0; tokens stay in the order of their ids throughout, and only rows that ask for a filter pay
for it.

Shapes: N rows, V vocabulary, M rows that draw, F rows that ask for a filter, C candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.kernels.cpu.draw import can_draw, draw_rows

# A row's most likely token weighs 2**40, the others exp(difference) of that. The total of 2**22 tokens fits int64, and
# only what is less likely than 2**-40 (1e-12) of the top is never drawn.
WEIGHT_BITS = 40
MAX_VOCAB = 1 << 22
# Candidates that top-p looks at first; eight times as many as long as they hold too little.
TOP_P_CANDIDATES = 256

# Scores drawn from at once: a bound on scratch memory (some 30 bytes each). On a CPU it is so low that the allocator
# reuses its pages; to get new ones from the system for each draw costs more than the arithmetic.
SCORES_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 24}

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class NonFiniteLogitsError(ValueError):
    """Rows whose largest logit is NaN or infinite; `rows` are their indices, so that the others can still be drawn."""

    def __init__(self, rows: tuple[int, ...]):
        super().__init__(rows)
        self.rows = rows

    def __str__(self) -> str:
        return f"no finite largest logit in rows {list(self.rows)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How the tokens of one sequence are drawn; the same object serves all its positions.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. seed may be any integer; its
    low 64 bits count. logprobs is how many of the most likely tokens to report beside the chosen one; None: nothing,
    0: only the chosen one.

    Raises:
        ValueError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be at least 0, got {self.logprobs}")

    @property
    def is_plain(self) -> bool:
        """Whether temperature is all that changes the scores."""
        return (self.top_k, self.top_p, self.min_p, self.repetition_penalty) == (0, 1, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """One token a row.

    logprob is the natural log of its probability before penalty, temperature and filters; None where not asked for.
    top holds (token id, logprob) of the most likely tokens, best first, equal ones by id; empty where not asked for.
    """

    token_ids: list[int]
    logprob: list[float | None]
    top: list[list[tuple[int, float]]]


def sample(
    logits_NV: Tensor,
    settings_N: Sequence[SamplingSettings],
    position_N: Sequence[int],
    context_ids_N: Sequence[Sequence[int]] | None = None,
) -> SampledTokens:
    """Draw the next token of each row.

    Args:
        logits_NV: float32, bfloat16 or float16 on any device; not changed. -inf excludes a token.
        settings_N: one a row.
        position_N: absolute index, from 0, of the token being drawn in its sequence.
        context_ids_N: prompt and output ids of each row so far; read only for rows with a repetition penalty.

    Raises:
        ValueError: Lengths that do not agree, an empty vocabulary or one above MAX_VOCAB, a negative position, no
            context for a row with a penalty, or a context id outside the vocabulary.
        NonFiniteLogitsError: A row whose largest logit is NaN or infinite; no row was drawn.
    """
    _check_arguments(logits_NV, settings_N, position_N)
    plain = [n for n, settings in enumerate(settings_N) if settings.is_plain] if can_draw(logits_NV) else []
    others = sorted(set(range(len(settings_N))).difference(plain))
    ids_N = torch.empty(len(settings_N), dtype=torch.int64, device=logits_NV.device)
    is_finite_N = torch.ones_like(ids_N, dtype=torch.bool)
    if plain:
        settings_P = [settings_N[n] for n in plain]
        uniforms = [uniform(s.seed, position_N[n]) for n, s in zip(plain, settings_P, strict=True)]
        ids_N[plain], best_P = draw_rows(_rows(logits_NV, plain), [s.temperature for s in settings_P], uniforms)
        is_finite_N[plain] = best_P.isfinite()
    if others:
        scores_FV = _rows(_penalised(logits_NV, settings_N, context_ids_N), others)
        ids_N[others], best_F = _draw_filtered(
            scores_FV, [settings_N[n] for n in others], [position_N[n] for n in others]
        )
        is_finite_N[others] = best_F.isfinite()
    if not bool(is_finite_N.all()):
        raise NonFiniteLogitsError(tuple((~is_finite_N).nonzero().flatten().tolist()))
    token_ids: list[int] = ids_N.tolist()
    logprob, top = _logprobs(logits_NV, ids_N, settings_N)
    return SampledTokens(token_ids=token_ids, logprob=logprob, top=top)


def uniform(seed: int, position: int) -> float:
    """Return the number in (0, 1) that draws the token at `position` of a sequence with `seed`.

    It is output number `position` of a SplitMix64 generator whose first state is the mixed seed: Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", OOPSLA 2014, with the constants of Vigna's public splitmix64.c.
    The top 52 bits and a half give a value that float64 holds exactly and that is neither 0 nor 1.
    """
    bits = splitmix64(splitmix64(seed) + position * _GOLDEN_GAMMA)
    return ((bits >> 12) + 0.5) * 2.0**-52


def splitmix64(state: int) -> int:
    """Return the 64-bit output of a SplitMix64 generator in `state` (its low 64 bits count)."""
    z = (state + _GOLDEN_GAMMA) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def _draw_filtered(
    scores_FV: Tensor, settings_F: Sequence[SamplingSettings], position_F: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return ids_F and best_F, each row's token and its largest score; nothing is drawn where one is not finite."""
    # max() gives the first, so the lowest, of equal indices.
    best_F, ids_F = scores_FV.max(dim=-1)
    if not bool(best_F.isfinite().all()):
        return ids_F, best_F
    drawing = [f for f, settings in enumerate(settings_F) if settings.temperature > 0]
    num_at_once = max(1, SCORES_AT_ONCE["cpu" if scores_FV.is_cpu else "gpu"] // scores_FV.shape[1])
    for start in range(0, len(drawing), num_at_once):
        rows = drawing[start : start + num_at_once]
        weights_MV = filtered_weights(_rows(scores_FV, rows), [settings_F[f] for f in rows])
        ids_F[rows] = _inverse_cdf(weights_MV, [uniform(settings_F[f].seed, position_F[f]) for f in rows])
    return ids_F, best_F


def filtered_weights(scores_MV: Tensor, settings_M: Sequence[SamplingSettings]) -> Tensor:
    """Return weights_MV (int64): proportional to the probabilities after temperature and filters, 0 for dropped tokens.

    scores_MV is float32 with a finite largest value in each row; every temperature is above 0.
    """
    device = scores_MV.device
    # The smallest normal float32: a temperature that float32 rounds to 0 would make 0 / 0 of the most likely token.
    # And the largest: infinity would make NaN of excluded tokens.
    limits = torch.finfo(torch.float32)
    temperature_M = torch.tensor([min(s.temperature, limits.max) for s in settings_M], device=device)
    temperature_M.clamp_(min=limits.tiny)
    # The largest is taken off first, so that a small temperature overflows to -inf and never to +inf.
    shifted_MV = (scores_MV - scores_MV.amax(dim=-1, keepdim=True)).div_(temperature_M[:, None])
    weights_MV = shifted_MV.exp_().mul_(2.0**WEIGHT_BITS).long()
    _drop_below_top_k(scores_MV, weights_MV, settings_M)
    _drop_outside_top_p(weights_MV, settings_M)
    _drop_below_min_p(weights_MV, settings_M)
    return weights_MV


def _check_arguments(logits_NV: Tensor, settings_N: Sequence[SamplingSettings], position_N: Sequence[int]) -> None:
    if logits_NV.dim() != 2 or not 0 < logits_NV.shape[1] <= MAX_VOCAB or not logits_NV.is_floating_point():
        raise ValueError(
            f"logits must be floating point [rows, 1 to {MAX_VOCAB}], got {logits_NV.dtype} {list(logits_NV.shape)}"
        )
    num_rows = logits_NV.shape[0]
    if len(settings_N) != num_rows or len(position_N) != num_rows:
        raise ValueError(f"{num_rows} rows of logits, but {len(settings_N)} settings and {len(position_N)} positions")
    if num_rows and min(position_N) < 0:
        raise ValueError(f"positions must be at least 0, got {min(position_N)}")


def _rows(x_NV: Tensor, rows: Sequence[int]) -> Tensor:
    return x_NV if len(rows) == x_NV.shape[0] else x_NV[list(rows)]


def _penalised(
    logits_NV: Tensor, settings_N: Sequence[SamplingSettings], context_ids_N: Sequence[Sequence[int]] | None
) -> Tensor:
    """Return float32 scores: each token of the context once, divided by the penalty if positive, else multiplied."""
    penalised = [n for n, settings in enumerate(settings_N) if settings.repetition_penalty != 1]
    if not penalised:
        return logits_NV.float()
    if context_ids_N is None or len(context_ids_N) != len(settings_N):
        found = "none" if context_ids_N is None else str(len(context_ids_N))
        raise ValueError(f"a repetition penalty needs the context of all {len(settings_N)} rows, got {found}")
    scores_NV = logits_NV.to(torch.float32, copy=True)
    vocab_size = scores_NV.shape[1]
    for n in penalised:
        ids = torch.tensor(context_ids_N[n], dtype=torch.long)
        # Checked before it goes to the device: there a bad index would end the process.
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"context of row {n} has ids outside 0..{vocab_size - 1}: {int(ids.min())}..{int(ids.max())}"
            )
        ids = ids.to(scores_NV.device)
        seen = scores_NV[n, ids]
        penalty = settings_N[n].repetition_penalty
        # An id that is there twice is written twice with the same value.
        scores_NV[n, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores_NV


def _drop_below_top_k(scores_MV: Tensor, weights_MV: Tensor, settings_M: Sequence[SamplingSettings]) -> None:
    """Set the weights of tokens that score less than the k-th to 0; those that equal it stay."""
    asking = [m for m, settings in enumerate(settings_M) if 0 < settings.top_k < scores_MV.shape[1]]
    if not asking:
        return
    k_F = torch.tensor([settings_M[m].top_k for m in asking], device=scores_MV.device)
    best_FC = _rows(scores_MV, asking).topk(max(settings_M[m].top_k for m in asking)).values
    kth_M1 = torch.full_like(scores_MV[:, :1], -math.inf)
    kth_M1[asking] = best_FC.gather(1, k_F[:, None] - 1)
    weights_MV.masked_fill_(scores_MV < kth_M1, 0)


def _drop_outside_top_p(weights_MV: Tensor, settings_M: Sequence[SamplingSettings]) -> None:
    """Keep a token while those before it, best first and equal ones by id, have less than top_p of the weight."""
    asking = [m for m, settings in enumerate(settings_M) if settings.top_p < 1]
    if not asking:
        return
    weights_FV = _rows(weights_MV, asking)
    vocab_size = weights_FV.shape[1]
    top_p_F = torch.tensor([settings_M[m].top_p for m in asking], dtype=torch.float64, device=weights_MV.device)
    limit_F1 = (weights_FV.sum(dim=-1) * top_p_F)[:, None]
    num_candidates = TOP_P_CANDIDATES
    while True:
        ids_FC = _best_ids(weights_FV, min(num_candidates, vocab_size))
        candidates_FC = weights_FV.gather(1, ids_FC)
        if num_candidates >= vocab_size or bool((candidates_FC.sum(dim=-1, keepdim=True) >= limit_F1).all()):
            break
        num_candidates *= 8
    before_FC = candidates_FC.cumsum(dim=-1) - candidates_FC
    dropped_FC = before_FC >= limit_F1
    dropped_FC[:, 0] = False
    rows_F = torch.tensor(asking, device=weights_MV.device)
    weights_MV.index_fill_(0, rows_F, 0)
    weights_MV[rows_F[:, None], ids_FC] = candidates_FC.masked_fill_(dropped_FC, 0)


def _drop_below_min_p(weights_MV: Tensor, settings_M: Sequence[SamplingSettings]) -> None:
    """Set the weights of tokens with less than min_p of the most likely one's probability to 0."""
    if all(settings.min_p == 0 for settings in settings_M):
        return
    least_M = torch.tensor([math.ceil(s.min_p * 2**WEIGHT_BITS) for s in settings_M], device=weights_MV.device)
    weights_MV.masked_fill_(weights_MV < least_M[:, None], 0)


def _best_ids(ranks_FV: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` highest ranks (integers within +-2**40) of each row, best first, equal ones by id.

    topk alone leaves the order of equal ones open; so one int64 holds both the rank and the id, counted from the end.
    """
    ids_from_end_V = MAX_VOCAB - 1 - torch.arange(ranks_FV.shape[1], device=ranks_FV.device)
    keys_FV = torch.add(ids_from_end_V, ranks_FV, alpha=MAX_VOCAB)
    return MAX_VOCAB - 1 - (keys_FV.topk(count).values & (MAX_VOCAB - 1))


def _inverse_cdf(weights_MV: Tensor, uniforms: list[float]) -> Tensor:
    """Return the first id at which the running sum of weights passes uniform * total; weights_MV is overwritten."""
    cumulative_MV = weights_MV.cumsum_(dim=-1)
    total_M1 = cumulative_MV[:, -1:]
    uniform_M1 = torch.tensor(uniforms, dtype=torch.float64, device=weights_MV.device)[:, None]
    # Below the total even after rounding: uniform is half a step of float64 or more below 1.
    target_M1 = (uniform_M1 * total_M1).long()
    return torch.searchsorted(cumulative_MV, target_M1, right=True)[:, 0]


def _logprobs(
    logits_NV: Tensor, ids_N: Tensor, settings_N: Sequence[SamplingSettings]
) -> tuple[list[float | None], list[list[tuple[int, float]]]]:
    """Return each row's logprob of its token and its most likely tokens, computed for rows that ask."""
    logprob: list[float | None] = [None] * len(settings_N)
    top: list[list[tuple[int, float]]] = [[] for _ in settings_N]
    counts = {n: settings.logprobs for n, settings in enumerate(settings_N) if settings.logprobs is not None}
    if not counts:
        return logprob, top
    rows = list(counts)
    logprobs_FV = _rows(logits_NV, rows).float().log_softmax(dim=-1)
    for n, value in zip(rows, logprobs_FV.gather(1, _rows(ids_N, rows)[:, None])[:, 0].tolist(), strict=True):
        logprob[n] = value
    num_best = min(max(counts.values()), logits_NV.shape[1])
    if num_best:
        # None is above 0, and the bits of positive float32 numbers are in the numbers' order.
        ids_FC = _best_ids(-logprobs_FV.abs().view(torch.int32), num_best)
        values_FC = logprobs_FV.gather(1, ids_FC)
        for n, ids, values in zip(rows, ids_FC.tolist(), values_FC.tolist(), strict=True):
            top[n] = list(zip(ids, values, strict=True))[: counts[n]]
    return logprob, top
