import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from expertmesh.cluster.dispatch_hash import DispatchTable, choose_shards, identity_hash, token_keys
from expertmesh.cluster.errors import InputError, NoReplicaError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement

LAYER = 5


def placement_of(*weights: int, names: tuple[str, ...] = ("a", "b", "c", "d", "e")) -> Placement:
    """One layer of one expert with a replica of each weight, on shards of these names."""
    key = ExpertKey(LAYER, 0)
    shards = tuple(ShardSlots(shard=ShardId(name), experts=(key,)) for name in names[: len(weights)])
    return Placement(epoch=0, num_experts=1, layers=(LAYER,), shards=shards, weights={key: weights})


def choose(placement: Placement, num_tokens: int, dead: tuple[int, ...] = ()) -> npt.NDArray[np.int32]:
    """The shard of each of num_tokens tokens of one request for expert 0."""
    alive_S = np.ones(len(placement.shards), dtype=np.bool_)
    alive_S[list(dead)] = False
    keys_T = token_keys(np.full(num_tokens, identity_hash("request"), dtype=np.uint64), np.arange(num_tokens))
    topk_ids_TK = np.zeros((num_tokens, 1), dtype=np.int64)
    return choose_shards(topk_ids_TK, keys_T, LAYER, DispatchTable(placement, LAYER), alive_S)[:, 0]


@pytest.mark.parametrize("weights", [(128, 128), (1, 255), (10, 20, 30, 196), (51, 51, 51, 51, 51), (7, 0, 3)])
def test_shares_are_in_proportion_to_weights(weights: tuple[int, ...]) -> None:
    counts = np.bincount(choose(placement_of(*weights), 100_000), minlength=len(weights))
    positive = np.array(weights) > 0
    assert counts[~positive].sum() == 0
    expected = np.array(weights)[positive] / sum(weights) * 100_000
    assert chisquare(counts[positive], expected).pvalue > 0.001


def test_a_changed_weight_moves_only_tokens_to_or_from_that_replica() -> None:
    before = choose(placement_of(64, 64, 128), 20_000)
    more, less = choose(placement_of(64, 96, 128), 20_000), choose(placement_of(64, 32, 128), 20_000)
    assert set(more[more != before]) == {1}
    assert set(before[less != before]) == {1}
    # The share of the replica goes from 1/4 to 1/3, and to 1/7; nothing else moves.
    assert np.mean(more != before) == pytest.approx(1 / 3 - 1 / 4, abs=0.01)
    assert np.mean(less != before) == pytest.approx(1 / 4 - 1 / 7, abs=0.01)


def test_scaling_all_weights_moves_nothing() -> None:
    assert (choose(placement_of(3, 5, 8), 5000) == choose(placement_of(48, 80, 128), 5000)).all()


def test_a_dead_replicas_tokens_spread_by_the_others_weights_and_no_other_moves() -> None:
    placement = placement_of(100, 50, 106)
    before, after = choose(placement, 50_000), choose(placement, 50_000, dead=(2,))
    assert (before == after)[before != 2].all()
    counts = np.bincount(after[before == 2], minlength=3)
    assert counts[2] == 0
    assert chisquare(counts[:2], counts.sum() * np.array([100, 50]) / 150).pvalue > 0.001


def test_a_replica_of_weight_0_serves_when_the_others_are_dead_and_shares_evenly_with_its_like() -> None:
    counts = np.bincount(choose(placement_of(9, 0, 0), 20_000, dead=(0,)), minlength=3)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > 0.001


def test_choice_follows_the_shards_name_not_its_place_in_the_placement() -> None:
    first, second = placement_of(10, 20, 30), placement_of(30, 10, 20, names=("c", "a", "b"))
    names_first = np.array(["a", "b", "c"])[choose(first, 5000)]
    names_second = np.array(["c", "a", "b"])[choose(second, 5000)]
    assert (names_first == names_second).all()


def test_layers_and_positions_and_requests_choose_apart() -> None:
    shards = tuple(
        ShardSlots(shard=ShardId(name), experts=(ExpertKey(0, 0), ExpertKey(1, 0))) for name in ("a", "b", "c", "d")
    )
    placement = Placement(epoch=0, num_experts=1, layers=(0, 1), shards=shards)
    topk_ids_TK, alive_S = np.zeros((20_000, 1), dtype=np.int64), np.ones(4, dtype=np.bool_)
    chosen = []
    for layer, request in ((0, "x"), (1, "x"), (0, "y")):
        keys_T = token_keys(np.full(20_000, identity_hash(request), dtype=np.uint64), np.arange(20_000))
        chosen.append(choose_shards(topk_ids_TK, keys_T, layer, DispatchTable(placement, layer), alive_S)[:, 0])
    for other in chosen[1:]:
        pairs = np.bincount(chosen[0] * 4 + other, minlength=16)
        assert chisquare(pairs).pvalue > 0.001, "the choices are independent of each other"


