"""Traces of made-up routing: experts as popular as Zipf's law has it, the hot ones others in each layer.

Shape suffixes: L MoE layers, E experts of a layer.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.traces import TraceHeader, TraceStep

# Long before, all tokens choose the same experts; popularities beyond it could not be told from 0.
MAX_SKEW = 20.0


def zipf_steps(
    header: TraceHeader,
    *,
    skew: float,
    num_steps: int,
    step_s: float,
    prefill_tokens: int,
    decode_tokens: int,
    seed: int,
    topic_steps: int = 0,
) -> Iterator[TraceStep]:
    """Yield intervals of equally many tokens, each of which chooses top_k different experts of a layer.

    The r-th most popular expert of a layer is chosen in proportion to r ** -skew, up to by every token. Which expert
    has which rank is a permutation of each layer's own.

    Args:
        header: the model.
        skew: 0 is even; traffic of one kind of text is near 1.
        num_steps: how many.
        step_s: seconds of each.
        prefill_tokens: of each, of prompts.
        decode_tokens: of each, generated.
        seed: equal arguments give equal traces.
        topic_steps: the topic, and with it all permutations, changes each time that so many have passed; 0: never.

    Raises:
        InputError: an argument out of range.
    """
    counts = {"num_steps": num_steps, "prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens}
    for name, value in {**counts, "seed": seed, "topic_steps": topic_steps}.items():
        if value < 0:
            raise InputError(f"a synthetic trace with {name}={value}; it must not be negative")
    if not 0 <= skew <= MAX_SKEW:
        raise InputError(f"a synthetic trace with skew={skew}; it must be 0 to {MAX_SKEW}")
    if not 0 < step_s < math.inf:
        raise InputError(f"a synthetic trace with step_s={step_s}; it must be finite and above 0")
    return _zipf_steps(header, skew, num_steps, step_s, (prefill_tokens, decode_tokens), seed, topic_steps)


def _zipf_steps(
    header: TraceHeader,
    skew: float,
    num_steps: int,
    step_s: float,
    tokens: tuple[int, int],
    seed: int,
    topic_steps: int,
) -> Iterator[TraceStep]:
    by_rank_E = choice_probabilities(np.arange(1.0, header.num_experts + 1) ** -skew, header.top_k)
    rng = np.random.default_rng(seed)
    for number in range(num_steps):
        if number == 0 or (topic_steps and number % topic_steps == 0):
            chance_LE = np.stack([rng.permutation(by_rank_E) for _ in header.layers])
        load_LE = np.stack([_draw(chance_E, sum(tokens), rng) for chance_E in chance_LE])
        time_s = float((number + 1) * step_s)
        yield TraceStep(time_s=time_s, prefill_tokens=tokens[0], decode_tokens=tokens[1], load_LE=load_LE)


def choice_probabilities(popularity_E: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.float64]:
    """Return with what probability a token that chooses top_k experts chooses each: by popularity, up to 1.

    What the most popular ones cannot take, as a token chooses each but once, is left to the others.

    Args:
        popularity_E: falling, above 0.
        top_k: at most E.
    """
    num_experts = len(popularity_E)
    num_sure = next(
        n for n in range(top_k + 1) if n == num_experts or popularity_E[n] * (top_k - n) <= popularity_E[n:].sum()
    )
    chance_E = np.ones(num_experts)
    if num_sure < num_experts:
        chance_E[num_sure:] = popularity_E[num_sure:] * ((top_k - num_sure) / popularity_E[num_sure:].sum())
    return np.minimum(chance_E, 1.0)


def _draw(chance_E: npt.NDArray[np.float64], num_tokens: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return how many of the tokens choose each expert, each token as many different ones as the chances sum to.

    Systematic sampling (Madow 1949): a token that draws u chooses those experts whose part of the line, laid out by
    their chances, holds one of u, u + 1, u + 2, ... None is longer than 1, so none is chosen twice.
    """
    start_T = np.sort(rng.random(num_tokens))
    top_k = round(chance_E.sum())
    end_E = np.minimum(np.cumsum(chance_E), top_k)
    end_E[-1] = top_k
    whole_E = np.floor(end_E)
    before_E = whole_E.astype(np.int64) * num_tokens + np.searchsorted(start_T, end_E - whole_E)
    load_E: npt.NDArray[np.int64] = np.diff(before_E, prepend=0)
    return load_E
