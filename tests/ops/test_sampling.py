"""Sampling against its slow twin, against the processors of transformers, and in distribution.

Shapes: N rows, V vocabulary.
"""

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertmesh.kernels.reference_sampling import random_bits, sample_row
from expertmesh.kernels.sampling import (
    MAX_VOCAB,
    SCORES_AT_ONCE,
    NonFiniteLogitsError,
    SampledTokens,
    SamplingSettings,
    _inverse_cdf,
    filtered_weights,
    sample,
    splitmix64,
    uniform,
)

# Sixteenths: equal scores are frequent, and no edge of a filter lies within the rounding of exp.
score = st.integers(-160, 160).map(lambda n: n / 16)
row_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.25]),
    seed=st.integers(-(2**63), 2**64),
    logprobs=st.one_of(st.none(), st.integers(0, 30)),
)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def row_of(result: SampledTokens, n: int) -> tuple[int, float | None, list[tuple[int, float]]]:
    return result.token_ids[n], result.logprob[n], result.top[n]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_the_twin(data: st.DataObject) -> None:
    num_rows, vocab_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 24))
    rows = st.lists(score, min_size=vocab_size, max_size=vocab_size)
    logits = data.draw(st.lists(rows, min_size=num_rows, max_size=num_rows))
    wanted = data.draw(st.lists(row_settings, min_size=num_rows, max_size=num_rows))
    positions = data.draw(st.lists(st.integers(0, 40), min_size=num_rows, max_size=num_rows))
    token_ids = st.lists(st.integers(0, vocab_size - 1), max_size=8)
    contexts = data.draw(st.lists(token_ids, min_size=num_rows, max_size=num_rows))

    result = sample(torch.tensor(logits), wanted, positions, contexts)

    for n in range(num_rows):
        token_id, logprob, ranked = sample_row(logits[n], wanted[n], positions[n], contexts[n])
        assert result.token_ids[n] == token_id
        count = wanted[n].logprobs
        if count is None:
            assert result.logprob[n] is None
            assert result.top[n] == []
        else:
            assert result.logprob[n] == pytest.approx(logprob, abs=1e-5)
            assert [i for i, _ in result.top[n]] == [i for i, _ in ranked[:count]]
            assert [x for _, x in result.top[n]] == pytest.approx([x for _, x in ranked[:count]], abs=1e-5)


