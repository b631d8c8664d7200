from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from expertmesh.cluster.dispatch_hash import DispatchTable
from expertmesh.cluster.dispatch_policy import (
    CONCENTRATE_UP_TO_TOKENS,
    POLICIES,
    QUOTA_FROM_TOKENS,
    live_weights,
    open_policy,
)
from expertmesh.cluster.errors import NoReplicaError, UnknownNameError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement

LAYER = 2
Choice = npt.NDArray[np.int32]


def placement_of(hosts_E: list[tuple[int, ...]], num_shards: int, weights: dict[int, tuple[int, ...]]) -> Placement:
    """One layer whose expert e is on the shards hosts_E[e]."""
    shards = tuple(
        ShardSlots(
            shard=ShardId(f"s{shard}"),
            experts=tuple(ExpertKey(LAYER, expert) for expert, hosts in enumerate(hosts_E) if shard in hosts),
        )
        for shard in range(num_shards)
    )
    keyed = {ExpertKey(LAYER, expert): row for expert, row in weights.items()}
    return Placement(epoch=0, num_experts=len(hosts_E), layers=(LAYER,), shards=shards, weights=keyed)


class Batch:
    """A layer of 12 experts with up to 3 replicas and uneven weights on 6 shards, and a batch for it."""

    def __init__(self, seed: int, num_tokens: int, share_alive: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        hosts_E = [tuple(sorted(random.choice(6, random.integers(1, 4), replace=False).tolist())) for _ in range(12)]
        weights = {e: tuple(random.choice([0, 1, 60, 200], len(hosts)).tolist()) for e, hosts in enumerate(hosts_E)}
        weights = {e: row for e, row in weights.items() if any(row)}
        self.table = DispatchTable(placement_of(hosts_E, 6, weights), LAYER)
        self.alive_S = random.random(6) < share_alive
        self.weight_ER = live_weights(self.table, self.alive_S)
        self.usable = np.flatnonzero(self.weight_ER.any(axis=1))
        order_TE = random.permuted(np.tile(self.usable, (num_tokens, 1)), axis=1)
        self.topk_ids_TK = np.ascontiguousarray(order_TE[:, :4])
        self.token_keys_T = random.integers(0, 2**64, num_tokens, dtype=np.uint64)

    def choose(self, name: str) -> Choice:
        return open_policy(name, self.table)(self.topk_ids_TK, self.token_keys_T, self.alive_S)

    def by_expert(self, shard_TK: Choice) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield an expert of the batch, its shards' live weights and their numbers of pairs."""
        for expert in np.unique(self.topk_ids_TK).tolist():
            count_S = np.bincount(shard_TK[self.topk_ids_TK == expert], minlength=6)
            weight_S = np.zeros(6, dtype=np.int64)
            for shard, weight in zip(self.table.shard_ER[expert], self.weight_ER[expert], strict=True):
                weight_S[shard] += weight  # the padding, -1, adds 0
            yield expert, weight_S, count_S


batches = st.builds(
    Batch,
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.sampled_from([0, 1, 2, 7, 40, 150]),
    share_alive=st.sampled_from([1.0, 0.6]),
)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40, deadline=None)
@given(batch=batches)
def test_each_choice_is_a_live_replica_with_weight_and_equal_input_gives_equal_output(name: str, batch: Batch) -> None:
    shard_TK = batch.choose(name)
    assert shard_TK.shape == batch.topk_ids_TK.shape
    assert shard_TK.dtype == np.dtype(np.int32)
    for expert, weight_S, count_S in batch.by_expert(shard_TK):
        assert not count_S[weight_S == 0].any(), f"expert {expert} went to a dead, foreign or weightless shard"
    assert (shard_TK == batch.choose(name)).all()
    choose = open_policy(name, batch.table)
    choose(batch.topk_ids_TK[:1], batch.token_keys_T[:1], batch.alive_S)
    assert (shard_TK == choose(batch.topk_ids_TK, batch.token_keys_T, batch.alive_S)).all(), "no memory of past batches"


@settings(max_examples=60, deadline=None)
@given(batch=batches)
def test_quota_gives_each_replica_its_share_to_within_one_and_moves_no_pair_in_vain(batch: Batch) -> None:
    shard_TK, hashed_TK = batch.choose("quota"), batch.choose("rendezvous")
    hashed_counts = {expert: count_S for expert, _, count_S in batch.by_expert(hashed_TK)}
    num_moved = 0
    for expert, weight_S, count_S in batch.by_expert(shard_TK):
        exact_S = count_S.sum() * weight_S / weight_S.sum()
        assert (np.abs(count_S - exact_S) < 1).all()
        num_moved += int(np.maximum(hashed_counts[expert] - count_S, 0).sum())
        # The fewest moves to shares within one: what is above the share rounded up leaves, what is below it comes.
        surplus = np.maximum(hashed_counts[expert] - np.ceil(exact_S), 0).sum()
        lack = np.maximum(np.floor(exact_S) - hashed_counts[expert], 0).sum()
        assert np.maximum(hashed_counts[expert] - count_S, 0).sum() == max(surplus, lack)
    assert (shard_TK != hashed_TK).sum() == num_moved


