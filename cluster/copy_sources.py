"""From which shard each expert that a shard is about to take is copied."""

from collections import Counter
from collections.abc import Collection, Mapping

from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement


def copy_sources(
    current: Placement, target: Placement, live: Collection[ShardId], node: Mapping[ShardId, str]
) -> dict[ShardId, dict[ExpertKey, ShardId]]:
    """Choose a source for each expert that the target adds to a shard, from those that host it now.

    A source on the same node comes first, then the one that has been given the fewest experts so far.

    Args:
        current: the placement in force.
        target: the one to go to.
        live: the shards that can be asked.
        node: of each shard; one that is not named is on a node of its own.

    Returns:
        For each shard of the target the sources of its new experts. An expert that no live shard hosts is not in it.
    """
    hosted = {slots.shard: frozenset(slots.experts) for slots in current.shards}
    num_given: Counter[ShardId] = Counter()
    sources: dict[ShardId, dict[ExpertKey, ShardId]] = {}
    for slots in target.shards:
        sources[slots.shard] = {}
        for key in sorted(set(slots.experts) - hosted.get(slots.shard, frozenset())):
            holders = [shard for shard in current.replicas(key) if shard in live and shard != slots.shard]
            if holders:
                here = node.get(slots.shard, slots.shard)
                source = min(holders, key=lambda s: (node.get(s, s) != here, num_given[s]))
                num_given[source] += 1
                sources[slots.shard][key] = source
    return sources
