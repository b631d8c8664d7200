"""What is offered to a simulated fleet: intervals of tokens and their choices, from a trace or made up.

Shape suffixes: L MoE layers (by position in TraceHeader.layers), E experts of a layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.synthetic_traces import MAX_SKEW, choice_probabilities
from expertmesh.cluster.traces import TraceHeader, TraceStep

_INTERVAL_S = 1.0  # of made-up traffic, as of a recording


@dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
    """tokens that come evenly from begin_s to end_s. load_LE: how many of them choose each expert."""

    begin_s: float
    end_s: float
    tokens: int
    load_LE: npt.NDArray[np.float64]


class Rate:
    """Tokens offered a second over time: linear between points, level before the first and after the last.

    Raises:
        InputError: no points, times that do not rise, a negative rate, or none above 0.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        self._points = tuple(points)
        times_s = [time_s for time_s, _ in self._points]
        if not self._points or any(b <= a for a, b in pairwise(times_s)):
            raise InputError(f"rate: its times must rise, got {times_s}")
        for value in (value for point in self._points for value in point):
            if not 0 <= value < math.inf:
                raise InputError(f"rate: times and tokens/s must be finite and not negative, got {value}")
        if not any(rate for _, rate in self._points):
            raise InputError("rate: it is 0 all the time, and no token would come")
        self._times_s = np.array(times_s)
        self._rates = np.array([rate for _, rate in self._points])

    def at(self, time_s: float) -> float:
        """Return the tokens a second at a time."""
        return float(np.interp(time_s, self._times_s, self._rates))

    def tokens_until(self, time_s: float) -> int:
        """Return the whole tokens offered from time 0 on."""
        inside = self._times_s[(self._times_s > 0) & (self._times_s < time_s)]
        knots = np.concatenate([[0.0], inside, [time_s]])
        return math.floor(float(np.trapezoid(np.interp(knots, self._times_s, self._rates), knots)) + 1e-6)


def trace_intervals(steps: Iterable[TraceStep]) -> Iterator[Interval]:
    """Yield a trace's intervals at their own times.

    Raises:
        InputError: an interval in which tokens took no time.
    """
    begin_s = 0.0
    for number, step in enumerate(steps):
        tokens = step.prefill_tokens + step.decode_tokens
        if step.time_s > begin_s:
            yield Interval(begin_s=begin_s, end_s=step.time_s, tokens=tokens, load_LE=step.load_LE.astype(np.float64))
        elif tokens:
            raise InputError(f"interval {number} of the trace: time_s={step.time_s} leaves its {tokens} tokens no time")
        begin_s = step.time_s


def zipf_intervals(
    header: TraceHeader, rate: Rate, *, skew: float, topic_s: float, duration_s: float, seed: int
) -> Iterator[Interval]:
    """Make up intervals whose experts are as popular as Zipf's law has it; see `synthetic_traces.zipf_steps`.

    Tokens choose independently here, which is quick for many of them.

    Args:
        header: the model.
        rate: tokens a second.
        skew: 0 is even.
        topic_s: the experts' popularity changes as often as this; 0: never.
        duration_s: of all intervals.
        seed: equal arguments give equal traffic.

    Raises:
        InputError: skew or topic_s out of range.
    """
    if not 0 <= skew <= MAX_SKEW:
        raise InputError(f"zipf: a skew of {skew}; it must be 0 to {MAX_SKEW:g}")
    if not 0 <= topic_s < math.inf:
        raise InputError(f"topics: {topic_s} s; it must be finite and not negative")
    by_rank_E = choice_probabilities(np.arange(1.0, header.num_experts + 1) ** -skew, header.top_k)
    rng = np.random.default_rng(seed)
    topic = -1
    for begin_s in np.arange(0.0, duration_s, _INTERVAL_S).tolist():
        if topic < 0 or (topic_s and int(begin_s // topic_s) > topic):
            topic = int(begin_s // topic_s) if topic_s else 0
            chance_LE = np.stack([rng.permutation(by_rank_E) for _ in header.layers])
        end_s = min(begin_s + _INTERVAL_S, duration_s)
        tokens = rate.tokens_until(end_s) - rate.tokens_until(begin_s)
        load_LE = draw(tokens * chance_LE, tokens * chance_LE * (1 - chance_LE), rng)
        load_LE *= header.top_k * tokens / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300)
        yield Interval(begin_s=begin_s, end_s=end_s, tokens=tokens, load_LE=np.minimum(load_LE, tokens))


def repeated(make: Callable[[], Iterable[Interval]], duration_s: float) -> Iterator[Interval]:
    """Replay intervals over and over until duration_s, one after the other; what reaches beyond is cut.

    Args:
        make: returns them, each time from the first.
        duration_s: above 0.

    Raises:
        InputError: there are none.
    """
    begin_s = 0.0
    while True:
        lap_s = begin_s
        for interval in make():
            length_s = interval.end_s - interval.begin_s
            part = min(1.0, (duration_s - begin_s) / length_s)
            tokens = math.ceil(interval.tokens * part - 1e-9)
            load_LE = interval.load_LE * (tokens / max(1, interval.tokens))
            end_s = begin_s + length_s if part == 1 else duration_s
            yield Interval(begin_s=begin_s, end_s=end_s, tokens=tokens, load_LE=load_LE)
            begin_s = end_s
            if begin_s >= duration_s * (1 - 1e-12):
                return
        if begin_s == lap_s:
            raise InputError("trace: it has no intervals with tokens")


def at_rate(intervals: Iterable[Interval], rate: Rate) -> Iterator[Interval]:
    """Offer other numbers of tokens with the same choices; every interval must have tokens."""
    for interval in intervals:
        tokens = rate.tokens_until(interval.end_s) - rate.tokens_until(interval.begin_s)
        yield replace(interval, tokens=tokens, load_LE=interval.load_LE * (tokens / max(1, interval.tokens)))


def draw(
    mean: npt.NDArray[np.float64], variance: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Draw counts of these means and variances: normal, with the skewness of a Poisson count, never below 0.

    The first correction of Cornish and Fisher ("Moments and Cumulants in the Specification of Distributions", 1938):
    a Poisson count of mean m is about m + sqrt(m) z + (z**2 - 1) / 6. It is scaled by variance / mean, so that counts
    without variance are exact. Many times quicker than drawing whole numbers; `test_simulation_routing.py` compares.
    """
    z = rng.standard_normal(mean.shape)
    skewed = variance / np.maximum(mean, 1e-300) * ((z * z - 1) / 6)
    counts: npt.NDArray[np.float64] = np.maximum(mean + np.sqrt(variance) * z + skewed, 0.0)
    return counts
