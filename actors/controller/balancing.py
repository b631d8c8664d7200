"""The two loops that follow the load: when they look, and what they know then. What comes of it: load_following.py.

Both only propose; the keeper's thread carries out, and drops what was made for a placement that is no longer in force.
"""

import threading
import time
from collections.abc import Callable

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.balancer_types import BalancePlan
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.load_following import LoadFollower, Proposal, Seen, shard_facts
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

_log = EventLog(__name__)
_COLLECT_PERIOD_S = 1.0
# Ray sends a process's metrics to its node's agent each 10 s.
_REPORT_PERIOD_S = 5.0


class Balancing:
    """Loads in, proposals out. One thread runs `run`; any may call `plan`."""

    def __init__(
        self,
        keeper: Keeper,
        collector: LoadCollector,
        settings: ServeSettings,
        watchdog: Watchdog,
        report: Callable[[], None],
    ) -> None:
        """Watch a fleet; report: called now and then on the loops' thread, hands on what is known."""
        self._report = report
        self._keeper = keeper
        self._collector = collector
        self._settings = settings
        self._watchdog = watchdog
        self._follower = LoadFollower(
            replicas=settings.replicas, slow_s=collector.slow_s, can_move=settings.rebalance_period_s > 0
        )
        self._stopping = threading.Event()

    def run(self) -> None:
        """Collect and propose until `stop`."""
        settings = self._settings
        loops = {"load windows": (_COLLECT_PERIOD_S, self._collect), "metrics": (_REPORT_PERIOD_S, self._report)}
        if settings.weights_period_s:
            loops["dispatch weights"] = (settings.weights_period_s, lambda: self._look(self._follower.level))
        if settings.rebalance_period_s:
            loops["balancer"] = (settings.rebalance_period_s, lambda: self._look(self._follower.rebalance))
        due_s = dict.fromkeys(loops, 0.0)
        for name, (period_s, _) in loops.items():
            self._watchdog.expect(name, period_s)
            due_s[name] = time.monotonic() + period_s
        while not self._stopping.wait(max(0.0, min(due_s.values()) - time.monotonic())):
            name = min(due_s, key=lambda loop: due_s[loop])
            due_s[name] = time.monotonic() + loops[name][0]
            try:
                loops[name][1]()
                self._watchdog.success(name, time.monotonic())
            except Exception as error:  # noqa: BLE001  it is told and the loops go on
                if not isinstance(error, ExpertMeshError):
                    _log.tell("loop_failed", error, loop=name)
                self._watchdog.failure(name, time.monotonic(), str(error))

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def plan(self) -> BalancePlan:
        """Return what the balancer would do now.

        Raises:
            UnavailableError: nothing is served yet.
        """
        placement = self._keeper.placement
        if placement is None:
            raise UnavailableError("the deployment is still starting")
        return self._follower.plan(placement, self._see(placement))

    def _collect(self) -> None:
        self._collector.collect(time.time())

    def _look(self, decide: Callable[[Placement, Seen], Proposal | None]) -> None:
        placement = self._keeper.placement
        assert placement is not None, "the loops began before the fleet"
        if not self._keeper.is_calm:
            return
        proposal = decide(placement, self._see(placement))
        if proposal is not None:
            self._keeper.propose(proposal.placement, proposal.reason)

    def _see(self, placement: Placement) -> Seen:
        keeper, now_s = self._keeper, time.time()
        shards = [slots.shard for slots in placement.shards]  # without those that are away for long
        nodes = {shard: str(keeper.shards.facts.get(shard, {}).get("node", "")) for shard in shards}
        replicas, spare_slots = keeper.replicas, self._settings.spare_slots
        return Seen(
            fast=self._collector.fast(now_s),
            slow=self._collector.slow(now_s),
            expert_time_s=self._collector.expert_s,
            shards=shard_facts(placement, shards, nodes, replicas=replicas, spare_slots=spare_slots),
            expert_bytes=keeper.expert_bytes,
        )
