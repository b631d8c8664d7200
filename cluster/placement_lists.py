"""A placement by layer and expert in nested lists, as JSON shows it."""

from expertmesh.cluster.placement import Placement


def placement_fields(placement: Placement) -> dict[str, object]:
    """Return a placement's fields: `epoch`, `shards`, and for each layer and expert (or slice, where experts are cut).

    `replicas`: the shards that host it, as positions in `shards`. `weights`: their dispatch weights, in the same order.
    """
    shard_LER, weight_LER = placement.replica_table
    return {
        "epoch": placement.epoch,
        "shards": [slots.shard for slots in placement.shards],
        "replicas": [[[shard for shard in R if shard >= 0] for R in ER] for ER in shard_LER.tolist()],
        "weights": [
            [weights[: len(weights) - shards.count(-1)] for weights, shards in zip(*ER, strict=True)]
            for ER in zip(weight_LER.tolist(), shard_LER.tolist(), strict=True)
        ],
    }
