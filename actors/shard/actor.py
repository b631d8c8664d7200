"""The expert shard's process: a Ray actor around ExpertSlots and ShardServer."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import psutil
import ray
import torch

from expertmesh.actors.cores import claim_cores, use_cores
from expertmesh.actors.links.base import SHARD_RANK, LinkAddress, open_link
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.runtime import link_end, node_address
from expertmesh.actors.shard.server import ShardServer
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.settings import ServeSettings
from expertmesh.models.architecture import open_architecture
from expertmesh.models.deterministic import deterministic_math
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights


class ShardActor:
    """Hosts expert slots. Holds no state of any request."""

    def __init__(self, shard_id: ShardId, settings: ServeSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        # Kept: what it replaces stays replaced as long as the process lives.
        self._math = ExitStack()
        if settings.deterministic:
            self._math.enter_context(deterministic_math())
        self._id = shard_id
        self._settings = settings
        self._host = settings.link_host or node_address()
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        # Kept: the claim ends with it. Every thread that computes is started after this.
        self._cores = claim_cores(threads) if settings.pin_cores and self._device.type == "cpu" else None
        use_cores(self._cores)
        self._server: ShardServer | None = None
        self._weights: CheckpointWeights | None = None
        self._changing = threading.Lock()
        # Workers meet this shard here: no other process takes part in forming a link.
        self._rendezvous = RendezvousServer(self._host)

    def open(self) -> None:
        """Open the checkpoint; no expert is read. Asking again changes nothing.

        Raises:
            CheckpointError: it cannot be opened.
        """
        with self._changing:
            if self._server is None:
                self._weights = CheckpointWeights(open_architecture(self._settings.model, self._settings.dtype))
                self._server = ShardServer(ExpertSlots(self._weights, (), self._device), epoch=0)

    def host(self, keys: Sequence[ExpertKey]) -> None:
        """Read those of these experts that are not here yet, layer by layer; what is here stays and is served.

        Raises:
            CheckpointError: they cannot be read.
        """
        with self._changing:
            assert self._server is not None, "host() before open()"
            assert self._weights is not None
            slots = self._server.slots
            new = sorted(set(keys) - slots.keys)
            for layer in sorted({key.layer for key in new}):
                slots.add(layer, [key.expert for key in new if key.layer == layer], self._weights.load_expert)

    def settle(self, keys: Sequence[ExpertKey], epoch: int) -> None:
        """Keep these experts alone: those of a placement. An older epoch than the last is passed over."""
        with self._changing:
            assert self._server is not None, "settle() before open()"
            if epoch >= self._server.epoch:
                self._server.epoch = epoch
                self._server.slots.keep(keys)

    def hosted(self) -> frozenset[ExpertKey]:
        """Return the experts that are here."""
        return self._server.slots.keys if self._server else frozenset()

    def accept_link(self, name: str, generation: int, kind: str) -> tuple[str, int]:
        """Begin to form this end of a link, and return where the other end finds it."""
        address = LinkAddress(
            host=self._host,
            port=self._rendezvous.port,
            name=name,
            generation=generation,
            rank=SHARD_RANK,
            interface=self._host,
            timeout_s=self._settings.link_timeout_s,
        )
        threading.Thread(target=self._serve, args=(kind, address), name=name, daemon=True).start()
        return self._host, self._rendezvous.port

    def describe(self) -> dict[str, Any]:
        """Return what `status` shows of a shard."""
        slots = self._server.slots if self._server else None
        return {
            "id": self._id,
            "pid": os.getpid(),
            "node": self._host,
            "state": "ready" if slots else "loading",
            "num_slots": slots.num_slots if slots else 0,
            "weight_bytes": slots.weight_bytes if slots else 0,
            "free_bytes": self._free_bytes(),
            "epoch": self._server.epoch if self._server else 0,
            "link_end": link_end(),
        }

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return int(psutil.virtual_memory().available)

    def _serve(self, kind: str, address: LinkAddress) -> None:
        assert self._server is not None, "a link before open()"
        try:
            link = open_link(kind, address, self._device)
        except LinkError:
            return  # the worker that asked for it is gone; it asks again under another generation
        self._server.serve(link)
