"""What the controller tells the live page, from a made-up fleet.

Shape suffixes: L layers, E experts, or slices of them.
"""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expertmesh.actors.controller.live_view import LiveView
from expertmesh.actors.recent_events import RecentEvents
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import initial_placement
from expertmesh.cluster.placement_lists import placement_fields
from tests.unit.gateway_fakes import MODEL

SHARDS = [ShardId("shard-0"), ShardId("shard-1")]
LOAD_LE = np.array([[8, 0, 4, 4], [0, 16, 0, 0]])


def operation(phase: Phase, **changed: Any) -> Operation:
    fields = {
        "id": "op-1", "request": "drain shard-1", "adding": (), "removing": ("shard-1",), "phase": phase,
        "progress": "", "error": "", "started_s": 5.0, "ended_s": 0.0, "deadline_s": 900.0,
    }  # fmt: skip
    return Operation(**{**fields, **changed})


class Fleet:
    def __init__(self, model: ModelInfo = MODEL) -> None:
        self.facts = {s: {"id": s, "state": "ready", "node": "here"} for s in SHARDS}
        self.worker = {"id": "worker-0", "state": "ready"}
        keeper: Any = SimpleNamespace(
            placement=initial_placement(model.moe_layers, model.num_slices, SHARDS, 1, epoch=7),
            shard_ids=SHARDS,
            worker_ids=[WorkerId("worker-0")],
            replicas=1,
            shards=SimpleNamespace(in_order=lambda: list(self.facts.values()), nodes=dict.fromkeys(SHARDS, "here")),
            workers=SimpleNamespace(in_order=lambda: [self.worker]),
        )
        self.keeper = keeper
        self.counters: list[dict[str, Any]] = [
            {
                "load_LE": LOAD_LE.repeat(model.expert_tp, axis=1),
                "decode_LE": LOAD_LE.repeat(model.expert_tp, axis=1) // 2,
            }
        ]
        collector: Any = SimpleNamespace(latest=lambda: self.counters)
        self.operations: list[Operation] = []
        operator: Any = SimpleNamespace(all=lambda: self.operations)
        log = RecentEvents(lambda: 1000.0)
        self.live = LiveView(model, self.keeper, collector, operator, spare_slots=0.25, events=log)

    def view(self, epoch: int = 0, after: int = 0, life: int = 0) -> dict[str, Any]:
        return self.live.view({"epoch": 7}, epoch, after, life)

    def events(self) -> list[tuple[str, str]]:
        return [(str(kind), text) for _, _, kind, text in self.view()["events"]]


@pytest.mark.parametrize("expert_tp", [1, 2])
def test_a_view_has_loads_of_whole_experts_and_slots_of_shards(expert_tp: int) -> None:
    fleet = Fleet(replace(MODEL, expert_tp=expert_tp))
    fleet.counters *= 2  # two workers
    view = fleet.view()
    assert view["load_LE"].tolist() == (2 * LOAD_LE).tolist()
    assert (view["computed_tokens"], view["decoded_tokens"]) == (2 * 16 // MODEL.top_k, 2 * 8 // MODEL.top_k)
    # 8 experts over two shards, and at least a spare slot in each of two layers.
    assert view["slots"] == dict.fromkeys(SHARDS, 4 * expert_tp + 2)
    assert (view["life"], view["status"]) == (os.getpid(), {"epoch": 7})


def test_the_placement_goes_to_who_does_not_have_it() -> None:
    fleet, life = Fleet(), os.getpid()
    assert fleet.view(epoch=6, life=life)["placement"] == placement_fields(fleet.keeper.placement)
    assert fleet.view(epoch=7, life=life)["placement"] is None
    assert fleet.view(epoch=7, life=life + 1)["placement"], "of a former life: it may be another of that number"
    fleet.keeper.placement = None
    view = fleet.view()
    assert (view["placement"], view["slots"]) == (None, {})


def test_before_any_worker_has_counted_there_is_no_load() -> None:
    fleet = Fleet()
    fleet.counters = []
    assert fleet.view()["load_LE"].tolist() == np.zeros_like(LOAD_LE).tolist()


def test_what_happens_is_told_in_words_once() -> None:
    fleet = Fleet()
    fleet.live.look()
    fleet.live.lost_link(WorkerId("worker-0"), SHARDS[1])
    fleet.facts[SHARDS[1]]["state"] = "dead"
    fleet.live.look()
    fleet.live.note("2 experts have no live replica; loading them on 1 shards")
    fleet.live.moved(0.5, "")
    fleet.keeper.placement = replace(fleet.keeper.placement, epoch=8)
    fleet.live.moved(0.25, "new dispatch weights")
    fleet.live.operation(operation(Phase.PREPARE, progress="starting shard-2"))
    fleet.live.operation(operation(Phase.ROLLED_BACK, error="no room"))
    assert fleet.events() == [
        ("link", "worker-0 lost its link to shard-1; its tokens go to other replicas"),
        ("fault", "shard-1 is dead; it is started again"),
        ("member", "2 experts have no live replica; loading them on 1 shards"),
        ("placement", "epoch 7 in force after 0.50 s"),
        ("weights", "epoch 8 in force after 0.25 s: new dispatch weights"),
        ("operation", "op-1, drain shard-1: PREPARE, starting shard-2"),
        ("fault", "op-1, drain shard-1: ROLLED_BACK, no room"),
    ]
    newest = fleet.view()["events"][-1][0]
    assert fleet.view(after=newest, life=os.getpid())["events"] == []
    assert len(fleet.view(after=newest, life=1)["events"]) == 7, "another life's numbers mean nothing"


def test_operations_of_a_former_life_are_remembered_with_their_times() -> None:
    fleet = Fleet()
    fleet.operations = [
        operation(Phase.DONE, id="op-0", ended_s=50.0),
        operation(Phase.COMMIT, started_s=70.0, progress="moving experts"),
    ]
    fleet.live.remember()
    assert [(time_s, text) for _, time_s, _, text in fleet.view()["events"]] == [
        (50.0, "op-0, drain shard-1: DONE"),
        (70.0, "op-1, drain shard-1: COMMIT, moving experts"),
    ]
    assert [facts["id"] for facts in fleet.view()["operations"]] == ["op-0", "op-1"]
