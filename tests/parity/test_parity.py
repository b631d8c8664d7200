"""Greedy tokens equal transformers' own generate, for every family that must be served.

Each runs on real shards over real links, with whole experts and with slices of them, three prompts of unlike lengths in
one batch, prompts longer than a step's budget so that chunked prefill is in play.
"""

from pathlib import Path

import pytest

from tests.families import BATCHED, OWN_CACHE, generate, random_prompts, write_checkpoint
from tests.fleet import LocalFleet, greedy

NUM_TOKENS = 64
LENGTHS = (5, 19, 70)


@pytest.mark.parametrize(
    ("shards", "expert_tp"), [(2, 1), (2, 2), (4, 2)], ids=["whole experts", "in 2 slices", "in 2 slices on 4 shards"]
)
@pytest.mark.parametrize("family", [*BATCHED, *OWN_CACHE])
def test_greedy_tokens_equal_generate(family: str, shards: int, expert_tp: int, tmp_path: Path) -> None:
    model = write_checkpoint(family, tmp_path)
    prompts = random_prompts(LENGTHS)
    expected = {str(i): generate(model, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)}
    with LocalFleet(tmp_path, shards=shards, expert_tp=expert_tp) as fleet:
        assert fleet.architecture.uses_own_cache == (family in OWN_CACHE)
        got = fleet.run([greedy(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)])
    assert got == expected
    assert min(len(set(tokens)) for tokens in got.values()) >= 4, (
        "output settled on a few tokens: the test shows little"
    )
