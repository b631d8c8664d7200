"""What a capacity factor leaves out of a step.

Shape suffixes: T tokens, K choices a token, E experts.
"""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.capacity import expert_capacity, kept_pairs

Step = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]
FACTORS = st.sampled_from([0.01, 0.25, 0.9, 1.0, 1.25, 2.0, 100.0])


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Draw a step's choices, different for each token, and weights, of which many are equal."""
    num_experts = draw(st.integers(1, 9))
    top_k, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popularity_E = rng.random(num_experts) ** draw(st.sampled_from([0, 4]))
    ids_TK = np.argsort(-popularity_E * rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    return ids_TK, (rng.integers(0, 4, ids_TK.shape) / 4).astype(np.float32), num_experts


def slow_twin(step: Step, factor: float) -> list[list[bool]]:
    """Take the pairs one by one, the heaviest first, as long as their expert has room."""
    ids_TK, weights_TK, num_experts = step
    room_E = [expert_capacity(factor, ids_TK.size, num_experts)] * num_experts
    kept = [[False] * ids_TK.shape[1] for _ in ids_TK]
    places = [(-float(weights_TK[t, k]), t, k) for t in range(ids_TK.shape[0]) for k in range(ids_TK.shape[1])]
    for _, token, choice in sorted(places):
        expert = ids_TK[token, choice]
        kept[token][choice] = room_E[expert] > 0
        room_E[expert] -= 1
    return kept


@given(steps(), FACTORS)
def test_no_expert_gets_more_than_its_capacity_and_none_less_than_it_could(step: Step, factor: float) -> None:
    ids_TK, _, num_experts = step
    kept_TK = kept_pairs(*step, factor)
    load_E, taken_E = (np.bincount(ids.ravel(), minlength=num_experts) for ids in (ids_TK, ids_TK[kept_TK]))
    capacity = expert_capacity(factor, ids_TK.size, num_experts)
    assert taken_E.tolist() == np.minimum(load_E, capacity).tolist()


@given(steps(), FACTORS)
def test_the_heaviest_pairs_are_kept_and_of_equal_ones_the_first(step: Step, factor: float) -> None:
    assert kept_pairs(*step, factor).tolist() == slow_twin(step, factor)


@given(steps())
def test_without_overflow_nothing_is_dropped(step: Step) -> None:
    """A token chooses an expert once: at a factor of E / K the capacity is the number of tokens."""
    ids_TK, _, num_experts = step
    assert kept_pairs(*step, num_experts / ids_TK.shape[1]).all()


@given(steps(), FACTORS, st.integers(0, 2**32))
def test_what_is_dropped_of_distinct_weights_does_not_depend_on_the_order_of_tokens(
    step: Step, factor: float, seed: int
) -> None:
    ids_TK, _, num_experts = step
    rng = np.random.default_rng(seed)
    weights_TK = rng.permutation(ids_TK.size).astype(np.float32).reshape(ids_TK.shape)
    order_T = rng.permutation(len(ids_TK))
    kept_TK = kept_pairs(ids_TK, weights_TK, num_experts, factor)
    assert kept_pairs(ids_TK[order_T], weights_TK[order_T], num_experts, factor).tolist() == kept_TK[order_T].tolist()


def test_a_step_worked_by_hand() -> None:
    """Three tokens choose expert 1, whose share of 4 tokens over 2 experts is 2: the lightest of them is dropped."""
    ids_TK = np.array([[1], [1], [0], [1]])
    weights_TK = np.array([[0.5], [0.2], [0.1], [0.5]], dtype=np.float32)
    assert kept_pairs(ids_TK, weights_TK, 2, 1.0).tolist() == [[True], [False], [True], [True]]


@pytest.mark.parametrize(
    ("factor", "num_pairs", "capacity"),
    [(1.0, 2, 1), (0.001, 2, 1), (1.0, 16, 2), (1.25, 16, 3), (2.0, 16, 4), (1.0, 0, 0)],
)
def test_capacity_is_an_even_share_times_the_factor_rounded_up(factor: float, num_pairs: int, capacity: int) -> None:
    assert expert_capacity(factor, num_pairs, 8) == capacity
