"""Who of the members is away, and when the fleet is balanced without them.

While a member is being started again its experts may be about to move back, so nothing else moves. But one that never
comes back, as on a dead node, must not keep the others from following the load.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

Member = TypeVar("Member", bound=str)


def still_away(
    before_s: Mapping[str, float], members: Collection[str], there: Collection[str], now_s: float
) -> dict[str, float]:
    """Return since when each member that is not there is away.

    Args:
        before_s: what this returned at the last look.
        members: those that are to be there.
        there: those that do what they are for.
        now_s: the time of this look.
    """
    return {member: before_s.get(member, now_s) for member in members if member not in there}


def given_up(away_since_s: Mapping[Member, float], now_s: float, absence_s: float) -> frozenset[Member]:
    """Return those that have been away for absence_s, and are not waited for any more."""
    return frozenset(member for member, since_s in away_since_s.items() if now_s >= since_s + absence_s)


def is_settled(
    *,
    shards: Collection[str],
    placed: Collection[str],
    hosting: Collection[str],
    starting: Collection[str],
    absent: Collection[str],
) -> bool:
    """Say whether the placement may follow the load: nothing is about to come or go that would change it anyway.

    Args:
        shards: those that are to be there.
        placed: those that the placement names.
        hosting: those that have what it gives them.
        starting: members that are being started, workers too.
        absent: members that are not waited for.
    """
    present = set(shards) - set(absent)
    return present == set(placed) == set(hosting) and set(starting) <= set(absent)
