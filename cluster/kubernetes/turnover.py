"""Pods that come and go: under Ray's autoscaler none is started again in its place, KubeRay makes another."""

from collections import Counter
from collections.abc import Sequence

from expertmesh.cluster.kubernetes.pods import PodState

# Of a group; one or two may be a lost node, or a start before the head's.
MANY = 3


class Turnover:
    """Counts pods that were made and were gone again while somebody looked. Those of the first look do not count."""

    def __init__(self) -> None:
        self._first: frozenset[str] | None = None
        self._group_of: dict[str, str] = {}

    def restless(self, states: Sequence[PodState]) -> tuple[str, int] | None:
        """Return a group of which many have come and gone, and how many; None if there is none.

        Args:
            states: of the pods that there are now.
        """
        now = {state.uid: state.group for state in states}
        if self._first is None:
            self._first = frozenset(now)
        self._group_of |= {uid: group for uid, group in now.items() if uid not in self._first}
        gone = Counter(group for uid, group in self._group_of.items() if uid not in now)
        return next(((group, number) for group, number in sorted(gone.items()) if number >= MANY), None)
