"""Keeps a worker's links to the shards of the newest placement: forms them, and forms anew those that broke."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import ShardPeer
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import Placement

_log = EventLog(__name__)
_HEAL_PERIOD_S = 0.5
# Links are formed in milliseconds; a placement that can do without one that takes longer is used without it.
_GRACE_S = 0.5
Life = tuple[ShardId, str]


class LinkKeeper:
    """Links by life of a shard. All calls but `lost` come from one event loop.

    A broken link is not the end of its shard: a shard that was stopped, or cut off, is joined again when it answers.
    A shard that hangs while it is joined holds up no other.
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
            join: forms a link, within a bounded time; raises UnavailableError, or TimeoutError.
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
        self._links: dict[Life, Link] = {}
        self._joining: dict[Life, asyncio.Task[None]] = {}
        self._shown: dict[ShardId, Link] = {}
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._healing = asyncio.create_task(self._heal(), name="heal links")

    async def prepare(self, peers: Mapping[ShardId, ShardPeer]) -> None:
        """Form links to shards that a coming placement needs; the fleet in use does not change."""
        if joins := self._begin(peers):
            await asyncio.wait(joins)

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
                await self._join_as_needed(placement, peers)
                self._placement, self._peers = placement, dict(peers)
                lives = {(shard, peer.life) for shard, peer in peers.items()}
                self._links = {life: link for life, link in self._links.items() if life in lives}
                self._show()
            return self._placement.epoch

    def lost(self, shard: ShardId, link: Link) -> None:
        """Hear that a link broke. From any thread."""
        self._loop.call_soon_threadsafe(self._forget, shard, link)

    async def close(self) -> None:
        """Heal no more. The links stay as they are."""
        tasks = [self._healing, *self._joining.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, shard: ShardId, link: Link) -> None:
        for life, standing in tuple(self._links.items()):
            if standing is link:
                del self._links[life]
                self._wake.set()
                self._report_lost(shard)

    async def _heal(self) -> None:
        """Show links that were formed since the last fleet, and form those that are missing."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            links = self._links_to(self._peers)
            if self._placement is not None and any(self._shown.get(s) is not link for s, link in links.items()):
                self._show()
            await asyncio.sleep(_HEAL_PERIOD_S)
            self._begin(self._peers)

    def _show(self) -> None:
        assert self._placement is not None, "a fleet without a placement"
        self._shown = self._links_to(self._peers)
        self._publish(Fleet(self._placement, self._shown, self._policy))

    async def _join_as_needed(self, placement: Placement, peers: Mapping[ShardId, ShardPeer]) -> None:
        """Join all for a short while, and longer while an expert has no replica on any that is joined."""
        joins = self._begin(peers)
        if joins:
            _, joins = await asyncio.wait(joins, timeout=_GRACE_S)
        while joins and placement.missing(self._links_to(peers)):
            _, joins = await asyncio.wait(joins, return_when=asyncio.FIRST_COMPLETED)

    def _links_to(self, peers: Mapping[ShardId, ShardPeer]) -> dict[ShardId, Link]:
        lives = {shard: (shard, peer.life) for shard, peer in peers.items()}
        return {shard: self._links[life] for shard, life in lives.items() if life in self._links}

    def _begin(self, peers: Mapping[ShardId, ShardPeer]) -> set[asyncio.Task[None]]:
        """Begin to join those without a link; return the joins of these peers that are under way."""
        under_way: set[asyncio.Task[None]] = set()
        for shard, peer in peers.items():
            life = (shard, peer.life)
            if life in self._links:
                continue
            if life not in self._joining:
                self._joining[life] = asyncio.create_task(self._join_one(shard, peer), name=f"join {shard}")
            under_way.add(self._joining[life])
        return under_way

    async def _join_one(self, shard: ShardId, peer: ShardPeer) -> None:
        try:
            self._links[shard, peer.life] = await self._join(shard, peer)
        except (UnavailableError, TimeoutError) as error:
            _log.tell("link_missing", shard=shard, reason=reason_of(error))
        except Exception as error:  # noqa: BLE001  it is told, and the other links go on
            _log.tell("link_missing", error, shard=shard, reason=reason_of(error))
        finally:
            del self._joining[shard, peer.life]
            self._wake.set()
