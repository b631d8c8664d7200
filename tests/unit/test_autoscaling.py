"""The loop without a fleet: what it measures, when it asks the operator for what, and what it makes of the answers."""

import json
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.controller.autoscaling import Autoscaling
from expertmesh.actors.controller.measuring import Measuring
from expertmesh.actors.controller.queues import Backlog
from expertmesh.actors.links.ends import LinkEnd
from expertmesh.cluster.autoscaler import ShardTierSettings, WorkerTierSettings
from expertmesh.cluster.errors import CapacityError, ConflictError, InputError, UnavailableError
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.settings import AutoscaleSettings
from expertmesh.cluster.watchdog import Watchdog

PERIOD_S = 5.0
SETTINGS = AutoscaleSettings(
    period_s=PERIOD_S,
    shards=ShardTierSettings(min_count=1, max_count=6, up_delay_s=10, down_delay_s=20, cooldown_s=30),
    workers=WorkerTierSettings(min_count=1, max_count=3, up_delay_s=10, down_delay_s=20, cooldown_s=30),
)


class Fleet:
    """Members that are as busy as they are told to be, and an operator that does at once what it is asked."""

    def __init__(self, shards: int = 2, workers: int = 1) -> None:
        self.replicas, self.expert_bytes = 1, 100
        self.shards, self.workers = SimpleNamespace(facts={}), SimpleNamespace(facts={})
        self.operations: list[Operation] = []
        self.refusals: list[Exception] = []
        self.rolls_back = False
        self.busy, self.free_pages = 0.5, 60
        self.evacuations: Any = SimpleNamespace(surplus=frozenset())
        self._set(shards, workers)

    @property
    def current(self) -> Operation | None:
        return next((operation for operation in self.operations if not operation.is_over), None)

    def all(self) -> list[Operation]:
        return self.operations

    def scale(self, shards: int | None, workers: int | None) -> Operation:
        if self.refusals:
            raise self.refusals.pop(0)
        self.end(shards, workers)
        return self.operations[-1]

    def end(self, shards: int | None, workers: int | None) -> None:
        error = "no room" if self.rolls_back else ""
        self.operations.append(
            Operation(
                id=f"op-{len(self.operations)}", request=f"scale to {shards} and {workers}", adding=(), removing=(),
                phase=Phase.ROLLED_BACK if error else Phase.DONE, progress="", error=error,
                started_s=0, ended_s=1, deadline_s=1,
            )
        )  # fmt: skip
        if not error:
            self._set(shards or len(self.shard_ids), workers or len(self.worker_ids))

    def pass_time(self) -> None:
        for facts in self.shards.facts.values():
            self._count(facts, busy_s=self.busy * PERIOD_S, queue_s=0.001, num_packets=10)
        for facts in self.workers.facts.values():
            self._count(facts, busy_s=PERIOD_S, expert_s=0.4 * PERIOD_S, num_tokens=50)
            facts["free_pages"] = self.free_pages

    def _set(self, shards: int, workers: int) -> None:
        self.shard_ids, self.worker_ids = ([f"{n}-{i}" for i in range(c)] for n, c in (("s", shards), ("w", workers)))
        self.shards.facts = {s: self.shards.facts.get(s) or self._shard(s) for s in self.shard_ids}
        self.workers.facts = {w: self.workers.facts.get(w) or self._worker(w) for w in self.worker_ids}

    def _shard(self, name: str) -> dict[str, Any]:
        counters = {"at_s": 100.0, "busy_s": 0.0, "queue_s": 0.0, "num_packets": 0}
        end = LinkEnd(node="here")
        return {
            "id": name, "pid": 7, "state": "ready", "counters": counters, "link_end": end,
            "weight_bytes": 400, "free_bytes": 10_000,
        }  # fmt: skip

    def _worker(self, name: str) -> dict[str, Any]:
        counters = {"at_s": 100.0, "busy_s": 0.0, "expert_s": 0.0, "num_tokens": 0}
        return {
            "id": name, "pid": 8, "state": "ready", "counters": counters,
            "num_pages": 100, "free_pages": 60, "waiting": 0, "outstanding_tokens": 70,
        }  # fmt: skip

    def _count(self, facts: dict[str, Any], **grown: float) -> None:
        facts["counters"] = {
            name: value + {"at_s": PERIOD_S, **grown}[name] for name, value in facts["counters"].items()
        }


