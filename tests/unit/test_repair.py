"""Repaired placements: complete, level, and no expert moved that need not be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.repair import repair

LAYERS = (1, 2, 5)
NUM_EXPERTS = 7


def names(count: int, first: int = 0) -> list[ShardId]:
    return [ShardId(f"shard-{i}") for i in range(first, first + count)]


def slots_of(placement: Placement, shard: ShardId) -> frozenset[ExpertKey]:
    return frozenset(next((s.experts for s in placement.shards if s.shard == shard), ()))


def slots_by_layer(placement: Placement) -> list[list[int]]:
    return [[sum(key.layer == layer for key in s.experts) for s in placement.shards] for layer in placement.layers]


@settings(deadline=None, max_examples=60)
@given(
    num_before=st.integers(1, 5),
    num_new=st.integers(0, 3),
    data=st.data(),
    replicas=st.integers(1, 4),
    level=st.booleans(),
)
def test_every_expert_has_its_replicas_and_what_can_stay_stays(
    num_before: int, num_new: int, data: st.DataObject, replicas: int, level: bool
) -> None:
    before = initial_placement(LAYERS, NUM_EXPERTS, names(num_before), min(replicas, num_before), epoch=4)
    stay = data.draw(st.sets(st.sampled_from(names(num_before)))) if num_before else set()
    shards = sorted(stay) + names(num_new, first=num_before)
    if not shards:
        return
    after = repair(before, shards, {}, replicas=replicas, level=level)
    assert after.epoch == 5
    assert [s.shard for s in after.shards] == shards
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            hosts = after.replicas(ExpertKey(layer, expert))
            assert len(hosts) >= min(replicas, len(shards))
    if level:
        assert all(max(slots) - min(slots) <= 1 for slots in slots_by_layer(after))
    else:
        for shard in stay:
            assert slots_of(before, shard) <= slots_of(after, shard)
    assert repair(before, shards, {}, replicas=replicas, level=level) == after


def test_the_experts_of_a_lost_shard_spread_over_the_survivors() -> None:
    before = initial_placement(LAYERS, 12, names(4), 1, epoch=1)
    after = repair(before, names(3), {}, replicas=1, level=False)
    assert slots_by_layer(after) == [[4, 4, 4]] * 3


def test_a_level_placement_of_the_same_shards_stays() -> None:
    before = initial_placement(LAYERS, 12, names(3), 2, epoch=1)
    after = repair(before, names(3), {}, replicas=2, level=True)
    assert after.shards == before.shards


def test_a_new_shard_takes_its_part_and_no_more_moves_than_that() -> None:
    before = initial_placement((0,), 12, names(3), 1, epoch=1)
    after = repair(before, names(4), {}, replicas=1, level=True)
    assert slots_by_layer(after) == [[3, 3, 3, 3]]
    moved = [key for s in after.shards for key in s.experts if key not in slots_of(before, s.shard)]
    assert len(moved) == 3


def test_a_returned_shard_uses_what_it_still_holds() -> None:
    whole = initial_placement((0,), 8, names(2), 1, epoch=1)
    alone = repair(whole, names(1), {}, replicas=1, level=False)
    held = {ShardId("shard-1"): slots_of(whole, ShardId("shard-1"))}
    again = repair(alone, names(2), held, replicas=1, level=True)
    assert slots_by_layer(again) == [[4, 4]]
    replicated = repair(alone, names(2), held, replicas=2, level=False)
    assert all(len(replicated.replicas(ExpertKey(0, e))) == 2 for e in range(8))


def test_weights_stay_where_the_replicas_do() -> None:
    before = initial_placement((0,), 6, names(3), 2, epoch=1)
    keys = [ExpertKey(0, expert) for expert in range(6)]
    weighted = Placement(
        epoch=1, num_experts=6, layers=(0,), shards=before.shards, weights={key: (3, 1 + key.expert) for key in keys}
    )
    after = repair(weighted, names(2), {}, replicas=1, level=False)
    both = [key for key in keys if before.replicas(key) == tuple(names(2))]
    assert 0 < len(both) < 6
    assert after.weights == {key: weighted.weights[key] for key in both}


def test_bad_arguments_are_refused() -> None:
    before = initial_placement(LAYERS, NUM_EXPERTS, names(2), 1)
    with pytest.raises(CapacityError, match="no shard is left"):
        repair(before, [], {}, replicas=1, level=True)
    with pytest.raises(InputError, match="0 replicas"):
        repair(before, names(2), {}, replicas=0, level=True)
