"""What the controller reports, from made-up facts. Shape suffixes: L layers, E experts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expertmesh.actors.controller.metrics import STATES, FleetMeter
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.hot_experts import hottest_LK
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import initial_placement
from expertmesh.cluster.watchdog import Watchdog
from tests.recorded_metrics import Recorded
from tests.unit.gateway_fakes import MODEL

SHARDS = [ShardId("shard-0"), ShardId("shard-1")]
PLACEMENT = initial_placement(MODEL.moe_layers, MODEL.num_experts, SHARDS, 1, epoch=7)
LOAD_LE = np.array([[8, 0, 4, 4], [0, 16, 0, 0]])
NONE = Load(np.zeros_like(LOAD_LE), np.zeros_like(LOAD_LE), 0.0)


def worker(pid: int = 30, **counted: float) -> dict[str, Any]:
    return {
        "id": "worker-0",
        "pid": pid,
        "state": "ready",
        "running": 3,
        "waiting": 2,
        "num_pages": 64,
        "free_pages": 60,
        "tokens_generated": 100,
        "dropped_pairs": 5,
        "counters": {"busy_s": 4.0, "expert_s": 3.0, "num_retries": 0, "num_lost_links": 0} | counted,
    }


def shard(copied: int = 0) -> dict[str, Any]:
    return {
        "id": "shard-0",
        "pid": 40,
        "state": "ready",
        "num_slots": 4,
        "weight_bytes": 4096,
        "experts_copied": copied,
        "experts_read": 4,
        "counters": {"busy_s": 1.5, "queue_s": 0.5, "num_packets": 9},
    }


def counters(load_LE: np.ndarray[Any, Any] = LOAD_LE, life: int = 30) -> dict[str, Any]:
    return {
        "id": "worker-0",
        "life": life,
        "load_LE": load_LE,
        "decode_LE": load_LE // 2,
        "dispatch_bytes_L": [100, 50],
        "combine_bytes_L": [10, 20],
    }


class Fleet:
    """A meter, and what it exported."""

    def __init__(self, model: ModelInfo = MODEL, hot_experts: int = 2) -> None:
        self.recorded = Recorded()
        self.meter = FleetMeter(
            model, hot_experts=hot_experts, metrics=self.recorded.metrics, wall_clock=lambda: 1000.0
        )

    def report(self, **fields: Any) -> Recorded:
        given: dict[str, Any] = {
            "shards": [shard()],
            "workers": [worker()],
            "counters": [counters()],
            "placement": PLACEMENT,
            "is_ready": True,
            "slow": Load(LOAD_LE, LOAD_LE, 300.0),
            "recent": NONE,
        }
        self.meter.report(**given | fields)
        return self.recorded


def test_members_and_what_they_said() -> None:
    recorded = Fleet().report(workers=[worker(num_retries=2, num_lost_links=1)])
    for name, value in (
        ("running_sequences", 3),
        ("waiting_sequences", 2),
        ("kv_pages", 64),
        ("kv_free_pages", 60),
        ("generated_tokens_total", 100),
        ("worker_busy_seconds_total", 4.0),
        ("worker_expert_seconds_total", 3.0),
        ("retries_total", 2),
        ("lost_links_total", 1),
        ("dropped_pairs_total", 5),
    ):
        assert recorded.value(name, worker="worker-0") == value, name
    for name, value in (
        ("shard_slots", 4),
        ("shard_weight_bytes", 4096),
        ("shard_packets_total", 9),
        ("shard_busy_seconds_total", 1.5),
        ("shard_queue_seconds_total", 0.5),
    ):
        assert recorded.value(name, shard="shard-0") == value, name
    assert recorded.value("replica_moves_total", shard="shard-0", source="checkpoint") == 4
    assert recorded.value("replica_moves_total", shard="shard-0", source="shard") == 0
    assert recorded.value("ready") == 1
    assert recorded.value("epoch") == 7
    assert len(recorded.series("members")) == 2 * len(STATES)
    assert recorded.value("members", tier="shard", state="ready") == 1


def test_a_member_that_is_gone_is_counted_and_has_said_nothing() -> None:
    gone = {"id": "shard-1", "state": "dead"}
    recorded = Fleet().report(shards=[gone], workers=[{"id": "worker-1", "state": "starting"}], is_ready=False)
    assert recorded.value("ready") == 0
    assert recorded.value("members", tier="shard", state="dead") == 1
    assert recorded.value("members", tier="shard", state="ready") == 0
    assert recorded.value("members", tier="worker", state="starting") == 1
    assert recorded.series("shard_slots") == recorded.series("kv_pages") == []


def test_tokens_and_bytes() -> None:
    recorded = Fleet().report()
    # Each token chooses two experts of a layer.
    assert recorded.value("computed_tokens_total", worker="worker-0", phase="prefill") == 4
    assert recorded.value("computed_tokens_total", worker="worker-0", phase="decode") == 4
    assert recorded.value("link_bytes_total", worker="worker-0", kind="dispatch") == 150
    assert recorded.value("link_bytes_total", worker="worker-0", kind="combine") == 30


def test_bytes_of_sliced_experts_are_reduced() -> None:
    sliced = replace(MODEL, num_experts=2, expert_tp=2)
    recorded = Fleet(sliced).report()
    assert recorded.value("link_bytes_total", worker="worker-0", kind="reduce") == 30
    assert recorded.value("computed_tokens_total", worker="worker-0", phase="decode") == 2
    assert [series["kind"] for series in recorded.series("link_bytes_total")] == ["dispatch", "reduce"]


def test_tokens_by_shard_add_up_and_outlive_a_worker() -> None:
    fleet = Fleet()
    expected_S = shard_load_LS(LOAD_LE, PLACEMENT).sum(axis=0)
    for told in (LOAD_LE, LOAD_LE, LOAD_LE // 2):  # the last was overtaken
        recorded = fleet.report(counters=[counters(told)])
        assert [recorded.value("shard_tokens_total", shard=s) for s in SHARDS] == expected_S.tolist()
    recorded = fleet.report(counters=[counters(LOAD_LE, life=31)])  # the worker was started again
    assert [recorded.value("shard_tokens_total", shard=s) for s in SHARDS] == (2 * expected_S).tolist()
    fleet.report(counters=[])
    recorded = fleet.report(counters=[counters(2 * LOAD_LE, life=31)])
    assert [recorded.value("shard_tokens_total", shard=s) for s in SHARDS] == (3 * expected_S).tolist()


def test_balancedness_of_each_window_that_has_a_load() -> None:
    recorded = Fleet().report()
    assert recorded.series("balancedness_ratio") == [{"window": "slow"}]
    expected = balancedness(shard_load_LS(2 * LOAD_LE, PLACEMENT))
    assert recorded.value("balancedness_ratio", window="slow") == pytest.approx(expected)


def test_changes_of_placement_are_told_once() -> None:
    fleet = Fleet()
    assert fleet.report().series("last_placement_change_timestamp_seconds") == []
    fleet.meter.placement_changed(2.5)
    for _ in range(2):
        recorded = fleet.report()
    assert recorded.observed["expertmesh_placement_change_seconds"] == [2.5]
    assert recorded.value("last_placement_change_timestamp_seconds") == 1000.0


@pytest.mark.parametrize("hot_experts", [0, 1, 3, 64])
def test_hot_experts_are_bounded_however_the_load_moves(hot_experts: int) -> None:
    fleet = Fleet(hot_experts=hot_experts)
    rng = np.random.default_rng(3)
    for _ in range(20):
        load_LE = rng.integers(0, 100, LOAD_LE.shape)
        recorded = fleet.report(slow=Load(load_LE, load_LE, 300.0))
    most = min(hot_experts, MODEL.num_experts) * len(MODEL.moe_layers)
    for name in ("hot_expert_index", "hot_expert_load_ratio"):
        assert len(recorded.series(name)) == most
    for row, layer in enumerate(MODEL.moe_layers):
        order_E = np.argsort(-load_LE[row], kind="stable").tolist()
        for rank in range(1, most // len(MODEL.moe_layers) + 1):
            labels = {"layer": str(layer), "rank": str(rank)}
            assert recorded.value("hot_expert_index", **labels) == order_E[rank - 1]
            ratio = load_LE[row, order_E[rank - 1]] / load_LE[row].mean()
            assert recorded.value("hot_expert_load_ratio", **labels) == pytest.approx(ratio)


def test_slices_of_an_expert_are_one_hot_expert() -> None:
    sliced = replace(MODEL, num_experts=2, expert_tp=2)
    load_LE = np.array([[1, 1, 9, 9], [5, 5, 0, 0]])
    recorded = Fleet(sliced).report(slow=Load(load_LE, load_LE, 300.0))
    assert [recorded.value("hot_expert_index", layer=layer, rank="1") for layer in ("0", "1")] == [1, 0]


def test_layers_without_load_have_no_hot_expert_of_any_size() -> None:
    index_LK, ratio_LK = hottest_LK(np.array([[0.0, 0.0], [1.0, 3.0]]), 1)
    assert index_LK.tolist() == [[0], [1]]
    assert ratio_LK.tolist() == [[0.0], [1.5]]


def test_loops() -> None:
    fleet, watchdog = Fleet(), Watchdog()
    watchdog.expect("balancer", 30.0)
    fleet.meter.report_loops(watchdog, 1000.0)
    assert fleet.recorded.value("loop_stalled", loop="balancer") == 0
    fleet.meter.report_loops(watchdog, 1151.0)
    assert fleet.recorded.value("loop_stalled", loop="balancer") == 1
    assert fleet.recorded.value("loop_last_success_age_seconds", loop="balancer") == 151.0
