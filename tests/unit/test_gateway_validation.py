"""Which requests the gateway takes, and what it makes of them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.actors.gateway.validation import MAX_SEED, ValidRequest, sample_seed, validate_request
from expertmesh.cluster.errors import InputError
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from tests.unit.gateway_fakes import EOS_ID, MODEL, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return save_tokenizer(directory)


def check(request: GenerateRequest, tokenizer: Tokenizer | None = None, request_id: str = "r") -> ValidRequest:
    return validate_request(request, model=MODEL, tokenizer=tokenizer, request_id=request_id, default_seed=77)


def ids(*token_ids: int) -> TokenIds:
    return TokenIds(ids=token_ids or (1, 2, 3))


def test_defaults_are_greedy_and_end_at_the_models_eos() -> None:
    valid = check(GenerateRequest(token_ids=ids()))
    (sampling,) = valid.sampling
    assert valid.prompt_ids == (1, 2, 3)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (128, 0.0, 0, 1.0)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.0, 1.0, None)
    assert (sampling.seed, sampling.stop_token_ids) == (77, (EOS_ID,))


def test_given_values_arrive(tokenizer: Tokenizer) -> None:
    request = GenerateRequest(
        token_ids=ids(),
        max_tokens=5,
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=MAX_SEED,
        stop=["ab"],
        stop_token_ids=[4, EOS_ID],
        logprobs=0,
    )
    valid = check(request, tokenizer)
    (sampling,) = valid.sampling
    assert valid.stop == ("ab",)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (5, 0.7, 3, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.1, 1.2, 0)
    assert (sampling.seed, sampling.stop_token_ids) == (MAX_SEED, (4, EOS_ID))


def test_text_is_tokenised(tokenizer: Tokenizer) -> None:
    assert list(check(GenerateRequest(text="hé"), tokenizer).prompt_ids) == tokenizer.encode("hé")


def test_ignore_eos_leaves_only_the_requests_own_stop_tokens() -> None:
    valid = check(GenerateRequest(token_ids=ids(), stop_token_ids=[9], ignore_eos=True))
    assert valid.sampling[0].stop_token_ids == (9,)


def test_max_tokens_that_is_not_given_fits_the_context_and_top_k_the_vocabulary() -> None:
    valid = check(GenerateRequest(token_ids=ids(*[1] * 500), top_k=100_000))
    assert valid.sampling[0].max_tokens == 12
    assert valid.sampling[0].top_k == MODEL.vocab_size


def test_samples_differ_in_seed_alone() -> None:
    valid = check(GenerateRequest(token_ids=ids(), seed=5, n=64))
    seeds = [sampling.seed for sampling in valid.sampling]
    assert seeds[0] == 5
    assert len(set(seeds)) == 64
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert len({replace(sampling, seed=0) for sampling in valid.sampling}) == 1


def test_sample_seed_is_splitmix64() -> None:
    # First output of splitmix64 from state 0, as in its published test vector, without the lowest bit.
    assert sample_seed(0, 1) == 0xE220A8397B1DCDAF >> 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no prompt"),
        ({"text": ""}, "the prompt is empty"),
        ({"token_ids": TokenIds()}, "the prompt is empty"),
        ({"token_ids": ids(1, 257)}, "token id 257 is outside the vocabulary of 257"),
        ({"token_ids": ids(*[1] * 512)}, "prompt of 512 tokens leaves no room in the context of 512"),
        ({"token_ids": ids(*[1] * 500), "max_tokens": 13}, "500 tokens and max_tokens 13 make 513; the context is 512"),
        ({"token_ids": ids(), "max_tokens": 0}, "max_tokens is 0"),
        ({"token_ids": ids(), "max_tokens": -1}, "max_tokens is -1"),
        ({"token_ids": ids(), "temperature": -0.1}, "temperature is -0.1"),
        ({"token_ids": ids(), "temperature": math.nan}, "temperature is nan"),
        ({"token_ids": ids(), "temperature": math.inf}, "temperature is inf"),
        ({"token_ids": ids(), "top_k": -1}, "top_k is -1"),
        ({"token_ids": ids(), "top_p": 0.0}, "top_p is 0.0"),
        ({"token_ids": ids(), "top_p": 1.01}, "top_p is 1.01"),
        ({"token_ids": ids(), "top_p": math.nan}, "top_p is nan"),
        ({"token_ids": ids(), "min_p": -0.5}, "min_p is -0.5"),
        ({"token_ids": ids(), "min_p": 1.5}, "min_p is 1.5"),
        ({"token_ids": ids(), "repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"token_ids": ids(), "repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"token_ids": ids(), "seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"token_ids": ids(), "n": 0}, "n is 0"),
        ({"token_ids": ids(), "n": 65}, "n is 65"),
        ({"token_ids": ids(), "logprobs": -1}, "logprobs is -1"),
        ({"token_ids": ids(), "logprobs": 21}, "logprobs is 21"),
        ({"token_ids": ids(), "stop": ["x"] * 17}, "17 stop strings"),
        ({"token_ids": ids(), "stop": ["x", ""]}, "a stop string is empty"),
        ({"token_ids": ids(), "stop_token_ids": [300]}, "stop token id 300"),
    ],
)
def test_wrong_values_are_refused_by_name_and_value(
    fields: dict[str, object], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=message):
        check(GenerateRequest(**fields), tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("request_id", ["", "x" * 129, "line\nbreak"])
def test_wrong_request_ids_are_refused(request_id: str) -> None:
    with pytest.raises(InputError, match="request_id"):
        check(GenerateRequest(token_ids=ids()), request_id=request_id)


def test_without_a_tokenizer_text_and_stop_strings_are_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer; give the prompt as token_ids"):
        check(GenerateRequest(text="hello"))
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        check(GenerateRequest(token_ids=ids(), stop=["x"]))
