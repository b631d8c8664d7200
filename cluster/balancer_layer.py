"""One layer while it is balanced: which shard hosts which expert, and how much of its load each replica computes.

A layer may have a thousand shards with few replicas each, so what is done often looks at replicas, not at all pairs of
a shard and an expert.

Shape suffixes: S shards, E experts of the layer, P the layer's replicas (sorted by expert, then shard), R replicas of
one expert, N nodes.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.balancer_shares import SharedLoads, filled
from expertmesh.cluster.placement import EVEN_WEIGHT

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LEVEL_TOLERANCE = 2e-3  # of the mean
_MAX_FILLS = 40  # of each expert, in a levelling


class Replicas(NamedTuple):
    """A layer's replicas and the load that each computes."""

    expert_P: Ints
    shard_P: Ints
    share_P: Floats


@dataclass(kw_only=True)
class Layer:
    """The state of one layer. The methods keep load_S, the sums of share_SE over the experts, up to date.

    load_E: float64 tokens. slots_S: int64; 0 for a shard that may host nothing. speed_S: float64 above 0.
    node_S, domain_S: int64 numbers that stand for names. min_replicas: replicas that each expert shall have.
    hosts_SE: bool. share_SE: float64 tokens, 0 where hosts_SE is False. count_E: replicas of each expert. Read them;
    `add`, `drop` and `restore` change them.
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
    count_E: Ints = field(init=False)

    def __post_init__(self) -> None:
        num_shards, num_experts = len(self.slots_S), len(self.load_E)
        self.slots_S = np.minimum(self.slots_S, num_experts)
        # An expert's shards lie side by side in memory: they are asked for more often than a shard's experts.
        self.hosts_SE = np.zeros((num_experts, num_shards), dtype=np.bool_).T
        self.share_SE = np.zeros((num_experts, num_shards)).T
        self.load_S = np.zeros(num_shards)
        self.count_E = np.zeros(num_experts, dtype=np.int64)
        self._used_S = np.zeros(num_shards, dtype=np.int64)
        self._position_P: Ints | None = None
        self.set_min_replicas(self.min_replicas)

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
        return np.asarray(self.slots_S - self._used_S)

    @property
    def replicas(self) -> Replicas:
        """All replicas."""
        if self._position_P is None:
            self._position_P = np.flatnonzero(self.hosts_SE.ravel(order="F"))
        expert_P, shard_P = np.divmod(self._position_P, len(self.slots_S))
        return Replicas(expert_P, shard_P, self.share_SE.ravel(order="F")[self._position_P])

    def nodes_NE(self) -> Ints:  # noqa: N802
        """Return the replicas of each expert on each node."""
        expert_P, shard_P, _ = self.replicas
        num_nodes = int(self.node_S.max(initial=0)) + 1
        position_P = self.node_S[shard_P] * len(self.load_E) + expert_P
        return np.bincount(position_P, minlength=num_nodes * len(self.load_E)).reshape(num_nodes, -1)

    def droppable_SE(self) -> Bools:  # noqa: N802
        """Return the replicas without which their expert still has min_replicas, on as many nodes as it shall."""
        expert_P, shard_P, _ = self.replicas
        nodes_NE = self.nodes_NE()
        num_nodes_E = (nodes_NE > 0).sum(axis=0)
        left_P = num_nodes_E[expert_P] - (nodes_NE[self.node_S[shard_P], expert_P] == 1)
        spread_P = left_P >= np.minimum(num_nodes_E, self.num_spread)[expert_P]
        may_P = spread_P & (self.count_E > self.min_replicas)[expert_P]
        droppable_SE: Bools = np.zeros((len(self.load_E), len(self.slots_S)), dtype=np.bool_).T
        droppable_SE[shard_P[may_P], expert_P[may_P]] = True
        return droppable_SE

    def may_relocate_S(self, source: int, expert: int) -> Bools:  # noqa: N802
        """Return the shards that a replica may go to without its expert being on fewer nodes than it shall."""
        host_R = np.flatnonzero(self.hosts_SE[:, expert])
        other_nodes = set(self.node_S[host_R[host_R != source]].tolist())
        num_before = len(other_nodes | {int(self.node_S[source])}) if source in host_R else len(other_nodes)
        may_S = ~self.hosts_SE[:, expert] & (self.slots_S > 0)
        if len(other_nodes) < min(num_before, self.num_spread):
            may_S &= ~np.isin(self.node_S, sorted(other_nodes))
        return may_S

    def crowd_S(self, expert: int) -> Floats:  # noqa: N802
        """Return how much a further replica on each shard would share its domain and node with the expert's others."""
        hosts_S = self.hosts_SE[:, expert]
        crowd_S = np.where(hosts_S, 1e3, 0.0)
        for place_S in (self.domain_S, self.node_S):
            crowd_S += np.bincount(place_S[hosts_S], minlength=int(place_S.max(initial=0)) + 1)[place_S]
        return crowd_S

    def add(self, shard: int, expert: int, share: float = 0.0) -> None:
        """Host an expert; the share is in addition to what other replicas compute."""
        assert not self.hosts_SE[shard, expert], f"expert {expert} is on shard {shard} already"
        self._host(shard, expert, True)
        self.share_SE[shard, expert] = share
        self.load_S[shard] += share

    def drop(self, shard: int, expert: int) -> float:
        """End a replica and return its share, which goes to nobody until `fill` or `level`."""
        share = float(self.share_SE[shard, expert])
        self._host(shard, expert, False)
        self.share_SE[shard, expert] = 0.0
        self.load_S[shard] -= share
        return share

    def _host(self, shard: int, expert: int, hosts: bool) -> None:
        change = int(hosts) - int(self.hosts_SE[shard, expert])
        self.hosts_SE[shard, expert] = hosts
        self.count_E[expert] += change
        self._used_S[shard] += change
        self._position_P = None

    def fill(self, expert: int) -> None:
        """Split an expert's load over its replicas so that the largest of their shards' times is least."""
        host_R = np.flatnonzero(self.hosts_SE[:, expert])
        base_R = self.load_S[host_R] - self.share_SE[host_R, expert]
        share_R = filled(float(self.load_E[expert]), base_R.tolist(), self.speed_S[host_R].tolist())
        self.load_S[host_R] = base_R + share_R
        self.share_SE[host_R, expert] = share_R

    def level(self) -> None:
        """Lower the largest time by shares alone: fill expert after expert until no replica would pass load on.

        This is block coordinate descent on the sum of load**2 / speed, whose least point is also the least largest time
        (Fujishige, "Lexicographically optimal base of a polymatroid", 1980). Looked at are the experts that are uneven
        at the beginning, and then those on shards whose load has changed.
        """
        expert_P, shard_P, share_P = self.replicas
        if not len(expert_P):
            return
        self.load_S = np.bincount(shard_P, share_P, len(self.slots_S)).astype(np.float64)
        held_E = np.bincount(expert_P, share_P, len(self.load_E))
        lost_E = (np.abs(held_E - self.load_E) > 1e-9 * self.load_E) & (self.count_E > 0)
        tolerance = LEVEL_TOLERANCE * self.ideal_time
        uneven_E = self._spread_E(expert_P, shard_P, share_P) > tolerance
        waiting = np.concatenate([np.flatnonzero(lost_E), np.flatnonzero(uneven_E & ~lost_E)]).tolist()
        if not waiting:
            return
        lost, queued, queue = set(np.flatnonzero(lost_E).tolist()), set(waiting), deque(waiting)
        loads = self._loads()
        for _ in range(_MAX_FILLS * len(self.load_E)):
            if not queue:
                break
            expert = queue.popleft()
            queued.discard(expert)
            if expert in lost or loads.spread(expert) > tolerance:
                lost.discard(expert)
                for other in loads.fill(expert, 1e-3 * tolerance):
                    if other not in queued:
                        queued.add(other)
                        queue.append(other)
        self.load_S = loads.put_back(self.share_SE)

    def _loads(self) -> SharedLoads:
        return SharedLoads(
            load_E=self.load_E,
            speed_S=self.speed_S,
            load_S=self.load_S,
            hosts_SE=self.hosts_SE,
            share_SE=self.share_SE,
            is_shared_E=self.count_E > 1,
        )

    def _spread_E(self, expert_P: Ints, shard_P: Ints, share_P: Floats) -> Floats:  # noqa: N802
        """Return for each expert how far the time of a shard that computes for it is above that of another host."""
        begin_P = np.flatnonzero(np.diff(expert_P, prepend=-1))
        time_P = self.time_S[shard_P]
        high = np.maximum.reduceat(np.where(share_P > 0, time_P, -np.inf), begin_P)
        spread_E = np.full(len(self.load_E), -np.inf)
        spread_E[expert_P[begin_P]] = high - np.minimum.reduceat(time_P, begin_P)
        return spread_E

    def quantise(self) -> dict[int, tuple[int, ...]]:
        """Round shares to integer weights with sum EVEN_WEIGHT, largest remainders first, and take them as the shares.

        The hottest expert is rounded first, so that the others, whose steps are finer, can make up for it. An expert
        with one replica or without load gets no weights.
        """
        weights = {}
        loads = self._loads()
        shared_E = (self.count_E > 1) & (self.load_E > 0)
        for expert in np.argsort(-self.load_E, kind="stable").tolist():
            if shared_E[expert]:
                weights[expert] = loads.quantise(expert, EVEN_WEIGHT)
        self.load_S = loads.put_back(self.share_SE)
        return weights

    def snapshot(self) -> "Snapshot":
        """Return the replicas and shares as they are."""
        replicas = self.replicas
        assert self._position_P is not None
        return Snapshot(self._position_P.astype(np.int32), replicas.share_P)

    def restore(self, snapshot: "Snapshot") -> None:
        """Go back to a snapshot."""
        now = self.replicas
        self.hosts_SE[now.shard_P, now.expert_P] = False
        self.share_SE[now.shard_P, now.expert_P] = 0.0
        self._position_P = snapshot.position_P.astype(np.int64)
        expert_P, shard_P = np.divmod(self._position_P, len(self.slots_S))
        self.hosts_SE[shard_P, expert_P] = True
        self.share_SE[shard_P, expert_P] = snapshot.share_P
        self.count_E = np.bincount(expert_P, minlength=len(self.load_E))
        self._used_S = np.bincount(shard_P, minlength=len(self.slots_S))
        self.load_S = np.bincount(shard_P, snapshot.share_P, len(self.slots_S)).astype(np.float64)


class Snapshot(NamedTuple):
    """A layer's replicas and shares, small enough to keep many: expert * S + shard of each, rising, and its share."""

    position_P: npt.NDArray[np.int32]
    share_P: Floats
