"""Requests, tokens and sequences of a key, with time as an argument."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError, RateLimitError
from expertmesh.cluster.rate_limits import Limits, RateLimiter, TokenBucket


def admit(limiter: RateLimiter, now_s: float, *, sequences: int = 1, prompt: int = 1) -> float | None:
    """Return None when it is taken, else the seconds to wait (-1: nobody knows)."""
    try:
        limiter.admit(num_sequences=sequences, num_prompt_tokens=prompt, now_s=now_s)
    except RateLimitError as error:
        return -1 if error.retry_after_s is None else error.retry_after_s
    return None


def test_without_limits_everything_is_taken() -> None:
    limiter = RateLimiter(Limits())
    assert [admit(limiter, 0, sequences=64, prompt=10**6) for _ in range(100)] == [None] * 100
    assert limiter.num_sequences == 6400


def test_requests_a_minute() -> None:
    limiter = RateLimiter(Limits(requests_per_minute=3))
    assert [admit(limiter, 10) for _ in range(4)] == [None, None, None, 20]
    assert admit(limiter, 25) == pytest.approx(5)
    assert [admit(limiter, 30), admit(limiter, 30)] == [None, 20]
    assert [admit(limiter, 1000) for _ in range(4)] == [None, None, None, 20], "a bucket holds no more than a minute's"


def test_tokens_a_minute_count_the_output_too() -> None:
    limiter = RateLimiter(Limits(tokens_per_minute=600))
    assert admit(limiter, 0, prompt=600) is None
    limiter.spend(100, 0)
    assert admit(limiter, 0, prompt=50) == pytest.approx(15), "the debt of 100, and 50, at 10 a second"
    assert admit(limiter, 14.9, prompt=50) == pytest.approx(0.1)
    assert admit(limiter, 15, prompt=50) is None


def test_sequences_at_once() -> None:
    limiter = RateLimiter(Limits(max_concurrent=4))
    assert admit(limiter, 0, sequences=3) is None
    assert admit(limiter, 0, sequences=2) == -1
    limiter.release(3)
    assert admit(limiter, 0, sequences=4) is None


def test_a_refusal_uses_nothing() -> None:
    limiter = RateLimiter(Limits(requests_per_minute=2, tokens_per_minute=60, max_concurrent=2))
    assert admit(limiter, 0, prompt=50) is None
    for _ in range(5):
        assert admit(limiter, 0, prompt=20) == 10
        assert admit(limiter, 0, sequences=2) == -1
    assert admit(limiter, 0, prompt=10) is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(tokens_per_minute=9), "the prompt has 10 tokens; this API key may use 9 a minute"),
        (Limits(max_concurrent=1), "n is 2; this API key may have 1 sequences at once"),
    ],
)
def test_what_can_never_be_is_wrong_input(limits: Limits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        admit(RateLimiter(limits), 0, sequences=2, prompt=10)


def test_other_limits_keep_what_was_used() -> None:
    limiter = RateLimiter(Limits(requests_per_minute=4, max_concurrent=9))
    assert [admit(limiter, 0) for _ in range(3)] == [None] * 3
    limiter.set_limits(Limits(requests_per_minute=6, tokens_per_minute=60), 0)
    assert [admit(limiter, 0) for _ in range(4)] == [None, None, None, 10]
    limiter.set_limits(Limits(requests_per_minute=1, tokens_per_minute=60), 0)
    assert admit(limiter, 0) == 60
    limiter.set_limits(Limits(), 0)
    assert admit(limiter, 0, prompt=1000) is None
    assert limiter.num_sequences == 7


def test_a_clock_that_steps_back_stands_still() -> None:
    bucket = TokenBucket(60)
    bucket.take(60, 100)
    assert bucket.level(50) == 0
    assert bucket.level(101) == 1


@settings(deadline=None)
@given(
    calls=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=40),
    per_minute=st.integers(40, 200),
)
def test_over_any_time_no_more_than_the_rate_and_a_bucket(calls: list[tuple[float, int]], per_minute: int) -> None:
    limiter, now_s, taken = RateLimiter(Limits(tokens_per_minute=per_minute)), 0.0, list[tuple[float, int]]()
    for passed_s, prompt in calls:
        now_s += passed_s
        wait_s = admit(limiter, now_s, prompt=prompt)
        if wait_s is not None:
            assert wait_s > 0
            now_s += wait_s
            assert admit(limiter, now_s, prompt=prompt) is None, "who comes back when told is taken"
        taken.append((now_s, prompt))
    for start in range(len(taken)):
        for end in range(start, len(taken)):
            span_s = taken[end][0] - taken[start][0]
            used = sum(tokens for _, tokens in taken[start : end + 1])
            assert used <= per_minute * (1 + span_s / 60) * (1 + 1e-6)
