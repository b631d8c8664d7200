"""What a change of placement copies, and how long it takes."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from expertmesh.cluster.balancer_types import BalanceSettings
from expertmesh.cluster.copy_sources import copy_sources
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import Placement


class Copies(NamedTuple):
    """Experts copied, their bytes, and the seconds of the shard that copies longest."""

    num_experts: int
    num_bytes: int
    seconds: float


def copies(
    before: Placement,
    after: Placement,
    *,
    live: Collection[ShardId],
    racks: Mapping[ShardId, str],
    expert_bytes: int,
    expert_tp: int,
    settings: BalanceSettings,
) -> Copies:
    """Return what going to a placement takes: shards copy side by side, each one expert after the other.

    As `balancer.rebalance` counts, from the sources that the mover takes. GPUs of a shard copy their slices at once.

    Args:
        before: the placement in force.
        after: the one to go to.
        live: shards that hold what `before` says.
        racks: of all shards; one's shards are a domain.
        expert_bytes: of a whole expert.
        expert_tp: slices of it.
        settings: bandwidths of a copy.
    """
    hosted = {slots.shard: frozenset(slots.experts) for slots in before.shards if slots.shard in live}
    sources = copy_sources(before, after, live, racks)
    seconds: defaultdict[ShardId, float] = defaultdict(float)
    num_experts = 0
    for slots in after.shards:
        for key in set(slots.experts) - hosted.get(slots.shard, frozenset()):
            source = sources[slots.shard].get(key)
            if source is None:
                rate = settings.checkpoint_bytes_per_s
            elif racks[source] == racks[slots.shard]:
                rate = settings.domain_bytes_per_s
            else:
                rate = settings.network_bytes_per_s
            num_experts += 1
            seconds[slots.shard] += expert_bytes / expert_tp / rate
    return Copies(num_experts, num_experts * expert_bytes, max(seconds.values(), default=0.0))
