"""The expert shard's process as others call it: a Ray actor.

Whoever holds an actor's handle imports its class, hence this file, which imports nothing that computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from expertmesh.actors.links.ends import ShardPeer
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.settings import ServeSettings


class ShardActor:
    """A Shard in a process of its own."""

    def __init__(self, shard_id: ShardId, settings: ServeSettings, threads: int) -> None:
        from expertmesh.actors.shard.shard import Shard

        self._shard = Shard(shard_id, settings, threads)

    def open(self) -> None:
        """See Shard.open."""
        self._shard.open()

    def host(self, keys: Sequence[ExpertKey], sources: Mapping[ExpertKey, ShardPeer], *, urgent: bool) -> None:
        """See Shard.host."""
        self._shard.host(keys, sources, urgent=urgent)

    def settle(self, keys: Sequence[ExpertKey], epoch: int) -> None:
        """See Shard.settle."""
        self._shard.settle(keys, epoch)

    def hosted(self) -> frozenset[ExpertKey]:
        """See Shard.hosted."""
        return self._shard.hosted()

    def accept_link(self, name: str, generation: int, kind: str) -> tuple[str, int]:
        """See Shard.accept_link."""
        return self._shard.accept_link(name, generation, kind)

    def describe(self) -> dict[str, Any]:
        """See Shard.describe."""
        return self._shard.describe()
