"""The ends of links: where they are, where they meet, which kind of link joins two. Names no tensor library."""

from dataclasses import dataclass
from typing import Any

WORKER_RANK = 0
SHARD_RANK = 1


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


@dataclass(frozen=True)
class ShardPeer:
    """How to reach a shard.

    life: differs between two processes that have the shard's name one after the other. handle: its actor. end: where
    its tensors live.
    """

    life: str
    handle: Any
    end: LinkEnd


def kind_for(own_end: LinkEnd, peer: ShardPeer, links: str) -> str:
    """Return the kind of a link to a shard; links is the setting of that name."""
    return link_kind(own_end, peer.end) if links == "auto" else links


def calling_end(met: tuple[str, int], name: str, generation: int, interface: str, timeout_s: float) -> LinkAddress:
    """Return the address of the end that asked a shard for a link.

    Args:
        met: what the shard's `accept_link` answered: host and port.
        name: of the link, as it was asked for.
        generation: as it was asked for.
        interface: address of the caller's network interface.
        timeout_s: see LinkAddress.
    """
    host, port = met
    return LinkAddress(
        host=host,
        port=port,
        name=name,
        generation=generation,
        rank=WORKER_RANK,
        interface=interface,
        timeout_s=timeout_s,
    )


def link_kind(worker: LinkEnd, shard: LinkEnd) -> str:
    """Choose the kind for two ends.

    NCCL between two GPUs, and the GPU's memory on one, where NCCL refuses two ranks; else the host's memory within a
    node and Gloo between nodes.
    """
    same_node = worker.node == shard.node
    if worker.gpu and shard.gpu:
        return "cuda_ipc" if same_node and worker.gpu == shard.gpu else "nccl"
    return "shared" if same_node else "gloo"
