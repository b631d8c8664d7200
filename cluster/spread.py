"""Replicas of an expert on different nodes, so that the loss of a node takes no expert away.

Shape suffixes: S shards (by position), E experts of a layer, N nodes (by position).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.ids import ShardId


def node_indices(shards: Sequence[ShardId], nodes: Mapping[ShardId, str]) -> list[int]:
    """Return for each shard the position of its node. Shards that are not in `nodes` are on one node of their own."""
    positions: dict[str, int] = {}
    return [positions.setdefault(nodes.get(shard, ""), len(positions)) for shard in shards]


def spread_over_nodes(hosts_E: list[list[int]], node_S: Sequence[int], wanted: int) -> None:
    """Swap replicas between a layer's experts until each is on `wanted` nodes, or no swap helps.

    No shard gets more or fewer slots, and no expert fewer nodes. With wanted = 2 the experts left on one node are as
    few as these slots allow: a swap is found as long as some expert has no replica on the fullest node.

    Args:
        hosts_E: the shards of each expert, by position; changed in place.
        node_S: the node of each shard, from `node_indices`.
        wanted: nodes that each expert is to be on; fewer where it has fewer replicas, or there are fewer nodes.
    """
    wanted = min(wanted, max(node_S) + 1)
    if wanted < 2:
        return
    count_EN = np.zeros((len(hosts_E), max(node_S) + 1), dtype=np.int64)
    for expert, hosts in enumerate(hosts_E):
        for host in hosts:
            count_EN[expert, node_S[host]] += 1
    for expert, hosts in enumerate(hosts_E):
        while np.count_nonzero(count_EN[expert]) < min(wanted, len(hosts)):
            if not _swap(hosts_E, node_S, count_EN, expert):
                break


def _swap(hosts_E: list[list[int]], node_S: Sequence[int], count_EN: npt.NDArray[np.int64], expert: int) -> bool:
    """Give away one of the expert's replicas on a node where it has several, for one on a node where it has none."""
    mine = hosts_E[expert]
    for crowded in np.flatnonzero(count_EN[expert] > 1).tolist():
        for empty in np.flatnonzero(count_EN[expert] == 0).tolist():
            gains_E, spare_E = count_EN[:, crowded] == 0, count_EN[:, empty] > 1
            others = np.flatnonzero((count_EN[:, empty] > 0) & (gains_E | spare_E))
            # First those for whom the swap is a gain as well.
            for other in others[np.argsort(~(gains_E & spare_E)[others], kind="stable")].tolist():
                theirs = hosts_E[other]
                given = next((host for host in mine if node_S[host] == crowded and host not in theirs), None)
                if given is None:
                    continue
                taken = next(host for host in theirs if node_S[host] == empty)
                mine[mine.index(given)], theirs[theirs.index(taken)] = taken, given
                for row, sign in ((expert, 1), (other, -1)):
                    count_EN[row, empty] += sign
                    count_EN[row, crowded] -= sign
                return True
    return False
