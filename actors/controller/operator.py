"""Carries out what an operator asks for: scale, drain, go to a placement. One operation at a time.

Beside it members move off nodes that are to end (evacuations.py), under other names: who was asked to leave meanwhile
leaves under the new one.

The keeper's rounds call `step`. Processes are started on a thread of their own, so that a fault meanwhile is not left
waiting. An operation under way goes on when the controller was killed and started again: all that it needs is kept.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from expertmesh.actors.controller.evacuations import Evacuations
from expertmesh.actors.controller.handover import Handover
from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.member_names import is_worker, new_names, typed
from expertmesh.actors.controller.operation_book import OperationBook
from expertmesh.actors.state import StateStore
from expertmesh.cluster.errors import CapacityError, ConflictError, ExpertMeshError, InputError, UnavailableError
from expertmesh.cluster.evacuation import present_names
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, ShardSlots
from expertmesh.cluster.repair import repair

_MOST = 1024
_DEADLINE_S = 900.0
# What a leaving worker's sequences may take to go on elsewhere before its process ends; they do either way.
_DRAIN_S = 30.0
_STARTED_AT_ONCE = 32


class Operator:
    """The operations of one deployment. Any thread may ask; the keeper's thread steps."""

    def __init__(
        self,
        keeper: Keeper,
        store: StateStore,
        *,
        room_timeout_s: float = 0.0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Make an operator without operations.

        Args:
            keeper: of the fleet.
            store: keeps the operations.
            room_timeout_s: what a member may wait for room, and the deadlines allow for.
            note: told what happens to nodes that are to end, in words.
        """
        self._keeper = keeper
        self._deadline_s = _DEADLINE_S + room_timeout_s
        self._current: Operation | None = None
        self._starting: threading.Thread | None = None
        self._start_error: ExpertMeshError | None = None
        self._lock = threading.Lock()
        self.book = OperationBook(store)
        self.handover = Handover()
        self.evacuations = Evacuations(
            keeper, self.book, self._lock, self.handover, room_timeout_s=room_timeout_s, note=note
        )

    def resume(self) -> None:
        """Read the operations of a former life. Call it before the keeper's rounds begin."""
        self.book.load()
        under_way = [operation for operation in self.book.all() if not operation.is_over and not operation.node]
        current = under_way[-1] if under_way else None
        members = {*self._keeper.shard_ids, *self._keeper.worker_ids}
        if current is not None and current.phase is Phase.COMMIT and set(current.adding) - members:
            # Who is no member yet is found again by being started again.
            current = replace(current, phase=Phase.PREPARE)
        self._current = current
        self.evacuations.resume()

    def scale(self, shards: int | None, workers: int | None) -> Operation:
        """Begin to have that many shards and workers; None leaves a tier as it is.

        Raises:
            InputError: a number that cannot be.
            CapacityError: the shards that stay have too little memory.
            ConflictError: another operation is under way.
        """
        for name, number in (("shards", shards), ("workers", workers)):
            if number is not None and not 1 <= number <= _MOST:
                raise InputError(f"cannot scale to {number} {name}; 1 to {_MOST} can be asked for")
        if shards is None and workers is None:
            raise InputError("scale to how many shards, how many workers?")
        parts = [f"{n} {name}" for n, name in ((shards, "shards"), (workers, "workers")) if n is not None]
        with self._lock:
            if same := self._same(f"scale to {' and '.join(parts)}"):
                return same
            adding: list[str] = []
            removing: list[str] = []
            for wanted, have, prefix in (
                (shards, self._keeper.shard_ids, "shard-"),
                (workers, self._keeper.worker_ids, "worker-"),
            ):
                if wanted is not None:
                    adding += new_names(prefix, [*have, *self.book.names_in_use], wanted - len(have))
                    # Those first that would have to move in any case.
                    moving = self.evacuations.moving
                    removing += sorted(have, key=lambda member: member in moving)[wanted:]
            return self._begin(f"scale to {' and '.join(parts)}", adding, removing)

    def drain(self, member: str) -> Operation:
        """Begin to take one shard or worker out.

        Raises:
            InputError: there is no such member, or it is the last of its tier.
            CapacityError: the shards that stay have too little memory.
            ConflictError: another operation is under way.
        """
        with self._lock:
            if same := self._same(f"drain {member}"):
                return same
            for tier in (self._keeper.shard_ids, self._keeper.worker_ids):
                if member in tier:
                    if len(tier) == 1:
                        raise InputError(f"{member} is the last of its kind and cannot be drained")
                    return self._begin(f"drain {member}", [], [member])
        known = [*self._keeper.shard_ids, *self._keeper.worker_ids]
        raise InputError(f"there is no {member!r}; there are {', '.join(known)}")

    def go_to(self, target: Placement, request: str) -> Operation:
        """Begin to put a placement in force.

        Args:
            target: of this model and these shards; its epoch does not matter.
            request: what is asked for, in words.

        Raises:
            InputError: it is of another model, names unknown shards, or leaves an expert out.
            ConflictError: another operation is under way, or members move off a node.
        """
        with self._lock:
            if same := self._same(request):
                return same
            if moves := self.evacuations.under_way:
                raise ConflictError(f"{moves[0].id} is under way: {moves[0].request}")
            current = self._keeper.placement
            assert current is not None, "an operation before the fleet"
            if (target.layers, target.num_experts) != (current.layers, current.num_experts):
                raise InputError(
                    f"the placement is of a model with {target.num_experts} experts in the layers {target.layers}, "
                    f"this one has {current.num_experts} in {current.layers}"
                )
            shards = {slots.shard: slots for slots in target.shards}
            unknown = sorted(set(shards) - set(self._keeper.shard_ids))
            missing = target.missing(set(shards))
            if unknown or missing:
                what = (
                    f"names unknown shards: {', '.join(unknown)}" if unknown else f"leaves {missing[0]} without a shard"
                )
                raise InputError(f"the placement {what}")
            whole = tuple(shards.get(s, ShardSlots(shard=s, experts=())) for s in self._keeper.shard_ids)
            return self._begin(request, [], [], replace(target, shards=whole))

    def get(self, operation_id: str) -> Operation:
        """Return one operation; see OperationBook.get."""
        return self.book.get(operation_id)

    def all(self) -> list[Operation]:
        """Return all operations, the newest last."""
        return self.book.all()

    @property
    def current(self) -> Operation | None:
        """The operation under way."""
        return self._current

    @property
    def leaving_workers(self) -> list[str]:
        """Workers whose sequences are to go on elsewhere now."""
        current = self._current
        removing = self._removing(current) if current and current.phase is Phase.DRAIN else ()
        return [*(m for m in removing if is_worker(m)), *self.evacuations.leaving_workers]

    def step(self) -> None:
        """Take the operation under way one step further, and the moves off nodes that are to end."""
        self.evacuations.step(self._current)
        operation = self._current
        if operation is None:
            return
        if operation.phase is Phase.PREPARE:
            self._prepare(operation)
        elif operation.phase is Phase.COMMIT:
            self._commit(operation)
        else:
            self._drain(operation)

    def _begin(
        self, request: str, adding: Sequence[str], removing: Sequence[str], target: Placement | None = None
    ) -> Operation:
        self._require_memory([s for s in self._keeper.shard_ids if s not in removing])
        now_s = time.time()
        operation = Operation(
            id=f"op-{uuid.uuid4().hex[:8]}",
            request=request,
            adding=tuple(adding),
            removing=tuple(removing),
            phase=Phase.PREPARE,
            progress=f"starting {', '.join(adding)}" if adding else "",
            error="",
            started_s=now_s,
            ended_s=0.0,
            deadline_s=now_s + self._deadline_s,
            target=target.to_bytes() if target else b"",
        )
        self._note(operation)
        self._keeper.alarm()
        return operation

    def _same(self, request: str) -> Operation | None:
        """Return the operation under way if it is the one asked for; None when there is none.

        Raises:
            ConflictError: it is another.
        """
        current = self._current
        if current is not None and current.request != request:
            raise ConflictError(f"{current.id} is under way: {current.request}")
        return current

    def _require_memory(self, staying: Sequence[ShardId]) -> None:
        """Refuse when the shards that stay cannot take the experts of those that leave."""
        keeper = self._keeper
        assert keeper.placement is not None
        target = repair(keeper.placement, staying, {}, replicas=keeper.replicas, level=True, nodes=keeper.shards.nodes)
        facts = dict(keeper.shards.facts)
        expert_bytes = keeper.expert_bytes
        needed: dict[str, int] = {}
        for slots in target.shards:
            more = len(slots.experts) - keeper.placement.num_slots(slots.shard)
            end = facts.get(slots.shard, {}).get("link_end")
            if end is None:
                raise UnavailableError(f"{slots.shard} is being started; ask again when `status` shows it ready")
            place = str(end)
            needed[place] = needed.get(place, 0) + max(0, more) * expert_bytes
        for place, num_bytes in needed.items():
            free = min(f["free_bytes"] for f in facts.values() if str(f.get("link_end", "")) == place)
            if num_bytes > free:
                raise CapacityError(
                    f"the shards that stay on {place} would need {num_bytes / 2**30:.2f} GiB more, "
                    f"{free / 2**30:.2f} GiB are free"
                )

    def _prepare(self, operation: Operation) -> None:
        if not self._lives(operation.adding):
            if self._starting is None:
                self._start_error = None
                self._starting = threading.Thread(target=self._start, args=(operation,), name=operation.id, daemon=True)
                self._starting.start()
                return
            if self._starting.is_alive():
                return
        self._starting = None
        if self._start_error is not None or not self._lives(operation.adding):
            self._roll_back(operation, str(self._start_error or "what was started is gone again"))
            return
        self._note(operation.advanced(Phase.COMMIT, "moving experts", now_s=time.time()))

    def _start(self, operation: Operation) -> None:
        try:
            # All at once, so that Ray sees all that is demanded and brings the nodes for it together.
            with ThreadPoolExecutor(_STARTED_AT_ONCE, operation.id) as pool:
                list(pool.map(lambda member: self._keeper.start_member(typed(member)), operation.adding))
        except ExpertMeshError as error:
            self._start_error = error
        finally:
            self._keeper.alarm()

    def _commit(self, operation: Operation) -> None:
        keeper = self._keeper
        members = [*keeper.shard_ids, *keeper.worker_ids]
        removing = self._removing(operation)
        after = [m for m in members if m not in removing]
        after += [m for m in operation.adding if m not in after]
        shards = [ShardId(m) for m in after if not is_worker(m)]
        if not operation.target and set(after) == set(members):
            # A former controller changed the members and was killed before it could say so; or nothing is to change.
            self._note(operation.advanced(Phase.DRAIN, _ending(operation), now_s=time.time()))
            return
        if time.time() > operation.deadline_s:
            self._roll_back(operation, "its deadline passed")
            return
        if not self._lives(operation.adding):
            self._roll_back(operation, "what was started is gone again")
            return
        try:
            if not operation.target:
                keeper.change_members(shards, [WorkerId(m) for m in after if is_worker(m)])
            else:
                assert keeper.placement is not None
                keeper.adopt(replace(Placement.from_bytes(operation.target), epoch=keeper.placement.epoch + 1))
        except ExpertMeshError as error:
            self._roll_back(operation, str(error))
            return
        self._note(operation.advanced(Phase.DRAIN, _ending(operation), now_s=time.time()))

    def _drain(self, operation: Operation) -> None:
        keeper, removing = self._keeper, self._removing(operation)
        for member in filter(is_worker, removing):
            facts = keeper.workers.facts.get(WorkerId(member), {})
            is_busy = facts.get("running", 0) + facts.get("waiting", 0) > 0
            is_known = self.handover.is_known(member, time.monotonic())
            if (is_busy or not is_known) and time.time() < operation.started_s + _DRAIN_S:
                return
        for member in removing:
            keeper.end_member(typed(member))
        self._note(operation.advanced(Phase.DONE, "", now_s=time.time()))

    def _roll_back(self, operation: Operation, error: str) -> None:
        for member in operation.adding:
            self._keeper.end_member(typed(member))
        self._note(operation.advanced(Phase.ROLLED_BACK, "", now_s=time.time(), error=error))

    def _lives(self, members: Sequence[str]) -> bool:
        ready = {*self._keeper.shards.ready, *self._keeper.workers.ready}
        return set(members) <= ready

    def _removing(self, operation: Operation) -> tuple[str, ...]:
        """Return who leaves, by the names that they have now."""
        return present_names(operation.removing, self.book.all(), operation.started_s)

    def _note(self, operation: Operation) -> None:
        self._current = None if operation.is_over else operation
        self.book.note(operation)


def _ending(operation: Operation) -> str:
    return f"ending {', '.join(operation.removing)}" if operation.removing else ""
