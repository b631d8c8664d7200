"""A member that is being started, on a thread of its own, so that nothing waits for it."""

import threading

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.member_names import typed
from expertmesh.actors.runtime import Room
from expertmesh.cluster.errors import ExpertMeshError


class MemberStart:
    """The start begins with the object. error: why it failed, once it is over."""

    def __init__(self, keeper: Keeper, member: str, room_timeout_s: float) -> None:
        """Begin to start a member that may wait so long for room."""
        self._keeper, self._member = keeper, member
        self._giving_up = threading.Event()
        self._room = Room(timeout_s=room_timeout_s, give_up=self._giving_up)
        self.error: ExpertMeshError | None = None
        self._thread = threading.Thread(target=self._run, name=f"start {member}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def give_up(self) -> None:
        """Wait for room no longer. One that has room is started all the same."""
        self._giving_up.set()

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._keeper.start_member(typed(self._member), self._room)
        except ExpertMeshError as error:
            self.error = error
        finally:
            self._keeper.alarm()
