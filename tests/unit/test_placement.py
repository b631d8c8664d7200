import pickle
import struct
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import CapacityError, InputError, StateError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, ShardSlots, initial_placement

A, B, C = ShardId("a"), ShardId("b"), ShardId("c")


def shard_ids(count: int) -> list[ShardId]:
    return [ShardId(f"shard-{index}") for index in range(count)]


def slots_of(shard: ShardId, *experts: tuple[int, int]) -> ShardSlots:
    return ShardSlots(shard=shard, experts=tuple(ExpertKey(*pair) for pair in experts))


def small_placement() -> Placement:
    """Layers 1 and 3 of 2 experts; expert 0 of layer 1 has three weighted replicas, expert 1 of layer 3 none."""
    return Placement(
        epoch=7,
        num_experts=2,
        layers=(1, 3),
        shards=(slots_of(A, (1, 0), (1, 1)), slots_of(B, (3, 0), (1, 0)), slots_of(C, (1, 0), (3, 0))),
        weights={ExpertKey(1, 0): (10, 0, 30)},
    )


def test_replicas_slots_and_missing_experts() -> None:
    placement = small_placement()
    assert placement.replicas(ExpertKey(1, 0)) == (A, B, C)
    assert placement.replicas(ExpertKey(3, 0)) == (B, C)
    assert placement.replicas(ExpertKey(3, 1)) == ()
    assert [placement.num_slots(shard) for shard in (A, B, C, ShardId("d"))] == [2, 2, 2, 0]
    assert placement.missing({A, B, C}) == ((3, 1),)
    assert placement.missing({B}) == ((1, 1), (3, 1))
    assert len(placement.missing(set())) == 4


def test_the_table_holds_replicas_in_the_order_of_the_shards_with_their_weights() -> None:
    shard_LER, weight_LER = small_placement().replica_table
    assert shard_LER.tolist() == [[[0, 1, 2], [0, -1, -1]], [[1, 2, -1], [-1, -1, -1]]]
    half = EVEN_WEIGHT // 2
    assert weight_LER.tolist() == [[[10, 0, 30], [EVEN_WEIGHT, 0, 0]], [[half, half, 0], [0, 0, 0]]]
    with pytest.raises(ValueError, match="read-only"):
        shard_LER[0, 0, 0] = 1


def test_a_placement_without_slots_misses_everything() -> None:
    placement = Placement(epoch=0, num_experts=2, layers=(0,), shards=())
    assert placement.missing(()) == ((0, 0), (0, 1))
    assert Placement.from_bytes(placement.to_bytes()) == placement


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epoch": -1}, "epoch=-1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"layers": (1, 3, 1)}, "layer 1 is named twice"),
        ({"shards": (slots_of(A), slots_of(A))}, "shard a is named twice"),
        ({"shards": (slots_of(A, (1, 0), (1, 0)),)}, "expert of shard a L1E0 is named twice"),
        ({"shards": (slots_of(A, (2, 0)),)}, "L2E0 is not among"),
        ({"shards": (slots_of(A, (1, 2)),)}, "L1E2 is not among"),
        ({"weights": {ExpertKey(1, 0): (1, 2)}}, r"L1E0 has 3 replicas and weights \(1, 2\)"),
        ({"weights": {ExpertKey(1, 1): (0,)}}, "L1E1 has 1 replicas"),
        ({"weights": {ExpertKey(3, 0): (3, -1)}}, "L3E0 has 2 replicas"),
        ({"weights": {ExpertKey(3, 2): ()}}, "L3E2 is not among"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], text: str) -> None:
    placement = small_placement()
    fields = {"epoch": 7, "num_experts": 2, "layers": placement.layers, "shards": placement.shards, "weights": {}}
    with pytest.raises(InputError, match=text):
        Placement(**{**fields, **change})  # type: ignore[arg-type]


def test_a_placement_survives_the_wire_and_pickling() -> None:
    placement = small_placement()
    for copy in (Placement.from_bytes(placement.to_bytes()), pickle.loads(pickle.dumps(placement))):  # noqa: S301
        assert copy == placement
        assert copy.replicas(ExpertKey(3, 0)) == (B, C)


@settings(max_examples=100)
@given(position=st.integers(0), bit=st.integers(0, 7), length=st.integers(0))
def test_a_damaged_record_is_refused(position: int, bit: int, length: int) -> None:
    record = bytearray(small_placement().to_bytes())
    with pytest.raises(StateError, match="placement record"):
        Placement.from_bytes(bytes(record[: length % len(record)]))
    record[position % len(record)] ^= 1 << bit
    with pytest.raises(StateError, match="placement record"):
        Placement.from_bytes(bytes(record))


@pytest.mark.parametrize("body", [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb([0, 0, [1], [["a", [0]]], []])])
def test_a_record_with_other_content_is_refused(body: bytes) -> None:
    with pytest.raises(StateError, match="unusable content"):
        Placement.from_bytes(struct.pack(">4sHI", b"EMPL", 1, zlib.crc32(body)) + body)


