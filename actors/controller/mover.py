"""Takes the fleet from one placement to the next, behind the traffic: copy, join, publish, free."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from expertmesh.actors.controller.tiers import Tier, wait_for
from expertmesh.actors.links.ends import ShardPeer
from expertmesh.cluster.copy_sources import copy_sources
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId, WorkerId
from expertmesh.cluster.placement import Placement

_log = logging.getLogger(__name__)
_PUBLISH_TIMEOUT_S = 10.0


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
        hosts = [
            self._shards.handles[s.shard].host.remote(s.experts, sources.get(s.shard, {}), urgent=give_up is None)
            for s in target.shards
        ]
        wait_for(hosts, self._timeout_s, give_up=give_up)
        # Joined before they are needed, so that no step waits for a link to be formed.
        peers = self.peers([slots.shard for slots in target.shards])
        _try_all([w.join.remote(peers) for w in tuple(self._workers.handles.values())], _PUBLISH_TIMEOUT_S)

    def publish(self, placement: Placement, *, behind_only: bool = False) -> None:
        """Tell the workers, or those alone that are behind. One that cannot be told now is told by a later round."""
        record, peers = placement.to_bytes(), self.peers([slots.shard for slots in placement.shards])
        facts = self._workers.facts
        told = [
            handle.set_fleet.remote(record, peers)
            for worker, handle in tuple(self._workers.handles.items())
            if not behind_only or (facts[worker]["state"] == "ready" and facts[worker]["epoch"] < placement.epoch)
        ]
        _try_all(told, _PUBLISH_TIMEOUT_S)

    def settle(self, placement: Placement) -> None:
        """Have the shards free what a placement that was published does not give them."""
        told = [
            self._shards.handles[s.shard].settle.remote(s.experts, placement.epoch)
            for s in placement.shards
            if s.shard in self._shards.handles
        ]
        _try_all(told, self._timeout_s)

    def peers(self, shards: Sequence[ShardId]) -> dict[ShardId, ShardPeer]:
        """Return how to reach those of these shards that are there."""
        return {
            shard: ShardPeer(
                life=str(self._shards.facts[shard]["pid"]),
                handle=self._shards.handles[shard],
                end=self._shards.facts[shard]["link_end"],
            )
            for shard in shards
            if shard in self._shards.handles and "link_end" in self._shards.facts[shard]
        }

    def _sources(
        self, current: Placement, target: Placement, hosting: Sequence[ShardId]
    ) -> dict[ShardId, dict[ExpertKey, ShardPeer]]:
        """Return, for each shard, where to copy its new experts from."""
        peers = self.peers(hosting)
        node = {shard: peer.end.node for shard, peer in peers.items()}
        chosen = copy_sources(current, target, peers, node)
        return {shard: {key: peers[s] for key, s in of.items()} for shard, of in chosen.items()}


def _try_all(references: list[Any], timeout_s: float) -> None:
    """Wait for each call; one that fails is logged, and a later round makes up for it."""
    for reference in references:
        try:
            wait_for([reference], timeout_s)
        except UnavailableError as error:
            _log.warning("a part of the fleet was not told: %s", error)
