"""The textbook expert-parallel layer, on real processes over Gloo, against one process that has all experts.

Shape suffixes: T tokens, H hidden, K choices a token, E experts, R ranks.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.expert_parallel import expert_capacity, reference_layer
from tests.ranks import LayerCase, Ranks, experts_of, gradients, inputs_of, leaves, math_of, running_ranks

# Sums of at most 4 experts' outputs and of the gradients of at most 64 rows, in another order.
TOLERANCE = 2e-5

Splits = Literal["exact", "equal"]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Ranks]]:
    with running_ranks(request.param, tmp_path_factory.mktemp("ranks")) as group:
        yield request.param, group


def case_of(tokens: list[int], *, top_k: int = 3, skewed: bool = False, seed: int = 0) -> LayerCase:
    """Return a case with so many tokens on each rank, whose choices are different experts, the low ones if skewed."""
    rng = random.Random(seed)
    experts = range(top_k + 1 if skewed else 8)
    ids = tuple(tuple(tuple(rng.sample(experts, top_k)) for _ in range(count)) for count in tokens)
    return LayerCase(ids_RTK=ids, top_k=top_k, seed=seed)


def on_expert(expert: int, tokens: list[int]) -> LayerCase:
    return LayerCase(ids_RTK=tuple(tuple((expert,) for _ in range(count)) for count in tokens), top_k=1)


def expected(case: LayerCase) -> list[dict[str, Tensor]]:
    """Return what each rank must find, from one process with all experts."""
    slots, found = leaves(experts_of(case)), []
    for inputs in inputs_of(case):
        capacity = None
        if case.capacity_factor is not None:
            capacity = expert_capacity(case.capacity_factor, inputs.ids_TK.numel(), case.num_experts)
        hidden_TH, weights_TK = inputs.hidden_TH.requires_grad_(), inputs.weights_TK.requires_grad_()
        out_TH, dropped_E = reference_layer(
            hidden_TH, inputs.ids_TK, weights_TK, slots=slots, math=math_of(case), capacity=capacity
        )
        if out_TH.requires_grad:
            torch.autograd.backward([out_TH], [inputs.gradient_TH])
        parts = {"hidden": hidden_TH, "weights": weights_TK}
        grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in parts.items()}
        found.append({"out": out_TH.detach(), "dropped": dropped_E, **grads})
    of_experts = gradients(slots)
    for rank, answer in enumerate(found):
        num_slots = case.num_experts // len(found)
        answer |= {name: t[rank * num_slots : (rank + 1) * num_slots] for name, t in of_experts.items()}
    return found


def assert_near(got: Tensor, wanted: Tensor, where: str) -> None:
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{where}: {text}")


def check(case: LayerCase, group: Ranks) -> list[dict[str, Tensor]]:
    """Run a case and compare all that the ranks found."""
    got, wanted = group.run(case), expected(case)
    for rank, (mine, reference) in enumerate(zip(got, wanted, strict=True)):
        names = reference.keys() if case.needs_gradients else {"out", "dropped"}
        assert mine.keys() >= names, f"rank {rank}"
        for name in names:
            assert_near(mine[name], reference[name], f"rank {rank}, {name}")
    return got


EDGES = {
    "even": lambda n: case_of([5] * n),
    "ragged": lambda n: case_of([(7 * rank) % 5 + 1 for rank in range(n)], seed=1),
    "a rank without tokens": lambda n: case_of([0] + [6] * (n - 1), seed=2),
    "one rank alone has tokens": lambda n: case_of([0] * (n - 1) + [9], seed=3),
    "no tokens at all": lambda n: case_of([0] * n),
    "all tokens on the first expert": lambda n: on_expert(0, [4] * n),
    "all tokens on the last expert": lambda n: on_expert(7, [3] * n),
    "skewed": lambda n: case_of([8] * n, skewed=True, seed=4),
    "every expert": lambda n: case_of([2] * n, top_k=8, seed=5),
}


@pytest.mark.parametrize("edge", EDGES)
def test_output_and_gradients_are_those_of_one_process(ranks: tuple[int, Ranks], edge: str) -> None:
    num_ranks, group = ranks
    for answer in check(EDGES[edge](num_ranks), group):
        assert not answer["dropped"].any()


@pytest.mark.parametrize("splits", ["exact", "equal"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 8.0])
@pytest.mark.parametrize("edge", EDGES)
def test_dropping_is_that_of_the_slow_twin(ranks: tuple[int, Ranks], edge: str, factor: float, splits: Splits) -> None:
    num_ranks, group = ranks
    check(replace(EDGES[edge](num_ranks), capacity_factor=factor, splits=splits), group)


@pytest.mark.parametrize("splits", ["exact", "equal"])
def test_what_arrives_late_is_dropped_and_counted(ranks: tuple[int, Ranks], splits: Splits) -> None:
    """Of 8 tokens that all choose expert 2, and 8 experts, one is its even share: twice that are kept, the first."""
    num_ranks, group = ranks
    for answer in check(replace(on_expert(2, [8] * num_ranks), capacity_factor=2.0, splits=splits), group):
        assert answer["dropped"].tolist() == [0, 0, 6, 0, 0, 0, 0, 0]
        assert answer["out"][:2].any(dim=1).all()
        assert not answer["out"][2:].any()
        assert not answer["weights"][2:].any()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("splits", ["exact", "equal"])
def test_other_kinds_of_experts(ranks: tuple[int, Ranks], splits: Splits, is_transposed: bool, has_bias: bool) -> None:
    num_ranks, group = ranks
    case = case_of([6] * num_ranks, seed=6)
    check(replace(case, is_transposed=is_transposed, has_bias=has_bias, capacity_factor=1.0, splits=splits), group)


@pytest.mark.parametrize("splits", ["exact", "equal"])
def test_without_gradients_the_kernels_of_serving_give_the_same(ranks: tuple[int, Ranks], splits: Splits) -> None:
    num_ranks, group = ranks
    case = replace(case_of([12] * num_ranks, skewed=True), capacity_factor=1.0, splits=splits, needs_gradients=False)
    check(case, group)


def test_bf16_is_that_of_one_process_within_its_rounding(ranks: tuple[int, Ranks]) -> None:
    """Both round at the same places, now and then to neighbours 2**-7 apart: four such steps of the largest value."""
    num_ranks, group = ranks
    case = replace(case_of([9] * num_ranks), dtype=torch.bfloat16)
    for got, wanted in zip(group.run(case), expected(case), strict=True):
        for name in ("out", "hidden", "weights", "up_SUH", "down_SHW"):
            largest = float(wanted[name].abs().max())
            torch.testing.assert_close(got[name], wanted[name].float(), rtol=0, atol=4 * 2**-7 * largest)


@given(
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.integers(1, 4),
    st.sampled_from([None, 0.2, 0.7, 1.0, 2.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer(ranks: tuple[int, Ranks], tokens: list[int], top_k: int, factor: float | None, seed: int) -> None:
    num_ranks, group = ranks
    case = replace(case_of(tokens[:num_ranks], top_k=top_k, seed=seed), capacity_factor=factor)
    check(case, group)
    if factor is not None:
        check(replace(case, splits="equal"), group)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_experts": 9}, "num_experts=9 on . ranks of . experts each"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0; it must be above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"splits": "equal"}, "splits='equal' needs a capacity_factor"),
    ],
)
def test_what_does_not_fit_is_refused(ranks: tuple[int, Ranks], change: dict[str, object], complaint: str) -> None:
    num_ranks, group = ranks
    with pytest.raises(ValueError, match=complaint):
        group.run(replace(case_of([2] * num_ranks), **change))  # type: ignore[arg-type]


def test_capacity_is_an_even_share_times_the_factor_rounded_up() -> None:
    assert [expert_capacity(factor, 20, 8) for factor in (0.1, 0.4, 1.0, 1.25, 2.0)] == [1, 1, 3, 4, 5]
    assert expert_capacity(1.0, 0, 8) == 0
