"""Keeps the fleet as it should be: every expert hosted on a live shard, every worker in the newest placement.

One thread runs `round` now and then, and at once when a worker reports a broken link. A round looks at what is there
and takes the next step towards what should be; one that fails, at whatever point, is followed by another that begins
from what it left.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from expertmesh.actors.controller.tiers import Tier, wait_for
from expertmesh.actors.state import StateStore
from expertmesh.actors.worker.link_keeper import ShardPeer
from expertmesh.cluster.errors import ExpertMeshError, StateError, UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement
from expertmesh.cluster.repair import repair
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

_log = logging.getLogger(__name__)
_PERIOD_S = 0.5
# A round that moves experts may take a while.
_PATIENCE_ROUNDS = 120.0
# An answer takes milliseconds; a shard that is silent for longer after a worker lost it counts as away for now.
_ASK_TIMEOUT_S = 5.0
_ALARM_TIMEOUT_S = 1.0
_PUBLISH_TIMEOUT_S = 10.0
# A Redis that was emptied gets its records back after at most this.
_CHECK_PERIOD_S = 5.0


class Keeper:
    """The shards, the workers, and the placement in force. One thread at a time calls `bring_up` and `round`."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ModelInfo,
        store: StateStore,
        shards: Tier[ShardId],
        workers: Tier[WorkerId],
        note: Callable[[str], None],
        watchdog: Watchdog,
    ) -> None:
        self._settings = settings
        self._model = model
        self._store = store
        self.shards = shards
        self.workers = workers
        self._note = note
        self._watchdog = watchdog
        self.placement: Placement | None = None
        # Who is to be there. Others that are there are starting or leaving.
        self.shard_ids: list[ShardId] = []
        self.worker_ids: list[WorkerId] = []
        self.each_round: Callable[[], None] = lambda: None
        # Brings the store back if it is ours to do so; says whether it had to.
        self.ensure_store: Callable[[], bool] = lambda: False
        self._checked_s = 0.0
        self._proposal: tuple[Placement, str] | None = None
        self._is_saved = False
        self._reviving: set[ShardId | WorkerId] = set()
        self._alarm = threading.Event()
        self._stopping = threading.Event()

    def bring_up(self, shard_ids: list[ShardId], worker_ids: list[WorkerId]) -> None:
        """Start what is not there, put a placement in force and let the workers serve. Again: nothing changes.

        Args:
            shard_ids: the shards, unless the store knows of others.
            worker_ids: the workers, unless the store knows of others.

        Raises:
            ExpertMeshError: the first thing that went wrong.
        """
        timeout_s = self._settings.start_timeout_s
        self.shard_ids, self.worker_ids = self._stored_members() or (shard_ids, worker_ids)
        self.shards.create_members(self.shard_ids)
        self.workers.create_members(self.worker_ids)
        self._note("opening the checkpoint in the shards, loading the dense half into the workers")
        wait_for(
            [s.open.remote() for s in self.shards.handles.values()]
            + [w.load.remote() for w in self.workers.handles.values()],
            timeout_s,
        )
        self.ask(timeout_s)
        placement = self._stored() or self._hosted() or self._first()
        self._note(f"loading experts into the shards, joining workers and shards, epoch {placement.epoch}")
        self._move_to(placement)
        wait_for([w.start.remote() for w in self.workers.handles.values()], timeout_s)
        self.ask(_ASK_TIMEOUT_S)

    def run(self) -> None:
        """Do rounds until `stop`."""
        self._watchdog.expect("fleet's rounds", _PERIOD_S, patience=_PATIENCE_ROUNDS)
        while not self._stopping.is_set():
            alarmed = self._alarm.wait(_PERIOD_S)
            self._alarm.clear()
            try:
                self.round(_ALARM_TIMEOUT_S if alarmed else _ASK_TIMEOUT_S)
                self._watchdog.success("fleet's rounds", time.monotonic())
            except ExpertMeshError as error:
                self._watchdog.failure("fleet's rounds", time.monotonic(), str(error))
                _log.warning("a round failed; the next is in %.1f s: %s", _PERIOD_S, error)
            except Exception as error:  # noqa: BLE001  whatever went wrong is told, and the keeper goes on
                self._watchdog.failure("fleet's rounds", time.monotonic(), repr(error))
                _log.exception("a round failed; the next is in %.1f s", _PERIOD_S)

    def alarm(self) -> None:
        """Have a round now: a worker lost a shard."""
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
        self._keep_saved()
        missing = self.placement.missing(hosting)
        if missing and hosting:
            self._note(f"{len(missing)} experts have no live replica; loading them on {len(hosting)} shards")
            self._move_to(repair(self.placement, hosting, {}, replicas=1, level=False))
        self._revive_dead()
        if not self._reviving and live and not {s.shard for s in self.placement.shards} == set(live) == set(hosting):
            held, nodes = {shard: self._keys_of(shard) for shard in live}, self.shards.nodes
            self._note(f"spreading the experts over {len(live)} shards")
            self._move_to(repair(self.placement, live, held, replicas=self.replicas, level=True, nodes=nodes))
        self._publish(self.placement, behind_only=True)
        self.each_round()
        proposal, self._proposal = self._proposal, None
        if proposal is not None and self.is_calm and proposal[0].epoch == self.placement.epoch + 1:
            self._note(f"epoch {proposal[0].epoch}: {proposal[1]}")
            self._move_to(proposal[0])

    @property
    def is_calm(self) -> bool:
        """Whether all shards that are to be there host what the placement says, and none is being started."""
        assert self.placement is not None, "asked before bring_up()"
        hosting = set(self._hosting)
        return not self._reviving and hosting == set(self.shard_ids) == {s.shard for s in self.placement.shards}

    def propose(self, target: Placement, reason: str) -> None:
        """Have the next round go to a placement, if it still follows the one in force. Any thread."""
        self._proposal = target, reason
        self._alarm.set()

    def adopt(self, target: Placement) -> None:
        """Go to a placement now. Keeper's thread.

        Raises:
            ExpertMeshError: it could not be reached; the old one stays in force.
        """
        if not self.is_calm:
            raise UnavailableError("shards are being started or left out; ask again when `status` shows all ready")
        self._move_to(target)

    def ask(self, timeout_s: float) -> None:
        """Ask shards and workers how they are."""
        self.shards.ask(timeout_s)
        self.workers.ask(timeout_s)

    @property
    def replicas(self) -> int:
        """Replicas that each expert is to have, as far as there are shards."""
        return self._settings.replicas

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights; 0 while no shard has any."""
        loaded = [facts for facts in tuple(self.shards.facts.values()) if facts.get("num_slots")]
        return max((facts["weight_bytes"] // facts["num_slots"] for facts in loaded), default=0)

    def start_member(self, member: ShardId | WorkerId) -> None:
        """Start a shard without experts, or a worker in the placement in force; either is ready afterwards.

        Raises:
            ExpertMeshError: it could not be started.
        """
        timeout_s = self._settings.start_timeout_s
        tier = self._tier(member)
        tier.facts[member] = {"id": member, "state": "starting"}
        handle = tier.create(member)
        if tier is self.shards:
            wait_for([handle.open.remote()], timeout_s)
        else:
            wait_for([handle.load.remote()], timeout_s)
            placement = self.placement
            assert placement is not None, "start_member() before bring_up()"
            peers = self._peers([slots.shard for slots in placement.shards])
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

    def not_ready_reason(self) -> str:
        """Say why requests cannot be served now; "" when they can."""
        if self.placement is None:
            return "starting"
        lost = {shard for facts in self.workers.facts.values() for shard in facts.get("lost_shards", ())}
        missing = self.placement.missing(set(self._hosting) - lost)
        if missing:
            return f"{len(missing)} experts have no live replica, {missing[0]} among them"
        if not self.workers.ready:
            return "no attention worker is ready"
        return ""

    @property
    def _hosting(self) -> list[ShardId]:
        """The ready members that have what a placement gave them; a new process has nothing yet."""
        return [s for s in self.shards.ready if s in self.shard_ids and self.shards.facts[s]["epoch"]]

    def _move_to(self, target: Placement) -> None:
        """Load what the target adds, publish it, and only then free what it drops.

        Raises:
            ExpertMeshError: a shard could not load, or is gone; the old placement stays in force.
        """
        timeout_s = self._settings.start_timeout_s
        experts = {slots.shard: slots.experts for slots in target.shards}
        wait_for([self.shards.handles[s].host.remote(keys) for s, keys in experts.items()], timeout_s)
        # Joined before they are needed, so that no step waits for a link to be formed.
        peers = self._peers([slots.shard for slots in target.shards])
        workers = list(self.workers.handles.values())
        _try_all([w.join.remote(peers) for w in workers], _PUBLISH_TIMEOUT_S)
        self.placement = target
        self._save()
        self._publish(target, behind_only=False)
        _try_all([self.shards.handles[s].settle.remote(keys, target.epoch) for s, keys in experts.items()], timeout_s)
        self.ask(_ALARM_TIMEOUT_S)

    def _publish(self, placement: Placement, *, behind_only: bool) -> None:
        """Tell the workers. One that cannot be told now is told by a later round."""
        record, peers = placement.to_bytes(), self._peers([slots.shard for slots in placement.shards])
        told = [
            handle.set_fleet.remote(record, peers)
            for worker, handle in self.workers.handles.items()
            if not behind_only
            or (
                self.workers.facts[worker]["state"] == "ready" and self.workers.facts[worker]["epoch"] < placement.epoch
            )
        ]
        _try_all(told, _PUBLISH_TIMEOUT_S)

    def _peers(self, shards: list[ShardId]) -> dict[ShardId, ShardPeer]:
        """Return how to reach those that are there."""
        return {
            shard: ShardPeer(
                life=str(self.shards.facts[shard]["pid"]),
                handle=self.shards.handles[shard],
                end=self.shards.facts[shard]["link_end"],
            )
            for shard in shards
            if shard in self.shards.handles and "link_end" in self.shards.facts[shard]
        }

    def _revive_dead(self) -> None:
        """Begin to replace processes that are gone, each on a thread of its own."""
        for tier in (self.shards, self.workers):
            for actor_id in tier.dead:
                is_member = actor_id in self.shard_ids or actor_id in self.worker_ids
                if is_member and actor_id not in self._reviving:
                    self._reviving.add(actor_id)
                    self._note(f"{actor_id} is gone; starting it again")
                    threading.Thread(target=self._revive, args=(tier, actor_id), name=f"revive {actor_id}").start()

    def _revive(self, tier: Any, actor_id: Any) -> None:
        try:
            tier.dismiss(actor_id)
            self.start_member(actor_id)
            self._note(f"{actor_id} is back")
        except ExpertMeshError as error:
            _log.warning("%s could not be started again: %s", actor_id, error)
            tier.facts[actor_id] = {"id": actor_id, "state": "dead"}
        finally:
            self._reviving.discard(actor_id)
            self._alarm.set()

    def _tier(self, member: str) -> Any:
        return self.workers if member.startswith("worker-") else self.shards

    def _stored_members(self) -> tuple[list[ShardId], list[WorkerId]] | None:
        try:
            return self._store.load_members()
        except (StateError, UnavailableError) as error:
            _log.warning("the stored members cannot be used: %s", error)
            return None

    def _stored(self) -> Placement | None:
        """Return the placement in the store if it is of this model."""
        try:
            stored = self._store.load_placement()
        except (StateError, UnavailableError) as error:
            _log.warning("the stored placement cannot be used: %s", error)
            return None
        if stored is None:
            return None
        fits = stored.layers == self._model.moe_layers and stored.num_experts == self._model.num_experts
        shards = {slots.shard for slots in stored.shards}
        return stored if fits and shards <= set(self.shards.handles) else None

    def _hosted(self) -> Placement | None:
        """Return the placement that the shards themselves make up, if they hold every expert: the store lost it."""
        slots = tuple(
            ShardSlots(shard=shard, experts=tuple(sorted(self._keys_of(shard)))) for shard in self.shards.handles
        )
        found = Placement(
            epoch=1 + self._newest_epoch(),
            num_experts=self._model.num_experts,
            layers=self._model.moe_layers,
            shards=slots,
        )
        return None if found.missing([s.shard for s in slots]) else found

    def _first(self) -> Placement:
        model, shards, nodes = self._model, self.shard_ids, self.shards.nodes
        replicas, epoch = min(self.replicas, len(shards)), 1 + self._newest_epoch()
        return initial_placement(model.moe_layers, model.num_experts, shards, replicas, epoch=epoch, nodes=nodes)

    def _newest_epoch(self) -> int:
        return max((facts.get("epoch", 0) for facts in self.workers.facts.values()), default=0)

    def _keys_of(self, shard: ShardId) -> frozenset[ExpertKey]:
        keys: frozenset[ExpertKey] = wait_for([self.shards.handles[shard].hosted.remote()], _ASK_TIMEOUT_S)[0]
        return keys

    def _keep_saved(self) -> None:
        """Write again what the store has lost, or could not take before."""
        try:
            if self.ensure_store():
                self._note("Redis is gone; started it again")
                self._is_saved = False
        except UnavailableError as error:
            _log.warning("Redis could not be started again: %s", error)
        now_s = time.monotonic()
        if now_s > self._checked_s + _CHECK_PERIOD_S:
            self._checked_s = now_s
            stored = self._stored()
            assert self.placement is not None
            self._is_saved = self._is_saved and stored is not None and stored.epoch == self.placement.epoch
        if not self._is_saved:
            self._save()

    def _save(self) -> None:
        """Keep the placement; without a store it goes on from memory and tries again."""
        assert self.placement is not None
        try:
            self._store.save_placement(self.placement)
            self._store.save_members(self.shard_ids, self.worker_ids)
            self._is_saved = True
        except UnavailableError as error:
            _log.warning("the placement of epoch %d is not saved yet: %s", self.placement.epoch, error)
            self._is_saved = False


def _try_all(references: list[Any], timeout_s: float) -> None:
    """Wait for each call; one that fails is logged, and a later round makes up for it."""
    for reference in references:
        try:
            wait_for([reference], timeout_s)
        except UnavailableError as error:
            _log.warning("a part of the fleet was not told: %s", error)
