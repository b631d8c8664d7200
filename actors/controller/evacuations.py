"""Moves members off nodes that are to end: each gets a successor elsewhere, which takes over before the node is gone.

Each move is an operation of its own, beside the operator's, so that one which finds no room holds up no other. The
number of members stays as it is. A member that cannot be moved in time dies with its node, and is replaced as any is.
"""

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from expertmesh.actors.controller.handover import Handover
from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.member_names import is_worker, new_names, typed
from expertmesh.actors.controller.member_start import MemberStart
from expertmesh.actors.controller.operation_book import OperationBook
from expertmesh.actors.controller.tiers import natural
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import ExpertMeshError
from expertmesh.cluster.evacuation import Move, due_moves, room_timeout_s, sole_owners
from expertmesh.cluster.operations import Operation, Phase

_log = EventLog(__name__)
# Of a node that does not say when it ends.
_PATIENCE_S = 900.0


class Evacuations:
    """The moves under way. The keeper's thread steps; any may ask, and tell which nodes are to end."""

    def __init__(
        self,
        keeper: Keeper,
        book: OperationBook,
        naming: threading.Lock,
        handover: Handover,
        *,
        room_timeout_s: float,
        note: Callable[[str], None],
    ) -> None:
        """Make one without moves.

        Args:
            keeper: of the fleet.
            book: of its operations.
            naming: held while names are chosen.
            handover: what gateways know.
            room_timeout_s: longest that a successor waits for room.
            note: told what happens to nodes, in words.
        """
        self._keeper = keeper
        self._book = book
        self._naming = naming
        self._handover = handover
        self._room_timeout_s = room_timeout_s
        self._note = note
        self._under_way: dict[str, Operation] = {}
        self._starts: dict[str, MemberStart] = {}
        self._said: dict[str, bool] = {}  # whether members are left, of each node that was told of
        self._put_off = ""  # why the last try failed
        self._leaving: Mapping[str, float] = {}

    def hear(self, leaving: Mapping[str, float]) -> None:
        """Hear when each node that is to end may end, seconds since the epoch; infinite: it is not said."""
        self._leaving = leaving
        self._keeper.alarm()

    def resume(self) -> None:
        """Go on with those of a former life, once the book is read."""
        members = {*self._keeper.shard_ids, *self._keeper.worker_ids}
        for operation in self._book.all():
            if operation.node and not operation.is_over:
                is_member = operation.adding[0] in members
                # Who is no member yet is found again by being started again.
                again = operation.phase is Phase.COMMIT and not is_member
                self._under_way[operation.id] = replace(operation, phase=Phase.PREPARE) if again else operation

    @property
    def under_way(self) -> tuple[Operation, ...]:
        """The moves that are not over."""
        return tuple(self._under_way.values())

    @property
    def moving(self) -> frozenset[str]:
        """Members that have a successor to come: nobody else need replace them."""
        return frozenset(o.removing[0] for o in self.under_way if o.phase is not Phase.DRAIN)

    @property
    def leaving_workers(self) -> list[str]:
        """Workers whose sequences are to go on elsewhere now."""
        return [o.removing[0] for o in self.under_way if o.phase is Phase.DRAIN and is_worker(o.removing[0])]

    @property
    def surplus(self) -> frozenset[str]:
        """Processes that are there beside the members, for the time of a move."""
        return frozenset(o.removing[0] if o.phase is Phase.DRAIN else o.adding[0] for o in self.under_way)

    def warnings(self, now_s: float) -> list[str]:
        """Say which nodes of ours are to end."""
        return [
            f"node {_short(node)} is to end{_when(deadline_s - now_s)}; {', '.join(there)} on it"
            for node, deadline_s in sorted(self._leaving.items(), key=lambda item: item[1])
            if (there := self._members_on(node))
        ]

    def step(self, current: Operation | None) -> None:
        """Begin what is due, and take each move one step further.

        Args:
            current: the operator's operation under way.
        """
        self._tell_nodes()
        self._begin_due(current)
        for operation in self._in(Phase.PREPARE):
            self._prepare(operation)
        # Whose successor takes over in this step has a round for what was under way with it.
        draining = self._in(Phase.DRAIN)
        # A placement that was asked for names the members of now.
        if current is None or not current.target:
            self._commit(self._in(Phase.COMMIT))
        for operation in draining:
            self._drain(operation)

    def _begin_due(self, current: Operation | None) -> None:
        leaving, keeper = self._leaving, self._keeper
        if not leaving or keeper.placement is None:
            return
        nodes = {m: facts["node"] for m, facts in self._facts().items() if self._is_member(m) and _is_ready(facts)}
        moves = due_moves(
            now_s=time.time(),
            leaving=leaving,
            nodes=nodes,
            sole_owners=sole_owners(keeper.placement),
            attempts=Counter((o.removing[0], o.node) for o in self._book.all() if o.node),
            under_way={*(o.removing[0] for o in self.under_way), *(current.removing if current else ())},
        )
        for move in moves:
            self._begin(move)

    def _begin(self, move: Move) -> None:
        now_s = time.time()
        with self._naming:
            members = [*self._keeper.shard_ids, *self._keeper.worker_ids]
            (successor,) = new_names(f"{move.member.partition('-')[0]}-", [*members, *self._book.names_in_use], 1)
            self._set(
                Operation(
                    id=f"op-{uuid.uuid4().hex[:8]}",
                    request=f"move {move.member} off node {_short(move.node)}",
                    adding=(successor,),
                    removing=(move.member,),
                    phase=Phase.PREPARE,
                    progress=f"starting {successor}",
                    error="",
                    started_s=now_s,
                    ended_s=0.0,
                    deadline_s=min(move.deadline_s, now_s + _PATIENCE_S),
                    node=move.node,
                )
            )

    def _prepare(self, operation: Operation) -> None:
        (old,), (new,) = operation.removing, operation.adding
        start = self._starts.get(operation.id)
        if not self._is_ready(new):
            if start is None:
                timeout_s = room_timeout_s(time.time(), operation.deadline_s, self._room_timeout_s)
                self._starts[operation.id] = MemberStart(self._keeper, new, timeout_s)
                return
            if start.is_alive:
                if not self._is_member(old) or not self._is_there(old):
                    start.give_up()  # if it has no room yet: the demand is then that of who replaces the dead
                return
        self._starts.pop(operation.id, None)
        error = start.error if start else None
        if not self._is_member(old):
            self._roll_back(operation, f"{old} has left meanwhile")
        elif error is not None or not self._is_ready(new):
            self._roll_back(operation, str(error or f"{new} is gone again"))
        else:
            progress = "handing over its sequences" if is_worker(old) else "moving experts"
            self._set(operation.advanced(Phase.COMMIT, progress, now_s=time.time()))

    def _commit(self, operations: Sequence[Operation]) -> None:
        """Have successors take over, all that are ready at once."""
        going = []
        for operation in operations:
            (old,), (new,) = operation.removing, operation.adding
            if self._is_member(new):
                # A former controller changed the members and was killed before it could say so.
                self._set(operation.advanced(Phase.DRAIN, f"ending {old}", now_s=time.time()))
            elif not self._is_member(old):
                self._roll_back(operation, f"{old} has left meanwhile")
            elif not self._is_ready(new):
                self._roll_back(operation, f"{new} is gone again")
            else:
                going.append(operation)
        if not going:
            return
        try:
            self._keeper.replace_members({operation.removing[0]: operation.adding[0] for operation in going})
        except ExpertMeshError as error:
            if str(error) != self._put_off:  # tried again each round
                self._put_off = str(error)
                _log.tell("move_put_off", members=[o.removing[0] for o in going], reason=reason_of(error))
            for operation in going:
                if time.time() > operation.deadline_s:
                    self._roll_back(operation, str(error))
            return
        for operation in going:
            self._set(operation.advanced(Phase.DRAIN, f"ending {operation.removing[0]}", now_s=time.time()))

    def _drain(self, operation: Operation) -> None:
        old = operation.removing[0]
        if time.time() < operation.deadline_s and not self._is_free(old):
            return
        self._keeper.end_member(typed(old))
        self._set(operation.advanced(Phase.DONE, "", now_s=time.time()))

    def _is_free(self, member: str) -> bool:
        """Say whether nobody asks anything of a member any more."""
        workers = self._keeper.workers
        if is_worker(member):
            facts = workers.facts.get(typed(member), {})
            is_busy = facts.get("running", 0) + facts.get("waiting", 0) > 0
            return not is_busy and self._handover.is_known(member, time.monotonic())
        epoch = self._keeper.placement.epoch if self._keeper.placement else 0
        return all(workers.facts.get(worker, {}).get("epoch", 0) >= epoch for worker in workers.ready)

    def _roll_back(self, operation: Operation, error: str) -> None:
        self._keeper.end_member(typed(operation.adding[0]))
        self._set(operation.advanced(Phase.ROLLED_BACK, "", now_s=time.time(), error=error))

    def _tell_nodes(self) -> None:
        """Say once of each node of ours that it is to end, and once who has moved when nobody is left on it."""
        leaving, now_s = self._leaving, time.time()
        for node, deadline_s in leaving.items():
            there = self._members_on(node)
            if there and node not in self._said:
                self._said[node] = True
                self._note(f"node {_short(node)} is to end{_when(deadline_s - now_s)}; {', '.join(there)} move off it")
        for node, are_left in tuple(self._said.items()):
            if are_left and not self._members_on(node):
                self._said[node] = False
                moved = [o.removing[0] for o in self._book.all() if o.node == node and o.phase is Phase.DONE]
                if moved:
                    self._note(f"{', '.join(moved)} moved off node {_short(node)}; nothing is left on it")
            elif not are_left and node not in leaving:
                del self._said[node]

    def _members_on(self, node: str) -> list[str]:
        there = [m for m, facts in self._facts().items() if facts.get("node") == node and facts["state"] != "dead"]
        return sorted(there, key=lambda member: (is_worker(member), natural(member)))

    def _facts(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each shard and worker."""
        shards, workers = self._keeper.shards.facts, self._keeper.workers.facts
        return {str(member): facts for member, facts in (*tuple(shards.items()), *tuple(workers.items()))}

    def _in(self, phase: Phase) -> list[Operation]:
        return [operation for operation in self.under_way if operation.phase is phase]

    def _set(self, operation: Operation) -> None:
        others = {other.id: other for other in self.under_way if other.id != operation.id}
        self._under_way = others if operation.is_over else {**others, operation.id: operation}
        self._book.note(operation)

    def _is_member(self, member: str) -> bool:
        return member in self._keeper.shard_ids or member in self._keeper.worker_ids

    def _is_ready(self, member: str) -> bool:
        return _is_ready(self._facts().get(member, {}))

    def _is_there(self, member: str) -> bool:
        return bool(self._facts().get(member, {}).get("state", "dead") != "dead")


def _is_ready(facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("state") == "ready")


def _short(node: str) -> str:
    """Return enough of a node's id in Ray to tell nodes apart."""
    return node[-8:]


def _when(left_s: float) -> str:
    return f" in {max(0.0, left_s):.0f} s" if math.isfinite(left_s) else ""
