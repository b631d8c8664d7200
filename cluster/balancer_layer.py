"""One layer while it is balanced: which shard hosts which expert, and how much of its load each replica computes.

Shape suffixes: S shards, E experts of the layer, R replicas of one expert, N nodes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from expertmesh.cluster.placement import EVEN_WEIGHT

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LEVEL_TOLERANCE = 2e-3  # of the mean: half a step of a weight, for an expert as large as a shard's part
_MAX_SWEEPS = 40


class Snapshot(NamedTuple):
    """A layer's replicas and shares, small enough to keep many: flat positions in [S, E] and the shares there."""

    position_R: npt.NDArray[np.int64]
    share_R: Floats


@dataclass(kw_only=True)
class Layer:
    """The state of one layer. The methods keep load_S, the sums of share_SE over the experts, up to date.

    load_E: float64 tokens. slots_S: int64; 0 for a shard that may host nothing. speed_S: float64 above 0.
    node_S, domain_S: int64 numbers that stand for names. min_replicas: replicas that each expert shall have.
    hosts_SE: bool. share_SE: float64 tokens, 0 where hosts_SE is False.
    """

    load_E: Floats
    slots_S: Ints
    speed_S: Floats
    node_S: Ints
    domain_S: Ints
    min_replicas: int
    hosts_SE: Bools = field(init=False)
    share_SE: Floats = field(init=False)
    load_S: Floats = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.slots_S), len(self.load_E))
        self.slots_S = np.minimum(self.slots_S, shape[1])
        self.hosts_SE = np.zeros(shape, dtype=np.bool_)
        self.share_SE = np.zeros(shape)
        self.load_S = np.zeros(shape[0])
        self.set_min_replicas(self.min_replicas)
        # Sparse: numpy multiplies dense matrices of integers at a fiftieth of the speed.
        in_node_NS = self.node_S[None] == np.arange(int(self.node_S.max(initial=0)) + 1)[:, None]
        self._in_node_NS = csr_array(in_node_NS.astype(np.int64))

    def set_min_replicas(self, min_replicas: int) -> None:
        """Ask for so many replicas of each expert, on as many nodes, as far as there are such nodes."""
        self.min_replicas = min_replicas
        self.num_spread = min(min_replicas, len(set(self.node_S[self.slots_S > 0].tolist())))

    @property
    def time_S(self) -> Floats:  # noqa: N802
        """Load over speed: what a layer waits for is the largest."""
        return self.load_S / self.speed_S

    @property
    def ideal_time(self) -> float:
        """Load over speed if all shards with slots were level."""
        return float(self.load_E.sum() / max(self.speed_S[self.slots_S > 0].sum(), 1e-300))

    @property
    def free_S(self) -> Ints:  # noqa: N802
        """Slots without an expert; negative when a shard hosts more than it may."""
        return np.asarray(self.slots_S - self.hosts_SE.sum(axis=1))

    @property
    def count_E(self) -> Ints:  # noqa: N802
        """Replicas of each expert."""
        return np.asarray(self.hosts_SE.sum(axis=0))

    def nodes_NE(self) -> Ints:  # noqa: N802
        """Return the replicas of each expert on each node."""
        return np.asarray(self._in_node_NS @ self.hosts_SE)

    def droppable_SE(self) -> Bools:  # noqa: N802
        """Return the replicas without which their expert still has min_replicas, on as many nodes as it shall."""
        nodes_NE = self.nodes_NE()
        num_nodes_E = (nodes_NE > 0).sum(axis=0)
        left_SE = num_nodes_E - (nodes_NE[self.node_S] == 1)
        spread_SE = left_SE >= np.minimum(num_nodes_E, self.num_spread)
        droppable_SE: Bools = self.hosts_SE & (self.count_E > self.min_replicas) & spread_SE
        return droppable_SE

    def may_relocate_S(self, source: int, expert: int) -> Bools:  # noqa: N802
        """Return the shards that a replica may go to without its expert being on fewer nodes than it shall."""
        others_S = self.hosts_SE[:, expert].copy()
        num_before = len(set(self.node_S[others_S].tolist()))
        others_S[source] = False
        other_nodes = sorted(set(self.node_S[others_S].tolist()))
        may_S = ~self.hosts_SE[:, expert] & (self.slots_S > 0)
        if len(other_nodes) < min(num_before, self.num_spread):
            may_S &= ~np.isin(self.node_S, other_nodes)
        return may_S

    def crowd_S(self, expert: int) -> Floats:  # noqa: N802
        """Return how much a further replica on each shard would share its domain and node with the expert's others."""
        hosts_S = self.hosts_SE[:, expert]
        in_domain_S = (self.domain_S[:, None] == self.domain_S[hosts_S]).sum(axis=1)
        in_node_S = (self.node_S[:, None] == self.node_S[hosts_S]).sum(axis=1)
        return np.asarray(in_domain_S + in_node_S + 1e3 * hosts_S)

    def add(self, shard: int, expert: int, share: float = 0.0) -> None:
        """Host an expert; the share is in addition to what other replicas compute."""
        assert not self.hosts_SE[shard, expert], f"expert {expert} is on shard {shard} already"
        self.hosts_SE[shard, expert] = True
        self.share_SE[shard, expert] = share
        self.load_S[shard] += share

    def drop(self, shard: int, expert: int) -> float:
        """End a replica and return its share, which goes to nobody until `fill` or `level`."""
        share = float(self.share_SE[shard, expert])
        self.hosts_SE[shard, expert] = False
        self.share_SE[shard, expert] = 0.0
        self.load_S[shard] -= share
        return share

    def fill(self, expert: int) -> None:
        """Split an expert's load over its replicas so that the largest of their shards' times is least."""
        host_R = np.flatnonzero(self.hosts_SE[:, expert])
        if not len(host_R):
            return
        speed_R = self.speed_S[host_R]
        base_R = self.load_S[host_R] - self.share_SE[host_R, expert]
        order_R = np.argsort(base_R / speed_R, kind="stable")
        # The water's level over the first r shards falls while further ones are below it, and rises after.
        level = ((self.load_E[expert] + base_R[order_R].cumsum()) / speed_R[order_R].cumsum()).min()
        share_R = np.maximum(level * speed_R - base_R, 0.0)
        self.set_shares(expert, host_R, share_R * (self.load_E[expert] / max(share_R.sum(), 1e-300)))

    def set_shares(self, expert: int, host_R: Ints, share_R: Floats) -> None:
        """Set what each replica of an expert computes."""
        self.load_S[host_R] += share_R - self.share_SE[host_R, expert]
        self.share_SE[host_R, expert] = share_R

    def level(self) -> None:
        """Lower the largest time by shares alone: fill expert after expert until no replica would pass load on.

        This is block coordinate descent on the sum of load**2 / speed, whose least point is also the least largest time
        (Fujishige, "Lexicographically optimal base of a polymatroid", 1980).
        """
        self.load_S = self.share_SE.sum(axis=1)
        lost_E = np.abs(self.share_SE.sum(axis=0) - self.load_E) > 1e-9 * self.load_E
        for expert in np.flatnonzero(lost_E).tolist():
            self.fill(expert)
        shared_E = np.flatnonzero((self.count_E > 1) & (self.load_E > 0))
        tolerance = LEVEL_TOLERANCE * self.ideal_time
        for _ in range(_MAX_SWEEPS):
            time_S1 = self.time_S[:, None]
            high_E = np.where(self.share_SE[:, shared_E] > 0, time_S1, -np.inf).max(axis=0, initial=-np.inf)
            low_E = np.where(self.hosts_SE[:, shared_E], time_S1, np.inf).min(axis=0, initial=np.inf)
            uneven = shared_E[high_E - low_E > tolerance].tolist()
            if not uneven:
                return
            for expert in uneven:
                self.fill(expert)

    def quantise(self) -> dict[int, tuple[int, ...]]:
        """Round shares to integer weights with sum EVEN_WEIGHT, largest remainders first, and take them as the shares.

        The hottest expert is rounded first, so that the others, whose steps are finer, can make up for it. An expert
        with one replica or without load gets no weights.
        """
        weights = {}
        shared_E = (self.count_E > 1) & (self.load_E > 0)
        for expert in np.argsort(-self.load_E, kind="stable").tolist():
            if not shared_E[expert]:
                continue
            self.fill(expert)
            host_R = np.flatnonzero(self.hosts_SE[:, expert])
            exact_R = self.share_SE[host_R, expert] / self.load_E[expert] * EVEN_WEIGHT
            weight_R = np.floor(exact_R).astype(np.int64)
            order_R = np.argsort(weight_R - exact_R, kind="stable")
            weight_R[order_R[: EVEN_WEIGHT - int(weight_R.sum())]] += 1
            self.set_shares(expert, host_R, weight_R * (self.load_E[expert] / EVEN_WEIGHT))
            weights[expert] = tuple(weight_R.tolist())
        return weights

    def snapshot(self) -> Snapshot:
        """Return the replicas and shares as they are."""
        position_R = np.flatnonzero(self.hosts_SE)
        return Snapshot(position_R, self.share_SE.ravel()[position_R])

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        self.hosts_SE[:] = False
        self.share_SE[:] = 0.0
        self.hosts_SE.ravel()[snapshot.position_R] = True
        self.share_SE.ravel()[snapshot.position_R] = snapshot.share_R
        self.load_S = self.share_SE.sum(axis=1)
