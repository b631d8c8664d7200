"""Takes the fleet from one placement to the next, behind the traffic: copy, join, publish, free."""

import threading
from collections.abc import Sequence
from typing import Any

from expertmesh.actors.controller.tiers import Tier, try_all
from expertmesh.actors.links.ends import ShardPeer
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.copy_sources import copy_sources
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId, WorkerId
from expertmesh.cluster.placement import Placement

_log = EventLog(__name__)
# A worker gives up joining a shard that does not answer before this.
_PUBLISH_TIMEOUT_S = 6.0


class Mover:
    """The calls to shards and workers that a change of placement is made of. Keeps nothing between them."""

    def __init__(self, shards: Tier[ShardId], workers: Tier[WorkerId], timeout_s: float) -> None:
        """Make a mover for two tiers; timeout_s is the longest that a shard may take for its experts."""
        self._shards = shards
        self._workers = workers
        self._timeout_s = timeout_s

    def bring(
        self,
        current: Placement | None,
        target: Placement,
        hosting: Sequence[ShardId],
        give_up: threading.Event | None,
    ) -> None:
        """Have the shards of a placement take the experts that it adds, and the workers join those shards.

        Args:
            current: the placement in force, if there is one.
            target: the placement to go to.
            hosting: the shards that experts can be copied from.
            give_up: ends the waiting when it is set; the requests that are served meanwhile come first then. None:
                requests wait for the experts.

        Raises:
            ExpertMeshError: a shard could not take experts, or give_up was set.
        """
        sources = self._sources(current, target, hosting) if current else {}
        urgent = give_up is None
        taking = {
            s.shard: self._shard(s.shard).host.remote(s.experts, sources.get(s.shard, {}), urgent=urgent)
            for s in target.shards
        }
        self._shards.wait_for_all(taking, self._timeout_s, give_up)
        # Joined before they are needed, so that no step waits for a link to be formed.
        peers = self.peers([slots.shard for slots in target.shards])
        try_all([handle.join.remote(peers) for handle in self._listening().values()], _PUBLISH_TIMEOUT_S)

    def publish(self, placement: Placement, *, behind_only: bool = False) -> None:
        """Tell the workers, or those alone that are behind. One that cannot be told now is told by a later round."""
        record, peers = placement.to_bytes(), self.peers([slots.shard for slots in placement.shards])
        workers = self._workers
        told = [
            handle.set_fleet.remote(record, peers)
            for worker, handle in self._listening().items()
            if not behind_only or (worker in workers.ready and workers.facts[worker]["epoch"] < placement.epoch)
        ]
        try_all(told, _PUBLISH_TIMEOUT_S)

    def settle(self, placement: Placement, shards: Sequence[ShardId]) -> None:
        """Have shards free what a placement does not give them. One that cannot does so after the next move."""
        keys = {slots.shard: slots.experts for slots in placement.shards if slots.shard in shards}
        try:
            told = {s: self._shard(s).settle.remote(keys[s], placement.epoch) for s in keys}
            self._shards.wait_for_all(told, self._timeout_s)
        except UnavailableError as error:
            _log.tell("slots_not_freed", reason=reason_of(error))

    def peers(self, shards: Sequence[ShardId]) -> dict[ShardId, ShardPeer]:
        """Return how to reach those of these shards that are there."""
        return {
            shard: ShardPeer(
                life=str(self._shards.facts[shard]["pid"]),
                handle=self._shards.handles[shard],
                end=self._shards.facts[shard]["link_end"],
            )
            for shard in shards
            if shard in self._shards.handles and "link_end" in self._shards.facts.get(shard, {})
        }

    def _sources(
        self, current: Placement, target: Placement, hosting: Sequence[ShardId]
    ) -> dict[ShardId, dict[ExpertKey, ShardPeer]]:
        """Return, for each shard, where to copy its new experts from."""
        peers = self.peers(hosting)
        node = {shard: peer.end.node for shard, peer in peers.items()}
        chosen = copy_sources(current, target, peers, node)
        return {shard: {key: peers[s] for key, s in of.items()} for shard, of in chosen.items()}

    def _shard(self, shard: ShardId) -> Any:
        """Return a shard's handle.

        Raises:
            UnavailableError: it is being started again.
        """
        try:
            return self._shards.handles[shard]
        except KeyError as error:
            raise UnavailableError(f"{shard} is not there now") from error

    def _listening(self) -> dict[WorkerId, Any]:
        """The workers that are not known to be silent or gone."""
        deaf = {w for w, facts in tuple(self._workers.facts.items()) if facts["state"] in ("unresponsive", "dead")}
        return {w: handle for w, handle in tuple(self._workers.handles.items()) if w not in deaf}
