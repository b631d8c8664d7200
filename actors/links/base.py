"""What a link is, and the registry of the kinds there are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from expertmesh.cluster.errors import UnknownNameError
from expertmesh.cluster.packets import PacketHeader

WORKER_RANK = 0
SHARD_RANK = 1
# An idle link is no error: a reader waits this long for the next request, and again.
IDLE_S = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class LinkEnd:
    """Where one end's tensors live: the node's id in Ray, and the id of the GPU on that node ("" on a CPU)."""

    node: str
    gpu: str = ""

    def __str__(self) -> str:
        return f"GPU {self.gpu} of node {self.node}" if self.gpu else f"node {self.node}"


@dataclass(frozen=True, kw_only=True)
class LinkAddress:
    """Where and under which name the two ends of a link meet.

    host and port are of the shard's rendezvous store; name is unique for the pair of ends and the generation. interface
    is the address of this end's network interface. timeout_s bounds forming the link and each wait that gives no other
    bound.
    """

    host: str
    port: int
    name: str
    generation: int
    rank: int
    interface: str
    timeout_s: float


class Link(ABC):
    """Joins exactly two ends. Every wait has a deadline; after any LinkError the link is broken for good.

    One thread at a time may send, and one may receive.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation

    @abstractmethod
    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        """Send one message: the header and the parts, one after another.

        May return before it has arrived, and may wait until the peer takes what no buffer on the way holds.

        Args:
            header: its payload_bytes is the sum of the parts' bytes.
            parts: contiguous tensors.

        Raises:
            LinkError: the peer is gone, or the deadline passed, for this message or the one before.
        """

    @abstractmethod
    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        """Receive one message.

        Args:
            timeout_s: how long to wait for it; None is the link's own timeout.

        Returns:
            The header and its payload as uint8; the payload is valid until the next recv.

        Raises:
            LinkError: the peer is gone, the deadline passed, or the message is not of this protocol.
        """

    @abstractmethod
    def close(self) -> None:
        """Tell the peer, if it still listens, and let go."""


_KINDS = {
    "gloo": "expertmesh.actors.links.gloo:GlooLink",
    "local": "expertmesh.actors.links.local:LocalLink",
    "nccl": "expertmesh.actors.links.nccl:NcclLink",
}


def open_link(kind: str, address: LinkAddress, device: torch.device) -> Link:
    """Form one end of a link; blocks until the other end has come, at most address.timeout_s.

    Raises:
        UnknownNameError: no such kind.
        LinkError: the other end did not come.
    """
    if kind not in _KINDS:
        raise UnknownNameError(f"link kind {kind!r} is not one of {', '.join(_KINDS)}")
    module, _, name = _KINDS[kind].partition(":")
    link: Link = getattr(import_module(module), name)(address, device)
    return link


def link_kind(worker: LinkEnd, shard: LinkEnd) -> str:
    """Choose the kind for two ends: NCCL between two GPUs (it refuses two ranks on one), a local socket, else Gloo."""
    same_node = worker.node == shard.node
    if worker.gpu and shard.gpu and not (same_node and worker.gpu == shard.gpu):
        return "nccl"
    return "local" if same_node else "gloo"
