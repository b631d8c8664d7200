"""Sees to members that are gone or half started, each on a thread of its own, so that nothing waits for them."""

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import ExpertMeshError
from expertmesh.cluster.ids import ShardId, WorkerId

_log = EventLog(__name__)
# A process that is gone is mostly back within this; longer, and the others take its experts' replicas meanwhile.
_SOON_S = 15.0
Id = ShardId | WorkerId


class Reviver:
    """The members being started again. `begin` and the properties are for one thread, the keeper's."""

    def __init__(
        self, start: Callable[[Any], None], is_member: Callable[[Id], bool], say: Callable[[str], None]
    ) -> None:
        """Make one with nothing to do.

        Args:
            start: starts a member of that id; raises ExpertMeshError.
            is_member: whether an id is to be there; one that is drained meanwhile is ended again.
            say: told each step.
        """
        self._start = start
        self._is_member = is_member
        self._say = say
        self._under_way: set[Id] = set()
        self._gone_since_s: dict[Id, float] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a member is being started."""
        return bool(self._under_way)

    @property
    def starting(self) -> frozenset[Id]:
        """The members that are being started."""
        return frozenset(self._under_way)

    @property
    def may_be_soon_done(self) -> bool:
        """Whether one that is gone may be back in a moment, so that nothing need move because of it."""
        now_s = time.monotonic()
        return any(now_s < self._gone_since_s.get(member, 0.0) + _SOON_S for member in tuple(self._under_way))

    def begin(self, tier: Any, succeeded: Collection[str] = ()) -> None:
        """Begin to replace the dead of a tier, and to finish what a former controller began to start.

        Args:
            tier: the tier.
            succeeded: members that have a successor to come, and are left alone.
        """
        dead = tier.dead
        for member in (*dead, *tier.loading):
            if self._is_member(member) and member not in self._under_way and member not in succeeded:
                is_gone = member in dead
                self._under_way.add(member)
                self._gone_since_s.setdefault(member, time.monotonic())
                self._say(f"{member} is gone; starting it again" if is_gone else f"{member} is half started; going on")
                threading.Thread(target=self._revive, args=(tier, member, is_gone), name=f"revive {member}").start()

    def _revive(self, tier: Any, member: Any, is_gone: bool) -> None:
        try:
            if is_gone:
                tier.dismiss(member, returns=True)
            self._start(member)
            self._gone_since_s.pop(member, None)
            self._say(f"{member} is back")
        except ExpertMeshError as error:
            _log.tell("member_not_revived", member=member, reason=reason_of(error))
            tier.handles.pop(member, None)
            tier.facts[member] = {"id": member, "state": "dead"}
        finally:
            if not self._is_member(member):
                tier.dismiss(member)
                self._gone_since_s.pop(member, None)
            self._under_way.discard(member)