class Loop:
    def __init__(self, fleet: Fleet, settings: AutoscaleSettings = SETTINGS) -> None:
        self.fleet, self.now_s = fleet, 0.0
        model: Any = SimpleNamespace(moe_layers=(0, 1), num_slices=4)
        keeper: Any = fleet
        self.scaling = Autoscaling(keeper, keeper, settings, model, Watchdog())
        self.scaling.begin()
        with pytest.raises(UnavailableError):
            self.scaling.step(self.now_s)  # the first look

    def run(self, steps: int) -> list[str]:
        """Return what was asked for in these steps."""
        before = len(self.fleet.operations)
        for _ in range(steps):
            self.now_s += PERIOD_S
            self.fleet.pass_time()
            self.scaling.step(self.now_s)
        return [operation.request for operation in self.fleet.operations[before:]]

    @property
    def problem(self) -> str:
        status = self.scaling.status(self.now_s)
        assert status is not None
        return str(status["problem"])


def test_busy_shards_bring_more_and_calm_takes_them_again() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.busy = 0.95
    assert loop.run(3) == ["scale to 3 and None"]
    fleet.busy = 0.05
    assert loop.run(30) == ["scale to 2 and None", "scale to 1 and None"], "one at a time"


def test_a_full_worker_brings_another_and_both_tiers_are_asked_for_at_once() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.free_pages, fleet.busy = 2, 0.95
    assert loop.run(3) == ["scale to 3 and 2"]


def test_while_an_operation_runs_nothing_is_asked_for() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.busy = 0.95
    running = Operation(
        id="op-x", request="rebalance", adding=(), removing=(), phase=Phase.COMMIT, progress="", error="",
        started_s=0, ended_s=0, deadline_s=1,
    )  # fmt: skip
    fleet.operations = [running]
    assert loop.run(10) == []
    fleet.operations = []
    assert loop.run(1) == ["scale to 3 and None"]


def test_a_refusal_is_told_and_asked_again_after_the_cool_down() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.busy = 0.95
    fleet.refusals = [ConflictError("op-7 is under way"), CapacityError("too little memory")]
    assert loop.run(4) == []
    assert loop.problem == "op-7 is under way"
    assert loop.run(5) == []
    assert loop.problem == "too little memory"
    assert loop.run(6) == ["scale to 3 and None"]
    loop.run(1)
    assert loop.problem == ""


def test_a_tier_without_room_does_not_hold_up_the_other() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.free_pages, fleet.busy, fleet.rolls_back = 2, 0.95, True
    assert loop.run(4) == ["scale to 3 and 2"]
    assert loop.problem == "op-0 was rolled back: no room"
    assert loop.run(6) == ["scale to 3 and None"]
    fleet.rolls_back = False
    assert loop.run(1) == ["scale to None and 2"]


def test_what_others_scale_to_is_where_it_goes_on() -> None:
    fleet = Fleet(shards=4)
    loop = Loop(fleet)
    fleet.end(2, None)
    assert loop.run(20) == [], "a load of 1 fits two shards"
    fleet.end(5, None)
    assert loop.run(5) == [], "a cool-down comes first"
    assert loop.run(30) == ["scale to 4 and None"]


def test_processes_that_are_there_twice_for_a_move_are_counted_once() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    loop.run(1)
    # Two more than are wanted, and the one that may be leaving, would be taken for the decision of others.
    fleet.shards.facts |= {name: fleet._shard(name) for name in ("s-7", "s-8", "s-9")}
    fleet.evacuations.surplus = frozenset({"s-7", "s-8", "s-9"})
    assert loop.run(4) == []
    decision = loop.scaling._decision
    assert decision is not None
    assert (decision.shards, decision.inputs["shards"]["current"]) == (2, 2)


def test_a_move_off_a_node_is_no_decision_of_others() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    fleet.busy, fleet.refusals = 0.95, [ConflictError("op-7 is under way")]
    assert loop.run(4) == []
    fleet.operations.append(
        Operation(
            id="op-m", request="move s-0 off node n", adding=("s-7",), removing=("s-0",), phase=Phase.DONE, progress="",
            error="", started_s=0, ended_s=1, deadline_s=1, node="n",
        )
    )  # fmt: skip
    loop.run(1)
    decision = loop.scaling._decision
    assert decision is not None
    assert decision.shards == 3, "what it wants is still to come"


