"""What tokens' choices ask of each shard, given a placement: means once an interval, draws once a step.

A step is a sample, without putting back, of its interval's tokens: one that has all of them has exactly the rows that
were recorded. Replicas get a token by a hash (cluster/dispatch_hash.py), which is a draw by weight.

Shape suffixes: L MoE layers, E experts of a layer, S shards (by position in Placement.shards, dead ones too), R
replicas, N pairs of an expert and a replica.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.dispatch_weights import live_shares
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.simulation.traffic import Interval, draw

Floats = npt.NDArray[np.float64]


class Ranks(NamedTuple):
    """A step's load of each shard, float64 [L, S]: (token, expert) pairs, and how many of its experts have any."""

    rows_LS: Floats
    active_LS: Floats


class Routing:
    """A placement as a list of pairs with their shares. Dead shards get nothing.

    alive_S: bool, of the placement's shards; every expert must have one alive.
    """

    def __init__(self, placement: Placement, alive_S: npt.NDArray[np.bool_]) -> None:
        row_N, shard_N, weight_N = placement.replica_pairs
        num_rows, num_shards = len(placement.layers) * placement.num_experts, len(placement.shards)
        self._shape_LS = (len(placement.layers), num_shards)
        self._num_live = int(alive_S.sum())
        share_N = live_shares(weight_N, alive_S[shard_N], row_N, num_rows)
        computes_N = share_N > 0
        self.expert_N, self.share_N = row_N[computes_N], share_N[computes_N]
        self.row_N = self.expert_N // placement.num_experts * num_shards + shard_N[computes_N]

    @property
    def num_live(self) -> int:
        """Shards that compute."""
        return self._num_live

    def sum_LS(self, values_N: Floats) -> Floats:  # noqa: N802  # a shape suffix
        """Add up values of pairs on their shards."""
        size = self._shape_LS[0] * self._shape_LS[1]
        sums: Floats = np.bincount(self.row_N, values_N, minlength=size).astype(np.float64).reshape(self._shape_LS)
        return sums


class Mix:
    """One interval's choices under one routing."""

    def __init__(self, routing: Routing, interval: Interval) -> None:
        self.tokens, self._routing = interval.tokens, routing
        self._load_N = interval.load_LE.ravel()[routing.expert_N]
        chance_N, share_N = self._load_N / max(1, interval.tokens), routing.share_N
        self._mean_LS = routing.sum_LS(share_N * chance_N)
        self._by_replica_LS = routing.sum_LS(share_N * (1 - share_N) * chance_N)
        self._by_token_LS = routing.sum_LS(share_N**2 * chance_N * (1 - chance_N))
        self._of = (0, 0)
        self._variance_LS = self._active_LS = self._mean_LS

    @property
    def balancedness(self) -> float:
        """The mean load of the live shards over the largest, as `balance.balancedness` has it."""
        largest = float(self._mean_LS.max(axis=1).sum())
        return float(self._mean_LS.sum()) / self._routing.num_live / largest if largest else 1.0

    def draw(self, tokens: int, rng: np.random.Generator) -> Ranks:
        """Draw a step of so many tokens."""
        population = max(tokens, self.tokens)
        if self._of != (tokens, population):
            self._of = (tokens, population)
            part = tokens / population
            self._variance_LS = self._by_replica_LS + (1 - part) * self._by_token_LS
            # None of an expert's choices is in the step: each is with that probability, as if independent.
            none_N = (1 - part * self._routing.share_N) ** (self._load_N * (population / max(1, self.tokens)))
            self._active_LS = self._routing.sum_LS(1 - none_N)
        rows_LS = draw(self._mean_LS * tokens, self._variance_LS * tokens, rng)
        return Ranks(rows_LS, self._active_LS)
