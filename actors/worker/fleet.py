"""A placement as the worker's dispatcher uses it: with links to its shards.

Shape suffixes: L layers, E experts, R the most replicas of any expert, S shards of the placement.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertmesh.actors.links.base import Channel, Link
from expertmesh.cluster.dispatch_hash import DispatchTable
from expertmesh.cluster.dispatch_policy import open_policy
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import Placement
from expertmesh.kernels.cpu.exchange import Exchange


class Fleet:
    """A placement and this worker's links to its shards. Links break; a broken one stays broken in this fleet."""

    def __init__(self, placement: Placement, links: Mapping[ShardId, Link], policy: str = "rendezvous") -> None:
        """Lay out the placement for dispatch; policy is one of `dispatch_policy.POLICIES`."""
        self.placement = placement
        self.shards = tuple(slots.shard for slots in placement.shards)
        self.links = dict(links)
        self.alive_S = np.array([shard in self.links for shard in self.shards])
        self.generations = [self.links[s].generation if s in self.links else 0 for s in self.shards]
        self._only_LE: npt.NDArray[np.int32] | None = None
        self.choose = {layer: open_policy(policy, DispatchTable(placement, layer)) for layer in placement.layers}

    @cached_property
    def exchange(self) -> Exchange:
        """Carries layers to these shards and back in compiled code; where `channels` finds how."""
        return Exchange(len(self.shards))

    def channels(self) -> list[Channel] | None:
        """Return what carries each shard's link, -1 for a dead one; None: a link has none, or is broken."""
        try:
            found = [
                self.links[shard].channel() if alive else Channel(-1)
                for shard, alive in zip(self.shards, self.alive_S, strict=True)
            ]
        except LinkError:
            return None  # who sends will find it so again, and lose it
        channels = [channel for channel in found if channel is not None]
        return channels if len(channels) == len(found) else None

    def open_exchange(self, channels: list[Channel]) -> Exchange:
        """Return the exchange with these shards, over these channels."""
        memories = [(channel.outgoing, channel.incoming, channel.room_bytes) for channel in channels]
        descriptors = [channel.descriptor for channel in channels]
        self.exchange.set_shards(descriptors, memories, self.generations, self.placement.epoch)
        return self.exchange

    def only_LE(self, layers: Sequence[int]) -> npt.NDArray[np.int32]:  # noqa: N802  # a shape suffix
        """Return the one live shard of each expert of these layers; -1: there are several, or none."""
        if self._only_LE is None:
            shard_LER = self.placement.replica_table.shard_LER
            alive_LER = np.append(self.alive_S, False)[shard_LER]
            first_LE1 = alive_LER.argmax(axis=-1)[..., None]
            only_LE = np.take_along_axis(shard_LER, first_LE1, axis=-1)[..., 0]
            only_LE = np.where(alive_LER.sum(axis=-1) == 1, only_LE, np.int32(-1))
            self._only_LE = np.ascontiguousarray(only_LE[[self.placement.layers.index(layer) for layer in layers]])
        return self._only_LE

    def mark_dead(self, index: int) -> None:
        """Send nothing more to a shard."""
        self.alive_S[index] = False
        self._only_LE = None
