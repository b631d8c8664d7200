"""How replicas share the load of their experts, number by number.

An expert has a handful of replicas, for which Python's own arithmetic takes a fraction of the time of numpy's calls.

Shape suffixes: S shards, E experts of the layer, R replicas of one expert (by shard).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def filled(load: float, base_R: Sequence[float], speed_R: Sequence[float]) -> list[float]:
    """Split a load over replicas so that the largest time, (base + share) / speed, is least: fill up like water.

    Args:
        load: of the expert.
        base_R: what the replicas' shards compute besides.
        speed_R: of their shards.
    """
    order = sorted(range(len(base_R)), key=lambda r: base_R[r] / speed_R[r])
    level, volume, width = float("inf"), load, 0.0
    for r in order:
        volume += base_R[r]
        width += speed_R[r]
        # The level over the first shards falls while further ones are below it, and rises after.
        if volume / width >= level:
            break
        level = volume / width
    share_R = [max(level * speed - base, 0.0) for base, speed in zip(base_R, speed_R, strict=True)]
    scale = load / max(sum(share_R), 1e-300)
    return [share * scale for share in share_R]


class SharedLoads:
    """A layer's shares as numbers, taken from its arrays when first asked for; `put_back` writes them there again."""

    def __init__(
        self,
        *,
        load_E: Floats,
        speed_S: Floats,
        load_S: Floats,
        hosts_SE: Bools,
        share_SE: Floats,
        is_shared_E: Bools,
    ) -> None:
        self._load_E: list[float] = load_E.tolist()
        self._speed_S: list[float] = speed_S.tolist()
        self._load_S: list[float] = load_S.tolist()
        self._hosts_SE, self._share_SE, self._is_shared_E = hosts_SE, share_SE, is_shared_E
        self._host_R: dict[int, list[int]] = {}
        self._share_R: dict[int, list[float]] = {}
        self._experts: dict[int, list[int]] = {}

    def spread(self, expert: int) -> float:
        """Return how far the time of a shard that computes for an expert is above that of another of its hosts."""
        hosts, shares = self._replicas(expert)
        times = [self._load_S[host] / self._speed_S[host] for host in hosts]
        return max((t for t, share in zip(times, shares, strict=True) if share > 0), default=0.0) - min(times)

    def fill(self, expert: int, least_change: float) -> list[int]:
        """Split an expert's load anew; return the shared experts on shards whose time has changed by more than that."""
        hosts, shares = self._replicas(expert)
        base_R = [self._load_S[host] - share for host, share in zip(hosts, shares, strict=True)]
        speed_R = [self._speed_S[host] for host in hosts]
        new_R = filled(self._load_E[expert], base_R, speed_R)
        self._set(expert, hosts, base_R, new_R)
        changed = [
            host
            for host, old, new, speed in zip(hosts, shares, new_R, speed_R, strict=True)
            if abs(new - old) > least_change * speed
        ]
        return [expert for host in changed for expert in self._experts_on(host)]

    def quantise(self, expert: int, total: int) -> tuple[int, ...]:
        """Split an expert's load anew, in whole parts of a total, by largest remainder; return the parts."""
        hosts, shares = self._replicas(expert)
        base_R = [self._load_S[host] - share for host, share in zip(hosts, shares, strict=True)]
        part = self._load_E[expert] / total
        exact_R = [
            share / part for share in filled(self._load_E[expert], base_R, [self._speed_S[host] for host in hosts])
        ]
        parts_R = [int(exact) for exact in exact_R]
        by_remainder = sorted(range(len(hosts)), key=lambda r: parts_R[r] - exact_R[r])
        for r in by_remainder[: total - sum(parts_R)]:
            parts_R[r] += 1
        self._set(expert, hosts, base_R, [parts * part for parts in parts_R])
        return tuple(parts_R)

    def put_back(self, share_SE: Floats) -> Floats:
        """Write the shares into an array [S, E], and return the sums of each shard."""
        for expert, hosts in self._host_R.items():
            share_SE[hosts, expert] = self._share_R[expert]
        return np.array(self._load_S)

    def _replicas(self, expert: int) -> tuple[list[int], list[float]]:
        if expert not in self._host_R:
            host_R = np.flatnonzero(self._hosts_SE[:, expert])
            self._host_R[expert] = host_R.tolist()
            self._share_R[expert] = self._share_SE[host_R, expert].tolist()
        return self._host_R[expert], self._share_R[expert]

    def _set(self, expert: int, hosts: list[int], base_R: list[float], share_R: list[float]) -> None:
        self._share_R[expert] = share_R
        for host, base, share in zip(hosts, base_R, share_R, strict=True):
            self._load_S[host] = base + share

    def _experts_on(self, shard: int) -> list[int]:
        if shard not in self._experts:
            self._experts[shard] = np.flatnonzero(self._hosts_SE[shard] & self._is_shared_E).tolist()
        return self._experts[shard]