def test_numbers_out_of_its_bounds_are_refused() -> None:
    fleet = Fleet()
    fleet.replicas = 2
    scaling = Loop(fleet).scaling
    scaling.require_allowed(2, 3)
    scaling.require_allowed(None, None)
    for shards, workers, message in (
        (7, None, "7 shards; .* 2 to 6"),
        (1, 1, "1 shards"),
        (None, 4, "4 workers; .* 1 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            scaling.require_allowed(shards, workers)


def test_each_decision_is_logged_with_its_inputs_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    caplog.set_level(logging.INFO, "expertmesh")
    fleet.busy = 0.95
    loop.run(4)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "the first, and the one that changes something"
    record = json.loads(lines[-1].removeprefix("decision "))
    assert record["shards"] == {"wanted": 3, "there": 2}
    assert record["inputs"]["shards"]["busiest_utilisation"] == pytest.approx(0.95)
    assert record["reasons"][0].startswith("shards go from 2 to 3")
    assert "\n" not in lines[-1]
    loop.run(12)
    assert len(caplog.records) in (3, 4), "once a minute though nothing changes"


def test_status_tells_the_last_decision() -> None:
    fleet = Fleet()
    loop = Loop(fleet)
    assert loop.scaling.status(1.0) is None
    loop.run(1)
    status = loop.scaling.status(loop.now_s + 2)
    assert status is not None
    assert (status["shards"], status["workers"], status["age_s"], status["problem"]) == (2, 1, 2.0, "")
    assert len(status["reasons"]) == 2


def test_rates_are_of_the_members_own_time_and_survive_a_restart() -> None:
    fleet = Fleet()
    measuring = Measuring()
    with pytest.raises(UnavailableError, match="no shard"):
        measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=800)
    fleet.pass_time()
    restarted = fleet.shards.facts["s-1"]
    restarted["pid"] = 9
    restarted["counters"] = {"at_s": 400.0, "busy_s": 300.0, "queue_s": 0.0, "num_packets": 5}
    shards, workers = measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=800)
    assert (shards.current, shards.mean_utilisation) == (1, 0.5)
    assert shards.queue_s == pytest.approx(0.0001)
    assert shards.worker_wait_fraction == pytest.approx(0.4)
    assert (shards.needed_bytes, shards.shard_bytes) == (800, 10_400)
    assert (workers.current, workers.tokens_per_s, workers.outstanding_tokens) == (1, 10.0, 70)
    fleet.pass_time()
    shards, _ = measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=800)
    assert (shards.current, shards.shard_bytes) == (2, (10_000 + 800) // 2), "they share the node's memory"


def test_members_that_are_away_are_not_measured() -> None:
    fleet = Fleet()
    measuring = Measuring()
    with pytest.raises(UnavailableError):
        measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=0)
    fleet.pass_time()
    fleet.workers.facts["w-0"] = {**fleet.workers.facts["w-0"], "state": "unresponsive"}
    with pytest.raises(UnavailableError, match="no worker said"):
        measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=0)


def test_what_waits_at_gateways_is_work_of_the_workers() -> None:
    loop = Loop(Fleet())
    loop.fleet.pass_time()
    for gateway, backlog, told_s in (
        ("gone", Backlog(500, 500_000), -1.0),
        ("a", Backlog(9, 9_000), 0.0),
        ("a", Backlog(3, 3_000), 4.0),
        ("b", Backlog(4, 4_000), 4.5),
    ):
        loop.scaling.queues.hear(gateway, backlog, told_s)
    loop.scaling.step(5.0)
    decision = loop.scaling._decision
    assert decision is not None
    assert decision.inputs["workers"]["num_waiting"] == 7
    assert decision.inputs["workers"]["outstanding_tokens"] == 7_070


def test_the_speed_of_a_worker_is_remembered_while_none_works() -> None:
    fleet = Fleet()
    measuring = Measuring()
    with pytest.raises(UnavailableError):
        measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=0)
    for busy_s, tokens, expected in ((0.0, 0, 0.0), (2.0, 30, 15.0), (0.0, 0, 15.0)):
        fleet._count(fleet.shards.facts["s-0"], busy_s=9 * PERIOD_S, queue_s=0, num_packets=0)
        fleet._count(fleet.workers.facts["w-0"], busy_s=busy_s, expert_s=0, num_tokens=tokens)
        shards, workers = measuring.look(fleet.shards.facts, fleet.workers.facts, needed_bytes=0)
        assert workers.tokens_per_s == expected
        assert (shards.busiest_utilisation, shards.queue_s) == (1.0, 0.0), "a long computation ends in one look"


def test_the_loop_tells_the_watchdog_and_ends() -> None:
    watchdog, fleet = Watchdog(), Fleet()
    model: Any = SimpleNamespace(moe_layers=(0,), num_slices=4)
    keeper: Any = fleet
    scaling = Autoscaling(keeper, keeper, SETTINGS.model_copy(update={"period_s": 0.01}), model, watchdog)
    thread = threading.Thread(target=scaling.run)
    thread.start()
    deadline_s = time.monotonic() + 5
    while scaling.status(0.0) is None and time.monotonic() < deadline_s:
        fleet.pass_time()
        time.sleep(0.005)
    scaling.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert watchdog.report(time.monotonic())[0].last_success_s is not None
