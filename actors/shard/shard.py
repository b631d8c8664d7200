"""The expert shard: what its actor does, with ExpertSlots and ShardServer."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from expertmesh.actors.cores import claim_cores, in_background, other_cores, use_cores, yield_soon
from expertmesh.actors.giving_way import take_part
from expertmesh.actors.links.base import Link, open_link
from expertmesh.actors.links.ends import SHARD_RANK, LinkAddress, ShardPeer, calling_end, kind_for
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.logs import EventLog, reason_of, start_logs
from expertmesh.actors.machine_share import has_cores_of_its_own, usable_memory
from expertmesh.actors.runtime import failure_domain, link_end, node_address, node_id
from expertmesh.actors.shard.intake import Intake
from expertmesh.actors.shard.server import Counted, Peer, ShardServer
from expertmesh.cluster.counters import CLOCK
from expertmesh.cluster.errors import LinkError, UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.settings import ServeSettings
from expertmesh.kernels.cpu.threads import start_helpers
from expertmesh.models.architecture import open_architecture
from expertmesh.models.deterministic import deterministic_math
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.layer_weights import ExpertTensors
from expertmesh.models.loading import CheckpointWeights

_log = EventLog(__name__)
# A shard answers in milliseconds that it is ready to be joined; one that does not is not waited for.
_JOIN_S = 2.0


class Shard:
    """Hosts expert slots, in a process of its own. Holds no state of any request."""

    def __init__(self, shard_id: ShardId, settings: ServeSettings, threads: int) -> None:
        start_logs(settings, shard_id, node_id())
        take_part()
        torch.set_num_threads(threads)
        yield_soon()
        # Kept: what it replaces stays replaced as long as the process lives.
        self._math = ExitStack()
        if settings.deterministic:
            self._math.enter_context(deterministic_math())
        self._id = shard_id
        self._settings = settings
        self._host = settings.link_host or node_address()
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        # Kept: the claim ends with it.
        may_pin = settings.pin_cores and self._device.type == "cpu" and has_cores_of_its_own()
        self._cores = claim_cores(threads) if may_pin else None
        if self._cores is not None and not settings.deterministic:
            use_cores(None)
            start_helpers(min(threads, other_cores(self._cores)))
        use_cores(self._cores)  # every other thread that computes is started after this
        self._server: ShardServer | None = None
        self._weights: CheckpointWeights | None = None
        self._changing = threading.Lock()
        self._newest = 0  # number of the last request to host experts
        self._generations = count(1)  # of the links to other shards
        self._num_copied = 0
        self._num_read = 0
        # Workers meet this shard here: no other process takes part in forming a link.
        self._rendezvous = RendezvousServer(self._host)

    def open(self) -> None:
        """Open the checkpoint; no expert is read. Asking again changes nothing.

        Raises:
            CheckpointError: it cannot be opened.
        """
        with self._changing:
            if self._server is None:
                architecture = open_architecture(self._settings.model, self._settings.dtype)
                self._weights = CheckpointWeights(architecture, self._settings.expert_tp)
                self._server = ShardServer(ExpertSlots(self._weights, (), self._device), 0, self._settings.slow_log_s)
                _log.tell("checkpoint_opened")

    def host(self, keys: Sequence[ExpertKey], sources: Mapping[ExpertKey, ShardPeer], *, urgent: bool) -> None:
        """Take those of these experts that are not here yet, layer by layer; what is here stays and is served.

        Args:
            keys: the experts.
            sources: the shards to copy them from; what is not in it is read from the checkpoint.
            urgent: requests wait for them; else the requests that are served meanwhile come first.

        Raises:
            CheckpointError: they cannot be read.
            UnavailableError: given up, as the controller asked for others meanwhile.
        """
        self._newest += 1
        number = self._newest
        with self._changing:
            if urgent:
                self._take(number, keys, sources)
            else:
                in_background(lambda: self._take(number, keys, sources))

    def settle(self, keys: Sequence[ExpertKey], epoch: int) -> None:
        """Keep these experts alone: those of a placement. An older epoch than the last is passed over."""
        self._newest += 1  # what is being taken for another placement is not needed
        with self._changing:
            assert self._server is not None, "settle() before open()"
            if epoch >= self._server.epoch:
                self._server.epoch = epoch
                self._server.slots.keep(keys)
                _log.tell("epoch_settled", epoch=epoch, num_experts=len(keys))

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
        server = self._server
        slots = server.slots if server else None
        counted = server.counted if server else Counted(0, 0, 0.0, 0.0)
        return {
            "id": self._id,
            "pid": os.getpid(),
            "node": node_id(),
            "domain": failure_domain(self._settings.nodes.domain_label),
            "address": self._host,
            "state": "ready" if slots else "loading",
            "num_slots": slots.num_slots if slots else 0,
            "weight_bytes": slots.weight_bytes if slots else 0,
            "experts_copied": self._num_copied,
            "experts_read": self._num_read,
            "free_bytes": self._free_bytes(),
            "epoch": server.epoch if server else 0,
            "link_end": link_end(),
            "counters": {
                CLOCK: time.monotonic(),
                "busy_s": counted.busy_s,
                "queue_s": counted.queue_s,
                "num_packets": counted.num_packets,
            },
        }

    def _take(self, number: int, keys: Sequence[ExpertKey], sources: Mapping[ExpertKey, ShardPeer]) -> None:
        assert self._server is not None, "host() before open()"
        assert self._weights is not None
        intake = Intake(self._weights, sources, self._join, self._server.slots.packed_sizes)

        def get(key: ExpertKey) -> ExpertTensors:
            if number != self._newest:
                raise UnavailableError(f"{self._id}: given up before {key}: other experts were asked for meanwhile")
            return intake.get(key)

        began_s = time.monotonic()
        new = sorted(set(keys) - self._server.slots.keys)
        try:
            for layer in sorted({key.layer for key in new}):
                self._server.slots.add(layer, [key.expert for key in new if key.layer == layer], get)
        finally:
            intake.close()
            self._weights.release()
            self._num_copied += intake.num_copied
            self._num_read += intake.num_read
            if new:
                copied, read = intake.num_copied, intake.num_read
                _log.tell("experts_taken", num_copied=copied, num_read=read, duration_s=time.monotonic() - began_s)

    def _join(self, source: ShardPeer) -> Link:
        """Form a link to another shard."""
        generation = next(self._generations)
        name = f"{self._id}.{os.getpid()}/{source.life}/{generation}"
        kind = kind_for(link_end(), source, self._settings.links)
        try:
            met = ray.get(source.handle.accept_link.remote(name, generation, kind), timeout=_JOIN_S)
        except RayError as error:
            raise UnavailableError(f"its shard does not answer: {type(error).__name__}") from error
        address = calling_end(met, name, generation, self._host, self._settings.link_timeout_s)
        return open_link(kind, address, self._device)

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return usable_memory().available_bytes

    def _serve(self, kind: str, address: LinkAddress) -> None:
        assert self._server is not None, "a link before open()"
        try:
            link = open_link(kind, address, self._device)
        except LinkError as error:
            # Who asked for it is gone; it asks again under another generation.
            _log.tell("rendezvous_cut_off", link=address.name, reason=reason_of(error))
            return
        peer = Peer(address.name)
        _log.tell("peer_joined", peer=peer.name, peer_pid=peer.pid, kind=kind, generation=address.generation)
        self._server.serve(link, peer)