def test_a_record_of_another_version_says_so() -> None:
    record = small_placement().to_bytes()
    with pytest.raises(StateError, match="version 9; this release reads version 1"):
        Placement.from_bytes(record[:4] + struct.pack(">H", 9) + record[6:])


def test_worked_example_two_layers_of_four_experts_twice_on_three_shards() -> None:
    placement = initial_placement([0, 1], 4, [A, B, C], 2, epoch=1)
    assert placement.epoch == 1
    assert [placement.num_slots(shard) for shard in (A, B, C)] == [6, 5, 5]
    assert placement == initial_placement([0, 1], 4, [A, B, C], 2, epoch=1)


@settings(max_examples=150, deadline=None)
@given(
    num_layers=st.integers(1, 6),
    num_experts=st.integers(1, 24),
    num_shards=st.integers(1, 9),
    data=st.data(),
)
def test_without_capacities_slots_are_level_in_each_layer_and_in_all(
    num_layers: int, num_experts: int, num_shards: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, num_shards))
    shards = shard_ids(num_shards)
    placement = initial_placement(range(num_layers), num_experts, shards, replicas)
    slots_LS = slots_by_layer(placement)
    assert np.ptp(slots_LS, axis=1).max() <= 1
    assert np.ptp(slots_LS.sum(axis=0)) <= 1
    check_replicas(placement, replicas)


@settings(max_examples=150, deadline=None)
@given(
    num_layers=st.integers(1, 4),
    num_experts=st.integers(1, 8),
    capacities=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    data=st.data(),
)
def test_with_capacities_it_fits_exactly_when_it_can(
    num_layers: int, num_experts: int, capacities: list[int], data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, len(capacities)))
    shards = shard_ids(len(capacities))
    limits = dict(zip(shards, capacities, strict=True))
    num_needed = num_layers * num_experts * replicas
    num_usable = sum(min(capacity, num_layers * num_experts) for capacity in capacities)
    if num_needed > num_usable:
        with pytest.raises(CapacityError, match=f"{num_needed} expert slots are needed.* have {num_usable}"):
            initial_placement(range(num_layers), num_experts, shards, replicas, limits)
        return
    placement = initial_placement(range(num_layers), num_experts, shards, replicas, limits)
    assert all(placement.num_slots(shard) <= limits[shard] for shard in shards)
    assert np.ptp(slots_by_layer(placement), axis=0).max() <= 1, "a shard's slots are spread over the layers"
    check_replicas(placement, replicas)


def test_slots_are_in_proportion_to_capacity() -> None:
    placement = initial_placement(range(4), 16, [A, B, C], 1, {A: 100, B: 100, C: 200})
    assert [placement.num_slots(shard) for shard in (A, B, C)] == [16, 16, 32]


@given(expert_tp=st.integers(2, 4), groups=st.integers(1, 4), num_experts=st.integers(1, 9), layers=st.integers(1, 5))
def test_slices_of_an_expert_are_on_different_shards(
    expert_tp: int, groups: int, num_experts: int, layers: int
) -> None:
    shards = shard_ids(expert_tp * groups)
    placement = initial_placement(range(layers), num_experts * expert_tp, shards, 1)
    for layer in range(layers):
        for expert in range(num_experts):
            slices = range(expert * expert_tp, (expert + 1) * expert_tp)
            assert len({placement.replicas(ExpertKey(layer, index)) for index in slices}) == expert_tp


def test_every_pair_of_shards_is_joined_by_shared_experts() -> None:
    placement = initial_placement([0], 64, shard_ids(8), 2)
    joined = np.eye(8, dtype=bool)
    for first, second in placement.replica_table.shard_LER[0].tolist():
        joined[first, second] = joined[second, first] = True
    assert np.linalg.matrix_power(joined.astype(int), 2).all(), "load reaches any shard over at most one other"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([0], 4, [A, B], 3), "3 replicas of 4 experts"),
        (([0], 4, [A, B], 0), "0 replicas"),
        (([], 4, [A], 1), "in 0 layers"),
        (([0], 0, [A], 1), "of 0 experts"),
        (([0, 0], 4, [A], 1), "layer 0 is named twice"),
        (([0], 4, [A, A], 1), "shard a is named twice"),
        (([0], 4, [A, B], 1, {A: 4}), "are not those of the shards"),
        (([0], 4, [A], 1, {A: -4}), "are not those of the shards"),
    ],
)
def test_arguments_that_make_no_placement_are_refused(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        initial_placement(*arguments)  # type: ignore[arg-type]


def slots_by_layer(placement: Placement) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    slots_LS = np.zeros((len(placement.layers), len(placement.shards)), dtype=np.int64)
    for index, slots in enumerate(placement.shards):
        for key in slots.experts:
            slots_LS[placement.layers.index(key.layer), index] += 1
    return slots_LS


def check_replicas(placement: Placement, replicas: int) -> None:
    for layer in placement.layers:
        for expert in range(placement.num_experts):
            hosts = placement.replicas(ExpertKey(layer, expert))
            assert len(hosts) == len(set(hosts)) == replicas
