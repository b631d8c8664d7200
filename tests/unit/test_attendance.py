from typing import Any

import pytest

from expertmesh.cluster.attendance import given_up, is_settled, still_away


def test_who_is_away_is_so_since_the_first_look_that_missed_them() -> None:
    first = still_away({}, ["a", "b", "c"], {"a"}, 10.0)
    assert first == {"b": 10.0, "c": 10.0}
    second = still_away(first, ["a", "b", "c"], {"b"}, 20.0)
    assert second == {"a": 20.0, "c": 10.0}, "b is back, and if it goes again it is away since then"
    assert still_away(second, ["a", "b"], {"a", "b"}, 30.0) == {}, "c is no member any more"


def test_one_is_given_up_after_its_time() -> None:
    assert given_up({"a": 10.0, "b": 30.0}, 69.9, 60.0) == frozenset()
    assert given_up({"a": 10.0, "b": 30.0}, 70.0, 60.0) == {"a"}
    assert given_up({"a": 10.0}, 10.0, 0.0) == {"a"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"starting": {"worker-0"}}, False),
        ({"starting": {"worker-0"}, "absent": {"worker-0"}}, True),
        ({"hosting": {"a"}}, False),
        ({"placed": {"a"}, "hosting": {"a"}, "starting": {"b"}}, False),
        ({"placed": {"a"}, "hosting": {"a"}, "absent": {"b"}}, True),
        ({"placed": {"a"}, "hosting": {"a"}, "starting": {"b"}, "absent": {"b"}}, True),
        # Given up, and not yet spread over those that are there.
        ({"hosting": {"a"}, "absent": {"b"}}, False),
        # Back, and not yet in the placement.
        ({"placed": {"a"}, "hosting": {"a"}}, False),
    ],
)
def test_the_placement_follows_the_load_once_nothing_is_about_to_change_it(
    change: dict[str, Any], expected: bool
) -> None:
    whole: dict[str, Any] = {"shards": ["a", "b"], "placed": {"a", "b"}, "hosting": {"a", "b"}}
    assert is_settled(**{**whole, "starting": (), "absent": (), **change}) is expected
