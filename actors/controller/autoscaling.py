"""The loop that has as many shards and workers as the load asks for: it measures, decides, and asks the operator.

Scaling down goes through the operator like any other operation, so it drains first. What others ask of the operator is
taken as decided, and the autoscaler goes on from there.
"""

import json
import math
import threading
import time
from typing import Any

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.measuring import Measuring
from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.controller.queues import GatewayQueues
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.autoscaler import Autoscaler, Decision
from expertmesh.cluster.errors import ExpertMeshError, InputError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.settings import AutoscaleSettings
from expertmesh.cluster.watchdog import Watchdog

_log = EventLog(__name__)
_NAME = "autoscaler"
# Members say nothing new while a round of the fleet moves experts, which may take a while.
_PATIENCE_S = 120.0
# Decisions that change nothing are logged this often.
_QUIET_S = 60.0


class Autoscaling:
    """Measurements in, operations out. One thread runs `run`; any may ask `status` and `require_allowed`."""

    def __init__(
        self, keeper: Keeper, operator: Operator, settings: AutoscaleSettings, model: ModelInfo, watchdog: Watchdog
    ) -> None:
        """Make an autoscaler that has decided nothing yet."""
        # Fewer shards than replicas would give up what the replicas are for.
        shards = settings.shards.model_copy(update={"min_count": max(settings.shards.min_count, keeper.replicas)})
        self._tiers = {"shards": shards, "workers": settings.workers}
        self._autoscaler = Autoscaler(shards, settings.workers)
        self._measuring = Measuring()
        self.queues = GatewayQueues()  # told by whoever hears from gateways
        self._keeper = keeper
        self._operator = operator
        self._period_s = settings.period_s
        self._retry_delay_s = max(shards.cooldown_s, settings.workers.cooldown_s)
        self._needed_slots = len(model.moe_layers) * model.num_slices * keeper.replicas
        self._watchdog = watchdog
        self._own_id = ""  # of the operation asked for last
        self._own_tiers: tuple[str, ...] = ()  # that it is to change
        self._noted_id = ""  # of the last operation whose end was noted
        self._failed_s: dict[str, float] = {}  # when what a tier wants could last not be had
        self._problem = ""
        self._decision: Decision | None = None
        self._decided_s = self._logged_s = -math.inf
        self._stopping = threading.Event()

    def run(self) -> None:
        """Decide until `stop`."""
        self.begin()
        self._watchdog.expect(_NAME, self._period_s, patience=max(5.0, _PATIENCE_S / self._period_s))
        while not self._stopping.wait(self._period_s):
            try:
                self.step(time.monotonic())
                self._watchdog.success(_NAME, time.monotonic())
            except Exception as error:  # noqa: BLE001  it is told and the loop goes on
                if not isinstance(error, ExpertMeshError):
                    _log.tell("loop_failed", error, loop=_NAME)
                self._watchdog.failure(_NAME, time.monotonic(), str(error))

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def begin(self) -> None:
        """Take what is there as decided."""
        self._noted_id = getattr(self._newest, "id", "")
        self._autoscaler.accept(*self._counts)

    def step(self, now_s: float) -> None:
        """Measure, decide, and ask for what is wanted if it is not there.

        Args:
            now_s: seconds of a clock that does not step back.

        Raises:
            UnavailableError: the fleet said nothing new since the last step, and nothing was decided.
        """
        keeper, is_free = self._keeper, self._operator.current is None
        if is_free:
            self._note_end(now_s)
        surplus = self._operator.evacuations.surplus
        inputs = self._measuring.look(
            {shard: facts for shard, facts in tuple(keeper.shards.facts.items()) if shard not in surplus},
            {worker: facts for worker, facts in tuple(keeper.workers.facts.items()) if worker not in surplus},
            needed_bytes=keeper.expert_bytes * self._needed_slots,
            backlog=self.queues.sum(now_s),
        )
        last, decision = self._decision, self._autoscaler.decide(now_s, *inputs)
        self._decision, self._decided_s = decision, now_s
        has_changed = last is None or (last.shards, last.workers) != (decision.shards, decision.workers)
        self._log_decision(decision, now_s, has_changed=has_changed)
        if is_free:
            self._ask_for(decision, now_s)

    def require_allowed(self, shards: int | None, workers: int | None) -> None:
        """Refuse numbers that the autoscaler would take back at once.

        Raises:
            InputError: one is out of its bounds.
        """
        for name, count in (("shards", shards), ("workers", workers)):
            tier = self._tiers[name]
            if count is not None and not tier.min_count <= count <= tier.max_count:
                raise InputError(
                    f"cannot scale to {count} {name}; the autoscaler keeps {tier.min_count} to {tier.max_count}"
                )

    def status(self, now_s: float) -> dict[str, Any] | None:
        """Return the fields of AutoscalerStatus; None before the first decision."""
        decision = self._decision
        if decision is None:
            return None
        return {
            "shards": decision.shards,
            "workers": decision.workers,
            "reasons": list(decision.reasons),
            "age_s": max(0.0, now_s - self._decided_s),
            "problem": self._problem,
        }

    @property
    def _counts(self) -> tuple[int, int]:
        """Shards and workers that there are to be."""
        return len(self._keeper.shard_ids), len(self._keeper.worker_ids)

    @property
    def _newest(self) -> Operation | None:
        # Moves off a node that is to end change no numbers.
        return next((operation for operation in reversed(self._operator.all()) if not operation.node), None)

    def _note_end(self, now_s: float) -> None:
        """Learn from the operation that ended last; there is one at a time."""
        newest = self._newest
        if newest is None or newest.id == self._noted_id:
            return
        self._noted_id = newest.id
        if newest.id != self._own_id:
            self._autoscaler.accept(*self._counts)
        elif newest.phase is Phase.ROLLED_BACK:
            self._put_off(now_s, f"{newest.id} was rolled back: {newest.error}")
        else:
            self._failed_s = {tier: s for tier, s in self._failed_s.items() if tier not in self._own_tiers}

    def _ask_for(self, decision: Decision, now_s: float) -> None:
        """Ask for both tiers at once, so that Ray sees the whole demand; one that failed is tried alone, after a while.

        So a tier for which there is no room does not hold up the other.
        """
        num_shards, num_workers = self._counts
        wanted = {"shards": (decision.shards, num_shards), "workers": (decision.workers, num_workers)}
        wanted = {tier: counts for tier, counts in wanted.items() if counts[0] != counts[1]}
        if not wanted:
            self._problem = ""
        failed_s = {tier: self._failed_s.get(tier, -math.inf) for tier in wanted}
        due = sorted((t for t in wanted if now_s >= failed_s[t] + self._retry_delay_s), key=lambda t: failed_s[t])
        if not due:
            return
        self._own_tiers = tuple(due) if all(failed_s[tier] == -math.inf for tier in due) else (due[0],)
        try:
            counts = {tier: wanted[tier][0] for tier in self._own_tiers}
            self._own_id = self._operator.scale(counts.get("shards"), counts.get("workers")).id
        except ExpertMeshError as error:
            self._put_off(now_s, str(error))

    def _put_off(self, now_s: float, problem: str) -> None:
        _log.tell("autoscale_put_off", delay_s=self._retry_delay_s, reason=problem)
        self._problem = problem
        self._failed_s.update(dict.fromkeys(self._own_tiers, now_s))

    def _log_decision(self, decision: Decision, now_s: float, *, has_changed: bool) -> None:
        is_due = has_changed or now_s >= self._logged_s + _QUIET_S
        if is_due:
            self._logged_s = now_s
        num_shards, num_workers = self._counts
        record = {
            "shards": {"wanted": decision.shards, "there": num_shards},
            "workers": {"wanted": decision.workers, "there": num_workers},
            "reasons": decision.reasons,
            "inputs": decision.inputs,
        }
        _log.tell("autoscale_decision" if is_due else "autoscale_look", decision=json.dumps(record))
