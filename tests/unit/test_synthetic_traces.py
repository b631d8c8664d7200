"""Made-up routing is as skewed as was asked for, and changes when it was asked to.

Shape suffixes: L MoE layers, E experts of a layer.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.synthetic_traces import MAX_SKEW, choice_probabilities, zipf_steps
from expertmesh.cluster.traces import TraceHeader, TraceStep

HEADER = TraceHeader(model="made up", layers=(0, 1, 2), num_experts=32, top_k=4, hidden_size=64)


def steps(header: TraceHeader = HEADER, **changes: Any) -> list[TraceStep]:
    asked = {"skew": 1.0, "num_steps": 20, "step_s": 0.5, "prefill_tokens": 10, "decode_tokens": 40, "seed": 3}
    return list(zipf_steps(header, **{**asked, **changes}))


def total(made: list[TraceStep]) -> npt.NDArray[np.int64]:
    summed: npt.NDArray[np.int64] = np.sum([step.load_LE for step in made], axis=0)
    return summed


@given(
    st.integers(1, 70),
    st.floats(0, MAX_SKEW),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.integers(0, 3),
    st.data(),
)
def test_every_token_chooses_top_k_different_experts(
    num_experts: int, skew: float, tokens: tuple[int, int], topic_steps: int, data: st.DataObject
) -> None:
    top_k, seed = data.draw(st.integers(1, num_experts)), data.draw(st.integers(0, 2**32))
    header = TraceHeader(model="m", layers=(0, 5), num_experts=num_experts, top_k=top_k, hidden_size=1)
    asked = {"prefill_tokens": tokens[0], "decode_tokens": tokens[1], "topic_steps": topic_steps, "seed": seed}
    made = steps(header, skew=skew, num_steps=4, **asked)
    assert [step.time_s for step in made] == [0.5, 1.0, 1.5, 2.0]
    for step in made:
        assert (step.prefill_tokens, step.decode_tokens) == tokens
        assert step.load_LE.sum(axis=1).tolist() == [sum(tokens) * top_k] * 2
        assert 0 <= step.load_LE.min() <= step.load_LE.max() <= sum(tokens)


@given(st.integers(1, 300), st.floats(0, MAX_SKEW), st.data())
def test_chances_are_in_proportion_to_popularity_up_to_1(num_experts: int, skew: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    popularity_E = np.arange(1.0, num_experts + 1) ** -skew
    chance_E = choice_probabilities(popularity_E, top_k)
    assert chance_E.sum() == pytest.approx(top_k)
    assert chance_E.max() <= 1
    open_E = chance_E < 1
    ratio_E = chance_E[open_E] / popularity_E[open_E]
    assert ratio_E == pytest.approx(np.full(ratio_E.shape, ratio_E.mean() if ratio_E.size else 0))
    # Nobody is certain who need not be.
    assert ratio_E.size == 0 or (popularity_E[~open_E] * ratio_E.max() >= 1 - 1e-9).all()


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.2])
def test_loads_are_as_skewed_as_asked(skew: float) -> None:
    """Of 40,000 tokens: an expert's load is binomial, so within 5 standard deviations of what it must be."""
    made = steps(skew=skew, num_steps=40, prefill_tokens=0, decode_tokens=1000)
    chance_E = choice_probabilities(np.arange(1.0, 33) ** -skew, 4)
    deviation_E = np.sqrt(40_000 * chance_E * (1 - chance_E))
    for load_E in total(made):
        assert (np.abs(np.sort(load_E)[::-1] - 40_000 * chance_E) <= 5 * deviation_E + 5).all()


def test_loads_of_an_interval_spread_as_those_of_tokens_that_choose_by_themselves() -> None:
    made = steps(skew=1.0, num_steps=2000, prefill_tokens=0, decode_tokens=50)
    load_NE = np.stack([step.load_LE[0] for step in made])
    chance_E = load_NE.mean(axis=0) / 50
    assert load_NE.var(axis=0) == pytest.approx(50 * chance_E * (1 - chance_E), rel=0.2)


def test_layers_have_hot_experts_of_their_own() -> None:
    hot_L = total(steps(skew=1.2)).argmax(axis=1)
    assert len(set(hot_L.tolist())) > 1


def test_equal_arguments_give_equal_traces_and_another_seed_another() -> None:
    first, second, other = (total(steps(seed=seed)).tolist() for seed in (3, 3, 4))
    assert first == second != other


def test_the_hot_experts_change_with_the_topic_and_only_then() -> None:
    made = steps(skew=1.5, num_steps=30, decode_tokens=400, topic_steps=10)
    topics = [total(made[begin : begin + 10]) for begin in (0, 10, 20)]
    within = [total(made[begin : begin + 5]) for begin in (0, 5)]
    correlation = [np.corrcoef(topics[0].ravel(), other.ravel())[0, 1] for other in topics[1:]]
    assert max(correlation) < 0.5
    assert np.corrcoef(within[0].ravel(), within[1].ravel())[0, 1] > 0.95
    steady = steps(skew=1.5, num_steps=30, decode_tokens=400)
    assert np.corrcoef(total(steady[:10]).ravel(), total(steady[20:]).ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skew", -0.1),
        ("skew", MAX_SKEW + 1),
        ("skew", float("nan")),
        ("num_steps", -1),
        ("step_s", 0.0),
        ("step_s", float("inf")),
        ("prefill_tokens", -1),
        ("decode_tokens", -1),
        ("seed", -1),
        ("topic_steps", -1),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"a synthetic trace with {name}={value}"):
        steps(**{name: value})
