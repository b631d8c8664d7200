"""Keeps a worker's links to the shards of the newest placement: forms them, and forms anew those that broke."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import ShardPeer
from expertmesh.actors.worker.dispatcher import Fleet
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import Placement

_log = logging.getLogger(__name__)
_HEAL_PERIOD_S = 0.5


class LinkKeeper:
    """Links by shard. All calls but `lost` come from one event loop.

    A broken link is not the end of its shard: a shard that was stopped, or cut off, is joined again when it answers.
    """

    def __init__(
        self,
        join: Callable[[ShardId, ShardPeer], Awaitable[Link]],
        publish: Callable[[Fleet], None],
        report_lost: Callable[[ShardId], None],
        policy: str = "rendezvous",
    ) -> None:
        """Make a keeper without shards.

        Args:
            join: forms a link; raises UnavailableError, or TimeoutError.
            publish: gets each new fleet.
            report_lost: told the shard of each link that broke.
            policy: of the fleets' dispatch.
        """
        self._join = join
        self._publish = publish
        self._report_lost = report_lost
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._placement: Placement | None = None
        self._peers: dict[ShardId, ShardPeer] = {}
        self._links: dict[ShardId, Link] = {}
        self._broken = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._healing = asyncio.create_task(self._heal(), name="heal links")

    async def prepare(self, peers: Mapping[ShardId, ShardPeer]) -> None:
        """Form links to shards that a coming placement needs; the fleet in use does not change."""
        async with self._one_at_a_time:
            await self._join_missing(dict(peers))

    async def follow(self, placement: Placement, peers: Mapping[ShardId, ShardPeer]) -> int:
        """Use a placement, unless a newer one is in use; shards that cannot be joined now are tried again.

        Args:
            placement: of a new epoch, or of the one in use.
            peers: how to reach its shards.

        Returns:
            The epoch in use.
        """
        async with self._one_at_a_time:
            if self._placement is None or placement.epoch >= self._placement.epoch:
                self._placement = placement
                self._links = {s: link for s, link in self._links.items() if s in peers and self._is_same(s, peers[s])}
                self._peers = dict(peers)
                await self._join_missing(self._peers)
                self._publish(Fleet(self._placement, self._links, self._policy))
            return self._placement.epoch

    def lost(self, shard: ShardId, link: Link) -> None:
        """Hear that a link broke. From any thread."""
        self._loop.call_soon_threadsafe(self._forget, shard, link)

    async def close(self) -> None:
        """Heal no more. The links stay as they are."""
        self._healing.cancel()
        await asyncio.gather(self._healing, return_exceptions=True)

    def _forget(self, shard: ShardId, link: Link) -> None:
        if self._links.get(shard) is link:
            del self._links[shard]
            self._broken.set()
            self._report_lost(shard)

    async def _heal(self) -> None:
        while True:
            await self._broken.wait()
            await asyncio.sleep(_HEAL_PERIOD_S)
            async with self._one_at_a_time:
                self._broken.clear()
                if self._placement is not None and await self._join_missing(self._peers):
                    self._publish(Fleet(self._placement, self._links, self._policy))

    async def _join_missing(self, peers: dict[ShardId, ShardPeer]) -> bool:
        """Join those without a link, all at once; return whether one was joined."""
        missing = [shard for shard, peer in peers.items() if shard not in self._links or not self._is_same(shard, peer)]
        found = await asyncio.gather(*(self._join(shard, peers[shard]) for shard in missing), return_exceptions=True)
        joined = False
        for shard, result in zip(missing, found, strict=True):
            if isinstance(result, Link):
                self._links[shard], self._peers[shard] = result, peers[shard]
                joined = True
            elif isinstance(result, (UnavailableError, TimeoutError)):
                _log.warning("no link to %s yet: %s", shard, str(result) or type(result).__name__)
                self._broken.set()
            else:
                raise result
        return joined

    def _is_same(self, shard: ShardId, peer: ShardPeer) -> bool:
        return shard in self._peers and self._peers[shard].life == peer.life
