"""The next placement when shards have come or gone: every expert hosted again, slots level, few moves.

Quick and blind to load, so that it can run the moment a shard is lost; balancing by load comes later.

Shape suffixes: S shards (by position in the result), E experts of a layer.
"""

from collections.abc import Mapping, Sequence

from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots
from expertmesh.cluster.spread import node_indices, spread_over_nodes


def repair(
    placement: Placement,
    shards: Sequence[ShardId],
    hosted: Mapping[ShardId, frozenset[ExpertKey]],
    *,
    replicas: int,
    level: bool,
    nodes: Mapping[ShardId, str] | None = None,
) -> Placement:
    """Return the placement of the next epoch on these shards.

    Args:
        placement: the one in force.
        shards: those that are to host experts; others leave.
        hosted: what shards that are not in the placement hold already, and need not load.
        replicas: how many each expert is to have at least, capped at the number of shards; replicas beyond it that are
            there stay.
        level: whether slots are moved until those of two shards differ by at most one, in each layer. Then replicas
            are also exchanged until those of an expert are on different nodes, as far as these slots allow.
        nodes: of the shards; those that are not in it are on one node of their own.

    Returns:
        A placement in which every expert has its replicas. Experts whose replicas stay keep their dispatch weights.

    Raises:
        CapacityError: no shard is left.
        InputError: fewer than one replica is asked for.
    """
    if not shards:
        raise CapacityError("no shard is left to host experts")
    if replicas < 1:
        raise InputError(f"{replicas} replicas of each expert; it must be at least 1")
    wanted = min(replicas, len(shards))
    before = {slots.shard: set(slots.experts) for slots in placement.shards}
    kept = {shard: before.get(shard, hosted.get(shard, frozenset())) for shard in shards}
    node_S = node_indices(shards, nodes or {})
    hosts_of: dict[int, list[list[int]]] = {
        layer: [[] for _ in range(placement.num_experts)] for layer in placement.layers
    }
    for index, shard in enumerate(shards):
        for key in kept[shard]:
            hosts_of[key.layer][key.expert].append(index)
    experts_S: list[list[ExpertKey]] = [[] for _ in shards]
    for layer, hosts_E in hosts_of.items():
        # A returned shard's experts count only as far as they are needed.
        returned = {index for index, shard in enumerate(shards) if shard not in before}
        _drop_spares(hosts_E, returned, wanted)
        _add_missing(hosts_E, node_S, wanted)
        if level:
            _level(hosts_E, node_S)
            if wanted > 1:
                _level_nodes(hosts_E, node_S)
            spread_over_nodes(hosts_E, node_S, wanted)
        for expert, hosts in enumerate(hosts_E):
            for index in hosts:
                experts_S[index].append(ExpertKey(layer, expert))
    slots = tuple(ShardSlots(shard=shard, experts=tuple(keys)) for shard, keys in zip(shards, experts_S, strict=True))
    after = Placement(
        epoch=placement.epoch + 1, num_experts=placement.num_experts, layers=placement.layers, shards=slots
    )
    weights = {key: w for key, w in placement.weights.items() if placement.replicas(key) == after.replicas(key)}
    return Placement(
        epoch=after.epoch, num_experts=after.num_experts, layers=after.layers, shards=slots, weights=weights
    )


def _drop_spares(hosts_E: list[list[int]], returned: set[int], wanted: int) -> None:
    """Take experts off returned shards where the others have enough."""
    for hosts in hosts_E:
        for index in [h for h in hosts if h in returned][::-1]:
            if len(hosts) > wanted:
                hosts.remove(index)


def _add_missing(hosts_E: list[list[int]], node_S: Sequence[int], wanted: int) -> None:
    """Give each expert the replicas that it lacks, those without any first.

    They go to nodes where the expert is not yet, and there to the shards with the fewest slots.
    """
    num_shards = len(node_S)
    load_S = _slots(hosts_E, num_shards)
    for num_hosts in range(wanted):
        for expert, hosts in enumerate(hosts_E):
            if len(hosts) == num_hosts:
                its_nodes = {node_S[host] for host in hosts}
                # The expert's number breaks ties, so that the load of a lost shard spreads.
                _, _, _, index = min(
                    (node_S[i] in its_nodes, load_S[i], (i + expert) % num_shards, i)
                    for i in range(num_shards)
                    if i not in hosts
                )
                hosts.append(index)
                load_S[index] += 1


def _level(hosts_E: list[list[int]], node_S: Sequence[int]) -> None:
    """Move one expert at a time from the fullest shard to the emptiest until they differ by at most one.

    The fullest hosts more experts than the emptiest, so one that the emptiest lacks is always there.
    """
    load_S = _slots(hosts_E, len(node_S))
    while True:
        fullest, emptiest = load_S.index(max(load_S)), load_S.index(min(load_S))
        if load_S[fullest] - load_S[emptiest] <= 1:
            return
        _move_one(hosts_E, node_S, fullest, emptiest)
        load_S[fullest] -= 1
        load_S[emptiest] += 1


def _level_nodes(hosts_E: list[list[int]], node_S: Sequence[int]) -> None:
    """Let shards change places as the fuller ones while a node has more slots than there are experts.

    Such a node must host some expert twice. The slots stay level.
    """
    load_S = _slots(hosts_E, len(node_S))
    while True:
        load_N = [
            sum(load for load, n in zip(load_S, node_S, strict=True) if n == node) for node in range(max(node_S) + 1)
        ]
        over = load_N.index(max(load_N))
        sources = [i for i, node in enumerate(node_S) if node == over and load_S[i] == max(load_S)]
        targets = [i for i, n in enumerate(node_S) if load_N[n] < len(hosts_E) and load_S[i] < max(load_S)]
        if load_N[over] <= len(hosts_E) or not sources or not targets:
            return
        _move_one(hosts_E, node_S, sources[0], targets[0])
        load_S[sources[0]] -= 1
        load_S[targets[0]] += 1


def _move_one(hosts_E: list[list[int]], node_S: Sequence[int], source: int, target: int) -> None:
    """Move an expert from a shard to one with fewer slots; one that is not on fewer nodes afterwards, if there is."""
    movable = [hosts for hosts in hosts_E if source in hosts and target not in hosts]
    hosts = next((h for h in movable if _keeps_nodes(h, node_S, source, target)), movable[0])
    hosts[hosts.index(source)] = target


def _keeps_nodes(hosts: list[int], node_S: Sequence[int], source: int, target: int) -> bool:
    others = {node_S[host] for host in hosts if host != source}
    return node_S[source] in others or node_S[target] not in others


def _slots(hosts_E: list[list[int]], num_shards: int) -> list[int]:
    num_slots_S = [0] * num_shards
    for hosts in hosts_E:
        for index in hosts:
            num_slots_S[index] += 1
    return num_slots_S
