"""Which members move off nodes that are to end, in which order, and by when; and what their experts' placement is then.

A node is known by its id in Ray, a member by its name. Times are seconds since the epoch.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, ShardSlots

# With half of the time that is left for each, a third attempt still has an eighth of it for its room.
MAX_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A member that is to have a successor elsewhere. deadline_s is when its node may end; infinite: not said."""

    member: str
    node: str
    deadline_s: float


def due_moves(
    *,
    now_s: float,
    leaving: Mapping[str, float],
    nodes: Mapping[str, str],
    sole_owners: Collection[str],
    attempts: Mapping[tuple[str, str], int],
    under_way: Collection[str],
) -> tuple[Move, ...]:
    """Return the moves to begin now, the most urgent first.

    Those whose node ends first come first; of one node's, the shards whose loss would take experts away, then the other
    shards, then workers, whose sequences are computed again elsewhere in any case.

    Args:
        now_s: the time.
        leaving: when each node that is to end may end.
        nodes: of the members that are to be there and can hand on what they have.
        sole_owners: shards that have an expert alone.
        attempts: to move a member off a node, so far.
        under_way: members that are being moved or taken out.
    """
    moves = [
        Move(member=member, node=node, deadline_s=leaving[node])
        for member, node in nodes.items()
        if node in leaving
        and now_s < leaving[node]
        and member not in under_way
        and attempts.get((member, node), 0) < MAX_ATTEMPTS
    ]

    def urgency(move: Move) -> tuple[float, bool, bool, int, str]:
        is_worker, name = move.member.startswith("worker-"), move.member
        return move.deadline_s, move.member not in sole_owners, is_worker, len(name), name

    return tuple(sorted(moves, key=urgency))


def room_timeout_s(now_s: float, deadline_s: float, most_s: float) -> float:
    """Return how long a successor may wait for room: half of the time that is left. The rest is for start and copies.

    Args:
        now_s: the time.
        deadline_s: when the node may end.
        most_s: longest wait in any case.
    """
    return max(0.0, min(most_s, (deadline_s - now_s) / 2))


def sole_owners(placement: Placement) -> frozenset[ShardId]:
    """Return the shards that host an expert which no other shard hosts."""
    row_N, shard_N, _ = placement.replica_pairs
    is_alone_N = np.bincount(row_N)[row_N] == 1 if len(row_N) else np.zeros(0, dtype=np.bool_)
    return frozenset(placement.shards[index].shard for index in np.unique(shard_N[is_alone_N]).tolist())


def succeeded(placement: Placement, successors: Mapping[str, str]) -> Placement:
    """Return a placement in which each successor has what its predecessor had, its dispatch weights too."""
    slots = tuple(
        ShardSlots(shard=ShardId(successors.get(s.shard, s.shard)), experts=s.experts) for s in placement.shards
    )
    return replace(placement, shards=slots)


def present_names(members: Iterable[str], operations: Collection[Operation], since_s: float) -> tuple[str, ...]:
    """Return what these members are called now, after the moves that were made since a time.

    Args:
        members: as they were called then.
        operations: all that are known, in the order in which they began.
        since_s: what ended before it was known to who named them.
    """
    moves = [
        (operation.removing[0], operation.adding[0])
        for operation in operations
        if operation.node
        and operation.phase in (Phase.DRAIN, Phase.DONE)
        and (not operation.ended_s or operation.ended_s >= since_s)
    ]
    names = list(members)
    for old, new in moves:
        names = [new if name == old else name for name in names]
    return tuple(names)
