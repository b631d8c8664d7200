"""Keeps the fleet as it should be: every expert hosted on a live shard, every worker in the newest placement.

One thread runs `round` now and then, and at once when a worker reports a broken link. A round looks at what is there
and takes the next step towards what should be; one that fails, at whatever point, is followed by another that begins
from what it left.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from expertmesh.actors.controller.mover import Mover
from expertmesh.actors.controller.records import FleetRecords
from expertmesh.actors.controller.reviver import Reviver
from expertmesh.actors.controller.tiers import Tier, natural, wait_for
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.runtime import Room
from expertmesh.cluster.attendance import given_up, is_settled, still_away
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.evacuation import succeeded
from expertmesh.cluster.ids import ExpertKey, ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement
from expertmesh.cluster.repair import repair
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

_log = EventLog(__name__)
_PERIOD_S = 0.5
# A round that moves experts may take a while.
_PATIENCE_ROUNDS = 120.0
# An answer takes milliseconds; a shard that is silent for longer after a worker lost it counts as away for now.
_ASK_TIMEOUT_S = 5.0
_ALARM_TIMEOUT_S = 1.0


class Keeper:
    """The shards, the workers, and the placement in force. One thread at a time calls `bring_up` and `round`."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ModelInfo,
        records: FleetRecords,
        shards: Tier[ShardId],
        workers: Tier[WorkerId],
        note: Callable[[str], None],
        watchdog: Watchdog,
    ) -> None:
        self._settings = settings
        self._model = model
        self._records = records
        self.shards = shards
        self.workers = workers
        self._note = note
        self._watchdog = watchdog
        self.placement: Placement | None = None
        # Who is to be there. Others that are there are starting or leaving.
        self.shard_ids: list[ShardId] = []
        self.worker_ids: list[WorkerId] = []
        self.each_round: Callable[[], None] = lambda: None
        # Who is not to be started again when dead: a successor is being started.
        self.succeeded: Callable[[], frozenset[str]] = frozenset
        # Told how many seconds each change of placement took, and why the load asked for it, if it did.
        self.on_moved: Callable[[float, str], None] = lambda _duration_s, _why: None
        # Told that the members have just been asked.
        self.on_asked: Callable[[], None] = lambda: None
        self._proposal: tuple[Placement, str] | None = None
        self._alarm = threading.Event()
        self._lost = threading.Event()
        self._reviver = Reviver(self.start_member, self._is_member, self._log_and_look)
        self._away_since_s: dict[str, float] = {}
        self._said_away: frozenset[str] = frozenset()
        self._stopping = threading.Event()
        self._mover = Mover(shards, workers, settings.start_timeout_s)

    def bring_up(self, shard_ids: list[ShardId], worker_ids: list[WorkerId]) -> None:
        """Start what is not there, put a placement in force and let the workers serve. Again: nothing changes.

        Raises:
            ExpertMeshError: the first thing that went wrong.
        """
        timeout_s = self._settings.start_timeout_s
        self.shard_ids, self.worker_ids = self._records.members() or (shard_ids, worker_ids)
        self.shards.create_members(self.shard_ids)
        self.workers.create_members(self.worker_ids)
        self._note("opening the checkpoint in the shards, loading the dense half into the workers")
        wait_for(
            [s.open.remote() for s in self.shards.handles.values()]
            + [w.load.remote() for w in self.workers.handles.values()],
            timeout_s,
        )
        self.ask(timeout_s)
        placement = self._records.placement(self.shard_ids, 0) or self._first()
        self._note(f"loading experts into the shards, joining workers and shards, epoch {placement.epoch}")
        self._move_to(placement, urgent=True)
        wait_for([w.start.remote() for w in self.workers.handles.values()], timeout_s)
        self.ask(_ASK_TIMEOUT_S)

    def take_up(self, shard_ids: list[ShardId], worker_ids: list[WorkerId]) -> None:
        """Go on with a fleet that a former controller left. Whoever is gone or silent is seen to by the rounds.

        Args:
            shard_ids: shards that are to be there if the store does not know; those that are there stay in any case.
            worker_ids: likewise.
        """
        self.shard_ids, self.worker_ids = self._records.members() or (
            sorted({*shard_ids, *self.shards.named("shard-")}, key=natural),
            sorted({*worker_ids, *self.workers.named("worker-")}, key=natural),
        )
        for shard in self.shard_ids:
            self.shards.find_again(shard)
        for worker in self.worker_ids:
            self.workers.find_again(worker)
        self.ask(_ASK_TIMEOUT_S)
        newest_epoch = self._newest_epoch()
        stored = self._records.placement(self.shard_ids, newest_epoch)
        self.placement = stored or self._hosted(newest_epoch) or self._first()
        self._note(f"found {len(self.shards.ready)} shards and {len(self.workers.ready)} workers")
        self._mover.publish(self.placement, behind_only=True)

    def run(self) -> None:
        """Do rounds until `stop`."""
        self._watchdog.expect("fleet's rounds", _PERIOD_S, patience=_PATIENCE_ROUNDS)
        while not self._stopping.is_set():
            self._alarm.wait(_PERIOD_S)
            self._alarm.clear()
            ask_timeout_s = _ALARM_TIMEOUT_S if self._lost.is_set() else _ASK_TIMEOUT_S
            self._lost.clear()
            try:
                self.round(ask_timeout_s)
                self._watchdog.success("fleet's rounds", time.monotonic())
            except ExpertMeshError as error:
                self._watchdog.failure("fleet's rounds", time.monotonic(), str(error))
                _log.tell("round_put_off", delay_s=_PERIOD_S, reason=reason_of(error))
            except Exception as error:  # noqa: BLE001  whatever went wrong is told, and the keeper goes on
                self._watchdog.failure("fleet's rounds", time.monotonic(), repr(error))
                _log.tell("round_failed", error, delay_s=_PERIOD_S)

    def alarm(self) -> None:
        """Have a round now: there is something to do."""
        self._alarm.set()

    def report_lost(self) -> None:
        """Have a round now, and give up a move under way: a worker lost a shard."""
        self._lost.set()
        self._alarm.set()

    def stop(self) -> None:
        """End `run` after the round under way."""
        self._stopping.set()
        self._alarm.set()

    def round(self, ask_timeout_s: float) -> None:
        """Look, and do what is most urgent.

        Raises:
            ExpertMeshError: a step could not be done now.
        """
        assert self.placement is not None, "round() before bring_up()"
        self.ask(ask_timeout_s)
        live, hosting = [s for s in self.shards.ready if s in self.shard_ids], self._hosting
        self._call_the_roll(hosting)
        self._records.keep(self.placement, (self.shard_ids, self.worker_ids))
        missing = self.placement.missing(hosting)
        if missing and hosting:
            self._note(f"{len(missing)} experts have no live replica; loading them on {len(hosting)} shards")
            self._move_to(repair(self.placement, hosting, {}, replicas=1, level=False), urgent=True)
        for tier in (self.shards, self.workers):
            self._reviver.begin(tier, self.succeeded())
        placed = {slots.shard for slots in self.placement.shards}
        if live and not placed == set(live) == set(hosting) and not self._reviver.may_be_soon_done:
            held, nodes = {shard: self._keys_of(shard) for shard in live}, self.shards.nodes
            self._note(f"spreading the experts over {len(live)} shards")
            self._move_to(repair(self.placement, live, held, replicas=self.replicas, level=True, nodes=nodes))
        self._mover.publish(self.placement, behind_only=True)
        self.each_round()
        proposal, self._proposal = self._proposal, None
        if proposal is not None and self.is_calm and proposal[0].epoch == self.placement.epoch + 1:
            _log.tell("fleet_progress", line=f"epoch {proposal[0].epoch}: {proposal[1]}")
            self._move_to(proposal[0], why=proposal[1])

    @property
    def is_calm(self) -> bool:
        """Whether all shards that are to be there host what the placement says, and none is being started.

        Those that have been away for too long are not counted (cluster/attendance.py).
        """
        return self._is_settled(given_up(self._away_since_s, time.monotonic(), self._settings.absence_s))

    def _is_settled(self, absent: frozenset[str]) -> bool:
        assert self.placement is not None, "asked before bring_up()"
        return is_settled(
            shards=self.shard_ids,
            placed=[slots.shard for slots in self.placement.shards],
            hosting=self._hosting,
            starting=self._reviver.starting,
            absent=absent,
        )

    def _call_the_roll(self, hosting: list[ShardId]) -> None:
        """Note who is away, and say so once it is for good."""
        now_s, absence_s = time.monotonic(), self._settings.absence_s
        before, there = self._away_since_s, {*hosting, *self.workers.ready}
        self._away_since_s = still_away(before, [*self.shard_ids, *self.worker_ids], there, now_s)
        for member in sorted(given_up(self._away_since_s, now_s, absence_s) - self._said_away, key=natural):
            self._note(f"{member} has been away for {absence_s:g} s; the others are balanced without it")
        self._said_away = given_up(self._away_since_s, now_s, absence_s)

    def propose(self, target: Placement, reason: str) -> None:
        """Have the next round go to a placement, if it still follows the one in force. Any thread."""
        _log.tell("placement_proposed", epoch=target.epoch, reason=reason)
        self._proposal = target, reason
        self._alarm.set()

    def adopt(self, target: Placement) -> None:
        """Go to a placement now. Keeper's thread.

        Raises:
            ExpertMeshError: it could not be reached; the old one stays in force.
        """
        if not self._is_settled(frozenset()):
            raise UnavailableError("shards are being started or left out; ask again when `status` shows all ready")
        self._move_to(target)

    def ask(self, timeout_s: float) -> None:
        """Ask shards and workers how they are."""
        self.shards.ask(timeout_s)
        self.workers.ask(timeout_s)
        self.on_asked()

    @property
    def replicas(self) -> int:
        """Replicas that each expert is to have, as far as there are shards."""
        return self._settings.replicas

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights; 0 while no shard has any."""
        loaded = [facts for facts in tuple(self.shards.facts.values()) if facts.get("num_slots")]
        return max((facts["weight_bytes"] // facts["num_slots"] for facts in loaded), default=0)

    def start_member(self, member: ShardId | WorkerId, room: Room | None = None) -> None:
        """Start a shard without experts, or a worker in the placement in force; either is ready afterwards.

        Args:
            member: its name.
            room: how long it may wait for room; None: as the settings say.

        Raises:
            ExpertMeshError: it could not be started.
        """
        timeout_s = self._settings.start_timeout_s
        tier = self._tier(member)
        tier.facts[member] = {"id": member, "state": "starting"}
        handle = tier.create(member, behind_traffic=True, room=room)
        if tier is self.shards:
            wait_for([handle.open.remote()], timeout_s)
        else:
            wait_for([handle.load.remote()], timeout_s)
            placement = self.placement
            assert placement is not None, "start_member() before bring_up()"
            peers = self._mover.peers([slots.shard for slots in placement.shards])
            wait_for([handle.set_fleet.remote(placement.to_bytes(), peers)], timeout_s)
            wait_for([handle.start.remote()], timeout_s)
        tier.admit(member, handle)
        tier.facts[member] = wait_for([handle.describe.remote()], timeout_s)[0]

    def end_member(self, member: ShardId | WorkerId) -> None:
        """End a shard or worker, or what is left of it."""
        self._tier(member).dismiss(member)

    def change_members(self, shards: list[ShardId], workers: list[WorkerId]) -> None:
        """Have other members from now on: experts move to the shards, and who leaves may be ended afterwards.

        Raises:
            ExpertMeshError: experts could not be moved; nothing has changed.
        """
        assert self.placement is not None, "change_members() before bring_up()"
        if shards != self.shard_ids:
            away = sorted(set(shards) - set(self.shards.ready))
            if away:
                raise UnavailableError(f"{', '.join(away)} cannot take experts now")
            held, nodes = {shard: self._keys_of(shard) for shard in shards}, self.shards.nodes
            self._move_to(repair(self.placement, shards, held, replicas=self.replicas, level=True, nodes=nodes))
        self.shard_ids, self.worker_ids = shards, workers
        self._save()

    def replace_members(self, successors: Mapping[str, str]) -> None:
        """Have others in the place of some members: they take over what those have, which may be ended afterwards.

        Args:
            successors: by member; all are ready.

        Raises:
            ExpertMeshError: experts could not be moved; nothing has changed.
        """
        assert self.placement is not None, "replace_members() before bring_up()"
        shards = [ShardId(successors.get(shard, shard)) for shard in self.shard_ids]
        if shards != self.shard_ids:
            live = [shard for shard in shards if shard in self.shards.ready]
            # While one is away that may come back, no more is moved than must be.
            whole = len(live) == len(shards)
            current = succeeded(self.placement, successors)
            placed = {slots.shard for slots in current.shards}
            held, nodes = {shard: self._keys_of(shard) for shard in live if shard not in placed}, self.shards.nodes
            replicas = self.replicas if whole else 1
            self._move_to(repair(current, live, held, replicas=replicas, level=whole, nodes=nodes))
        self.shard_ids = shards
        self.worker_ids = [WorkerId(successors.get(worker, worker)) for worker in self.worker_ids]
        self._save()

    def not_ready_reason(self) -> str:
        """Say why requests cannot be served now; "" when they can."""
        if self.placement is None:
            return "starting"
        ready = self.workers.ready  # what one that is cut off has lost is no reason
        lost = {shard for worker in ready for shard in self.workers.facts.get(worker, {}).get("lost_shards", ())}
        missing = self.placement.missing(set(self._hosting) - lost)
        if missing:
            return f"{len(missing)} experts have no live replica, {missing[0]} among them"
        if not ready:
            return "no attention worker is ready"
        return ""

    @property
    def _hosting(self) -> list[ShardId]:
        """The ready members that have what a placement gave them; a new process has nothing yet."""
        return [s for s in self.shards.ready if s in self.shard_ids and self.shards.facts[s]["epoch"]]

    def _move_to(self, target: Placement, *, urgent: bool = False, why: str = "") -> None:
        """Bring what the target adds to the shards, publish it, and only then free what it drops.

        Args:
            target: the placement to go to.
            urgent: requests wait for it; else those that are served meanwhile come first.
            why: what of the load asks for it.

        Raises:
            ExpertMeshError: a shard could not take experts, or one was lost meanwhile; the old placement stays in
                force.
        """
        hosting, began_s = self._hosting, time.monotonic()
        try:
            self._mover.bring(self.placement, target, hosting, give_up=None if urgent else self._lost)
        except ExpertMeshError:
            if self.placement is not None:
                self._mover.settle(self.placement, hosting)
            raise
        self.placement = target
        self._save()
        self._mover.publish(target)
        self._mover.settle(target, [slots.shard for slots in target.shards])
        duration_s = time.monotonic() - began_s
        _log.tell("placement_changed", epoch=target.epoch, duration_s=duration_s, urgent=urgent, reason=why)
        self.on_moved(duration_s, why)
        self.ask(_ALARM_TIMEOUT_S)

    def _is_member(self, member: ShardId | WorkerId) -> bool:
        return member in self.shard_ids or member in self.worker_ids

    def _log_and_look(self, line: str) -> None:
        _log.tell("fleet_progress", line=line)
        self._alarm.set()

    def _tier(self, member: str) -> Any:
        return self.workers if member.startswith("worker-") else self.shards

    def _hosted(self, newest_epoch: int) -> Placement | None:
        """Return the placement that the shards which answer make up, if they host anything: the store lost it."""
        slots = tuple(ShardSlots(shard=shard, experts=tuple(sorted(self._keys_of(shard)))) for shard in self._hosting)
        if not any(each.experts for each in slots):
            return None
        return Placement(
            epoch=1 + newest_epoch,
            num_experts=self._model.num_slices,
            layers=self._model.moe_layers,
            shards=slots,
        )

    def _first(self) -> Placement:
        model, shards, nodes = self._model, self.shard_ids, self.shards.nodes
        replicas, epoch = min(self.replicas, len(shards)), 1 + self._newest_epoch()
        return initial_placement(model.moe_layers, model.num_slices, shards, replicas, epoch=epoch, nodes=nodes)

    def _newest_epoch(self) -> int:
        known = (*self.workers.facts.values(), *self.shards.facts.values())
        return max((facts.get("epoch", 0) for facts in known), default=0)

    def _keys_of(self, shard: ShardId) -> frozenset[ExpertKey]:
        keys: frozenset[ExpertKey] = wait_for([self.shards.handles[shard].hosted.remote()], _ASK_TIMEOUT_S)[0]
        return keys

    def _save(self) -> None:
        assert self.placement is not None
        self._records.save(self.placement, (self.shard_ids, self.worker_ids))
