"""How a shard comes to an expert: copied from a shard that hosts it, else read from the checkpoint."""

from collections.abc import Callable, Mapping

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.ends import ShardPeer
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.shard.copying import fetch_expert
from expertmesh.cluster.errors import LinkError, UnavailableError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.kernels.cpu.expert_mlp import PackedSizes
from expertmesh.models.layer_weights import ExpertTensors
from expertmesh.models.loading import CheckpointWeights

_log = EventLog(__name__)


class Intake:
    """Gets experts for one request of the controller. A source that fails is not asked again.

    num_copied and num_read count the experts that came from other shards and from the checkpoint.
    """

    def __init__(
        self,
        weights: CheckpointWeights,
        sources: Mapping[ExpertKey, ShardPeer],
        join: Callable[[ShardPeer], Link],
        packed_sizes: Callable[[int], PackedSizes | None],
    ) -> None:
        """Make an intake without links.

        Args:
            weights: the checkpoint.
            sources: the shard to copy an expert from; what is not in it is read.
            join: forms a link to a shard; raises UnavailableError or LinkError.
            packed_sizes: of a layer's experts, where the shard takes them as its CPU kernel lays them out.
        """
        self._weights = weights
        self._sources = sources
        self._join = join
        self._packed_sizes = packed_sizes
        # By the node and the life of the source; None: it failed.
        self._links: dict[tuple[str, str], Link | None] = {}
        self.num_copied = 0
        self.num_read = 0

    def get(self, key: ExpertKey) -> ExpertTensors:
        """Return an expert's tensors, as `ExpertSlots.add` takes them; valid until the next call.

        Raises:
            CheckpointError: it had to be read, and cannot be.
        """
        source = self._sources.get(key)
        if source is not None:
            try:
                tensors = self._copy(key, source)
            except (UnavailableError, LinkError) as error:
                _log.tell("expert_not_copied", key=str(key), reason=reason_of(error))
                self._give_up(source)
            else:
                self.num_copied += 1
                return tensors
        self.num_read += 1
        return self._weights.load_expert(key)

    def close(self) -> None:
        """Close the links."""
        for link in self._links.values():
            if link is not None:
                link.close()
        self._links = {}

    def _copy(self, key: ExpertKey, source: ShardPeer) -> ExpertTensors:
        process = source.end.node, source.life
        if process not in self._links:
            self._links[process] = self._join(source)
        link = self._links[process]
        if link is None:
            raise UnavailableError("the shard that hosts it failed before")
        dtype, shapes = self._weights.architecture.dtype, self._weights.expert_shapes(key.layer)
        return fetch_expert(link, key, shapes, dtype, self.num_copied + 1, self._packed_sizes(key.layer))

    def _give_up(self, source: ShardPeer) -> None:
        process = source.end.node, source.life
        link = self._links.get(process)
        self._links[process] = None
        if link is not None:
            link.close()
