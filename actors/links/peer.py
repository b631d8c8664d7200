"""A shard as others reach it, and the end of a link that they form to it."""

from dataclasses import dataclass
from typing import Any

from expertmesh.actors.links.base import WORKER_RANK, LinkAddress, LinkEnd, link_kind


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