@pytest.mark.parametrize(
    ("wanted", "processors"),
    [
        (SamplingSettings(temperature=1.0, top_k=40), [TopKLogitsWarper(40)]),
        (SamplingSettings(temperature=1.0, top_p=0.9), [TopPLogitsWarper(0.9)]),
        (SamplingSettings(temperature=1.0, top_p=0.999), [TopPLogitsWarper(0.999)]),
        (SamplingSettings(temperature=1.0, min_p=0.05), [MinPLogitsWarper(0.05)]),
        (
            SamplingSettings(temperature=0.7, top_k=100, top_p=0.95, min_p=0.01),
            [TemperatureLogitsWarper(0.7), TopKLogitsWarper(100), TopPLogitsWarper(0.95), MinPLogitsWarper(0.01)],
        ),
        (
            SamplingSettings(temperature=5.0, top_p=0.9, min_p=0.2),
            [TemperatureLogitsWarper(5.0), TopPLogitsWarper(0.9), MinPLogitsWarper(0.2)],
        ),
    ],
)
def test_filters_equal_those_of_transformers(wanted: SamplingSettings, processors: list[LogitsProcessor]) -> None:
    logits_NV = random_logits(6, 3000)
    no_ids = torch.zeros(6, 0, dtype=torch.long)
    expected_NV = logits_NV.double()
    for processor in processors:
        expected_NV = processor(no_ids, expected_NV)
    weights_NV = filtered_weights(logits_NV, [wanted] * 6)
    assert torch.equal(weights_NV > 0, expected_NV.isfinite())
    probabilities_NV = weights_NV.double() / weights_NV.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(probabilities_NV, expected_NV.softmax(dim=-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits_NV = random_logits(20, 30)
    ids_NT = torch.randint(0, 30, (20, 12), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids_NT, logits_NV.clone()).argmax(dim=-1).tolist()
    greedy = sample(logits_NV, [SamplingSettings()] * 20, [0] * 20).token_ids
    wanted = [SamplingSettings(repetition_penalty=penalty)] * 20
    penalised = sample(logits_NV, wanted, [0] * 20, ids_NT.tolist()).token_ids
    assert penalised == expected
    assert penalised != greedy


@pytest.mark.parametrize(
    "wanted",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.6, top_k=9, top_p=0.9, min_p=0.02),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(wanted: SamplingSettings, vary: str) -> None:
    num_draws = 20_000
    logits_V = random_logits(1, 12)[0] / 2
    by_seed = vary == "seed"
    every = [replace(wanted, seed=n) if by_seed else wanted for n in range(num_draws)]
    positions = [7] * num_draws if by_seed else list(range(num_draws))
    drawn = torch.tensor(sample(logits_V.expand(num_draws, -1), every, positions).token_ids)
    counts_V = torch.bincount(drawn, minlength=12)
    weights_V = filtered_weights(logits_V[None], [wanted])[0].double()
    kept_V = weights_V > 0
    assert int(counts_V[~kept_V].sum()) == 0
    expected_V = weights_V[kept_V] / weights_V.sum() * num_draws
    assert stats.chisquare(counts_V[kept_V].numpy(), expected_V.numpy()).pvalue > 0.001


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, vocab_size = 9, 5003
    logits_NV = random_logits(num_rows, vocab_size).bfloat16()
    kinds = [
        SamplingSettings(temperature=0.9, logprobs=3),
        SamplingSettings(temperature=0.0, logprobs=0),
        SamplingSettings(temperature=1.2, top_p=0.7, logprobs=5),
        SamplingSettings(temperature=1.0, top_k=20, min_p=0.1, repetition_penalty=1.2),
    ]
    wanted = [replace(kinds[n % len(kinds)], seed=n) for n in range(num_rows)]
    contexts = [list(range(n, 500 + n)) for n in range(num_rows)]
    # The batch draws in one part for some positions and in several for the others.
    for position in range(12):
        monkeypatch.setitem(SCORES_AT_ONCE, "cpu", (1 + position) * vocab_size)
        positions = [position + n for n in range(num_rows)]
        batch = sample(logits_NV, wanted, positions, contexts)
        assert (
            sample(logits_NV.flip(0), wanted[::-1], positions[::-1], contexts[::-1]).token_ids[::-1] == batch.token_ids
        )
        for n in range(num_rows):
            alone = sample(logits_NV[n : n + 1], [wanted[n]], [positions[n]], [contexts[n]])
            assert row_of(alone, 0) == row_of(batch, n)


def test_a_resumed_sequence_draws_the_same_tokens() -> None:
    """The model is a table: the logits after a token depend on that token alone."""
    table_VV = random_logits(50, 50)
    wanted = SamplingSettings(temperature=1.1, top_p=0.95, repetition_penalty=1.1, seed=42)

    def generate(token_ids: list[int], length: int) -> list[int]:
        token_ids = list(token_ids)
        while len(token_ids) < length:
            row = table_VV[token_ids[-1]][None]
            token_ids += sample(row, [wanted], [len(token_ids)], [token_ids]).token_ids
        return token_ids

    whole = generate([3], 40)
    assert len(set(whole)) > 10
    for cut in (1, 2, 17, 39):
        assert generate(whole[:cut], 40) == whole


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits_NV = torch.zeros(3, 5000)
    logits_NV[1, [4000, 77, 4999]] = 2.0
    logits_NV[2, 1:] = -math.inf
    assert sample(logits_NV, [SamplingSettings()] * 3, [0, 1, 2]).token_ids == [0, 77, 0]
    mixed = [SamplingSettings(), SamplingSettings(), SamplingSettings(temperature=1.0)]
    assert sample(logits_NV, mixed, [0, 1, 2]).token_ids == [0, 77, 0]


def test_top_p_and_top_logprobs_take_equal_tokens_by_id() -> None:
    wanted = SamplingSettings(temperature=1.0, top_p=0.5, logprobs=4)
    kept_V = filtered_weights(torch.zeros(1, 1000), [wanted])[0] > 0
    assert kept_V.nonzero().flatten().tolist() == list(range(500))
    top = sample(torch.zeros(1, 1000), [wanted], [0]).top[0]
    assert [token_id for token_id, _ in top] == [0, 1, 2, 3]
    assert [logprob for _, logprob in top] == pytest.approx([-math.log(1000)] * 4)


def test_logprobs_come_from_the_raw_logits() -> None:
    logits_NV = random_logits(2, 300)
    wanted = SamplingSettings(temperature=0.3, top_k=5, repetition_penalty=1.5, logprobs=7)
    result = sample(logits_NV, [wanted, SamplingSettings(logprobs=400)], [0, 0], [[1, 2, 3], []])
    expected_NV = logits_NV.log_softmax(dim=-1)
    assert result.logprob == [expected_NV[n, i].item() for n, i in enumerate(result.token_ids)]
    assert [i for i, _ in result.top[0]] == expected_NV[0].topk(7).indices.tolist()
    assert len(result.top[1]) == 300
    assert math.fsum(math.exp(x) for _, x in result.top[1]) == pytest.approx(1, abs=1e-5)


def test_a_tiny_temperature_is_greedy() -> None:
    logits_NV = random_logits(4, 200)
    tiny = [SamplingSettings(temperature=t, seed=1) for t in (1e-3, 1e-20, 1e-45, 1e-300)]
    assert sample(logits_NV, tiny, [9] * 4).token_ids == logits_NV.argmax(dim=-1).tolist()


def test_dropped_tokens_are_not_drawn_at_the_edges() -> None:
    smallest, largest = 2.0**-53, 1 - 2.0**-53
    weights_MV = torch.tensor([[0, 3, 0, 1, 0]]).repeat(4, 1)
    assert _inverse_cdf(weights_MV, [smallest, 0.74, 0.75, largest]).tolist() == [1, 1, 3, 3]
    for total in (1, 2**40, 2**51 + 1, 2**53 - 1, 2**54 + 3, 2**62 - 1):
        assert _inverse_cdf(torch.tensor([[0, total, 0]]).repeat(2, 1), [smallest, largest]).tolist() == [1, 1]


def test_the_random_bits_are_those_of_splitmix64() -> None:
    """The five outputs for seed 1234567 are the generator's published test values."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    generator = random_bits(1234567)
    assert [next(generator) for _ in published] == published
    assert [splitmix64(1234567 + n * 0x9E3779B97F4A7C15) for n in range(5)] == published


def test_uniform_numbers_differ_by_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(-50, 50) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert 0 < min(numbers) < max(numbers) < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.001
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_finite_largest_logit_are_named(bad: float) -> None:
    logits_NV = random_logits(4, 10)
    logits_NV[1, 3] = bad
    logits_NV[3] = -math.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteLogitsError, match=r"\[1, 3\]") as caught:
            sample(logits_NV, [SamplingSettings(temperature=temperature)] * 4, [0] * 4)
        assert caught.value.rows == (1, 3)
        assert pickle.loads(pickle.dumps(caught.value)).rows == (1, 3)  # noqa: S301  the test's own bytes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("logprobs", -1),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .* got {value}"):
        replace(SamplingSettings(), **{field: value})


def test_arguments_that_do_not_agree_are_refused() -> None:
    logits_NV = random_logits(2, 8)
    plain = [SamplingSettings()] * 2
    penalty = [SamplingSettings(repetition_penalty=2.0)] * 2
    with pytest.raises(ValueError, match="2 rows of logits, but 1 settings"):
        sample(logits_NV, plain[:1], [0, 0])
    with pytest.raises(ValueError, match="at least 0, got -4"):
        sample(logits_NV, plain, [0, -4])
    with pytest.raises(ValueError, match="got none"):
        sample(logits_NV, penalty, [0, 0])
    with pytest.raises(ValueError, match=r"row 1 has ids outside 0\.\.7: 0\.\.8"):
        sample(logits_NV, penalty, [0, 0], [[1], [0, 8]])
    with pytest.raises(ValueError, match=r"torch.int64 \[2, 8\]"):
        sample(logits_NV.long(), plain, [0, 0])
    with pytest.raises(ValueError, match=str(MAX_VOCAB)):
        sample(torch.empty(0, MAX_VOCAB + 1), [], [])
    assert sample(logits_NV[:0], [], []) == SampledTokens(token_ids=[], logprob=[], top=[])


def test_the_logits_are_not_changed() -> None:
    logits_NV = random_logits(2, 100)
    before_NV = logits_NV.clone()
    wanted = SamplingSettings(temperature=0.5, top_p=0.5, repetition_penalty=2.0, logprobs=2)
    sample(logits_NV, [wanted] * 2, [0, 0], [[1, 2]] * 2)
    assert torch.equal(logits_NV, before_NV)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    logits_NV = random_logits(64, 8000)
    kinds = [
        SamplingSettings(),
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=1.5, top_p=0.9, top_k=99),
    ]
    wanted = [replace(kinds[n % 3], seed=n, repetition_penalty=1.0 + n % 2, logprobs=2) for n in range(64)]
    contexts = [list(range(40))] * 64
    on_cpu = sample(logits_NV, wanted, list(range(64)), contexts)
    on_gpu = sample(logits_NV.cuda(), wanted, list(range(64)), contexts)
    assert on_gpu.token_ids == on_cpu.token_ids
    assert [[i for i, _ in top] for top in on_gpu.top] == [[i for i, _ in top] for top in on_cpu.top]
