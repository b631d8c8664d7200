"""From counts to rates: what a look at the fleet adds to what is known. Shape suffixes: L layers, E experts."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expertmesh.actors.gateway.live_picture import GatewayFigures, LivePicture
from expertmesh.actors.gateway.live_times import TimesSummary, TokenTimes
from expertmesh.cluster.placement import EVEN_WEIGHT
from tests.unit.gateway_fakes import MODEL
from tests.unit.live_fakes import FakeFleet

TIMES = TimesSummary(0.01, 0.05, 0.2)
TOKENS_LE = [[1, 2, 3, 4], [0, 10, 0, 0]]


def figures(*events: tuple[int, float, str, str]) -> GatewayFigures:
    return GatewayFigures(is_serving=True, live_requests=3, times=TIMES, events=events)


class Look:
    """Looks of one picture, a second apart."""

    def __init__(self) -> None:
        self.fleet, self.picture, self.now_s = FakeFleet(), LivePicture(MODEL), 0.0

    def __call__(self, *events: tuple[int, float, str, str]) -> dict[str, Any]:
        self.now_s += 2.0
        picture = self.picture
        view = asyncio.run(self.fleet.ask(picture.epoch, picture.last_event, picture.life))
        return picture.seen(view, figures(*events), wall_s=1000 + self.now_s, clock_s=self.now_s)


def test_a_look_says_what_was_counted_since_the_last() -> None:
    look = Look()
    first = look()
    assert (first["tokens"], first["generated_per_s"], first["interval_s"]) == (None, None, None)
    look.fleet.route(TOKENS_LE, prompt=14, generated=6)
    second = look()
    assert second["tokens"] == TOKENS_LE
    assert (second["interval_s"], second["generated_per_s"], second["prompt_per_s"]) == (2.0, 3.0, 7.0)
    assert second["time_s"] == 1004.0
    assert (second["gap_p50_s"], second["gap_p99_s"], second["first_token_p50_s"]) == TIMES
    assert (second["is_serving"], second["live_requests"], second["away"]) == (True, 3, "")
    assert np.asarray(look()["tokens"]).sum() == 0


def test_the_placement_comes_when_it_is_new() -> None:
    look = Look()
    placement: Any = look()["placement"]
    assert (placement["epoch"], placement["shards"]) == (3, ["s0", "s1"])
    assert placement["replicas"] == [[[0, 1]] * 4] * 2
    assert placement["weights"][0] == [[192, 64], *[[EVEN_WEIGHT // 2] * 2] * 3]
    assert "placement" not in look()
    look.fleet.placement = replace(look.fleet.placement, epoch=4)
    assert look()["placement"]["epoch"] == 4
    assert look.picture.whole()["placement"]["epoch"] == 4  # type: ignore[index]  # JSON


def test_a_worker_that_left_makes_a_look_unknown_not_negative() -> None:
    look = Look()
    look.fleet.route(TOKENS_LE, generated=10)
    look()
    look.fleet.load_LE = np.zeros_like(look.fleet.load_LE)
    assert look()["tokens"] is None
    look.fleet.route(TOKENS_LE)
    assert look()["tokens"] == TOKENS_LE


def test_the_controller_away_leaves_what_was_seen_and_rates_unknown() -> None:
    look = Look()
    look()
    message = look.picture.away("gone", figures((1, 5.0, "fault", "lost")), wall_s=1003.0)
    assert message["away"] == "gone"
    assert (message["tokens"], message["generated_per_s"]) == (None, None)
    assert message["events"] == [{"id": "gateway-1", "time_s": 5.0, "kind": "fault", "text": "lost"}]
    whole: Any = look.picture.whole()
    assert whole["status"]["epoch"] == 3
    look.fleet.route(TOKENS_LE)
    back = look()
    assert (back["away"], back["tokens"]) == ("", None), "over how long they came is not known"
    assert look.picture.whole()["away"] == ""


def test_events_come_once_and_those_of_another_life_beside_them() -> None:
    look = Look()
    look.fleet.events = [(1, 10.0, "member", "ready"), (2, 11.0, "fault", "shard-1 is dead")]
    assert [event["id"] for event in look()["events"]] == ["controller-100-1", "controller-100-2"]
    assert look()["events"] == []
    look.fleet.life, look.fleet.events = 200, [(1, 20.0, "member", "found 2 shards")]
    look()  # asks by what it knew of the former life
    assert [event["id"] for event in look.picture.whole()["events"]][-1] == "controller-200-1"  # type: ignore[attr-defined]
    assert look.fleet.asked[-1] == (3, 2, 100)
    look()
    assert look.fleet.asked[-1] == (3, 1, 200)
    assert len(look.picture.whole()["events"]) == 3  # type: ignore[arg-type]  # a list


def test_after_a_pause_what_was_true_of_a_moment_is_forgotten_and_history_is_not() -> None:
    look = Look()
    look()
    look.picture.begin()
    whole: Any = look.picture.whole()
    assert "status" not in whole
    assert len(whole["history"]) == 1
    assert whole["model"]["name"] == MODEL.name
    look.fleet.route(TOKENS_LE)
    assert look()["tokens"] is None


def test_times_are_kept_while_they_are_wanted_and_for_the_window() -> None:
    now_s = [0.0]
    times = TokenTimes(lambda: now_s[0], window_s=10.0)
    times.add([9.0], [9.0])
    assert times.summary() == TimesSummary(None, None, None), "nobody wants to know"
    times.is_wanted = True
    times.add([0.5], [0.1] * 99)
    now_s[0] = 5.0
    times.add([1.5], [2.0])
    p50_s, p99_s, first_s = times.summary()
    assert (p50_s, first_s) == (0.1, 1.0)
    assert p99_s == pytest.approx(np.quantile([0.1] * 99 + [2.0], 0.99))
    now_s[0] = 12.0
    assert times.summary() == TimesSummary(2.0, 2.0, 1.5)
    times.is_wanted = False
    assert times.summary() == TimesSummary(None, None, None)
