"""What the loops propose for a load: weights, replicas, or nothing.

Shape suffixes: L layers, E experts.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.load_following import LoadFollower, Seen, shard_facts
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, initial_placement

LAYERS, NUM_EXPERTS = 2, 16
SHARDS = [ShardId(f"s{index}") for index in range(4)]


def load_of(load_LE: npt.NDArray[np.int64]) -> Load:
    return Load(prefill_LE=np.zeros_like(load_LE), decode_LE=load_LE, span_s=5.0)


def seen(placement: Placement, load_LE: npt.NDArray[np.int64]) -> Seen:
    facts = shard_facts(placement, SHARDS, dict.fromkeys(SHARDS, "node"), replicas=2, spare_slots=0.5)
    return Seen(fast=load_of(load_LE), slow=load_of(60 * load_LE), expert_time_s=100.0, shards=facts, expert_bytes=1000)


def follower() -> LoadFollower:
    return LoadFollower(replicas=2, slow_s=300.0, can_move=True)


@pytest.fixture
def placement() -> Placement:
    return initial_placement(range(LAYERS), NUM_EXPERTS, SHARDS, 2)


def test_a_load_as_even_as_chance_allows_changes_nothing(placement: Placement) -> None:
    load_LE = np.random.default_rng(0).poisson(1000, (LAYERS, NUM_EXPERTS))
    assert follower().level(placement, seen(placement, load_LE)) is None
    assert follower().rebalance(placement, seen(placement, load_LE)) is None


def test_weights_follow_a_load_in_the_layer_that_has_changed(placement: Placement) -> None:
    load_LE = np.full((LAYERS, NUM_EXPERTS), 1000)
    load_LE[1, :4] = 1500
    before = replace(placement, weights={ExpertKey(0, 0): (EVEN_WEIGHT // 2 + 1, EVEN_WEIGHT // 2 - 1)})
    lopsided = replace(before, weights={**before.weights, ExpertKey(1, 0): (EVEN_WEIGHT, 0)})
    proposal = follower().level(lopsided, seen(lopsided, load_LE))
    assert proposal is not None
    assert (proposal.num_moves, proposal.placement.epoch) == (0, 1)
    assert balancedness(shard_load_LS(load_LE, proposal.placement)) > 0.99
    changed = {key.layer for key in proposal.placement.weights if key not in before.weights}
    assert changed == {1}, "the first layer is level, and keeps its weights to the last step"
    assert proposal.placement.weights[ExpertKey(0, 0)] == before.weights[ExpertKey(0, 0)]


def test_where_weights_do_not_suffice_replicas_follow_in_the_second_look(placement: Placement) -> None:
    load_LE = np.full((LAYERS, NUM_EXPERTS), 100)
    load_LE[:, 0] = 20_000
    now = seen(placement, load_LE)
    following = follower()
    first = following.level(placement, now)
    assert first is None or first.num_moves == 0
    second = following.level(placement, now)
    assert second is not None
    assert second.num_moves > 0
    assert balancedness(shard_load_LS(load_LE, second.placement)) > 0.95


def test_too_few_tokens_say_nothing(placement: Placement) -> None:
    load_LE = np.zeros((LAYERS, NUM_EXPERTS), dtype=np.int64)
    load_LE[:, 0] = 100
    assert follower().level(placement, seen(placement, load_LE)) is None
