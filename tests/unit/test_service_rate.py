import pytest

from expertmesh.cluster.service_rate import LEAST_S, MOST_S, UNKNOWN_S, WINDOW, ServiceRate


def served(*, every_s: float, count: int) -> tuple[ServiceRate, float]:
    rate, now_s = ServiceRate(), 1000.0
    for _ in range(count):
        rate.ended(now_s)
        now_s += every_s
    return rate, now_s


def test_the_wait_is_the_queue_over_the_rate() -> None:
    rate, now_s = served(every_s=0.5, count=20)
    assert rate.wait_s(9, now_s) == pytest.approx(5.0)
    assert rate.wait_s(19, now_s) == pytest.approx(10.0)


def test_a_server_that_stands_still_says_more_the_longer_it_does() -> None:
    rate, now_s = served(every_s=0.5, count=20)
    assert rate.wait_s(9, now_s + 10) == pytest.approx(10.0)


def test_the_wait_has_bounds() -> None:
    rate, now_s = served(every_s=0.01, count=20)
    assert rate.wait_s(0, now_s) == LEAST_S
    assert rate.wait_s(100_000, now_s) == MOST_S


def test_what_was_served_long_ago_says_nothing() -> None:
    rate, now_s = served(every_s=0.01, count=20)
    assert rate.wait_s(1, now_s + 61) == UNKNOWN_S
    assert rate.wait_s(0, now_s + 61) == LEAST_S
    assert ServiceRate().wait_s(0, 0.0) == LEAST_S


def test_the_last_ones_count() -> None:
    rate, now_s = served(every_s=0.001, count=1000)
    for _ in range(WINDOW):
        rate.ended(now_s)
        now_s += 0.2
    assert rate.wait_s(9, now_s) == pytest.approx(2.0)
