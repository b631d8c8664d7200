"""Bytes predicted against those counted on real links, for each kind of plan, with trained routers."""

from pathlib import Path

import numpy as np
import pytest

from expertmesh.cluster.planner.fleet_traffic import FleetTraffic, fleet_traffic
from tests.fleet import LocalFleet, greedy

POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket-moe"


def predicted(fleet: LocalFleet, shards: int, expert_tp: int) -> list[FleetTraffic]:
    """Return what the placement and the loads say of each layer."""
    config = fleet.architecture.config
    num_experts, top_k = fleet.architecture.num_experts, config.num_experts_per_tok
    load_LE = fleet.dispatcher.load_LE[:, ::expert_tp]
    layers = []
    for load_E, shard_ER in zip(load_LE, fleet.placement.replica_table.shard_LER, strict=True):
        hosts_SE = np.array([(shard_ER == shard).any(axis=1) for shard in range(shards)])
        layers.append(
            fleet_traffic(
                tokens=load_E.sum() / top_k,
                hidden_size=config.hidden_size,
                num_experts=num_experts,
                top_k=top_k,
                num_shards=shards,
                expert_tp=expert_tp,
                value_bytes=fleet.architecture.dtype.itemsize,
                hosts_SE=hosts_SE.reshape(shards, num_experts, expert_tp).any(axis=2),
                load_E=load_E,
            )
        )
    return layers


@pytest.mark.parametrize(
    ("shards", "expert_tp", "tolerance"),
    # Where each shard gets each token nothing is left to chance. Else the model knows which experts are popular, not
    # which are chosen together, and the pocket model chooses some experts together.
    [(2, 2, 1e-12), (4, 4, 1e-12), (2, 1, 0.03), (4, 2, 0.03), (4, 1, 0.05)],
    ids=["tp", "tp of 4", "ep", "tpxep", "ep of 4"],
)
def test_predicted_bytes_are_those_counted(shards: int, expert_tp: int, tolerance: float) -> None:
    with LocalFleet(POCKET, shards=shards, expert_tp=expert_tp, num_pages=512) as fleet:
        prompts = [[(37 * i + 11 * n * n + n) % 250 + 3 for n in range(24)] for i in range(12)]
        fleet.run([greedy(str(i), prompt, 60) for i, prompt in enumerate(prompts)])
        layers = predicted(fleet, shards, expert_tp)
        counted = fleet.dispatcher.dispatch_bytes_L.sum(), fleet.dispatcher.combine_bytes_L.sum()
    assert sum(layer.dispatch_bytes for layer in layers) == pytest.approx(counted[0], rel=tolerance)
    assert sum(layer.back_bytes for layer in layers) == pytest.approx(counted[1], rel=tolerance)
