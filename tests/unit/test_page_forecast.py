"""The forecast of pages beside a twin that goes through every step; what is expected of outputs."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.output_lengths import QUANTILE, WINDOW, OutputLengths
from expertmesh.cluster.page_forecast import Stay, pages_suffice

SIZE = 4


def stay(num_tokens: int, num_left: int, prefill: int = 0) -> Stay:
    num_pages = -(-num_tokens // SIZE)
    return Stay(
        num_tokens=num_tokens,
        num_pages=num_pages,
        pages=tuple(range(num_pages)),
        num_left=num_left,
        num_prefill_steps=prefill,
    )


def nothing_shared(_pages: Sequence[int]) -> int:
    return 0


def suffice_step_by_step(stays: Sequence[Stay], num_free: int) -> bool:
    """The slow twin: what is taken and left in each step until all have ended."""
    for step in range(1, max(s.num_left + s.num_prefill_steps for s in stays) + 1):
        free = num_free
        for one in stays:
            if one.num_left + one.num_prefill_steps < step:
                free += one.num_pages
            else:
                free -= math.ceil((one.num_tokens + min(step, one.num_left) - 1) / SIZE) - one.num_pages
        if free < 0:
            return False
    return True


stays_drawn = st.lists(
    st.builds(stay, st.integers(1, 30), st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=8
)


@given(stays=stays_drawn, num_free=st.integers(0, 60))
def test_it_says_what_going_through_every_step_says(stays: list[Stay], num_free: int) -> None:
    said = pages_suffice(stays, nothing_shared, num_free=num_free, page_size=SIZE)
    assert said == suffice_step_by_step(stays, num_free)


def test_pages_that_others_have_too_are_not_left() -> None:
    stays = [stay(8, 1), stay(8, 9)]
    assert pages_suffice(stays, nothing_shared, num_free=0, page_size=SIZE)
    assert not pages_suffice(stays, len, num_free=0, page_size=SIZE)


def test_nothing_is_expected_but_the_most_before_any_has_ended() -> None:
    assert OutputLengths().expected(0, 1000) == 1000


def test_the_quantile_of_those_that_are_longer_counts() -> None:
    lengths = OutputLengths()
    for length in range(1, 101):
        lengths.add(length)
    assert lengths.expected(0, 1000) == 90
    assert lengths.expected(50, 1000) == 95
    assert lengths.expected(0, 20) == 20
    assert lengths.expected(100, 1000) == 1000


def test_what_ended_long_ago_is_forgotten() -> None:
    lengths = OutputLengths()
    for length in [500] * WINDOW + [5] * (WINDOW - 10) + [7] * 10:
        lengths.add(length)
    assert lengths.expected(0, 1000) == 5
    assert lengths.expected(5, 1000) == 7
    assert lengths.expected(7, 1000) == 1000


@given(st.lists(st.integers(1, 50), max_size=2 * WINDOW), st.integers(0, 60), st.integers(1, 60))
def test_it_is_a_length_that_nine_in_ten_keep(ended: list[int], num_generated: int, more: int) -> None:
    lengths, max_tokens = OutputLengths(), num_generated + more
    for length in ended:
        lengths.add(length)
    expected = lengths.expected(num_generated, max_tokens)
    assert num_generated < expected <= max_tokens
    longer = [length for length in ended[-WINDOW:] if length > num_generated]
    if longer and expected < max_tokens:
        assert sum(length <= expected for length in longer) >= QUANTILE * len(longer)
        assert sum(length < expected for length in longer) < QUANTILE * len(longer)
