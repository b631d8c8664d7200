"""Time of collectives: latency of messages (alpha) and time of bytes (beta), apart, so that it shows which binds.

The models are those of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH"
(2005): a ring of n ranks takes n - 1 steps to gather or to reduce and scatter, 2 (n - 1) for both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from expertmesh.cluster.planner.hardware import Hardware, LinkTier


class LinkTime(NamedTuple):
    """Seconds of a collective, by what takes them."""

    latency_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        """Both."""
        return self.latency_s + self.transfer_s

    def plus(self, other: "LinkTime") -> "LinkTime":
        """Return both after each other."""
        return LinkTime(self.latency_s + other.latency_s, self.transfer_s + other.transfer_s)


NOTHING = LinkTime(0.0, 0.0)


def all_to_all(hardware: Hardware, num_ranks: int, bytes_by_tier: Sequence[float]) -> LinkTime:
    """Return the time in which a rank sends to each other rank, and hears from each.

    Tiers work beside each other. Messages between direct peers are under way together, staged ones follow each other.

    Args:
        hardware: with tiers.
        num_ranks: that take part.
        bytes_by_tier: that the busiest rank sends, or receives, over each tier.
    """
    if num_ranks == 1:
        return NOTHING
    latencies = [_messages_s(t, n) for t, n in zip(hardware.tiers, hardware.peers_by_tier(num_ranks), strict=True)]
    transfers = [sent / t.effective_bytes_per_s for t, sent in zip(hardware.tiers, bytes_by_tier, strict=True)]
    return LinkTime(hardware.all_to_all_s + max(latencies), max(transfers))


def extra_peers_s(hardware: Hardware, num_ranks: int) -> float:
    """Return what an all-to-all's messages take for so many ranks, without launch and bytes."""
    return max(_messages_s(t, n) for t, n in zip(hardware.tiers, hardware.peers_by_tier(num_ranks), strict=True))


def _messages_s(tier: LinkTier, num_peers: int) -> float:
    if not num_peers:
        return 0.0
    if not tier.is_direct:
        return num_peers * tier.staged_message_s
    return tier.latency_s + (num_peers - 1) * tier.per_peer_s


def all_reduce(hardware: Hardware, num_ranks: int, payload_bytes: float) -> LinkTime:
    """Return the time in which neighbouring ranks add up what each has: of the algorithm that is fastest.

    One shot: each reads all others' at once. Ring. In the network: switches add up, each rank sends and hears once.
    Over several tiers: reduce and scatter within a domain, a ring or tree of the parts between domains, gather within.
    """
    if num_ranks == 1:
        return NOTHING
    start = LinkTime(hardware.collective_s, 0.0)
    tier = hardware.tier_of(num_ranks)
    ways = [_ring(tier, num_ranks, payload_bytes, rounds=2)]
    if tier.is_direct:
        all_others = (num_ranks - 1) * payload_bytes / tier.effective_bytes_per_s
        ways.append(LinkTime(tier.latency_s, all_others))
    if tier.reduces_in_network:
        ways.append(LinkTime(tier.in_network_latency_s, payload_bytes / tier.effective_bytes_per_s))
    inner = hardware.tiers[0]
    if tier is not inner and num_ranks % inner.domain_size == 0:
        within = _ring(inner, inner.domain_size, payload_bytes, rounds=2)
        domains, part = num_ranks // inner.domain_size, payload_bytes / inner.domain_size
        ways += [within.plus(_ring(tier, domains, part, rounds=2)), within.plus(_tree(tier, domains, part))]
    return start.plus(min(ways, key=lambda way: way.total_s))


def all_gather(hardware: Hardware, num_ranks: int, payload_bytes: float) -> LinkTime:
    """Return the time in which neighbouring ranks, each with a part of the payload, come to have all of it."""
    if num_ranks == 1:
        return NOTHING
    ring = _ring(hardware.tier_of(num_ranks), num_ranks, payload_bytes, rounds=1)
    return LinkTime(hardware.collective_s, 0.0).plus(ring)


def send(hardware: Hardware, num_ranks: int, payload_bytes: float) -> LinkTime:
    """Return the time of a message to the next stage, of a pipeline that fills num_ranks GPUs."""
    tier = hardware.tier_of(num_ranks)
    return LinkTime(hardware.collective_s + tier.step_s, payload_bytes / tier.effective_bytes_per_s)


def _ring(tier: LinkTier, num_ranks: int, payload_bytes: float, rounds: int) -> LinkTime:
    steps = rounds * (num_ranks - 1)
    return LinkTime(steps * tier.step_s, steps / num_ranks * payload_bytes / tier.effective_bytes_per_s)


def _tree(tier: LinkTier, num_ranks: int, payload_bytes: float) -> LinkTime:
    steps = 2 * math.ceil(math.log2(num_ranks))
    return LinkTime(steps * tier.step_s, 2 * payload_bytes / tier.effective_bytes_per_s)