def test_quota_of_small_counts_favours_no_replica_over_many_batches() -> None:
    placement = placement_of([(0, 1, 2)], 3, {0: (64, 64, 128)})
    choose, random = open_policy("quota", DispatchTable(placement, LAYER)), np.random.default_rng(1)
    topk_ids_TK, alive_S = np.zeros((2, 1), dtype=np.int64), np.ones(3, dtype=np.bool_)
    count_S = np.zeros(3, dtype=np.int64)
    for _ in range(2000):
        count_S += np.bincount(
            choose(topk_ids_TK, random.integers(0, 2**64, 2, dtype=np.uint64), alive_S)[:, 0], None, 3
        )
    assert chisquare(count_S, 4000 * np.array([0.25, 0.25, 0.5])).pvalue > 0.001


def test_quota_moves_a_pair_that_was_drawn_by_a_replica_of_weight_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendezvous does that about once in 1e12 tokens."""
    table = DispatchTable(placement_of([(0, 1), (0, 1, 2)], 3, {1: (100, 156, 0)}), LAYER)
    monkeypatch.setattr(table, "choose", lambda topk_ids_TK, *_: np.full_like(topk_ids_TK, 2, dtype=np.int32))
    choose, alive_S = open_policy("quota", table), np.ones(3, dtype=np.bool_)
    shard_TK = choose(np.ones((256, 1), dtype=np.int64), np.arange(256, dtype=np.uint64), alive_S)
    assert np.bincount(shard_TK[:, 0], minlength=3).tolist() == [100, 156, 0]


@settings(max_examples=60, deadline=None)
@given(batch=batches)
def test_concentrate_computes_each_expert_on_one_replica(batch: Batch) -> None:
    for _, _, count_S in batch.by_expert(batch.choose("concentrate")):
        assert (count_S > 0).sum() == 1


def test_concentrate_levels_distinct_experts_over_the_shards() -> None:
    # Experts 0..3 are alone on shard 0; 4..9 may go to shard 0 or to another.
    hosts_E = [(0,)] * 4 + [(0, 1), (0, 1), (0, 2), (0, 2), (0, 1, 2), (0, 1, 2)]
    choose = open_policy("concentrate", DispatchTable(placement_of(hosts_E, 3, {}), LAYER))
    topk_ids_TK = np.array([[e, (e + 1) % 10] for e in range(10)])
    for key in range(50):
        keys_T = np.full(10, key, dtype=np.uint64)
        shard_TK = choose(topk_ids_TK, keys_T, np.ones(3, dtype=np.bool_))
        experts_S = [len(np.unique(topk_ids_TK[shard_TK == shard])) for shard in range(3)]
        assert experts_S == [4, 3, 3]


def test_concentrate_breaks_ties_by_the_batch_not_by_the_order_of_the_shards() -> None:
    choose = open_policy("concentrate", DispatchTable(placement_of([(0, 1)], 2, {}), LAYER))
    keys = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    alive_S = np.ones(2, dtype=np.bool_)
    count_S = np.bincount([choose(np.zeros((1, 1), dtype=np.int64), key[None], alive_S)[0, 0] for key in keys])
    assert chisquare(count_S).pvalue > 0.001


def test_auto_goes_by_the_number_of_tokens() -> None:
    for num_tokens, name in (
        (CONCENTRATE_UP_TO_TOKENS, "concentrate"),
        (CONCENTRATE_UP_TO_TOKENS + 1, "rendezvous"),
        (QUOTA_FROM_TOKENS - 1, "rendezvous"),
        (QUOTA_FROM_TOKENS, "quota"),
    ):
        batch = Batch(3, num_tokens)
        chosen = {other: batch.choose(other) for other in ("concentrate", "rendezvous", "quota")}
        equal = {other for other, shard_TK in chosen.items() if (shard_TK == batch.choose("auto")).all()}
        assert equal == {name}


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("num_tokens", [1, 64, 256])
def test_an_expert_without_a_live_replica_is_an_error_only_when_it_is_asked_for(name: str, num_tokens: int) -> None:
    placement = initial_placement([LAYER], 4, [ShardId("a"), ShardId("b")], 1)
    table = DispatchTable(placement, LAYER)
    on_a, on_b = (np.flatnonzero(table.shard_ER[:, 0] == shard) for shard in (0, 1))
    choose, keys_T, alive_S = open_policy(name, table), np.zeros(num_tokens, dtype=np.uint64), np.array([False, True])
    assert (choose(np.tile(on_b, (num_tokens, 1)), keys_T, alive_S) == 1).all()
    with pytest.raises(NoReplicaError, match=f"expert L2E{on_a[0]} has no live replica"):
        choose(np.tile([on_b[0], on_a[0]], (num_tokens, 1)), keys_T, alive_S)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_replicas_of_weight_0_serve_when_the_others_are_dead(name: str) -> None:
    table = DispatchTable(placement_of([(0, 1, 2)], 3, {0: (9, 0, 0)}), LAYER)
    topk_ids_TK, keys_T = np.zeros((200, 1), dtype=np.int64), np.arange(200, dtype=np.uint64)
    choose = open_policy(name, table)
    assert set(choose(topk_ids_TK, keys_T, np.array([True, True, True])).ravel().tolist()) == {0}
    spread = set(choose(topk_ids_TK, keys_T, np.array([False, True, True])).ravel().tolist())
    assert spread <= {1, 2}
    assert len(spread) == (1 if name == "concentrate" else 2)


def test_an_unknown_name_lists_the_known() -> None:
    table = DispatchTable(initial_placement([LAYER], 2, [ShardId("a")], 1), LAYER)
    with pytest.raises(UnknownNameError, match="'best'; there are auto, concentrate, quota, rendezvous"):
        open_policy("best", table)
