"""A placement in lists says what the placement says."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import initial_placement
from expertmesh.cluster.placement_lists import placement_fields


@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 6),
    shards=st.integers(1, 4),
    replicas=st.integers(1, 4),
    data=st.data(),
)
def test_a_placement_by_layer_and_expert_says_what_the_placement_says(
    layers: int, experts: int, shards: int, replicas: int, data: st.DataObject
) -> None:
    names = [ShardId(f"s{index}") for index in range(shards)]
    replicas = min(replicas, shards)
    placement = initial_placement(tuple(range(1, 1 + layers)), experts, names, replicas, epoch=9)
    key = ExpertKey(data.draw(st.integers(1, layers)), data.draw(st.integers(0, experts - 1)))
    weights = tuple(data.draw(st.lists(st.integers(1, 9), min_size=replicas, max_size=replicas)))
    fields: Any = placement_fields(replace(placement, weights={key: weights}))
    for row, layer in enumerate(placement.layers):
        for expert in range(experts):
            shown = [fields["shards"][shard] for shard in fields["replicas"][row][expert]]
            assert tuple(shown) == placement.replicas(ExpertKey(layer, expert))
            assert len(fields["weights"][row][expert]) == replicas
    assert tuple(fields["weights"][key.layer - 1][key.expert]) == weights