def test_experts_of_a_token_with_the_same_replicas_go_to_one_shard() -> None:
    experts = tuple(ExpertKey(LAYER, expert) for expert in range(4))
    shards = tuple(ShardSlots(shard=ShardId(name), experts=experts) for name in ("a", "b"))
    placement = Placement(epoch=0, num_experts=4, layers=(LAYER,), shards=shards)
    topk_ids_TK = np.tile(np.arange(4), (100, 1))
    keys_T = token_keys(np.arange(100, dtype=np.uint64), np.zeros(100, dtype=np.int64))
    chosen_TK = choose_shards(topk_ids_TK, keys_T, LAYER, DispatchTable(placement, LAYER), np.ones(2, dtype=np.bool_))
    assert (chosen_TK == chosen_TK[:, :1]).all()
    assert len(set(chosen_TK[:, 0])) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_each_choice_is_a_live_replica_whatever_the_batch(replicas: int, num_tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shards = [ShardId(f"s{index}") for index in range(5)]
    placement = initial_placement([LAYER], 6, shards, replicas)
    alive_S = random.random(5) < 0.8
    live = {shard for shard, alive in zip(shards, alive_S, strict=True) if alive}
    usable = [e for e in range(6) if set(placement.replicas(ExpertKey(LAYER, e))) & live]
    if not usable:
        return
    topk_ids_TK = random.choice(usable, (num_tokens, 3)).astype(np.int32)
    keys_T = random.integers(0, 2**64, num_tokens, dtype=np.uint64)
    table = DispatchTable(placement, LAYER)
    shard_TK = choose_shards(topk_ids_TK, keys_T, LAYER, table, alive_S)
    assert shard_TK.shape == (num_tokens, 3)
    assert shard_TK.dtype == np.dtype(np.int32)
    for (token, choice), shard in np.ndenumerate(shard_TK):
        key = ExpertKey(LAYER, int(topk_ids_TK[token, choice]))
        assert shards[shard] in placement.replicas(key)
        assert alive_S[shard]
        alone = choose_shards(topk_ids_TK[[token]], keys_T[[token]], LAYER, table, alive_S)
        assert alone[0, choice] == shard


def test_one_dead_shard_does_not_hinder_experts_that_live_elsewhere() -> None:
    placement = initial_placement([LAYER], 4, [ShardId("a"), ShardId("b")], 1)
    table, keys_T = DispatchTable(placement, LAYER), np.zeros(1, dtype=np.uint64)
    host_E = table.shard_ER[:, 0]
    alive_S = np.array([False, True])
    on_b = np.flatnonzero(host_E == 1)
    assert choose_shards(on_b[None], keys_T, LAYER, table, alive_S).tolist() == [[1] * len(on_b)]
    lost = int(np.flatnonzero(host_E == 0)[0])
    with pytest.raises(NoReplicaError, match=f"expert L5E{lost} has no live replica"):
        choose_shards(np.array([[on_b[0], lost]]), keys_T, LAYER, table, alive_S)


def test_an_expert_without_any_replica_is_an_error_only_when_it_is_asked_for() -> None:
    slots = ShardSlots(shard=ShardId("a"), experts=(ExpertKey(LAYER, 0),))
    placement = Placement(epoch=0, num_experts=2, layers=(LAYER,), shards=(slots,))
    table, keys_T, alive_S = DispatchTable(placement, LAYER), np.zeros(1, dtype=np.uint64), np.ones(1, dtype=np.bool_)
    assert choose_shards(np.array([[0]]), keys_T, LAYER, table, alive_S).tolist() == [[0]]
    with pytest.raises(NoReplicaError, match="L5E1"):
        choose_shards(np.array([[0, 1]]), keys_T, LAYER, table, alive_S)


def test_a_table_is_for_its_own_layer() -> None:
    placement = placement_of(1, 2)
    with pytest.raises(InputError, match="layer 6"):
        DispatchTable(placement, 6)
    with pytest.raises(AssertionError, match="table of layer 5 was used for layer 6"):
        choose_shards(
            np.zeros((1, 1), dtype=np.int64),
            np.zeros(1, dtype=np.uint64),
            6,
            DispatchTable(placement, LAYER),
            np.ones(2, dtype=np.bool_),
        )


def test_golden_values() -> None:
    """Workers of different releases and processors must agree, so these values never change."""
    assert identity_hash("a") == 0x2F42665B399EF840
    keys_T = token_keys(np.array([0, 0, 1], dtype=np.uint64), np.array([0, 1, 0]))
    # The first two are the first outputs of SplitMix64 with seed 0.
    assert [hex(key) for key in keys_T.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x910a2dec89025cc1"]
    assert "".join(map(str, choose(placement_of(10, 20, 30), 40))) == "1221022021122111211122212222220021222110"
    assert identity_hash("".join(map(str, choose(placement_of(10, 20, 30), 100_000)))) == 0x26CCBA5FF601D847


def test_another_process_with_another_hash_seed_chooses_the_same() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_dispatch_hash import choose, placement_of\n"
        "print(choose(placement_of(10, 20, 30), 1000).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(choose(placement_of(10, 20, 30), 1000).tolist())}


def test_an_epoch_that_changes_another_expert_moves_nothing() -> None:
    shards = [ShardId(f"s{index}") for index in range(4)]
    before = initial_placement([LAYER], 8, shards, 2)
    after = replace(before, epoch=1, weights={ExpertKey(LAYER, 7): (1, 255)})
    topk_ids_TK = np.tile(np.arange(7), (500, 1))
    keys_T = token_keys(np.arange(500, dtype=np.uint64), np.arange(500))
    alive_S = np.ones(4, dtype=np.bool_)
    chosen = [choose_shards(topk_ids_TK, keys_T, LAYER, DispatchTable(p, LAYER), alive_S) for p in (before, after)]
    assert (chosen[0] == chosen[1]).all()
